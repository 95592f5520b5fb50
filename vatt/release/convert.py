"""A released TensorFlow checkpoint -> a folder of ours, every key accounted for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vatt import checkpoint
from vatt.errors import DataError
from vatt.model.transformer import resolve
from vatt.model.vatt import VATT, Classifier
from vatt.progress import Progress
from vatt.release.recognise import (
    COUNTERS,
    ENDING,
    GRAPH,
    ROOT,
    SLOT,
    TOWERS,
    ReleasedModel,
    recognise,
)
from vatt.release.tf_checkpoint import TensorFlowCheckpoint

HEAD_DROPOUT = {"video": 0.5, "audio": 0.0}  # while fine-tuning only
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Account:
    """What became of every key of a checkpoint, and of every weight of ours."""

    used: list[str] = field(default_factory=list)
    not_weights: dict[str, int] = field(default_factory=dict)  # kind -> how many keys
    unused: list[str] = field(default_factory=list)  # weights that nothing here asks for
    missing: list[str] = field(default_factory=list)  # keys that a weight of ours asks for
    shape: list[str] = field(default_factory=list)  # weights that do not fit, with both shapes

    @property
    def is_complete(self) -> bool:
        """Whether nothing is unused, missing or of another shape."""
        return not (self.unused or self.missing or self.shape)


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What a conversion found and wrote."""

    model: str
    parameters: int
    heads: dict[str, int]
    keys: Account
    sha256: dict[str, str]  # file of the source -> hash


def import_checkpoint(
    prefix: Path,
    out: Path | None,
    *,
    heads: Mapping[str, int],
    source: str,
    vocabulary: Path | None = None,
    allow_partial: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Convert the checkpoint at `prefix` into the folder `out`; None only looks.

    Weights that are missing or do not fit stop it, unless `allow_partial`: they then keep the
    values of a newly initialised model (seed 0). `source` is recorded with the hashes of the files.
    """
    released = TensorFlowCheckpoint(prefix)
    released.check_strings()
    weights, not_weights = split_keys(released)
    shapes = {key: released.entries[full].shape for key, full in weights.items()}
    found = recognise(shapes, heads)
    if vocabulary is not None:
        check_vocabulary(vocabulary, found.params.text.vocabulary)
    config = config_of(found)
    model = checkpoint.from_config(config)
    plan = {name: _plan(name, found, shapes) for name in model.state_dict()}
    state, account = _convert(released, model, plan, weights, not_weights, progress)
    if not account.is_complete and not allow_partial:
        raise _incomplete(prefix, account)
    if account.missing or account.shape:
        state = _new_weights(found) | state
    sha256 = released.sha256()
    if out is not None:
        extra = {**config, "source": {"prefix": source, "sha256": sha256}}
        checkpoint.save(state, found.params, out, extra=extra, vocabulary=vocabulary)
    return ImportReport(
        model=found.description,
        parameters=sum(tensor.numel() for tensor in model.parameters()),
        heads=_heads(found),
        keys=account,
        sha256=sha256,
    )


def split_keys(released: TensorFlowCheckpoint) -> tuple[dict[str, str], dict[str, int]]:
    """Short name -> key of all weights; and how many keys are slots, counters or the graph."""
    weights, not_weights = {}, dict.fromkeys(("optimizer slots", "counters", "object graph"), 0)
    for key in released.entries:
        if SLOT in key:
            not_weights["optimizer slots"] += 1
        elif key.startswith(GRAPH):
            not_weights["object graph"] += 1
        elif key.startswith(COUNTERS):
            not_weights["counters"] += 1
        elif key.startswith(ROOT) and key.endswith(ENDING):
            weights[key.removeprefix(ROOT).removesuffix(ENDING)] = key
        else:
            weights[key] = key
    return weights, not_weights


def config_of(found: ReleasedModel) -> dict[str, Any]:
    """The model's entries in config.json."""
    config: dict[str, Any] = {"model": found.params.model_dump(mode="json")}
    if found.modality is not None:
        config["classifier"] = {
            "modality": found.modality,
            "classes": [str(index) for index in range(found.num_classes or 0)],
            "head_dropout": HEAD_DROPOUT[found.modality],
        }
    return config


def check_vocabulary(path: Path, rows: int) -> None:
    """Refuse a word list that is not text, or has more words than the table has rows."""
    try:
        words = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a list of words: {error}") from None
    if not words or len(words) > rows:
        raise DataError(
            f"{path} has {len(words)} words, the model's table {rows} rows",
            hint="give the word list that belongs to the checkpoint, one word a line",
        )


def _plan(name: str, found: ReleasedModel, shapes: Mapping[str, Any]) -> tuple[str, ...]:
    """The released keys behind one of our weights."""
    sources = found.layout.get(name)
    assert sources is not None, f"no released key is known for {name}"
    return sources


def _convert(
    released: TensorFlowCheckpoint,
    model: VATT | Classifier,
    plan: Mapping[str, tuple[str, ...]],
    weights: Mapping[str, str],
    not_weights: dict[str, int],
    progress: Progress | None,
) -> tuple[dict[str, Tensor], Account]:
    aliases = checkpoint.shared_names(model)
    expected = {n: t for n, t in model.state_dict().items() if n not in aliases}
    state: dict[str, Tensor] = {}
    misfits: dict[str, str] = {}
    for done, (name, tensor) in enumerate(expected.items(), start=1):
        if all(source in weights for source in plan[name]):
            parts = [_ours(released, weights[source]) for source in plan[name]]
            joined = torch.cat(parts) if len(parts) > 1 else parts[0]
            if joined.shape == tensor.shape:
                state[name] = joined
            else:
                misfits[name] = f"{name}: {list(joined.shape)} instead of {list(tensor.shape)}"
        if progress:
            progress(done, len(expected))
    asked, used, misfit = (
        {source for name in names for source in plan[name]} for names in (plan, state, misfits)
    )
    account = Account(
        used=sorted(weights[key] for key in used),
        not_weights=not_weights,
        unused=sorted(weights[key] for key in weights.keys() - used - misfit),
        missing=sorted(ROOT + key + ENDING for key in asked - weights.keys()),
        shape=list(misfits.values()),
    )
    return state, account


def _ours(released: TensorFlowCheckpoint, key: str) -> Tensor:
    """A weight in our orientation: kernels [k..., in, out] become (out, k x in)."""
    tensor = released.read(key)
    if tensor.dtype not in _FLOATS:
        raise DataError(f"{key} holds {tensor.dtype}, weights are floating-point numbers")
    tensor = tensor.to(torch.float32)
    if not tensor.isfinite().all():
        raise DataError(f"{key} holds values that are not finite")
    if key.removesuffix(ENDING).endswith("/kernel") and tensor.ndim > 1:
        tensor = tensor.flatten(0, -2).T.contiguous()
    return tensor


def _new_weights(found: ReleasedModel) -> dict[str, Tensor]:
    """A newly initialised model's, always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if found.modality is None or found.num_classes is None:
            return checkpoint.build(found.params).state_dict()
        return checkpoint.build_classifier(
            found.params,
            modality=found.modality,
            num_classes=found.num_classes,
            head_dropout=HEAD_DROPOUT[found.modality],
        ).state_dict()


def _heads(found: ReleasedModel) -> dict[str, int]:
    towers = TOWERS if found.modality is None else (found.modality,)
    return {name: resolve(getattr(found.params, name).size).heads for name in towers}


def _incomplete(prefix: Path, account: Account) -> DataError:
    parts = [
        f"{len(found)} {what}: {', '.join(found[:3])}{' ...' if len(found) > 3 else ''}"
        for what, found in (
            ("keys missing", account.missing),
            ("keys unused", account.unused),
            ("weights of another shape", account.shape),
        )
        if found
    ]
    return DataError(
        f"{prefix} does not match its model\n  " + "\n  ".join(parts),
        hint="--allow-partial converts what fits and leaves the rest newly initialised",
    )
