"""The passes over the shards: which encoder or classifier sees which clips, and how far it is."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from vatt.checkpoint import CONFIG, WEIGHTS, load, load_config
from vatt.config import (
    EvaluateParams,
    FinetuneTaskParams,
    MachineParams,
    ModelParams,
    PretrainParams,
)
from vatt.data.batches import Batch, Loading, Sampling, eval_batches
from vatt.data.loading import open_index
from vatt.data.samples import INDEX, VOCABULARY
from vatt.evaluation import inner
from vatt.evaluation.classification import Predictions, predict
from vatt.evaluation.features import (
    Array,
    FeatureSet,
    Progress,
    cache_key,
    cached,
    extract,
    file_hash,
)
from vatt.evaluation.retrieval import draw_pool
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
        self.report(self.before, self.total)

    def inside(self, done: int, _: int) -> None:
        self.report(self.before + done, self.total)


def encoder_features(
    split: str,
    params: EvaluateParams,
    *,
    pretrained: Path,
    pretrain: PretrainParams,
    shards: Path,
    cache: Path | None,
    machine: MachineParams,
    seed: int,
    counter: Counter,
    clips: int,
) -> dict[str, FeatureSet]:
    """Both encoders' features of a split, from the cache where they are known."""
    model = ModelParams.model_validate(load_config(pretrained)["model"])
    sampling = Sampling.for_pretraining(model, pretrain)
    if split == "train":
        sampling = _of_probes(sampling, params)
    data = (file_hash(shards / INDEX, shards / VOCABULARY), repr(sampling), split, params.clips)
    weights = file_hash(pretrained / WEIGHTS, pretrained / CONFIG)
    keys = {
        "pretrained": cache_key("pretrained", weights, *data),
        "untrained": cache_key("untrained", model.model_dump_json(), seed, *data),
    }

    def compute(names: list[str]) -> dict[str, FeatureSet]:
        encoders = {
            name: _encoder(pretrained) if name == "pretrained" else untrained(model, seed)
            for name in names
        }
        batches = _batches(params, shards, split, sampling, (params.clips, 1), machine)
        return extract(encoders, batches, progress=counter.inside, total=clips)

    found = cached(cache, keys, compute)
    counter.add(clips)
    return found


def encoder_insides(
    params: EvaluateParams,
    *,
    pretrained: Path,
    pretrain: PretrainParams,
    shards: Path,
    machine: MachineParams,
) -> dict[str, Array]:
    """A look inside the pre-trained encoder with some test clips (see inner.py)."""
    model = _encoder(pretrained)
    keys = np.asarray(
        [row.key for row in open_index(shards, Loading.of(machine), split="test").rows]
    )
    chosen = draw_pool(keys, np.ones(len(keys), dtype=bool), inner.CLIPS)
    batches = _batches(
        params,
        shards,
        "test",
        Sampling.for_pretraining(model.params, pretrain),
        (1, 1),
        machine,
        keys=keys[chosen].tolist(),
    )
    return inner.inner_views(model, batches)


def _of_probes(sampling: Sampling, params: EvaluateParams) -> Sampling:
    """Training clips are shown for the probes' sake only: no words, and what no probe asks for."""
    asked = {probe.modality for probe in params.probes.values()}
    return replace(
        sampling,
        frames=sampling.frames if "video" in asked else 0,
        samples=sampling.samples if "audio" in asked else 0,
        candidates=0,
    )


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


def _batches(
    params: EvaluateParams,
    shards: Path,
    split: str,
    sampling: Sampling,
    views: tuple[int, int],
    machine: MachineParams,
    *,
    keys: Collection[str] | None = None,
) -> Iterator[Batch]:
    return eval_batches(
        shards,
        split=split,
        clip_ids=keys,
        batch_size=params.batch_size,
        sampling=sampling,
        views=views,
        # A clip is shown once: keeping it decoded would only cost memory.
        loading=replace(Loading.of(machine), cache_gb=0.0),
    )


def classifier_predictions(
    folder: Path,
    task: FinetuneTaskParams,
    params: EvaluateParams,
    *,
    shards: Path,
    machine: MachineParams,
    counter: Counter,
) -> Predictions:
    classifier = load(folder)
    assert isinstance(classifier, Classifier), f"{folder} holds no classifier"
    sampling = Sampling.for_task(classifier.params, task)
    views = (task.test_clips, task.test_crops)
    return predict(
        classifier.to(_device()),
        _batches(params, shards, "test", sampling, views, machine),
        modality=task.modality,
        label=task.label,
        classes=load_config(folder)["classifier"]["classes"],
        progress=counter.add,
    )
