"""Samples in shards: plain tars (WebDataset's layout) and an index of where each member lies.

A shards folder holds <split>-00000.tar, ..., index.jsonl, vocabulary.txt. A sample is <key>.json
(labels, captions, source), its picture (<key>.mp4, or <key>.0000.jpg and so on) at a constant frame
rate and its sound, mono (<key>.wav, .flac or .m4a): docs/data-format.md.
"""

import io
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from vatt.config import FinetuneTaskParams, Params, PreprocessParams
from vatt.data.clips.ledger import read_ledger
from vatt.data.clips.manifest import Caption
from vatt.data.clips.storage import Count, Storage
from vatt.errors import DataError

log = logging.getLogger(__name__)

Window = tuple[float, float]  # start and end, seconds of the source

INDEX = "index.jsonl"
VOCABULARY = "vocabulary.txt"
FORMAT = 2

Place = Annotated[int, Field(ge=0, lt=2**53)]  # bytes
Extent = tuple[Place, Place]  # offset and size in the tar
Side = Annotated[int, Field(ge=0, le=2**16)]  # pixels


@dataclass(frozen=True, slots=True)
class IndexRow:
    """Where a sample lies and what it holds."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    key: Annotated[str, Field(min_length=1)]
    clip_id: str  # of the manifest; a long clip gives several samples
    media: str  # samples of one media share it
    split: str
    shard: Annotated[str, Field(pattern=r"^[^/.\x00][^/\x00]*$")]  # a file of the index's folder
    labels: dict[str, str]
    json: Extent
    video: Extent | None
    audio: Extent | None
    num_frames: Count
    height: Side
    width: Side
    num_samples: Count  # of the waveform
    senses: dict[str, tuple[Place, Place, Count]] = field(default_factory=dict)  # see `members`

    def members(self) -> list[Extent]:
        """Where its members lie: `senses` has offset, size and number of values of the others."""
        own = [extent for extent in (self.json, self.video, self.audio) if extent is not None]
        return own + [(offset, size) for offset, size, _ in self.senses.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header(Storage):
    """The first line of an index."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    format: Literal[2]


_ROW, _HEADER = TypeAdapter(IndexRow), TypeAdapter(_Header)


def splits_of(folder: Path) -> dict[str, int]:
    """The splits that have samples, and how many."""
    counts: dict[str, int] = {}
    for row in read_index(folder / INDEX)[1]:
        counts[row.split] = counts.get(row.split, 0) + 1
    return counts


def write_index(path: Path, rows: Sequence[IndexRow], *, storage: Storage) -> None:
    """Write the header and one line a sample."""
    lines = [json.dumps({"format": FORMAT, **_plain(storage)}, sort_keys=True)]
    lines += [json.dumps(_plain(row), ensure_ascii=False, sort_keys=True) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _plain(part: IndexRow | Storage) -> dict[str, Any]:
    """As JSON; without senses of their own, as before there were any."""
    record = asdict(part)
    return {key: value for key, value in record.items() if key != "senses" or value}


def row_of(record: dict[str, Any]) -> IndexRow:
    """A row from its JSON form."""
    return _ROW.validate_python(record)


def read_index(path: Path) -> tuple[Storage, list[IndexRow]]:
    """How the samples are stored, and where each lies."""
    rows: dict[str, IndexRow] = {}
    number, header = 0, None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    header = _HEADER.validate_json(line, strict=True)
                else:
                    _add_row(rows, line)
        if header is None:
            raise ValueError("it is empty")
    except FileNotFoundError:
        raise DataError(f"{path} is missing", hint="run `vattctl preprocess`") from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", hint="check its permissions"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{path}:{number}: {_reason(error)}", hint="run `vattctl preprocess`"
        ) from None
    storage = Storage(header.fps, header.audio_hz, header.video, header.audio, header.senses)
    return storage, list(rows.values())


def _add_row(rows: dict[str, IndexRow], line: bytes) -> None:
    row = _ROW.validate_json(line, strict=True)
    if row.video is not None and not row.num_frames * row.height * row.width:
        raise ValueError(f"sample {row.key} has a video without frames or pixels")
    if row.key in rows:
        first = list(rows).index(row.key) + 2  # the header is line 1
        raise ValueError(f"sample {row.key} is already in line {first}")
    rows[row.key] = row


def _reason(error: ValueError) -> str:
    """Why a line of an index is refused, without the line itself."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def tar_bytes(size: int) -> int:
    """What a member takes in a tar: its header, and its content in whole blocks."""
    return tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


class ShardWriter:
    """Writes one tar; the same members give the same bytes."""

    def __init__(self, path: Path, *, name: str) -> None:
        self.name = name  # the shard's, in the end
        self._file = path.open("wb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, name: str, data: bytes) -> Extent:
        """Append a member; returns where its bytes lie."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o644
        offset = self._file.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(member, io.BytesIO(data))
        return offset, len(data)

    def close(self) -> None:
        """End the tar."""
        self._tar.close()
        self._file.close()


def nearest(captions: Sequence[Caption], *, start: float, end: float, count: int) -> list[Caption]:
    """The captions nearest in time to a window, nearest first: by the gap, then by the centres."""
    centre = (start + end) / 2

    def distance(caption: Caption) -> tuple[float, float, float]:
        gap = max(caption.start - end, start - caption.end, 0.0)
        return gap, abs((caption.start + caption.end) / 2 - centre), caption.start

    return sorted(captions, key=distance)[:count]


def windows_of(start: float, end: float, params: PreprocessParams) -> list[Window]:
    """Cut a span in windows of clip_seconds; a remainder below min_clip_seconds is left out."""
    length = params.clip_seconds
    whole = int((end - start) / length + 1e-6)
    windows = [(start + k * length, start + (k + 1) * length) for k in range(whole)]
    rest = (start + whole * length, end)
    if rest[1] - rest[0] >= params.min_clip_seconds - 1e-6:
        windows.append(rest)
    return windows


# --- what later stages need -----------------------------------------------------------------------

LAST_STAGE = "VATT_LAST_STAGE"  # in the environment: of those that a command runs
MOST_SHOWN = 3  # lacking things in one message


def stages_to_come() -> list[str]:
    """The stages of dvc.yaml, up to the last one that the running command wants."""
    import yaml

    pipeline = Path("dvc.yaml")
    if not pipeline.is_file():
        return []
    names = list(yaml.safe_load(pipeline.read_text(encoding="utf-8"))["stages"])
    last = os.environ.get(LAST_STAGE)
    return names[: names.index(last) + 1] if last in names else names


def check_clips(params: Params, stages: Collection[str]) -> None:
    """Refuse shards on which one of these stages must fail: better now than after a training."""
    rows = read_index(params.paths.shards / INDEX)[1]
    counts = Counter(row.split for row in rows)
    lacks = [
        f"{counts[split]} clips of the {split} split, {needed} or more are needed"
        for split, needed, stage in (("train", 2, "pretrain"), ("test", 2, "evaluate"))
        if counts[split] < needed and stage in stages
    ]
    names = params.finetune.run if "finetune" in stages else ()
    tasks = {name: _lacks(name, params.finetune.tasks[name], rows) for name in names}
    lacks += [lack for found in tasks.values() for lack in found]
    unfit = [name for name, found in tasks.items() if found]
    without = f", take {', '.join(unfit)} out of finetune.run" if unfit else ""
    if params.paths.preprocess_ledger.is_file():
        lacks += _check_pairs(params, rows, stages)
    if lacks:
        more = f"; and {len(lacks) - MOST_SHOWN} more" if len(lacks) > MOST_SHOWN else ""
        raise DataError(
            f"too little for the next stages: {'; '.join(lacks[:MOST_SHOWN])}{more}",
            hint=f"add clips, raise data.test_share{without}, or run `vattctl pretrain` alone",
        )


def _lacks(name: str, task: FinetuneTaskParams, rows: Sequence[IndexRow]) -> list[str]:
    """What a fine-tuning task needs and the shards do not hold."""
    sound = task.modality == "audio"
    usable = [
        row for row in rows if row.labels.get(task.label) and (row.audio if sound else row.video)
    ]
    values = {row.labels[task.label] for row in usable if row.split == "train"}
    found = []
    if len(values) < 2:
        found.append(
            f"task {name}: {len(values)} values of label '{task.label}' in the train split"
        )
    if not any(row.split == "test" for row in usable):
        found.append(f"task {name}: no test clip with label '{task.label}'")
    return found


def _check_pairs(params: Params, rows: Sequence[IndexRow], stages: Collection[str]) -> list[str]:
    """What contrastive training and retrieval lack; says where captions alone are missing."""
    entries = read_ledger(params.paths.preprocess_ledger)
    shown = [row for row in rows if row.video]
    spoken = {row.split for row in shown if row.clip_id in entries and
              "text" in entries[row.clip_id].has}  # fmt: skip
    heard = {row.split for row in shown if row.audio}
    lacks = []
    if "pretrain" in stages and not {"train"} & (spoken | heard):
        lacks.append("no train clip has a picture with sound or captions: nothing can be compared")
    elif "pretrain" in stages and "train" not in spoken and params.pretrain.mil_nce_weight:
        log.warning(
            "no train clip has captions: text will not be learned; "
            "add captions, or set pretrain.mil_nce_weight: 0"
        )
    measures = params.evaluate.probes or params.finetune.run
    if "evaluate" in stages and not measures and not {"test"} & (spoken | heard):
        lacks.append(
            "no test clip has a picture with sound or captions, and there is no probe or task: "
            "nothing can be measured"
        )
    elif "evaluate" in stages and "test" not in spoken:
        log.warning("no test clip has captions: retrieval by text will not be measured")
    return lacks
