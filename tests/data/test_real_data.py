"""Real and hostile files go the ordinary way and end in the state they should."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.corpus import TEST_DATA, demo_params, needs_data
from tests.data.test_batches import SAMPLING
from tests.data.test_shards import digests, write
from vatt.data.batches import eval_batches
from vatt.data.cut import Cut, cut, find_ffmpeg
from vatt.data.download import download
from vatt.data.ledger import Entry, read_ledger
from vatt.data.media import probe
from vatt.data.samples import ShardIndex, ShardReader
from vatt.data.sources.folder import Found, scan
from vatt.data.sources.urls import read_urls
from vatt.data.storage import decode_frames
from vatt.errors import DataError

pytestmark = needs_data
DATA = Path(TEST_DATA or "/nowhere")


def ingest(root: Path, folder: Path, **preprocess) -> tuple[Found, dict[str, Entry]]:
    """Folder -> shards; the ledger by the file's name."""
    params = demo_params(source="folder", location=folder, require=(), min_clips=1)
    found = scan(folder, params.data, params.preprocess)
    machine = params.machine.model_copy(update={"workers": 2})
    ledger = root / "download.jsonl"
    download(found.clips, params.data, machine, media=root / "media", ledger=ledger)
    write(
        root, found.clips, read_ledger(ledger), params=params, workers=2,
        max_failed_share=0.9, **preprocess,
    )  # fmt: skip
    states = read_ledger(root / "ledger.jsonl")
    return found, {clip.url.removeprefix("folder:"): states[clip.clip_id] for clip in found.clips}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    found, states = ingest(root, DATA / "hostile", clip_seconds=0.7, min_clip_seconds=0.7)
    return root, found, states


def test_all_fifty_real_clips_reach_the_shards(tmp_path):
    _, states = ingest(tmp_path, DATA / "clips")
    listed = json.loads((DATA / "clips" / "manifest.json").read_text())
    assert set(states) == {item["file"] for item in listed} and len(states) == 50
    assert {entry.state for entry in states.values()} == {"ok"}
    for item in listed:
        assert ("audio" in states[item["file"]].has) >= item["sound"]
    assert "text" in states["friday.mp4"].has and "text" in states["nasa_13013.mp4"].has
    batches = list(
        eval_batches(tmp_path / "shards", split="train", batch_size=16, sampling=SAMPLING)
    )
    index = ShardIndex.load(tmp_path / "shards", split="train")
    assert sum(len(batch.clip_ids) for batch in batches) == len(index.rows) > 300


def test_every_hostile_file_ends_as_it_should(hostile):
    _, found, states = hostile
    wrong = []
    for item in json.loads((DATA / "hostile" / "expected.json").read_text()):
        name, expected = item["file"], item["expect"]
        if item["kind"] in ("captions", "manifest") or expected == "ok-if-named":
            continue
        entry = states.get(name)
        if entry is None:
            fine = expected == "ignore" or item["kind"] == "dir"
        else:
            fine = {
                "ok": entry.state == "ok" and "video" in entry.has,
                "ok-video-only": entry.state == "ok" and entry.has == ("video",),
                "ok-audio-only": entry.state == "ok" and entry.has == ("audio",),
                "skip": entry.state != "ok" and bool(entry.reason),
                "ok-or-skip": entry.state == "ok" or bool(entry.reason),
                "partial-or-skip": bool(entry.reason),
            }[expected]
        if not fine:
            wrong.append((name, expected, entry))
    assert wrong == []
    assert found.ignored["unfinished downloads"] == found.ignored["folders named like a video"] == 1


def test_the_hostile_files_give_the_same_bytes_twice(hostile, tmp_path):
    root, _, _ = hostile
    ingest(tmp_path, DATA / "hostile", clip_seconds=0.7, min_clip_seconds=0.7)
    assert digests(tmp_path) == digests(root)


def test_rotated_and_anamorphic_pictures_come_upright(hostile):
    root, found, _ = hostile
    shape = {}
    reader = None
    for split in ("train", "test"):
        index = ShardIndex.load(root / "shards", split=split)
        reader = ShardReader(index)
        names = {clip.clip_id: clip.url.removeprefix("folder:") for clip in found.clips}
        shape |= {names[row.clip_id]: (row.height, row.width) for row in index.rows}
    height, width = shape["ok_reference.mp4"]
    assert height < width and shape["rotated_phone.mp4"] == (height, width)
    assert shape["tall.mp4"][0] > shape["tall.mp4"][1]
    assert min(min(sides) for sides in shape.values() if sides != (0, 0)) == 32
    assert reader is not None


@pytest.mark.parametrize("name", ["flash_beep.mp4", "flash_beep_offset.mkv", "flash_beep_vfr.mp4"])
@pytest.mark.parametrize("window", [(0.0, 3.0), (0.2, 2.8), (0.33, 2.93)])
def test_picture_and_sound_stay_in_step(name, window, tmp_path):
    """The source shows a flash with its first frame after the beep: 20 ms later, with VFR 60."""
    params = demo_params().preprocess.model_copy(update={"fps": 50, "audio_hz": 48000})
    path = DATA / "hostile" / name
    item = Cut(path, probe(path), (window,))
    [piece] = cut([item], params, program=find_ffmpeg(None), work=tmp_path)[0].pieces
    video = decode_frames(piece.video[0], range(piece.num_frames), fps=50).mean(axis=(1, 2, 3))
    flashes = (np.flatnonzero((video[1:] > 120) & (video[:-1] <= 120)) + 1) / 50 + window[0]
    loud = np.flatnonzero(np.abs(piece.audio.astype(int)) > 2000) / 48000 + window[0]
    beeps = loud[np.insert(np.diff(loud) > 0.2, 0, True)]
    np.testing.assert_allclose(beeps, [0.5, 1.3, 2.4], atol=0.005)
    late = 0.06 if "vfr" in name else 0.02
    assert (
        len(flashes) == 3 and ((flashes - beeps > -0.011) & (flashes - beeps < late + 0.011)).all()
    )


def test_mangled_lists_are_refused_with_lines(tmp_path):
    data = demo_params().data
    lists = DATA / "hostile" / "manifests"
    with pytest.raises(DataError, match=r"bad_rows.csv:2: .*\n.*bad_rows.csv:5: the same clip"):
        read_urls(lists / "bad_rows.csv", data)
    for name, message in (("empty", "empty"), ("header_only", "no clip"), ("semicolon", "commas")):
        with pytest.raises(DataError, match=message):
            read_urls(lists / f"{name}.csv", data)
    assert len(read_urls(lists / "missing_files.csv", data)) == 3
    assert read_urls(lists / "bom_crlf.csv", data)[0].labels == {"label": "arm wrestling"}
