"""The passes over the shards: which encoder or classifier sees which clips.

One pass looks inside the encoders for figures 3 and 4 of the paper: at their input tokens and at
the activations of the MLP nodes. B clips of a batch, n of all batches, L words, N tokens, D encoder
width, M hidden nodes of an MLP.
"""

import statistics
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vatt.checkpoint import CONFIG, VOCABULARY, WEIGHTS, build, load, load_config
from vatt.config import EvaluateParams, FinetuneTaskParams, MachineParams, ModelParams
from vatt.data.clips.samples import INDEX
from vatt.data.loading.batches import (
    Batch,
    Loading,
    Sampling,
    eval_batches,
    model_inputs,
    open_index,
)
from vatt.errors import DataError
from vatt.evaluation.classification import Predictions, predict
from vatt.evaluation.features import (
    ALONE,
    Array,
    FeatureSet,
    ProcessShare,
    cache_key,
    cached,
    cached_arrays,
    extract,
    file_hash,
)
from vatt.evaluation.retrieval import draw_pool
from vatt.flops import signal_flops, signals_of
from vatt.model.experts import Routing, noting_routings
from vatt.model.transformer import set_merging
from vatt.model.vatt import VATT, Classifier, tower_of
from vatt.progress import Counter


@dataclass(slots=True)
class Stopwatch:
    """Seconds that modules take for one input, without loading: of each, the median batch's."""

    batches: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def timing(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Time the modules' forward passes in the body."""
        began: dict[str, float] = {}
        hooks = []
        for name, module in modules.items():

            def start(*_: Any, name: str = name) -> None:
                began[name] = _now()

            def stop(_: nn.Module, inputs: Any, __: Any, name: str = name) -> None:
                seconds = (_now() - began[name]) / len(inputs[0])
                self.batches.setdefault(name, []).append(seconds)

            hooks += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def seconds(self) -> dict[str, float]:
        """By module; what came from the cache has none."""
        return {name: statistics.median(found) for name, found in self.batches.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True, slots=True)
class PassSettings:
    """The settings that all passes share."""

    params: EvaluateParams
    shards: Path
    cache: Path | None
    machine: MachineParams
    seed: int
    counter: Counter
    share: ProcessShare
    watch: Stopwatch = field(default_factory=Stopwatch)

    def batches(
        self,
        split: str,
        sampling: Sampling,
        views: tuple[int, int],
        keys: Collection[str] | None = None,
    ) -> Iterator[Batch]:
        """This process's batches of a split."""
        # Each clip is used once: keeping it decoded would only cost memory.
        loading = replace(Loading.of(self.machine), cache_gb=0.0)
        return eval_batches(
            open_index(self.shards, loading, split=split, keys=keys),
            sampling,
            batch_size=self.params.batch_size,
            views=views,
            rank=self.share.rank,
            world_size=self.share.world_size,
            loading=loading,
        )

    def data(self, sampling: Sampling, *more: object) -> tuple[object, ...]:
        """The parts of a cache key that identify the batches."""
        words = [] if sampling.vocabulary is None else [sampling.vocabulary]
        plain = replace(sampling, vocabulary=None)
        params = self.params
        how = params.batch_size, _device().type, params.precision, params.merge_rate
        return (file_hash(self.shards / INDEX, *words), repr(plain), *how, *more)


def encoder_features(
    settings: PassSettings, pretrained: Path, split: str, *, windows: int, clips: int
) -> dict[str, FeatureSet]:
    """The features of a split from both encoders, from the cache if they are there.

    The windows of the test split include words; all other passes serve the probes only.
    """
    model = ModelParams.model_validate(load_config(pretrained)["model"])
    sampling = Sampling.for_evaluation(model, settings.params, vocabulary=vocabulary_of(pretrained))
    if (split, windows) != ("test", settings.params.clips):
        sampling = _of_probes(sampling, settings.params)
    data = settings.data(sampling, split, windows)
    keys = {
        "pretrained": cache_key("pretrained", _weights(pretrained), *data),
        "untrained": cache_key("untrained", model.model_dump_json(), settings.seed, *data),
    }

    def compute(names: list[str]) -> dict[str, FeatureSet]:
        encoders = {
            name: _encoder(pretrained) if name == "pretrained" else untrained(model, settings.seed)
            for name in names
        }
        for encoder in encoders.values():
            set_merging(encoder, settings.params.merge_rate)
        timed = [encoders[name] for name in names if name == "pretrained"]
        towers = {name: getattr(encoder, name) for encoder in timed for name in encoder.senses}
        with settings.watch.timing(towers):
            return extract(
                encoders,
                settings.batches(split, sampling, (windows, 1)),
                progress=settings.counter.inside,
                total=clips,
                precision=settings.params.precision,
                share=settings.share,
            )

    found = cached(settings.cache, keys, compute, share=settings.share)
    settings.counter.add(clips)
    return found


def encoder_insides(settings: PassSettings, pretrained: Path) -> dict[str, Array]:
    """Inputs and activations of the pre-trained encoder for some test clips."""
    model = ModelParams.model_validate(load_config(pretrained)["model"])
    sampling = Sampling.for_evaluation(model, settings.params, vocabulary=vocabulary_of(pretrained))
    index = open_index(settings.shards, Loading.of(settings.machine), split="test")
    keys = np.asarray([row.key for row in index.rows])
    chosen = keys[draw_pool(keys, np.ones(len(keys), dtype=bool), CLIPS)].tolist()
    key = cache_key("insides", _weights(pretrained), *settings.data(sampling, chosen))

    def views(encoder: VATT) -> dict[str, Array]:
        batches = settings.batches("test", sampling, (1, 1), chosen)
        return inner_views(encoder, batches, share=settings.share)

    def compute() -> dict[str, Array]:
        found = views(_encoder(pretrained))
        if model.experts is not None:  # a router separates modalities before any training, too
            before = views(untrained(model, settings.seed))
            found |= {
                f"untrained/{name}": values
                for name, values in before.items()
                if name.startswith("experts/")
            }
        return found

    return cached_arrays(settings.cache, key, compute, share=settings.share)


def gflops(folder: Path, merge_rate: float) -> dict[str, float]:
    """Operations of one window in the towers of an encoder, or of one view in a classifier's.

    By modality, in GFLOPs; both products of attention count (vatt/flops.py, "true").
    """
    config = load_config(folder)
    model = ModelParams.model_validate(config["model"])
    how: Any = {"merge_rate": merge_rate, "experts": model.experts, "convention": "true"}
    towers = {
        name: signal_flops(name, section, **how) / 1e9
        for name, section in signals_of(model).items()
    }
    if "classifier" not in config:
        return towers
    tower = tower_of(config["classifier"]["modality"])
    return {tower: towers[tower]}


def vocabulary_of(pretrained: Path) -> Path | None:
    """The vocabulary of the encoder; None if the checkpoint has no word list."""
    path = pretrained / VOCABULARY
    return path if path.exists() else None


def _of_probes(sampling: Sampling, params: EvaluateParams) -> Sampling:
    """The sampling without words and without modalities that no probe uses."""
    used = {probe.modality for probe in params.probes.values()}
    return replace(
        sampling,
        frames=sampling.frames if "video" in used else 0,
        samples=sampling.samples if "audio" in used else 0,
        candidates=0,
        vocabulary=None,
        more={},
    )


def _weights(folder: Path) -> str:
    return file_hash(folder / WEIGHTS, folder / CONFIG)


def _encoder(folder: Path) -> VATT:
    model = load(folder)
    assert isinstance(model, VATT), f"{folder} has a classifier"
    return model.to(_device())


def untrained(model: ModelParams, seed: int) -> VATT:
    """The encoder before any training, with weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(model).eval().to(_device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def classifier_predictions(
    settings: PassSettings, folder: Path, task: FinetuneTaskParams, *, name: str, clips: int
) -> Predictions | None:
    """The predictions of a classifier for the test clips, in rank 0; None elsewhere."""
    config = load_config(folder)
    model = ModelParams.model_validate(config["model"])
    if "classifier" not in config:
        raise DataError(
            f"{folder} holds a pre-trained model, not a classifier", hint="run `vattctl finetune`"
        )
    classes = tuple(config["classifier"]["classes"])
    # With the input sizes of the checkpoint: those of a released one may differ from the task's.
    sizes = dict.fromkeys(("frames", "frame_size", "audio_samples"))
    sampling = Sampling.for_task(model, task.model_copy(update=sizes))
    views = (task.test_clips, task.test_crops)

    def compute() -> dict[str, Array]:
        classifier = load(folder)
        assert isinstance(classifier, Classifier), f"{folder} has no classifier"
        set_merging(classifier, settings.params.merge_rate)
        with settings.watch.timing({name: classifier.backbone}):
            answers = predict(
                classifier.to(_device()),
                settings.batches("test", sampling, views),
                modality=task.modality,
                label=task.label,
                classes=classes,
                progress=settings.counter.add,
                precision=settings.params.precision,
                share=settings.share,
            )
        if answers is None:
            return {}
        return {key: getattr(answers, key) for key in ("clip_ids", "labels", "logits")}

    key = cache_key(
        "answers", _weights(folder), *settings.data(sampling, views, task.modality, task.label)
    )
    before = settings.counter.before
    found = cached_arrays(settings.cache, key, compute, share=settings.share)
    settings.counter.before = before
    settings.counter.add(clips)
    return Predictions(**found, classes=classes) if found else None


CLIPS = 64  # of the look inside the encoders


@dataclass(frozen=True, slots=True)
class TowerActivity:
    """Inputs and activations of one tower for a batch."""

    clip_ids: list[str]
    inputs: Array  # (B, D) mean input token of each clip
    sums: Array  # (depth, M) activations summed over tokens
    tokens: int
    choices: Array  # (B, blocks, X) of experts, in the blocks that have some


def watch(tower: Any, clip_ids: list[str], inputs: Tensor, counts: Tensor | None) -> TowerActivity:
    """Run the tower and record it; `counts` (B, 1 + N) is 0 for padding."""
    entered: list[tuple[Tensor, ...]] = []
    active: list[Tensor] = []

    def add(_module: Any, _inputs: Any, nodes: Tensor) -> None:
        if nodes.dim() == 2:  # of experts: a row for each choice, and zeros for pads
            active.append(nodes.double().sum(0))
            return
        whole = nodes.new_ones(nodes.shape[:2]) if counts is None else counts
        active.append(torch.einsum("bnm,bn->m", nodes.double(), whole.double()))

    encoder = tower.encoder
    hooks = [encoder.register_forward_pre_hook(lambda _, given: entered.append(given))]
    try:
        tower(inputs)
        hooks += [block.mlp.activation.register_forward_hook(add) for block in encoder.blocks]
        with noting_routings() as noted:
            encoder(*entered[0])  # with the outputs of all tokens; a tower computes only AGG's
    finally:
        for hook in hooks:
            hook.remove()
    tokens = entered[0][0]
    whole = tokens.new_ones(tokens.shape[:2]) if counts is None else counts.to(tokens.dtype)
    own = whole[:, 1:, None]  # AGG is not an input
    means = (tokens[:, 1:] * own).sum(1) / own.sum(1)
    return TowerActivity(
        clip_ids,
        means.float().cpu().numpy(),
        torch.stack(active).cpu().numpy(),
        int(whole.sum()),
        np.stack([Routing.of(one).chosen.cpu().numpy() for one in noted], axis=1)
        if noted
        else np.zeros((len(inputs), 0, 0)),
    )


@torch.inference_mode()
def inner_views(
    model: VATT, batches: Iterable[Batch], *, share: ProcessShare = ALONE
) -> dict[str, Array]:
    """Mean input tokens and mean activations of the clips in `batches`, by modality.

    `input/<modality>` (n, D) is the mean of a clip's input tokens, with
    `input/<modality>/clip_ids` (n,); `nodes/<modality>` (depth, M) is the mean activation of every
    MLP node after the GELU, over all tokens; where blocks have experts, of the node of whichever
    expert a token takes, and `experts/<modality>` (n, blocks, X) counts the choices of each expert.
    Padding does not count; of several texts, the first is used.
    """
    model.eval()
    device = next(model.parameters()).device
    joined = share.joined([_watch_batch(model, batch.to(device)) for batch in batches])
    found: dict[str, Array] = {}
    for name in model.senses:
        seen = [part[name] for part in joined or () if name in part]
        if seen:
            found[f"input/{name}"] = np.concatenate([one.inputs for one in seen])
            ids = [clip for one in seen for clip in one.clip_ids]
            found[f"input/{name}/clip_ids"] = np.asarray(ids)
            sums = np.sum([one.sums for one in seen], axis=0)
            found[f"nodes/{name}"] = (sums / sum(one.tokens for one in seen)).astype(np.float32)
            if seen[0].choices.size:
                found[f"experts/{name}"] = np.concatenate([one.choices for one in seen])
    return found


def _watch_batch(model: VATT, batch: Batch) -> dict[str, TowerActivity]:
    found, present = {}, batch.has()
    for name, given in model_inputs(batch).items():
        there, counts = present[name], None
        if there.dim() > 1:  # several texts: the first
            given, there = given[:, 0], there[:, 0]
            counts = torch.nn.functional.pad(given != 0, (1, 0), value=True)[there]
        if there.any():
            ids = [clip for clip, has in zip(batch.clip_ids, there, strict=True) if has]
            found[name] = watch(model.get_submodule(name), ids, given[there], counts)
    return found
