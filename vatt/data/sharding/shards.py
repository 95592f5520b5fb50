"""Media -> tar shards. Shard by shard: a finished one is kept, an unfinished one is done again.

The plan (which samples are in which shard) is a pure function of the manifest, the download
ledger, the settings and the seed. A shard is finished when its part file (index rows and ledger
entries) is next to it and has the same plan.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vatt.config import DataParams, MachineParams, PreprocessParams
from vatt.data.clips.ledger import Entry, with_captions, write_ledger
from vatt.data.clips.manifest import Clip
from vatt.data.clips.media import find_ffmpeg
from vatt.data.clips.quality import improved
from vatt.data.clips.samples import INDEX, VOCABULARY, IndexRow, row_of, write_index
from vatt.data.clips.text import (
    Vocabulary,
    as_said,
    copy_vocabulary,
    count_words,
    read_stop_words,
    within_media,
    write_vocabulary,
)
from vatt.data.sharding.writer import (
    PARTS,
    Shard,
    WriterSettings,
    made_by,
    no_space,
    part_name,
    plan_shards,
    without_deadly,
    write_shard,
)
from vatt.data.workers import start_workers
from vatt.errors import DataError
from vatt.files import UNREADABLE, atomic_write, lock
from vatt.progress import Progress
from vatt.senses import SENSES, storage_of

TEXT_FACTS = "text.json"  # how much is said, and how much of it the vocabulary knows


def write_shards(
    clips: Iterable[Clip],
    downloads: Mapping[str, Entry],
    preprocess: PreprocessParams,
    data: DataParams,
    *,
    machine: MachineParams,
    media: Path,
    folder: Path,
    ledger: Path,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Cut all downloaded clips into shards; returns the number of clips in each state."""
    program = find_ffmpeg(machine.ffmpeg)
    work = folder.with_name(f".{folder.name}.work")
    setting = WriterSettings(
        preprocess, data.require, program, made_by(program), folder, work, Path.cwd()
    )
    with lock(folder.with_name(f".{folder.name}.lock")):
        stop_words = read_stop_words(preprocess.stop_words)
        clips = [as_said(clip, clean=preprocess.clean_text, without=stop_words) for clip in clips]
        lengths = {name: entry.seconds for name, entry in downloads.items()}
        clips = within_media(clips, lengths)
        facts: dict[str, float] = {}
        if preprocess.text_quality is not None:
            clips, facts = improved(clips, preprocess.text_quality)
        shards, entries = plan_shards(clips, downloads, preprocess, data, media=media, seed=seed)
        _tidy(folder, shards, work)
        try:
            rows = _run(shards, setting, entries, machine, progress or (lambda *_: None))
            _tidy(folder, shards, work)  # once more: a lost machine leaves half a shard behind
        except OSError as error:
            raise no_space(error, folder) from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
        entries = {c.clip_id: with_captions(entries[c.clip_id], c) for c in clips}
        counts = write_ledger(ledger, entries.values())
        tried = [entries[name] for name in entries if downloads[name].state == "ok"]
        _check_failures(tried, preprocess, ledger)
        _check_rest(len(entries), tried, len(rows), data, ledger)
        _finish(clips, entries, rows, preprocess, folder, quality=facts)
    return counts


def _tidy(folder: Path, shards: Sequence[Shard], work: Path) -> None:
    """Remove what is not of this plan, and what a killed run left half done."""
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    keep = {shard.name for shard in shards} | {INDEX, VOCABULARY, TEXT_FACTS, PARTS}
    keep |= {part_name(shard.name) for shard in shards}
    for path in sorted([*folder.iterdir(), *(folder / PARTS).iterdir()]):
        if path.name not in keep:
            path.unlink()


def _run(
    shards: Sequence[Shard],
    setting: WriterSettings,
    entries: dict[str, Entry],
    machine: MachineParams,
    progress: Progress,
) -> list[IndexRow]:
    """Write the shards that are not finished; returns all rows and adds to the entries."""
    total = sum(shard.num_samples for shard in shards)
    done = 0
    parts: dict[str, dict[str, Any]] = {}
    missing: list[Shard] = []
    for shard in shards:
        part = _read_part(shard, setting)
        if part is None:
            missing.append(shard)
        else:
            parts[shard.name] = part
            done += shard.num_samples
    progress(done, total)
    _check_media(missing)
    if missing:
        with start_workers(
            machine, most=len(missing), preload=["vatt.data.sharding.writer"]
        ) as workers:
            for shard, part in workers.map(
                partial(write_shard, setting=setting),
                missing,
                instead=partial(without_deadly, setting=setting),
            ):
                parts[shard.name] = part
                done += shard.num_samples
                progress(done, total)
    rows = []
    for shard in shards:
        rows += [row_of(record) for record in parts[shard.name]["rows"]]
        for record in parts[shard.name]["entries"]:
            entry = Entry(**{**record, "has": tuple(record["has"])})
            entries[entry.clip_id] = _merge(entries.get(entry.clip_id), entry)
    return rows


def _check_media(shards: Sequence[Shard]) -> None:
    """Stop before the first shard is written if media that a download called ok are gone."""
    sources = {job.source for shard in shards for job in shard.jobs}
    lost = sorted(source for source in sources if not source.is_file())
    if lost:
        raise DataError(
            f"{len(lost)} of {len(sources)} media files are missing, which the download had "
            f"fetched or found, among them {lost[0]}",
            hint="`vattctl download --retry missing` fetches them, and only them",
        )


def _merge(first: Entry | None, second: Entry) -> Entry:
    """One state for a clip that stands in two shards: ok when any of its samples is."""
    if first is None:
        return second
    better, other = (first, second) if first.state == "ok" else (second, first)
    has = tuple(name for name in SENSES if name in better.has + other.has)
    reasons = [better.reason, *([] if other.reason in better.reason else [other.reason])]
    return Entry(
        better.clip_id, better.state, "preprocess", "; ".join(filter(None, reasons)), has,
        samples=first.samples + second.samples,
    )  # fmt: skip


def _read_part(shard: Shard, setting: WriterSettings) -> dict[str, Any] | None:
    """What a finished shard holds; None when it must be written."""
    try:
        text = (setting.folder / PARTS / part_name(shard.name)).read_text(encoding="utf-8")
        size = (setting.folder / shard.name).stat().st_size
        part: dict[str, Any] = json.loads(text)
        is_finished = (part["stamp"], part["bytes"]) == (setting.stamp(shard), size)
    except UNREADABLE:
        return None
    return part if is_finished else None


def _check_failures(tried: Sequence[Entry], preprocess: PreprocessParams, ledger: Path) -> None:
    """Stop when too many of the clips that came could not be used."""
    failed = Counter(entry.state for entry in tried if entry.state != "ok")
    if failed.total() > preprocess.max_failed_share * len(tried):
        why = ", ".join(f"{count} {state}" for state, count in failed.most_common())
        raise DataError(
            f"{failed.total()} of {len(tried)} clips failed ({why}), more than "
            "preprocess.max_failed_share",
            hint=f"{ledger} says why; raise preprocess.max_failed_share to go on",
        )


def _check_rest(
    num_clips: int, tried: Sequence[Entry], num_samples: int, data: DataParams, ledger: Path
) -> None:
    """Stop when too little is left of the manifest."""
    if num_samples < data.min_clips:
        raise DataError(
            f"{num_samples} clips are left; data.min_clips requires {data.min_clips}",
            hint=f"{ledger} says what was lost; add data, or lower data.min_clips",
        )
    kept = sum(entry.state == "ok" for entry in tried)
    if kept < data.min_share * num_clips:
        raise DataError(
            f"{kept} of {num_clips} clips of the manifest are left; data.min_share requires "
            f"{data.min_share:.0%}",
            hint=f"{ledger} says what was lost; lower data.min_share to go on",
        )


def _finish(
    clips: Sequence[Clip],
    entries: Mapping[str, Entry],
    rows: Sequence[IndexRow],
    preprocess: PreprocessParams,
    folder: Path,
    *,
    quality: Mapping[str, float],
) -> None:
    """Write the vocabulary of the train captions and, last of all, the index."""
    counts = count_words(
        caption.text
        for clip in clips
        if clip.split == "train" and entries[clip.clip_id].state == "ok"
        for caption in clip.captions
    )
    path = folder / VOCABULARY
    if preprocess.vocabulary_file is None:
        write_vocabulary(path, counts, size=preprocess.vocabulary)
    else:
        copy_vocabulary(preprocess.vocabulary_file, path, size=preprocess.vocabulary)
    vocabulary = Vocabulary.load(path)
    facts = {
        "words": counts.total(),
        "distinct_words": len(counts),
        "vocabulary": len(vocabulary),
        "coverage": vocabulary.coverage(counts),
        **({"quality": quality} if quality else {}),
    }
    with atomic_write(folder / TEXT_FACTS) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    with atomic_write(folder / INDEX) as temporary:
        write_index(temporary, rows, storage=storage_of(preprocess))
