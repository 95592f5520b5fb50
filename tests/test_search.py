"""A person's own videos: moments embedded, indexed once and found by words."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.data.corpus import demo_params
from tests.test_architecture import ROOT
from tests.training.tiny import model_params
from vatt import checkpoint
from vatt.config import ModelParams
from vatt.errors import DataError, SettingsError
from vatt.model.vatt import VATT, Classifier
from vatt.search import (
    FACTS,
    MOMENTS,
    VECTORS,
    Embedder,
    build_index,
    embed_file,
    files_to_index,
    search,
)  # fmt: skip

SECONDS, FPS = 2, 10


def quiet(done, total):
    """Progress that nobody watches."""


def film(path, colour):
    """Two seconds of one colour that grows brighter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(SECONDS * FPS):
            picture = np.full((64, 64, 3), colour, dtype=np.uint8) + np.uint8(2 * number)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    (folder / "trips").mkdir()
    film(folder / "red.mp4", (200, 10, 10))
    film(folder / "trips" / "blue.mp4", (10, 10, 200))
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    torch.set_num_threads(1)
    folder, model = tmp_path_factory.mktemp("model"), model_params()
    torch.manual_seed(0)
    (folder / "words.txt").write_text("red\t2\nblue\t1\n")
    checkpoint.save(VATT(model), model, folder / "vatt", vocabulary=folder / "words.txt")
    return Embedder(folder / "vatt")


@pytest.fixture(scope="module")
def params():
    demo = demo_params()
    machine = demo.machine.model_copy(update={"workers": 0})
    return demo.model_copy(update={"machine": machine})


@pytest.fixture(scope="module")
def index(embedder, videos, params, tmp_path_factory):
    out = tmp_path_factory.mktemp("kept") / "index"
    build_index(embedder, videos, params, out=out, progress=quiet)
    return out


def test_every_moment_of_every_video_is_indexed_and_the_broken_one_left_out(index):
    facts = json.loads((index / FACTS).read_text())
    assert facts["left_out"] == 1
    assert (facts["videos"], facts["moments"]) == (2, 2 * SECONDS * FPS // 4)  # 4 frames each
    lines = [json.loads(line) for line in (index / "moments.jsonl").read_text().splitlines()]
    spans = sorted((one["start"], one["end"]) for one in lines if one["file"] == "trips/blue.mp4")
    np.testing.assert_allclose(spans, [(0.4 * k, 0.4 * k + 0.4) for k in range(5)], atol=1e-9)


def test_hits_are_the_cosines_that_the_model_gives(index, embedder, videos, params, tmp_path):
    hits = search(embedder, index, "red", count=99)
    assert [hit.cosine for hit in hits] == sorted((hit.cosine for hit in hits), reverse=True)
    words = embedder.text("red")
    moments = embed_file(embedder, videos / "red.mp4", params, work=tmp_path, progress=quiet)
    expected = {moment.start: float(vector @ words) for moment, vector in moments}
    found = {hit.moment.start: hit.cosine for hit in hits if hit.moment.file == "red.mp4"}
    assert found.keys() == expected.keys()
    for start, cosine in expected.items():
        assert found[start] == pytest.approx(cosine, abs=1e-5)


def test_a_file_without_a_moment_is_named_with_the_reason(embedder, videos, params, tmp_path):
    with av.open(str(tmp_path / "short.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width = stream.height = 64
        picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), dtype=np.uint8), format="rgb24")
        container.mux([*stream.encode(picture), *stream.encode()])
    for file, why in ((tmp_path / "short.mp4", "too-short"), (videos / "broken.mp4", "corrupt")):
        work = tmp_path / file.stem
        with pytest.raises(DataError, match=f"{file} cannot be embedded: {why}"):
            embed_file(embedder, file, params, work=work, progress=quiet)


def test_an_index_is_made_again_only_when_something_has_changed(embedder, videos, params, index):
    before = (index / "vectors.npy").stat().st_mtime_ns
    build_index(embedder, videos, params, out=index, progress=quiet)
    assert (index / "vectors.npy").stat().st_mtime_ns == before
    assert files_to_index(embedder, videos, params, out=index) == 0
    film(videos / "green.mp4", (10, 200, 10))
    assert files_to_index(embedder, videos, params, out=index) == 4
    facts = build_index(embedder, videos, params, out=index, progress=quiet)
    (videos / "green.mp4").unlink()
    assert facts["videos"] == 3


def test_a_checkpoint_says_how_fast_it_was_shown_pictures(embedder, videos, params, tmp_path):
    checkpoint.save(
        embedder.model,
        embedder.model.params,
        tmp_path / "slow",
        extra={"clips": {"fps": 5, "stored_fps": 5, "short_side": 64, "audio_hz": 16000}},
    )
    moments = embed_file(
        Embedder(tmp_path / "slow"), videos / "red.mp4", params, work=tmp_path, progress=quiet
    )
    seconds = [moment.end - moment.start for moment, _ in moments]
    assert seconds == pytest.approx([0.8, 0.8, 0.4])  # 4 frames; the project's settings say 10 fps


def test_words_that_nobody_knows_and_checkpoints_that_do_not_fit_are_clear_errors(
    embedder, index, tmp_path
):
    with pytest.raises(DataError, match="no word of 'green cat' is in"):
        embedder.text("green cat")
    model = model_params()
    torch.manual_seed(1)
    checkpoint.save(VATT(model), model, tmp_path / "other")
    other = Embedder(tmp_path / "other")
    with pytest.raises(DataError, match=r"no vocabulary\.txt"):
        other.text("red")
    with pytest.raises(DataError, match="made with another checkpoint"):
        search(other, index, "red", count=1)
    task = {"classifier": {"modality": "video", "classes": ["a", "b"]}}
    classifier = Classifier(model, modality="video", num_classes=2, head_dropout=0.0)
    checkpoint.save(
        classifier, ModelParams.model_validate(model), tmp_path / "classifier", extra=task
    )
    with pytest.raises(SettingsError, match="holds a classifier"):
        Embedder(tmp_path / "classifier")


def test_the_notebook_searches_a_folder_and_plots_similarities(
    videos, embedder, tmp_path, monkeypatch
):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    root = Path(__file__).parents[1]
    (tmp_path / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    for name, value in {
        "VIDEOS": str(videos),
        "CHECKPOINT": str(embedder.folder),
        "QUERIES": "red, blue",
        "PYTHONPATH": str(root),
        "IPYTHONDIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(root / "docs/notebooks/search-your-videos.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "moments of 2 videos; 1 left out" in printed and "2.0 s  red.mp4" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_the_example_of_the_python_page_finds_the_moments(
    embedder, videos, tmp_path, monkeypatch, capsys
):
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    example = next(part for part in text.split("```") if "build_index" in part)
    shutil.copytree(embedder.folder, tmp_path / "runs/checkpoints/pretrained")
    shutil.copytree(videos, tmp_path / "videos")
    shutil.copy(ROOT / "presets/demo.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    exec(example.removeprefix("python").replace("a dog jumps", "red"), {})
    assert "red.mp4 0.0 to 0.4 s" in capsys.readouterr().out


@pytest.mark.parametrize("name", [FACTS, MOMENTS, VECTORS])
def test_a_damaged_index_is_named_and_made_again(embedder, videos, params, tmp_path, name):
    folder = tmp_path / "index"
    build_index(embedder, videos, params, out=folder, progress=quiet)
    hits = search(embedder, folder, "red", count=3)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=f"{name} is (damaged|not what)"):
        search(embedder, folder, "red", count=1)
    build_index(embedder, videos, params, out=folder, progress=quiet)
    assert search(embedder, folder, "red", count=3) == hits
