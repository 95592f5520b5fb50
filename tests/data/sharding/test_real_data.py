"""Real and hostile files go the ordinary way and end in the state they should."""

import json
import random
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from tests.data.corpus import TEST_DATA, demo_params, make_clip, needs_data
from tests.data.loading.test_batches import SAMPLING
from tests.data.sharding.test_shards import write
from tests.test_stages import new_project, sets, vattctl
from vatt.config import Params, load_params
from vatt.data.clips.ledger import Entry, read_ledger
from vatt.data.clips.manifest import read_manifest
from vatt.data.clips.media import BrokenMediaError, find_ffmpeg, probe
from vatt.data.clips.storage import decode_frames, whole
from vatt.data.fetching.download import download
from vatt.data.loading.batches import eval_batches
from vatt.data.loading.reader import ShardIndex, ShardReader
from vatt.data.sharding.cut import Cut, cut
from vatt.data.sources.folder import Found, scan
from vatt.data.sources.urls import read_urls
from vatt.errors import DataError

pytestmark = needs_data
DATA = Path(TEST_DATA or "/nowhere")


def ingest(
    root: Path, folder: Path, params: Params | None = None, **preprocess
) -> tuple[Found, dict[str, Entry]]:
    """Folder -> shards; the ledger by the file's name."""
    params = params or demo_params(source="folder", location=folder, require=(), min_clips=1)
    found = scan(folder, params.data, opens=True)
    machine = params.machine.model_copy(update={"workers": 2})
    ledger = root / "download.jsonl"
    download(found.clips, params.data, machine, media=root / "media", ledger=ledger)
    write(
        root, found.clips, read_ledger(ledger), params=params, workers=2,
        max_failed_share=0.9, **preprocess,
    )  # fmt: skip
    states = read_ledger(root / "ledger.jsonl")
    return found, {clip.url.removeprefix("folder:"): states[clip.clip_id] for clip in found.clips}


CUT = {"clip_seconds": 0.7, "min_clip_seconds": 0.7, "short_side": 32, "samples_per_shard": 4}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Path, dict[str, Entry]]:
    """The folder of hostile files, by the commands that a person gives; the ledger by file."""
    project = new_project(tmp_path_factory.mktemp("hostile"))
    vattctl(project, "ingest", str(DATA / "hostile"))
    settings = {f"preprocess.{name}": value for name, value in CUT.items()}
    vattctl(project, "preprocess", *sets({"data.require": [], **settings}))
    states = read_ledger(project / "data" / "preprocess.ledger.jsonl")
    clips = list(read_manifest(project / "data" / "manifest.jsonl"))
    return project / "data", {c.url.removeprefix("folder:"): states[c.clip_id] for c in clips}


def test_all_fifty_real_clips_reach_the_shards(tmp_path):
    _, states = ingest(tmp_path, DATA / "clips")
    listed = json.loads((DATA / "clips" / "manifest.json").read_text())
    assert set(states) == {item["file"] for item in listed} and len(states) == 50
    assert {entry.state for entry in states.values()} == {"ok"}
    for item in listed:
        assert ("audio" in states[item["file"]].has) >= item["sound"]
    assert "text" in states["friday.mp4"].has and "text" in states["nasa_13013.mp4"].has
    index = ShardIndex.load(tmp_path / "shards", split="train")
    batches = list(eval_batches(index, SAMPLING, batch_size=16))
    assert sum(len(batch.clip_ids) for batch in batches) == len(index.rows) > 300


def expected() -> dict[str, str]:
    """What should become of each medium in the folder."""
    listed = json.loads((DATA / "hostile" / "expected.json").read_text())
    others = ("captions", "manifest", "dir")
    return {item["file"]: item["expect"] for item in listed if item["kind"] not in others}


REMIXED = "its channels cancel each other: another mix was taken"  # in its first second, they do


def test_every_hostile_file_ends_as_it_should(hostile):
    _, states = hostile
    wanted = expected()
    assert {name for name, what in wanted.items() if what in ("ignore", "ok-if-named")} == {
        "video.mp4.part", "no_extension"
    }  # fmt: skip
    assert wanted.keys() - states.keys() == {"video.mp4.part", "no_extension"}
    assert states.keys() <= wanted.keys()
    wrong = [
        (name, wanted[name], entry)
        for name, entry in states.items()
        if not {
            "ok": entry.state == "ok" and "video" in entry.has and entry.reason in ("", REMIXED),
            "ok-video-only": entry.state == "ok" and entry.has == ("video",),
            "ok-audio-only": entry.state == "ok" and entry.has == ("audio",),
            "skip": entry.state == "corrupt" and bool(entry.reason),
            "ok-or-skip": (entry.state == "too-short") == bool(entry.reason),
            "partial-or-skip": entry.state in ("ok", "too-short") and bool(entry.reason),
        }[wanted[name]]
    ]
    assert wrong == []
    assert states["zero_length.mp4"].reason == "empty file"
    assert states["one_frame.mp4"].reason == "0.03 s of 0.7 s"
    assert states["one_frame_with_sound.mp4"].samples == 4  # a picture that stays
    assert states["truncated_faststart.mp4"].samples == 2  # of 4: what is there, nothing repeated
    assert "partial file" in states["truncated_faststart.mp4"].reason
    assert "complaints: " in states["corrupt_bytes.mp4"].reason
    assert states["truncated.wav"].reason == "0.49 s of 0.7 s"


def test_nothing_is_left_behind_and_the_bytes_are_the_same_twice(hostile, tmp_path):
    data, states = hostile
    assert [path.name for path in data.iterdir() if path.name.endswith((".work", ".tmp"))] == []
    _, again = ingest(tmp_path, DATA / "hostile", load_params(data.parent / "params.yaml"))
    assert again == states
    shards = {path.name: path.read_bytes() for path in sorted((data / "shards").glob("*.tar"))}
    assert len(shards) > 20
    assert shards == {path.name: path.read_bytes() for path in (tmp_path / "shards").glob("*.tar")}
    for name in ("index.jsonl", "vocabulary.txt"):
        assert (data / "shards" / name).read_bytes() == (tmp_path / "shards" / name).read_bytes()


@pytest.mark.slow
def test_damaged_files_neither_crash_nor_leak(tmp_path):
    """Real files with bytes changed, cut off or doubled: pieces or a reason, nothing else."""
    draw = random.Random(0)
    params = demo_params().preprocess
    files = [path for path in sorted((DATA / "hostile").glob("*.*")) if path.is_file()]
    process, kept = psutil.Process(), 0
    handles, others = process.num_fds(), process.children()  # the server of workers, for one
    for number in range(300):
        data = bytearray(draw.choice(files).read_bytes())
        for _ in range(draw.choice((1, 10, 100)) if data else 0):
            data[draw.randrange(len(data))] = draw.randrange(256)
        where = draw.randrange(len(data) + 1)
        data = (data, data[:where], data[where:], data + data)[number % 4]
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(data)
        try:
            item = Cut(path, probe(path), ((0.0, 0.5), (0.5, 1.0)))
        except BrokenMediaError:
            continue
        [result] = cut([item], params, program=find_ffmpeg(None), work=tmp_path)
        kept += any(piece.num_frames for piece in result.pieces)
    assert kept > 30 and process.num_fds() == handles
    assert process.children() == others


def test_a_manifest_may_name_a_file_without_an_ending(tmp_path):
    clip = make_clip(0, end=None, captions=())
    clip = replace(clip, url="folder:no_extension")
    params = demo_params(source="folder", location=DATA / "hostile", require=())
    ledger = tmp_path / "download.jsonl"
    download([clip], params.data, params.machine, media=tmp_path / "media", ledger=ledger)
    write(tmp_path, [clip], read_ledger(ledger), params=params, min_clip_seconds=0.7)
    assert read_ledger(tmp_path / "ledger.jsonl")[clip.clip_id].has == ("video", "audio")


def first_samples(data: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Picture and sound of every file's first sample."""
    clips = read_manifest(data / "manifest.jsonl")
    names = {clip.clip_id: clip.url.removeprefix("folder:") for clip in clips}
    found = {}
    for split in ("train", "test"):
        index = ShardIndex.load(data / "shards", split=split)
        reader = ShardReader(index)
        for row in index.rows:
            if row.video is None or names[row.clip_id] in found:
                continue
            wave = reader.audio(row, 0, row.num_samples) if row.audio else np.zeros(0, np.int16)
            found[names[row.clip_id]] = reader.frames(row, range(row.num_frames)), wave
        reader.close()
    return found


def test_odd_pictures_come_upright_in_shape_and_in_their_colours(hostile):
    seen = first_samples(hostile[0])
    reference = seen["ok_reference.mp4"][0].astype(int)
    assert reference.shape == (7, 32, 42, 3)
    assert seen["tall.mp4"][0].shape[1] > 32 and seen["anamorphic.mp4"][0].shape[2] > 80
    like_it = (
        "rotated_phone.mp4", "odd_size.mp4", "start_offset.mkv", "broadcast.ts", "vfr.mp4",
        "fragmented.mp4", "grey.mkv", "anim.gif", "two_audio_tracks.mkv", "audio_starts_late.mkv",
    )  # fmt: skip
    for name in like_it:
        video = seen[name][0].astype(int)
        assert video.shape == reference.shape, name
        assert np.abs(video - reference).mean() < 6, name
    film = seen["vp9_opus.webm"][0].astype(int)
    for name in ("hevc_10bit.mp4", "av1_opus.mkv", "xvid_mp3.avi", "theora.ogv", "mpeg1.mpg"):
        assert np.abs(seen[name][0].astype(int) - film).mean() < 9, name


def test_odd_sound_is_mixed_chosen_and_padded_as_it_should(hostile):
    heard = {name: wave.astype(float) for name, (_, wave) in first_samples(hostile[0]).items()}
    reference = heard["ok_reference.mp4"]
    assert heard["audio_starts_late.mkv"].max() == 0  # it begins a second later
    for name in ("start_offset.mkv", "two_audio_tracks.mkv", "one_side_sound.mp4"):
        assert likeness(heard[name], reference) > 0.97, name
    assert np.abs(heard["one_side_sound.mp4"]).max() > 0.4 * np.abs(reference).max()
    for name in ("surround51.mp4", "stereo_96k.mkv"):
        assert likeness(heard[name], heard["mono_8k.mp4"]) > 0.97, name


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """The correlation of two sounds, up to a millisecond apart."""
    return max(np.corrcoef(np.roll(one, k), other)[0, 1] for k in range(-8, 9))


def shown(path: Path) -> tuple[list[tuple[float, float]], np.ndarray]:
    """When the source's picture is white by its own stamps, and when its beeps begin."""
    with av.open(str(path)) as container:
        frames = [
            (f.time, f.to_ndarray(format="gray").mean() > 120) for f in container.decode(video=0)
        ]
    with av.open(str(path)) as container:
        sound = [(f.time, f.to_ndarray().mean(axis=0)) for f in container.decode(audio=0)]
        hz = container.streams.audio[0].rate
    zero = frames[0][0]
    changes = [k for k in range(1, len(frames)) if frames[k][1] != frames[k - 1][1]]
    times = [frames[k][0] - zero for k in changes]
    loud = np.flatnonzero(np.abs(np.concatenate([wave for _, wave in sound])) > 0.06) / hz
    beeps = loud[np.insert(np.diff(loud) > 0.2, 0, True)] + sound[0][0] - zero
    return list(zip(times[::2], times[1::2], strict=True)), beeps


@pytest.mark.parametrize("name", ["flash_beep.mp4", "flash_beep_offset.mkv", "flash_beep_vfr.mp4"])
@pytest.mark.parametrize("fps", [10, 25, 50])
def test_picture_and_sound_keep_the_time_of_the_source(name, fps, tmp_path):
    """Each stored frame was on the screen within 20 ms of its time, each beep within 5 ms.

    So they are in step as far as the source is: its flashes set in 0 to 60 ms after the beeps,
    with the frame that its own rate allows.
    """
    params = demo_params().preprocess.model_copy(update={"fps": fps, "audio_hz": 48000})
    path = DATA / "hostile" / name
    white, beeps = shown(path)
    np.testing.assert_allclose(beeps, [0.5, 1.3, 2.4], atol=0.005)
    windows = ((0.0, 3.0), (0.2, 2.8), (0.33, 2.93))
    item = Cut(path, probe(path), windows)
    [result] = cut([item], params, program=find_ffmpeg(None), work=tmp_path)
    for (start, _), piece in zip(windows, result.pieces, strict=True):
        video = whole(
            decode_frames(piece.video[0], range(piece.num_frames), fps=fps), piece.num_frames
        )
        for number, is_white in enumerate(video.mean(axis=(1, 2, 3)) > 120):
            time = start + number / fps
            near = [begin < time + 0.02 and end > time - 0.02 for begin, end in white]
            inside = [begin <= time - 0.02 and end >= time + 0.02 for begin, end in white]
            assert any(near) if is_white else not any(inside), time
        loud = np.flatnonzero(np.abs(piece.audio.astype(int)) > 2000) / 48000 + start
        heard = loud[np.insert(np.diff(loud) > 0.2, 0, True)]
        np.testing.assert_allclose(heard, beeps, atol=0.005)


def test_mangled_lists_are_refused_with_lines(caplog):
    data = demo_params().data
    lists = DATA / "hostile" / "manifests"
    with pytest.raises(DataError, match=r"bad_rows.csv:2: .*\n.*bad_rows.csv:5: the same clip"):
        list(read_urls(lists / "bad_rows.csv", data))
    for name, message in (("empty", "empty"), ("header_only", "no clip")):
        with pytest.raises(DataError, match=message):
            list(read_urls(lists / f"{name}.csv", data))
    assert len(list(read_urls(lists / "semicolon.csv", data))) == 1
    assert "semicolon.csv: the fields are separated by semicolons" in caplog.text
    assert len(list(read_urls(lists / "missing_files.csv", data))) == 3
    assert next(read_urls(lists / "bom_crlf.csv", data)).labels == {"label": "arm wrestling"}
