"""The files that the report is made from; each of them may be missing.

All of them may hold text that strangers wrote (labels, captions, reasons); the templates escape it.
"""

import base64
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from vatt.config import PathsParams
from vatt.errors import DataError
from vatt.files import UNREADABLE, read_arrays, read_json

THUMBNAIL_BYTES = 2_000_000  # all together
STAGES = ("download", "preprocess", "pretrain", "finetune", "evaluate")

Json = dict[str, Any]
NamedArrays = dict[str, NDArray[Any]]
T = TypeVar("T", dict[str, Any], list[Any])

AGAIN = "delete it, then run `vattctl repro`: the stage that wrote it writes it again"


@dataclass(frozen=True, slots=True)
class StateCounts:
    """How many clips are in each state after one stage, and why."""

    stage: str
    states: dict[str, int]
    reasons: dict[str, list[tuple[str, int]]]  # state -> most frequent reasons

    @property
    def total(self) -> int:
        """Clips that the ledger accounts for."""
        return sum(self.states.values())


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """What the manifest lists."""

    clips: int
    splits: dict[str, int]
    sources: dict[str, int]
    hash: str  # names the set of clips: vatt.data.clips.manifest.manifest_hash


@dataclass(frozen=True, slots=True)
class Origin:
    """The settings and the code that a report is about."""

    seed: int
    commit: str  # empty outside git
    settings: Mapping[str, Any]  # whole sections of params.yaml, without secrets
    tunings: tuple[str, ...]  # fine-tunings of the present settings: `action-scratch`


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that was found; what is missing has not been run."""

    metrics: Mapping[str, Json] = field(default_factory=dict)  # file stem -> content
    runs: Mapping[str, Json] = field(default_factory=dict)  # file stem -> run id, timings
    curves: Mapping[str, list[dict[str, float]]] = field(default_factory=dict)
    attrition: tuple[StateCounts, ...] = ()
    corpus: CorpusFacts | None = None
    arrays: Mapping[str, NamedArrays] = field(default_factory=dict)  # npz stem -> arrays
    examples: tuple[Json, ...] = ()
    thumbnails: Mapping[str, str] = field(default_factory=dict)  # clip -> data: address
    model: Json | None = None  # the checkpoint's config
    origin: "Origin | None" = None

    @property
    def date(self) -> str:
        """The day on which the last stage before the report ended; empty if none has."""
        ended = [str(run["ended"]) for name, run in self.runs.items()
                 if run.get("ended") and name != "report"]  # fmt: skip
        return max(ended, default="")[:10]

    @property
    def evaluation(self) -> Json:
        """The content of evaluate.json; empty if there is none."""
        return self.metrics.get("evaluate", {})

    def listed(self, split: str = "test") -> int | None:
        """Clips of a split in the official list or, if there is no such list, in the manifest."""
        download = self.metrics.get("download", {})
        official: dict[str, int] = download.get("official", {})
        known = official.get(split)
        return known if known or self.corpus is None else self.corpus.splits.get(split)

    def lookup(self, *path: str) -> Any:
        """A value in evaluate.json by its path; None when it was not measured."""
        value: Any = self.evaluation
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_inputs(paths: PathsParams, origin: Origin | None = None) -> Inputs:
    """Read whatever exists below the project's paths.

    With an origin, fine-tunings that its settings no longer ask for are left out.
    """
    config = _read_json(paths.pretrained / "config.json", dict)
    metrics = _present(_read_folder(paths.metrics), origin)
    return Inputs(
        metrics=metrics,
        runs=_present(_read_folder(paths.runs), origin),
        curves=_present(_read_curves(paths), origin),
        origin=origin,
        attrition=tuple(
            _read_ledger(stage, file)
            for stage, file in (
                ("download", paths.download_ledger),
                ("preprocess", paths.preprocess_ledger),
            )
            if file.exists()
        ),
        corpus=_read_corpus(metrics),
        arrays=_read_arrays(paths.evaluation),
        examples=tuple(_read_json(paths.evaluation / "examples.json", list)),
        thumbnails=_read_thumbnails(paths.evaluation),
        model=config or None,
    )


def _present(found: dict[str, Any], origin: Origin | None) -> dict[str, Any]:
    """Without the fine-tunings of earlier settings."""
    if origin is None:
        return found
    known = {f"finetune-{name}" for name in origin.tunings}
    return {
        name: value
        for name, value in found.items()
        if not name.startswith("finetune-") or name in known
    }


def _read_json(file: Path, kind: type[T]) -> T:
    """The file's content; empty without the file."""
    return read_json(file, kind, hint=AGAIN) if file.exists() else kind()


def _read_folder(folder: Path) -> dict[str, Json]:
    return {file.stem: _read_json(file, dict) for file in sorted(folder.glob("*.json"))}


def _read_curves(paths: PathsParams) -> dict[str, list[dict[str, float]]]:
    files = {"pretrain": paths.pretrained / "history.json"}
    files |= {
        f"finetune-{file.parent.name}": file
        for file in sorted(paths.finetuned.glob("*/history.json"))
    }
    curves = {name: _read_json(file, list) for name, file in files.items()}
    return {name: curve for name, curve in curves.items() if curve}


def _read_ledger(stage: str, file: Path) -> StateCounts:
    last = {}
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                last[entry["clip_id"]] = {"state": str(entry["state"]), **entry}
            except UNREADABLE:
                raise DataError(f"{file}:{number} is damaged", hint=AGAIN) from None
    states = Counter(str(entry["state"]) for entry in last.values())
    reasons: dict[str, Counter[str]] = {}
    for entry in last.values():
        if entry["state"] != "ok":
            reason = str(entry.get("reason") or "no reason given")
            reasons.setdefault(str(entry["state"]), Counter())[reason] += 1
    ordered = sorted(states, key=lambda state: (state != "ok", -states[state], state))
    return StateCounts(
        stage=stage,
        states={state: states[state] for state in ordered},
        reasons={state: counts.most_common(3) for state, counts in reasons.items()},
    )


def _read_corpus(metrics: Mapping[str, Json]) -> CorpusFacts | None:
    """The counts of the download stage; the manifest itself may be large, or Parquet."""
    found = metrics.get("download", {}).get("corpus")
    if not found:
        return None
    try:
        facts = CorpusFacts(**{one.name: found[one.name] for one in fields(CorpusFacts)})
        counts: tuple[object, ...] = (facts.clips, *facts.splits.values(), *facts.sources.values())
    except UNREADABLE:
        counts = ("",)
    if not all(type(count) is int for count in counts):
        raise DataError("download.json is damaged: its corpus has no counts", hint=AGAIN)
    return facts


def _read_thumbnails(folder: Path) -> dict[str, str]:
    """Animated pictures as `data:` addresses, as many as fit into THUMBNAIL_BYTES."""
    found, left = {}, THUMBNAIL_BYTES
    for file in sorted(folder.glob("*.webp")):
        left -= file.stat().st_size
        if left >= 0:
            data = base64.b64encode(file.read_bytes()).decode()
            found[file.stem] = f"data:image/webp;base64,{data}"
    return found


def _read_arrays(folder: Path) -> dict[str, NamedArrays]:
    return {file.stem: read_arrays(file, hint=AGAIN) for file in sorted(folder.glob("*.npz"))}
