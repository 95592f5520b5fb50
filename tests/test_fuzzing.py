"""Whatever bytes a file of ours holds, its reader reads it or names it: settings, checkpoints,
states, indexes, records, arrays, media, files of other senses, and what DVC left.

The long form runs for VATT_FUZZ_SECONDS seconds a reader:
`VATT_FUZZ_SECONDS=600 pytest -m slow tests/test_fuzzing.py tests/data/sources/test_fuzzing.py`.
"""

import contextlib
import io
import json
import math
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from yt_dlp.networking import Response
from yt_dlp.networking.exceptions import HTTPError

from tests import tf_bundle
from tests.data.corpus import demo_params, make_clip, write_media
from tests.data.loading.test_damage import GOOD
from tests.data.sources.test_demo import write_recording
from tests.fuzzing import Reader, fuzz, fuzz_long, run
from tests.test_architecture import ROOT
from tests.training.tiny import make_model, model_params, pretrain_params
from vatt import checkpoint, export
from vatt.config import DepthStorageParams, MotionStorageParams, TextQualityParams, load_params
from vatt.data.clips.files import ContentHashes
from vatt.data.clips.media import BrokenMediaError, probe
from vatt.data.clips.quality import Languages, improved
from vatt.data.clips.samples import read_index, row_of, write_index
from vatt.data.clips.storage import Storage
from vatt.data.clips.text import read_stop_words
from vatt.data.fetching.fetch import explain
from vatt.data.fetching.network import Guard, Relay
from vatt.data.sources import demo
from vatt.data.sources.subtitles import read_subtitles
from vatt.errors import DataError
from vatt.evaluation.features import load_features
from vatt.files import inside, read_arrays, read_json
from vatt.plan import trial
from vatt.process import OUTCOME, read_outcome
from vatt.release.tf_checkpoint import TensorFlowCheckpoint
from vatt.report.inputs import read_inputs
from vatt.search import FACTS, MOMENTS, VECTORS, Index, Moment
from vatt.search import write_index as write_search_index
from vatt.senses import SENSES, motion
from vatt.tracking.records import MetricValue, Record, Unsent
from vatt.tracking.session import History
from vatt.training.engine import LocalEngine
from vatt.training.state import open_states
from vattctl import dvc

Files = dict[str, bytes]


def files_of(write: Callable[[Path], object]) -> Files:
    """What `write` leaves in an empty folder, by path."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def reader(file: str, files: Mapping[str, bytes], read: Callable[[Path], object]) -> Reader:
    """The reader of one of several files; the others stay good."""
    others = {name: data for name, data in files.items() if name != file}
    return Reader(file, files[file], read, others=others)


# --- checkpoints ----------------------------------------------------------------------------------


@cache
def model_files() -> Files:
    params = model_params()
    return files_of(lambda folder: checkpoint.save(make_model(params), params, folder / "m"))


def read_checkpoint(path: Path) -> None:
    checkpoint.load(path.parent)


@cache
def released_files() -> Files:
    rng = np.random.default_rng(0)
    tensors = {
        f"model/layer-{n}/kernel": rng.normal(size=(n + 1, 3)).astype(np.float32) for n in range(30)
    }
    return files_of(lambda folder: tf_bundle.write(folder / "ckpt", tensors, shards=2))


def read_released(path: Path) -> None:
    released = TensorFlowCheckpoint(path.parent / "ckpt")
    released.check_strings()
    for key, entry in released.entries.items():
        if entry.dtype is not None:
            released.read(key)


def released_block() -> Reader:
    """The records of an index; the table around them is right, with its checksums."""
    files = released_files()
    records = [(b"", tf_bundle.field(1, 2) + tf_bundle.field(3, tf_bundle.field(1, 1)))]
    for n in range(3):
        entry = tf_bundle.entry(1, (n + 1, 3), 0, 0, 12 * (n + 1), 0)
        records.append((b"model/%d" % n, entry))

    def read(path: Path) -> None:
        content = path.read_bytes() + b"\0"
        trailer = struct.pack("<I", tf_bundle.masked(content))
        place = tf_bundle.varint(0) + tf_bundle.varint(len(content) - 1)
        index = tf_bundle.block([(b"\xff" * 8, place)], restart=1) + b"\0"
        footer = place + tf_bundle.varint(len(content) + 4) + tf_bundle.varint(len(index) - 1)
        index += struct.pack("<I", tf_bundle.masked(index))
        end = footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
        (path.parent / "ckpt.index").write_bytes(content + trailer + index + end)
        with pytest.raises(DataError, match=r"ckpt\.(index|data)"):  # the checksums are of others
            read_released(path)

    return Reader("block", tf_bundle.block(records), read, others=files)


# --- settings and the state of a training ---------------------------------------------------------


def read_settings(path: Path) -> None:
    load_params(path)


STEPS = (2, 4)


@cache
def engine() -> LocalEngine:
    made = LocalEngine(torch.nn.Linear(3, 2), pretrain_params().optimizer, "fp32")
    made.update(made.module(torch.ones(1, 3)).sum(), learning_rate=0.1)  # so that it has moments
    return made


def set_weights(step: int) -> None:
    weights = list(engine().module.parameters())
    with torch.no_grad():
        for weight in weights:
            weight.fill_(step)


@cache
def state_files() -> Files:
    def write(folder: Path) -> None:
        with open_states(folder, {"seed": 0}, keep=2) as states:
            for step in STEPS:
                set_weights(step)
                engine().optimizer.param_groups[0]["updates"] = step
                states.save(engine(), step)

    return files_of(write)


def resume(path: Path) -> None:
    """The newest state that is whole, with its own weights."""
    set_weights(-1)
    with open_states(path.parents[1], {"seed": 0}, keep=2) as states:
        step = states.resume(engine())
    assert step in STEPS
    assert all((weight == step).all() for weight in engine().module.parameters())


def read_history(path: Path) -> None:
    history = History(path.parent)
    steps = [row["step"] for row in history.rows()]
    assert steps == sorted(set(steps))


HISTORY = b"".join(b'{"step": %d, "loss": 1.5}\n' % step for step in (1, 2, 3, 2, 3, 4))


# --- what a project holds -------------------------------------------------------------------------


def index_files() -> Files:
    rows = [row_of(GOOD | {"key": key}) for key in "abc"]
    storage = Storage(10, 8000, "h264", "pcm")
    return files_of(lambda folder: write_index(folder / "index.jsonl", rows, storage=storage))


def read_record(path: Path) -> None:
    record = Record.read(path)
    record.unfinished("h")
    record.bury()
    record.begin("pretrain", "r", "h", device="cpu", devices=1)
    record.end("FINISHED")


RECORD = {
    "stage": "pretrain", "run_id": "r", "stage_hash": "h", "began": "x", "starts": 1,
    "seconds": 2.5, "status": "RUNNING", "process": '["here", 4194303, 1.5]', "kwh": 0.5,
}  # fmt: skip


def read_hashes(path: Path) -> None:
    ContentHashes(path).of([path])


def hashes_files() -> Files:
    def write(folder: Path) -> None:
        hashes = ContentHashes(folder / "hashes")
        hashes._known = {f"/media/{n}": ((n, n, n, n), "0" * 64) for n in range(3)}
        hashes._is_new = True
        hashes.save()

    return files_of(write)


def arrays_files() -> Files:
    arrays = {"clip_ids": np.array(["a", "b"]), "video": np.ones((2, 3), np.float32)}
    return files_of(lambda folder: np.savez(folder / "a.npz", **arrays))


def read_npz(path: Path) -> None:
    read_arrays(path, hint="again")


def read_features(path: Path) -> None:
    load_features(path)


def read_object(path: Path) -> None:
    read_json(path, dict, hint="again")


def search_files() -> Files:
    moments = [Moment("a.mp4", 0.0, 1.0), Moment("b.mp4", 1.0, 2.0)]
    vectors = list(np.eye(2, 8, dtype=np.float32))
    return files_of(lambda folder: write_search_index(folder / "i", moments, vectors, {"a": 1}))


def read_search(path: Path) -> None:
    found = Index(path.parent).nearest(np.eye(2, 8, dtype=np.float32)[1], count=1)
    assert found[0].moment == Moment("b.mp4", 1.0, 2.0)


def read_end(path: Path) -> None:
    read_outcome(path.parents[1])


# --- what DVC left --------------------------------------------------------------------------------

STAGE = "  {}:\n    cmd: python -m stages.{}\n    deps:\n    - path: a\n      md5: b\n"
LOCK = "schema: '2.0'\nstages:\n" + "".join(STAGE.format(x, x) for x in ("download", "pretrain"))
USE = '{"read": {"a": [{"pid": 4194303, "cmd": "dvc"}]}, "write": {"b": {"pid": 4194302}}}'


def read_lock(path: Path) -> None:
    dvc.repair(path.parent)
    assert not path.exists() or dvc._stages_in(path.read_text(errors="replace"))


def read_use(path: Path) -> None:
    dvc.repair(path.parents[2])
    assert not path.exists() or isinstance(json.loads(path.read_text()), dict)


def read_changes(path: Path) -> None:
    with inside(path.parents[1]):
        changes = dvc._last_answer("m")
    assert changes is None or all(isinstance(names, list) for names in changes.values())


def read_choice(path: Path) -> None:
    noted = trial._noted(path)
    assert noted is None or noted["micro_batch_size"] is None or noted["micro_batch_size"] > 0


def read_unsent(path: Path) -> None:
    for kept in Unsent.kept_in(path.parents[1]):
        assert kept.run_id


def unsent_files() -> Files:
    values = [MetricValue("loss", 0.5, 1_700_000_000_000, step) for step in range(2)]
    return files_of(lambda folder: Unsent("a", values, {"b": "c"}, "FINISHED").keep(folder))


def read_report(path: Path, *, depth: int) -> None:
    with inside(path.parents[depth]):
        read_inputs(load_params(ROOT / "presets/demo.yaml").paths)


DOWNLOADED = b'{"corpus": {"clips": 2, "splits": {"train": 2}, "sources": {"a": 2}, "hash": "b"}}'
LEDGER = b"".join(
    b'{"clip_id": "%d", "state": "ok", "stage": "download", "reason": "a"}\n' % k for k in range(3)
)
PLAYLIST = b"""#EXTM3U
#EXT-X-TARGETDURATION:4
#EXT-X-KEY:METHOD=AES-128,URI="key.bin",IV=0x1
#EXTINF:4,
../d/0.ts
#EXTINF:4,
https://b.example:8443/1.ts?x=1#y
#EXT-X-ENDLIST
"""

# --- what comes from the network ------------------------------------------------------------------


def read_playlist(path: Path) -> None:
    """A playlist's addresses lead to the relay, all of them, or the playlist is refused."""
    relay = Relay(lambda _: None, Guard(private=False), 1)
    relay._base = "http://127.0.0.1:1"
    with contextlib.suppress(ValueError):
        text = relay._rewritten(path.read_bytes(), "https://a.example/b/c.m3u8", {}).decode()
        named = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
        assert all(line.startswith(relay._base + "/") for line in named)


def read_wait(path: Path) -> None:
    headers = {"Retry-After": path.read_bytes().decode("latin-1")}
    answer = Response(io.BytesIO(), "https://a.example", headers, status=429)
    wait = explain(HTTPError(answer)).wait
    assert 0 <= wait < math.inf


def read_sums(path: Path) -> None:
    assert isinstance(export._read_sums(path.read_bytes(), "https://a.example"), dict)


# --- media, and files next to them ----------------------------------------------------------------

WINDOWS = [(0.0, 0.3), (0.2, 0.5)]
MOTION_CSV = b"t,x,y\n" + b"".join(b"%.2f,%d,0.5\n" % (k / 50, k) for k in range(30))
EGO4D_CSV = (
    b"component_idx,canonical_timestamp_ms,gyro_x,gyro_y,gyro_z,accl_x\n"
    + b"".join(b"0,%.1f,0.5,-1.25e-1,%d,9.81\n" % (20 * k, k) for k in range(30))
)  # fmt: skip


def read_sense(name: str, path: Path) -> None:
    """What is cut is finite and can be decoded; a window without it has a reason."""
    params = demo_params().preprocess.model_copy(
        update={
            "motion": MotionStorageParams(hz=50, channels=2),
            "depth": DepthStorageParams(short_side=16, png_fps=10.0),
        }
    )
    motion._read.cache_clear()
    pieces, said = SENSES[name].cut(path, WINDOWS, params)
    assert len(pieces) == len(WINDOWS) and (said or None not in pieces)
    for piece in filter(None, pieces):
        values = SENSES[name].decode(piece.data, piece.count)
        assert len(values) == piece.count and np.isfinite(values).all()


def depth_files() -> Files:
    def write(folder: Path) -> None:
        write_media(folder / "a.depth.mp4", seconds=0.6, size=(32, 32), sound=False)
        (folder / "a.depth").mkdir()
        for number in range(6):
            picture = np.full((20, 24), 900 * number, np.uint16)
            cv2.imwrite(str(folder / f"a.depth/{number}.png"), picture)

    return files_of(write)


def depth_picture() -> Reader:
    pictures = {name: data for name, data in depth_files().items() if name.endswith(".png")}
    return reader("a.depth/2.png", pictures, lambda path: read_sense("depth", path.parent))


def voice() -> Reader:
    files = files_of(lambda folder: write_recording(folder / "0_ada_7.wav", 400))
    return reader("0_ada_7.wav", files, read_voice)


def read_voice(path: Path) -> None:
    sound = demo.render_voice(demo._recording(path), rng=np.random.default_rng(0))
    assert sound.dtype == np.int16


@cache
def english() -> Languages:
    return Languages(("en",))


def read_said(path: Path) -> None:
    """Captions as candidates: fillers, repeats, languages, scores."""
    found = read_subtitles(path)
    clip = replace(make_clip(1), captions=tuple(found.captions))
    params = TextQualityParams(
        fillers=("um", "uh"), repeat_seconds=2.0, languages=(), least_quality=0.2
    )
    (better,), facts = improved([clip], params)
    assert set(english().only_wanted(better.captions)) <= set(better.captions)
    assert all(0.2 <= (caption.quality or 0.0) <= 1 for caption in better.captions)
    assert facts["kept"] == len(better.captions) <= len(found.captions)


SAID = b"""WEBVTT

00:01.000 --> 00:03.000
um so we put the butter in the pan

00:02.000 --> 00:03.500
so we put the butter in the pan

00:04.000 --> 00:06.000
und dann schneiden wir die Zwiebeln in kleine Stucke
"""


def read_stop(path: Path) -> None:
    try:
        assert all(word == word.strip() for word in read_stop_words(path))
    except DataError as error:
        assert "stop_words" in str(error)


def media_files() -> Files:
    def write(folder: Path) -> None:
        for form in ("mp4", "matroska", "mpegts", "avi"):
            write_media(folder / f"a.{form}", seconds=0.5, form=form)

    return files_of(write)


def media(form: str) -> Reader:
    # The media's own error: the ledger's row names the clip.
    return Reader(form, media_files()[f"a.{form}"], lambda path: try_probe(path))


def try_probe(path: Path) -> None:
    try:
        probe(path)
    except BrokenMediaError as error:
        assert str(error)


CASES: dict[str, Callable[[], Reader]] = {
    "config of a checkpoint": lambda: reader("m/config.json", model_files(), read_checkpoint),
    "weights of a checkpoint": lambda: reader(
        "m/model.safetensors", model_files(), read_checkpoint
    ),
    "index of a released checkpoint": lambda: reader("ckpt.index", released_files(), read_released),
    "records of that index": released_block,
    "tensors of a released checkpoint": lambda: reader(
        "ckpt.data-00001-of-00002", released_files(), read_released
    ),
    "settings": lambda: Reader(
        "params.yaml", (ROOT / "presets/demo.yaml").read_bytes(), read_settings
    ),
    "facts of a state": lambda: reader("step-00000004/meta.json", state_files(), resume),
    "share of a state": lambda: reader("step-00000004/share-00000.pt", state_files(), resume),
    "history of a training": lambda: Reader("history.jsonl", HISTORY, read_history),
    "index of shards": lambda: reader("index.jsonl", index_files(), read_index),
    "record of a run": lambda: Reader("pretrain.json", json.dumps(RECORD).encode(), read_record),
    "cache of hashes": lambda: reader("hashes", hashes_files(), read_hashes),
    "arrays": lambda: reader("a.npz", arrays_files(), read_npz),
    "cached features": lambda: reader("a.npz", arrays_files(), read_features),
    "metrics": lambda: Reader("m.json", b'{"a": [1, 2.5e3], "b": {"c": "d"}}', read_object),
    "facts of a search index": lambda: reader(f"i/{FACTS}", search_files(), read_search),
    "moments of a search index": lambda: reader(f"i/{MOMENTS}", search_files(), read_search),
    "vectors of a search index": lambda: reader(f"i/{VECTORS}", search_files(), read_search),
    "outcome of a stage": lambda: Reader(
        str(OUTCOME), b'{"stage": "a", "code": 3, "message": "b"}', read_end
    ),
    "dvc.lock": lambda: Reader(
        "dvc.lock", LOCK.encode(), read_lock,
        others={".dvc/config": b"", ".vattctl/dvc.lock": LOCK.encode()},
    ),
    "lock of DVC": lambda: Reader(
        ".dvc/tmp/rwlock", USE.encode(), read_use, others={".dvc/config": b""}
    ),
    "last answer of dvc status": lambda: Reader(
        ".vattctl/status.json", b'{"mark": "m", "changes": {"a": ["b: c"]}}', read_changes
    ),
    "choice of a micro-batch": lambda: Reader(
        "micro-batch.json", b'{"key": "a", "micro_batch_size": 4, "kept": 2}', read_choice
    ),
    "unsent metrics": lambda: reader("unsent/a.json", unsent_files(), read_unsent),
    "metrics that a report shows": lambda: Reader(
        "reports/metrics/download.json", DOWNLOADED, partial(read_report, depth=2)
    ),
    "ledger that a report shows": lambda: Reader(
        "data/download.ledger.jsonl", LEDGER, partial(read_report, depth=1)
    ),
    "playlist": lambda: Reader("c.m3u8", PLAYLIST, read_playlist),
    "header of an answer": lambda: Reader("header", b"120", read_wait),
    "checksums of a pushed checkpoint": lambda: Reader(
        "checksums.json", b'{"sha256": {"config.json": "%s"}}' % (b"0" * 64), read_sums
    ),
    "motion": lambda: Reader("a.motion.csv", MOTION_CSV, partial(read_sense, "motion")),
    "motion of Ego4D": lambda: Reader("imu/a.csv", EGO4D_CSV, partial(read_sense, "motion")),
    "depth, video": lambda: reader("a.depth.mp4", depth_files(), partial(read_sense, "depth")),
    "depth, picture": depth_picture,
    "voices": voice,
    "captions, made better": lambda: Reader("a.vtt", SAID, read_said),
    "stop words": lambda: Reader("stop.txt", b"the\nof\n\xc3\xa9t\xc3\xa9\n", read_stop),
    "mp4": lambda: media("mp4"),
    "matroska": lambda: media("matroska"),
    "transport stream": lambda: media("mpegts"),
    "avi": lambda: media("avi"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_mutated_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    run(case, tmp_path, case.seed)
    fuzz(case, tmp_path, examples=40)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_mutations_for_a_long_time(tmp_path: Path, name: str) -> None:
    fuzz_long(name, CASES[name](), tmp_path)


def test_a_history_keeps_every_whole_line(tmp_path: Path) -> None:
    lines = [
        b'\x80"step": 1}',
        b'{"tep": 2}',
        b"[" * 5000,
        b'{"step": 3, "loss": 1.0}',
        b'{"step": 4',
    ]
    (tmp_path / "history.jsonl").write_bytes(b"\n".join(lines))
    history = History(tmp_path)
    history.add(4, {"loss": 2.0})
    assert history.rows() == [{"step": 3, "loss": 1.0}, {"step": 4, "loss": 2.0}]


@pytest.mark.parametrize(
    "change",
    [{"step": 5}, {"step": "4"}, {"step": True}, {"files": {}}, {"files": []}, {"identity": None}],
)
def test_a_state_whose_facts_were_changed_is_not_resumed(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    file = "step-00000004/meta.json"
    content = json.dumps(json.loads(state_files()[file]) | change)
    run(reader(file, state_files(), resume), tmp_path, content.encode())
    with open_states(tmp_path, {"seed": 0}, keep=2) as states:
        assert states.resume(engine()) == 2


@pytest.mark.parametrize("text", ["[]", "{}", '{"status": "RUNNING"}', '{"a": 1', "[" * 100_000])
def test_a_record_of_a_run_that_lacks_its_facts_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "pretrain.json").write_text(text)
    assert Record.read(tmp_path / "pretrain.json").facts == {}
