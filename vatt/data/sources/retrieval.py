"""Sets for text-to-video retrieval -> clips with their sentences: YouCook2 and MSR-VTT (1k-A).

Files, under their official names: youcook2: validation_youcook.csv, the clips that MIL-NCE and VATT
are tested on; msrvtt: MSRVTT_JSFUSION_test.csv (or msrvtt_test.csv, the same) and, for training,
MSRVTT_train.9k.csv with the json of its sentences: any *videodatainfo*.json, or MSRVTT_data.json as
distributed with CLIP4Clip (each also as .json.gz).
"""

import gzip
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vatt.config import DataParams
from vatt.data.clips.manifest import Caption, Clip
from vatt.data.sources.official import file_clip, listed_files, youtube_span
from vatt.data.sources.textfiles import MANGLED, Faults, csv_rows, number, read_json
from vatt.errors import DataError

SENTENCES = ("*videodatainfo*.json*", "MSRVTT_data.json*")  # of these, the first that is there
MSRVTT_TESTS = ("MSRVTT_JSFUSION_test.csv", "msrvtt_test.csv")
log = logging.getLogger(__name__)
A_CLIP = 30.0  # seconds: no clip of MSR-VTT is longer; its sentences hold for all of it


def read_youcook2(folder: Path, data: DataParams) -> Iterator[Clip]:
    """3,350 steps of recipes, a sentence each."""
    [path] = listed_files(folder, "validation_youcook.csv")
    faults = Faults(path, hint=MANGLED)
    seen: Counter[str] = Counter()
    for line, row in csv_rows(path, ("start", "end", "task", "text", "video_id")):
        try:
            start, end = number(row["start"], "start"), number(row["end"], "end")
            url, first, last = youtube_span(row["video_id"], start, end, sections=data.sections)
        except ValueError as error:
            faults.add(line, str(error))
            continue
        name = f"yc_{row['video_id']}_{start:g}_{end:g}".replace(".", "-")
        seen[name] += 1
        yield Clip(
            clip_id=name if seen[name] == 1 else f"{name}_{seen[name]}",
            source="youcook2",
            url=url,
            start=first,
            end=last,
            split="test",
            labels={"recipe": row["task"]},
            captions=(Caption(first, last, row["text"]),),
            licence=None,
        )
    faults.check()


def read_msrvtt(folder: Path, data: DataParams) -> Iterator[Clip]:
    """The 1k-A split: 9,000 train clips with all their sentences, 1,000 test clips with one."""
    sentences: dict[str, list[str]] = {}
    for pattern in SENTENCES:
        for path in sorted(folder.glob(pattern)) if not sentences else ():
            for video_id, sentence in _sentences(path):
                sentences.setdefault(video_id, []).append(sentence)
    train, tests = folder / "MSRVTT_train.9k.csv", [folder / name for name in MSRVTT_TESTS]
    mute = 0
    for _, row in csv_rows(train, ("video_id",)) if train.is_file() else ():
        mute += row["video_id"] not in sentences
        yield _msrvtt(row["video_id"], "train", sentences.get(row["video_id"], []))
    if mute:
        log.warning("%s: %d videos have no sentence in %s", train, mute, " or ".join(SENTENCES))
    path = next((path for path in tests if path.is_file()), tests[0])
    for _, row in csv_rows(path, ("video_id", "sentence")):
        yield _msrvtt(row["video_id"], "test", [row["sentence"]])


def _sentences(path: Path) -> Iterator[tuple[str, str]]:
    record = read_json(path, gzip.open if path.suffix == ".gz" else Path.open)
    try:
        for sentence in record["sentences"]:
            yield str(sentence["video_id"]), str(sentence["caption"])
    except (KeyError, TypeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is broken: {reason}", hint=MANGLED) from None


def _msrvtt(video_id: str, split: str, sentences: list[str]) -> Clip:
    clip = file_clip(f"{video_id}.mp4", "msrvtt", split, {})
    captions = tuple(Caption(0.0, A_CLIP, sentence) for sentence in sentences)
    return replace(clip, clip_id=f"msrvtt_{video_id}", captions=captions)
