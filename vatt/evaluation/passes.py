"""The passes over the shards: which encoder or classifier sees which clips, and how far it is."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from vatt.checkpoint import CONFIG, VOCABULARY, WEIGHTS, load, load_config
from vatt.config import EvaluateParams, FinetuneTaskParams, MachineParams, ModelParams
from vatt.data.batches import Batch, Loading, Sampling, eval_batches
from vatt.data.loading import open_index
from vatt.data.samples import INDEX
from vatt.evaluation import inner
from vatt.evaluation.classification import Predictions, predict
from vatt.evaluation.features import (
    Array,
    FeatureSet,
    Progress,
    cache_key,
    cached,
    cached_arrays,
    extract,
    file_hash,
)
from vatt.evaluation.retrieval import draw_pool
from vatt.evaluation.share import Share
from vatt.model.classifier import Classifier
from vatt.model.vatt import VATT


@dataclass(slots=True)
class Counter:
    """Turns the progress of several passes into one."""

    report: Progress
    total: int
    before: int = 0

    def add(self, clips: int) -> None:
        self.before += clips
        self.report(min(self.before, self.total), self.total)

    def inside(self, done: int, _: int) -> None:
        self.report(min(self.before + done, self.total), self.total)


@dataclass(frozen=True, slots=True)
class Setting:
    """What all passes have in common."""

    params: EvaluateParams
    shards: Path
    cache: Path | None
    machine: MachineParams
    seed: int
    counter: Counter
    share: Share

    def batches(
        self,
        split: str,
        sampling: Sampling,
        views: tuple[int, int],
        keys: Collection[str] | None = None,
    ) -> Iterator[Batch]:
        """This process's batches of a split."""
        return eval_batches(
            self.shards,
            split=split,
            clip_ids=keys,
            batch_size=self.params.batch_size,
            sampling=sampling,
            views=views,
            rank=self.share.rank,
            world_size=self.share.world_size,
            # A clip is shown once: keeping it decoded would only cost memory.
            loading=replace(Loading.of(self.machine), cache_gb=0.0),
        )

    def data(self, sampling: Sampling, *more: object) -> tuple[object, ...]:
        """What names the batches in a cache's key."""
        words = [] if sampling.vocabulary is None else [sampling.vocabulary]
        plain = replace(sampling, vocabulary=None)
        size, device = self.params.batch_size, _device().type
        return (file_hash(self.shards / INDEX, *words), repr(plain), size, device, *more)


def encoder_features(
    setting: Setting, pretrained: Path, split: str, *, windows: int, clips: int
) -> dict[str, FeatureSet]:
    """Both encoders' features of a split, from the cache where they are known.

    The test split's own windows are shown with words, everything else for the probes' sake only.
    """
    model = ModelParams.model_validate(load_config(pretrained)["model"])
    sampling = Sampling.for_evaluation(model, setting.params, vocabulary=vocabulary_of(pretrained))
    if (split, windows) != ("test", setting.params.clips):
        sampling = _of_probes(sampling, setting.params)
    data = setting.data(sampling, split, windows)
    keys = {
        "pretrained": cache_key("pretrained", _weights(pretrained), *data),
        "untrained": cache_key("untrained", model.model_dump_json(), setting.seed, *data),
    }

    def compute(names: list[str]) -> dict[str, FeatureSet]:
        encoders = {
            name: _encoder(pretrained) if name == "pretrained" else untrained(model, setting.seed)
            for name in names
        }
        batches = setting.batches(split, sampling, (windows, 1))
        return extract(
            encoders, batches, progress=setting.counter.inside, total=clips, share=setting.share
        )

    found = cached(setting.cache, keys, compute, share=setting.share)
    setting.counter.add(clips)
    return found


def encoder_insides(setting: Setting, pretrained: Path) -> dict[str, Array]:
    """A look inside the pre-trained encoder with some test clips (see inner.py)."""
    model = ModelParams.model_validate(load_config(pretrained)["model"])
    sampling = Sampling.for_evaluation(model, setting.params, vocabulary=vocabulary_of(pretrained))
    index = open_index(setting.shards, Loading.of(setting.machine), split="test")
    keys = np.asarray([row.key for row in index.rows])
    chosen = keys[draw_pool(keys, np.ones(len(keys), dtype=bool), inner.CLIPS)].tolist()
    key = cache_key("insides", _weights(pretrained), *setting.data(sampling, chosen))
    return cached_arrays(
        setting.cache,
        key,
        lambda: inner.inner_views(
            _encoder(pretrained),
            setting.batches("test", sampling, (1, 1), chosen),
            share=setting.share,
        ),
        share=setting.share,
    )


def vocabulary_of(pretrained: Path) -> Path | None:
    """The words that the encoder learned; None when nobody gave them."""
    path = pretrained / VOCABULARY
    return path if path.exists() else None


def _of_probes(sampling: Sampling, params: EvaluateParams) -> Sampling:
    """No words, and what no probe asks for."""
    asked = {probe.modality for probe in params.probes.values()}
    return replace(
        sampling,
        frames=sampling.frames if "video" in asked else 0,
        samples=sampling.samples if "audio" in asked else 0,
        candidates=0,
        vocabulary=None,
    )


def _weights(folder: Path) -> str:
    return file_hash(folder / WEIGHTS, folder / CONFIG)


def _encoder(folder: Path) -> VATT:
    model = load(folder)
    assert isinstance(model, VATT), f"{folder} holds a classifier"
    return model.to(_device())


def untrained(model: ModelParams, seed: int) -> VATT:
    """The encoder before any training, its weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VATT(model).eval().to(_device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def classifier_predictions(
    setting: Setting, folder: Path, task: FinetuneTaskParams, *, clips: int
) -> Predictions | None:
    """A classifier's answers for the test clips; None but in the first process."""
    config = load_config(folder)
    model = ModelParams.model_validate(config["model"])
    classes = tuple(config["classifier"]["classes"])
    # The checkpoint's own input sizes: a released one need not have the task's.
    sizes = dict.fromkeys(("frames", "frame_size", "audio_samples"))
    sampling = Sampling.for_task(model, task.model_copy(update=sizes))
    views = (task.test_clips, task.test_crops)

    def compute() -> dict[str, Array]:
        classifier = load(folder)
        assert isinstance(classifier, Classifier), f"{folder} holds no classifier"
        answers = predict(
            classifier.to(_device()),
            setting.batches("test", sampling, views),
            modality=task.modality,
            label=task.label,
            classes=classes,
            progress=setting.counter.add,
            share=setting.share,
        )
        if answers is None:
            return {}
        return {name: getattr(answers, name) for name in ("clip_ids", "labels", "logits")}

    key = cache_key(
        "answers", _weights(folder), *setting.data(sampling, views, task.modality, task.label)
    )
    before = setting.counter.before
    found = cached_arrays(setting.cache, key, compute, share=setting.share)
    setting.counter.before = before
    setting.counter.add(clips)
    return Predictions(**found, classes=classes) if found else None
