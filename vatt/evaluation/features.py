"""Model and evaluation batches -> arrays of features and embeddings, computed once and kept.

Several processes encode complete batches each, and the first joins their results. n clips, V
windows, K candidate texts, L words, D encoder width, E common-space width.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import vatt
from vatt.config import Precision
from vatt.data.loading.batches import Batch, model_inputs
from vatt.errors import DataError, MachineError
from vatt.files import atomic_write, read_arrays
from vatt.model.transformer import Block
from vatt.model.vatt import VATT
from vatt.progress import Progress
from vatt.senses import SENSES

_NOTHING = object()
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessShare:
    """This process among several, and how they exchange values."""

    rank: int
    world_size: int
    gather: Callable[[Any], list[Any] | None]  # all values by rank, in rank 0; None elsewhere
    from_rank_0: Callable[[Any], Any]

    def joined(self, parts: Sequence[Any]) -> list[Any] | None:
        """The parts of all batches in order, in rank 0; None elsewhere."""
        every = self.gather(list(parts))
        if every is None:
            return None
        turns = zip_longest(*every, fillvalue=_NOTHING)
        return [part for turn in turns for part in turn if part is not _NOTHING]


ALONE = ProcessShare(
    rank=0, world_size=1, gather=lambda value: [value], from_rank_0=lambda value: value
)


Array = NDArray[Any]
EncodedPart = tuple[
    list[str], dict[str, list[str]], dict[str, dict[str, Array]]
]  # ids, labels, encoded

ARRAY, LABEL = "arrays/", "labels/"  # in a file, before the names of what is kept
KEPT_FILES = 48  # in the cache; the least recently used are deleted


@dataclass(frozen=True)
class FeatureSet:
    """The outputs of an encoder for every clip of a split, with the clips' ids and labels.

    `arrays` has, for each sense, `<sense>` (n, V, D) its features, `<sense>_va` and `<sense>_vt`
    (n, V, E) its embeddings in the spaces that it reaches, and `has_<sense>` (n,). Of text there
    are text_vt (n, K, E), has_text (n, K), and the words themselves as text (n, K, L).
    `features.video_va` is `features.arrays["video_va"]`.
    """

    clip_ids: NDArray[np.str_]  # (n,)
    labels: dict[str, NDArray[np.str_]]  # name -> (n,); "" where a clip has no label
    arrays: dict[str, Array]

    def __getattr__(self, name: str) -> Array:
        arrays: dict[str, Array] = self.__dict__.get("arrays", {})
        if name not in arrays:
            raise AttributeError(f"the features have no {name}")
        return arrays[name]

    def take(self, rows: NDArray[np.integer]) -> "FeatureSet":
        """The same for these clips, in this order."""
        labels = {name: values[rows] for name, values in self.labels.items()}
        arrays = {name: values[rows] for name, values in self.arrays.items()}
        return FeatureSet(self.clip_ids[rows], labels, arrays)


def extract(
    encoders: Mapping[str, VATT],
    batches: Iterable[Batch],
    *,
    progress: Progress,
    total: int,
    precision: Precision = "fp32",
    share: ProcessShare = ALONE,
) -> dict[str, FeatureSet]:
    """Run every encoder on every batch, so that clips are decoded once.

    The windows of a clip are adjacent in a batch. With several processes, the first returns the
    features of all batches, the others nothing.
    """
    parts, clips = [], 0
    for batch in batches:
        encoded = {name: _encode(encoder, batch, precision) for name, encoder in encoders.items()}
        parts.append((batch.clip_ids, batch.labels, encoded))
        clips += len(set(batch.clip_ids)) * share.world_size
        progress(min(clips, total), total)
    joined = share.joined(parts)
    if joined is None:
        return {}
    return {name: _together(name, joined) for name in encoders}


def _together(name: str, parts: Sequence[EncodedPart]) -> FeatureSet:
    clip_ids = [clip for ids, _, _ in parts for clip in ids]
    windows = _windows(clip_ids)
    names = dict.fromkeys(label for _, labels, _ in parts for label in labels)
    arrays = [encoded[name] for _, _, encoded in parts]
    _check_finite(name, arrays)
    return FeatureSet(
        clip_ids=np.asarray(clip_ids)[::windows],
        labels={
            label: np.asarray([value for _, labels, _ in parts for value in labels[label]])[
                ::windows
            ]
            for label in names
        },
        arrays=_stack(arrays, windows),
    )


def _check_finite(name: str, parts: list[dict[str, Array]]) -> None:
    if not all(np.isfinite(array).all() for part in parts for array in part.values()):
        raise DataError(
            f"the outputs of the {name} encoder are not finite",
            hint="its training diverged: lower pretrain.optimizer.learning_rate and run it again",
        )


@contextmanager
def computing_in(precision: Precision, model: nn.Module) -> Iterator[None]:
    """Run the model's encoders in a precision; raise MachineError if they computed in another one.

    As in training, bf16 is that of matrix products: features are fp32 again.
    """
    weight = next(model.parameters())
    wanted = torch.bfloat16 if precision == "bf16" else weight.dtype
    seen: set[torch.dtype] = set()
    layers = [block.mlp.out for block in model.modules() if isinstance(block, Block)]
    hooks = [layer.register_forward_hook(lambda *of: seen.add(of[-1].dtype)) for layer in layers]
    try:
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    if seen - {wanted}:
        raise MachineError(
            f"the encoders should compute in {wanted}, and computed in "
            f"{', '.join(sorted(map(str, seen)))}",
            hint="another version of torch may be the cause: install that of constraints.txt, "
            "and please report this",
        )


@torch.inference_mode()
def _encode(encoder: VATT, batch: Batch, precision: Precision) -> dict[str, Array]:
    """The outputs of the encoder for a batch; a sense that was not sampled has width 0."""
    encoder.eval()
    here = batch.to(next(encoder.parameters()).device)
    with computing_in(precision, encoder):
        features = encoder.encode(**model_inputs(here))
    present = here.has()
    embeddings = encoder.project(features, present, bridged=True)
    spaces = {"va": embeddings.va, "vt": embeddings.vt}
    tensors = {f"has_{name}": there for name, there in present.items()}
    for name, values in here.signals.items():
        sense, there = SENSES[name], present[name]
        several = there.dim() > 1  # words are kept, not their features
        tensors[name] = values if several else features.get(name, there[:, None][:, :0].float())
        for space in dict.fromkeys((sense.space, "vt")):
            width_0 = there[..., None][..., :0].float()
            tensors[f"{name}_{space}"] = spaces[space].get(name, width_0)
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def _windows(clip_ids: list[str]) -> int:
    """The number of adjacent rows of each clip."""
    clips = len(dict.fromkeys(clip_ids))
    windows = len(clip_ids) // max(clips, 1)
    expected = [clip for clip in dict.fromkeys(clip_ids) for _ in range(windows)]
    assert clip_ids == expected, (
        "the windows of a clip must be adjacent, and their number the same for every clip"
    )
    return max(windows, 1)


def _stack(parts: list[dict[str, Array]], windows: int) -> dict[str, Array]:
    stacked = {}
    for name in parts[0]:
        rows = np.concatenate([part[name] for part in parts])
        by_clip = rows.reshape(len(rows) // windows, windows, *rows.shape[1:])
        # Windows differ in what is shown of a signal; the captions are those of the first window.
        is_windowed = not name.startswith(("has_", "text"))
        stacked[name] = by_clip if is_windowed else by_clip[:, 0]
    return stacked


def cached(
    folder: Path | None,
    keys: Mapping[str, str],
    compute: Callable[[list[str]], dict[str, FeatureSet]],
    *,
    share: ProcessShare = ALONE,
) -> dict[str, FeatureSet]:
    """The feature sets named in `keys`; only those without a file under their key are computed."""
    if folder is None:
        return compute(list(keys))
    files = {name: folder / f"{key}.npz" for name, key in keys.items()}
    stored = {name: load_features(file) for name, file in files.items() if share.rank == 0}
    missing = share.from_rank_0([name for name in keys if stored.get(name) is None])
    computed = compute(missing) if missing else {}
    if share.rank > 0:
        return {}
    for name, features in computed.items():
        save_features(features, files[name])
    _forget_old(folder, kept=set(files.values()))
    known = {name: features for name, features in stored.items() if features is not None}
    return known | computed


def cached_arrays(
    folder: Path | None,
    key: str,
    compute: Callable[[], dict[str, Array]],
    *,
    share: ProcessShare = ALONE,
) -> dict[str, Array]:
    """Plain arrays by name, computed if there is no file under their key."""
    if folder is None:
        return compute()
    file = folder / f"{key}.npz"
    stored = _load(file) if share.rank == 0 else None
    if share.from_rank_0(stored is not None):
        return stored or {}
    found = compute()
    if share.rank == 0:
        _save(found, file)
        _forget_old(folder, kept={file})
    return found


def cache_key(*parts: object) -> str:
    """A name for the features of these weights, clips and settings, made by the present code."""
    digest = hashlib.sha256(repr((torch.__version__, *parts)).encode())
    package = Path(vatt.__file__).parent
    own = ("classification.py", "features.py", "passes.py")
    rooms = ("model", "senses", "data/clips", "data/loading")
    sources = [package / "evaluation" / name for name in own]
    for source in sorted(
        [*sources, *(file for room in rooms for file in package.glob(f"{room}/*.py"))]
    ):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def file_hash(*files: Path) -> str:
    """The sha256 of the contents of files, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def save_features(features: FeatureSet, file: Path) -> None:
    """Write a feature set as one npz file of plain arrays."""
    arrays = {f"{ARRAY}{name}": values for name, values in features.arrays.items()}
    arrays |= {f"{LABEL}{name}": values for name, values in features.labels.items()}
    _save({"clip_ids": features.clip_ids, **arrays}, file)


def load_features(file: Path) -> FeatureSet | None:
    """Read what `save_features` wrote; None if there is no file or it is damaged."""
    stored = _load(file)
    if stored is None or not {"clip_ids", f"{ARRAY}video"} <= stored.keys():
        return None

    def group(prefix: str) -> dict[str, Array]:
        return {
            name.removeprefix(prefix): values
            for name, values in stored.items()
            if name.startswith(prefix)
        }

    return FeatureSet(stored["clip_ids"], group(LABEL), group(ARRAY))


def _save(arrays: Mapping[str, Any], file: Path) -> None:
    with atomic_write(file) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **arrays)


def _load(file: Path) -> dict[str, Array] | None:
    try:
        stored = read_arrays(file, hint="delete it")
    except FileNotFoundError:
        return None
    except DataError as error:
        log.warning("%s; it is computed again", error.problem)
        return None
    file.touch()  # the least recently used are deleted first
    return stored


def _forget_old(folder: Path, *, kept: set[Path]) -> None:
    by_age = sorted(folder.glob("*.npz"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in by_age[KEPT_FILES:]:
        if file not in kept:
            file.unlink(missing_ok=True)
