"""Moments in a person's own videos, and the words that find them: folder -> index -> moments.

n moments, E width of the video-text space. A moment is as long as what the model sees at once.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

import vatt
from vatt import checkpoint
from vatt.config import Params
from vatt.data.clips.files import ContentHashes
from vatt.data.clips.ledger import read_ledger
from vatt.data.clips.manifest import Clip
from vatt.data.fetching.download import download
from vatt.data.loading.batches import Batch, Loading, Sampling, eval_batches, model_inputs
from vatt.data.loading.reader import ShardIndex, ShardReader
from vatt.data.sharding.shards import write_shards
from vatt.data.sources.folder import scan
from vatt.errors import DataError, SettingsError
from vatt.files import atomic_folder, read_json
from vatt.model.vatt import VATT
from vatt.progress import Progress
from vatt.senses.audio import audio_seconds

Vectors = NDArray[np.float32]

VERSION = 2
FACTS, MOMENTS, VECTORS = "index.json", "moments.jsonl", "vectors.npy"
BATCH = 16
DOWNLOAD, PREPROCESS = "download.ledger.jsonl", "preprocess.ledger.jsonl"
SPLIT = "test"  # what is searched is never trained on
AGAIN = "delete the index and make it again"


@dataclass(frozen=True, slots=True)
class Moment:
    """A span of a file: `file`, and `start` and `end` in seconds."""

    file: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Hit:
    """A `moment` that was found, and the `cosine` between words and picture."""

    moment: Moment
    cosine: float


class Embedder:
    """A pre-trained checkpoint that embeds pictures and words in their common space."""

    def __init__(self, folder: Path) -> None:
        model = checkpoint.load(folder)
        if not isinstance(model, VATT):
            raise SettingsError(
                f"{folder} holds a classifier", hint="name a pre-trained checkpoint's folder"
            )
        self.folder, self.model = folder, model
        self.clips = checkpoint.train_clips(checkpoint.load_config(folder))
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.mark = _digest(folder / checkpoint.WEIGHTS)

    def settings(self, params: Params) -> Params:
        """The project's settings, with the form of clips that the checkpoint was trained on."""
        return params if self.clips is None else self.clips.into(params)

    @torch.inference_mode()
    def text(self, sentence: str) -> Vectors:
        """The embedding of a sentence: (E,). Raises DataError when it has no known word."""
        words = vatt.vocabulary(self.folder)
        ids = words.encode(sentence, self.model.params.text.words)
        if not words.knows(sentence):
            raise DataError(
                f"no word of '{sentence}' is in {self.folder / checkpoint.VOCABULARY}",
                hint=f"try others of its words, e.g. {', '.join(words.examples(8))}",
            )
        device = next(self.model.parameters()).device
        found = self.model(text=torch.from_numpy(ids)[None, None].to(device)).text_vt
        return found[0, 0].cpu().numpy()

    def videos(
        self,
        clips: Sequence[Clip],
        location: Path,
        params: Params,
        *,
        work: Path,
        progress: Progress,
    ) -> Iterator[tuple[Moment, Vectors]]:
        """Every moment of the clips' files and the embedding of its picture: (E,).

        `work` keeps what is cut, for the next time; the ledgers in it say what was left out.
        """
        params = self.settings(params)
        window = Window.of(self.model, params, "video")
        device = next(self.model.parameters()).device
        for moments, batch in window.batches(clips, location, params, work=work, progress=progress):
            with torch.inference_mode():
                found = (
                    self.model(video=model_inputs(batch.to(device))["video"]).video_vt.cpu().numpy()
                )
            yield from zip(moments, found, strict=True)


@dataclass(frozen=True, slots=True)
class Window:
    """What a model sees of a file at once."""

    modality: str  # video, audio or image
    sampling: Sampling
    seconds: float

    @classmethod
    def of(cls, model: VATT, params: Params, modality: str) -> Self:
        """A pre-trained model's window on pictures or on sound."""
        every = Sampling.for_pretraining(model.params, params.pretrain)
        alone = replace(every, candidates=0, words=0, augmentation=None, more={})
        if modality == "audio":
            sampling = replace(alone, frames=0)
            return cls(modality, sampling, audio_seconds(sampling, params.preprocess.audio_hz))
        return cls(modality, replace(alone, samples=0), alone.frames / alone.fps)

    def batches(
        self,
        clips: Sequence[Clip],
        location: Path,
        params: Params,
        *,
        work: Path,
        progress: Progress,
    ) -> Iterator[tuple[list[Moment], Batch]]:
        """The moments of the clips' files, each as long as the window, in batches."""
        index = self._cut(clips, location, params, work=work, progress=progress)
        kind = "audio" if self.modality == "audio" else "video"
        rows = {row.key: row for row in index.rows if getattr(row, kind) is not None}
        loading = replace(Loading.of(params.machine), cache_gb=0.0, shards_url=None)
        reader, seen = ShardReader(index), replace(index, rows=list(rows.values()))
        for batch in eval_batches(seen, self.sampling, batch_size=BATCH, loading=loading):
            origins = [reader.origin(rows[key]) for key in batch.clip_ids]
            yield [Moment(url.partition(":")[2], *span) for url, *span in origins], batch
        reader.close()

    def _cut(
        self,
        clips: Sequence[Clip],
        location: Path,
        params: Params,
        *,
        work: Path,
        progress: Progress,
    ) -> ShardIndex:
        """The files' moments as shards."""
        data = params.data.model_copy(
            update={
                "source": "folder", "location": location, "min_clips": 1, "min_share": 0.0,
                "require": ("audio" if self.modality == "audio" else "video",), "base_urls": (),
            }
        )  # fmt: skip
        preprocess = params.preprocess.model_copy(
            update={
                "clip_seconds": self.seconds,
                "min_clip_seconds": min(1.0, self.seconds) / 2,
                "fps": math.ceil(self.sampling.fps),
                "short_side": min(self.sampling.frame_size),
                "max_failed_share": 1.0,
                "vocabulary_file": None,
            }
        )
        ledger = work / DOWNLOAD
        download(clips, data, params.machine, media=work / "media", ledger=ledger)
        write_shards(
            clips, read_ledger(ledger), preprocess, data,
            machine=params.machine, media=work / "media", folder=work / "shards",
            ledger=work / PREPROCESS, seed=0, progress=progress,
        )  # fmt: skip
        return ShardIndex.load(work / "shards", split=SPLIT)


def embed_file(
    embedder: Embedder, file: Path, params: Params, *, work: Path, progress: Progress
) -> list[tuple[Moment, Vectors]]:
    """The moments of one file."""
    with explained(file, work):
        clips = [clip_of(file)]
        found = list(embedder.videos(clips, file.parent, params, work=work, progress=progress))
    return sorted(found, key=lambda one: one[0].start)


@contextmanager
def explained(file: Path, work: Path) -> Iterator[None]:
    """Where the body finds no moment of a file, say what the ledgers in `work` know of it."""
    clip = clip_of(file)
    try:
        yield
    except DataError:
        known = read_ledger(work / DOWNLOAD) | read_ledger(work / PREPROCESS)
        entry = known.get(clip.clip_id)
        if entry is None or entry.state == "ok":
            raise
        why = f"{entry.state}, {entry.reason}" if entry.reason else entry.state
        raise DataError(f"{file} cannot be embedded: {why}", hint="name another file") from None


def build_index(
    embedder: Embedder, folder: Path, params: Params, *, out: Path, progress: Progress
) -> dict[str, Any]:
    """Index all videos of a folder and below; returns what index.json says.

    An index of the same files by the same checkpoint is left as it is.
    """
    files, facts = _look(embedder, folder, params, ContentHashes.beside(out))
    if _is_current(out, facts):
        return _facts(out)
    work = out.with_name(f".{out.name}.work")
    clips = [replace(clip, split=SPLIT, captions=(), labels={}) for clip in files]
    moments, vectors = [], []
    for moment, vector in embedder.videos(clips, folder, params, work=work, progress=progress):
        moments.append(moment)
        vectors.append(vector)
    videos = len({moment.file for moment in moments})
    facts |= {"moments": len(moments), "videos": videos, "left_out": len(clips) - videos}
    write_index(out, moments, vectors, facts)
    return facts


def files_to_index(embedder: Embedder, folder: Path, params: Params, *, out: Path) -> int:
    """How many files `build_index` would read now: 0 where the index is current."""
    files, facts = _look(embedder, folder, params, ContentHashes.beside(out, writes=False))
    return 0 if _is_current(out, facts) else len(files)


def _look(
    embedder: Embedder, folder: Path, params: Params, hashes: ContentHashes
) -> tuple[Sequence[Clip], dict[str, Any]]:
    """The files of a folder, and what an index of them is made from."""
    found = scan(folder, params.data, hashes=hashes)
    return found.clips, {
        "version": VERSION,
        "folder": str(folder.resolve()),
        "files": found.mark,
        "checkpoint": embedder.mark,
        "fps": embedder.settings(params).pretrain.fps,
    }


class Index:
    """An index, opened once for many searches; exact, by the cosine."""

    def __init__(self, folder: Path) -> None:
        self.facts = _facts(folder)
        self._vectors: Vectors = np.load(folder / VECTORS, mmap_mode="r")
        # Moments are parsed only when found: parsing all of them takes longer than a search.
        self._moments = (folder / MOMENTS).read_text(encoding="utf-8").splitlines()

    def nearest(self, vector: Vectors, *, count: int) -> list[Hit]:
        """The moments nearest to a vector (E,), nearest first."""
        cosines = self._vectors @ vector
        places = np.argsort(-cosines, kind="stable")[:count]
        return [
            Hit(Moment(**json.loads(self._moments[place])), float(cosines[place]))
            for place in places
        ]


def search(embedder: Embedder, index: Path, query: str, *, count: int) -> list[Hit]:
    """The moments nearest to the words, nearest first."""
    opened = Index(index)
    if opened.facts["checkpoint"] != embedder.mark:
        raise DataError(
            f"{index} was made with another checkpoint than {embedder.folder}",
            hint="name the folder of the videos instead: a new index is made",
        )
    return opened.nearest(embedder.text(query), count=count)


def write_index(
    out: Path, moments: Sequence[Moment], vectors: Sequence[Vectors], facts: dict[str, Any]
) -> None:
    """Write a complete index or nothing: vectors, their moments, and what they were made from."""
    with atomic_folder(out) as temporary:
        np.save(temporary / VECTORS, np.stack(vectors))
        lines = [json.dumps(asdict(moment)) + "\n" for moment in moments]
        (temporary / MOMENTS).write_text("".join(lines), encoding="utf-8")
        sums = {name: _digest(temporary / name) for name in (VECTORS, MOMENTS)}
        text = json.dumps(facts | {"version": VERSION, "sha256": sums}, indent=2)
        (temporary / FACTS).write_text(text + "\n", encoding="utf-8")


def is_index(folder: Path) -> bool:
    """Whether a folder is an index, not a folder of videos."""
    return (folder / FACTS).is_file() and (folder / VECTORS).is_file()


def _facts(index: Path) -> dict[str, Any]:
    facts = read_json(index / FACTS, dict, hint=AGAIN)
    sums = facts.get("sha256")
    if facts.get("version") != VERSION or not isinstance(sums, dict):
        raise DataError(f"{index / FACTS} is of another version", hint=AGAIN)
    for file in (index / VECTORS, index / MOMENTS):
        if not file.is_file() or _digest(file) != sums.get(file.name):
            raise DataError(f"{file} is not what {FACTS} describes", hint=AGAIN)
    return facts


def _is_current(index: Path, facts: dict[str, Any]) -> bool:
    """Whether an undamaged index was made from this."""
    try:
        return _facts(index).items() >= facts.items()
    except (DataError, FileNotFoundError):
        return False


def clip_of(file: Path) -> Clip:
    """A file as the only clip of its folder."""
    return Clip(
        clip_id="file", source="folder", url=f"folder:{file.name}", start=0.0, end=None,
        split=SPLIT, labels={}, captions=(), licence=None,
    )  # fmt: skip


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
