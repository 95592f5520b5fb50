"""Exported forms hold the same model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from safetensors import safe_open

import vatt
from tests import tf_bundle
from tests.training.tiny import model_params
from vatt import checkpoint
from vatt.errors import DataError, MachineError, VattError
from vatt.export import FORMS, export_onnx, pull, push
from vatt.model.vatt import VATT
from vatt.release.convert import import_checkpoint
from vatt.release.recognise import ONLY
from vattctl.cli import main

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audio") / "checkpoint"
    prefix = GOLDEN / "ckpt_ft_audio" / "ckpt-1"
    import_checkpoint(prefix, out, heads={ONLY: 3}, source="here")
    return out


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ut")
    tf_bundle.write(folder / "ckpt-5", tf_bundle.golden_tensors(np.load(GOLDEN / "ut_weights.npz")))
    words = folder / "words.txt"
    words.write_text("one\ntwo\n")
    import_checkpoint(
        folder / "ckpt-5", folder / "out", heads={ONLY: 3}, source="here", vocabulary=words
    )
    return folder / "out"


@pytest.mark.parametrize("form", ["safetensors", "huggingface-folder"])
def test_a_folder_form_loads_as_the_same_model(form: str, pretrained: Path, tmp_path: Path) -> None:
    FORMS[form](pretrained, tmp_path / "out")
    text = torch.randint(0, 128, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    ours, theirs = (vatt.load(folder)(text=text) for folder in (pretrained, tmp_path / "out"))
    torch.testing.assert_close(theirs.text_vt, ours.text_vt, rtol=0, atol=0)
    assert (tmp_path / "out" / "vocabulary.txt").read_text() == "one\ntwo\n"
    with safe_open(str(tmp_path / "out" / "model.safetensors"), "pt") as file:
        written = json.loads(file.metadata()["config"])
    assert written == json.loads((pretrained / "config.json").read_text())


def test_a_hugging_face_folder_names_classes_and_inputs(classifier: Path, tmp_path: Path) -> None:
    FORMS["huggingface-folder"](classifier, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["VattForClassification"]
    assert config["id2label"]["6"] == "6" and config["label2id"]["6"] == 6
    inputs = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert inputs["audio"]["samples"] == 1024
    assert "classifier of audio into 7 classes" in (tmp_path / "out" / "README.md").read_text()


def test_an_onnx_graph_gives_the_golden_logits(classifier: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    comparisons = export_onnx(classifier, tmp_path / "out")
    assert {comparison.clips for comparison in comparisons} == {1, 3}
    assert all(comparison.difference < 1e-5 for comparison in comparisons)
    arrays = np.load(GOLDEN / "ft_audio_eval.npz")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "out" / "audio.onnx"), providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(["logits"], {"audio": arrays["in/audio"][..., 0]})
    averaged = logits.reshape(2, 2, 7).mean(1)
    np.testing.assert_allclose(averaged, arrays["out/logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx_graphs_have_the_answers_of_experts(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    experts = {"number": 4, "top_k": 2, "capacity": 0.7}
    params = model_params(backbone="agnostic", experts=experts)
    checkpoint.save(checkpoint.build(params).eval(), params, tmp_path / "model")
    comparisons = export_onnx(tmp_path / "model", tmp_path / "out")
    assert {one.graph for one in comparisons} == {"video.onnx", "audio.onnx", "text.onnx"}


@pytest.mark.slow
def test_onnx_graphs_of_a_pretrained_model_take_any_number_of_clips(
    pretrained: Path, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main_code("export", str(pretrained), "--to", "onnx", "--out", str(tmp_path / "o")) == 0
    graphs = {path.name for path in (tmp_path / "o").glob("*.onnx")}
    assert graphs == {"video.onnx", "audio.onnx", "text.onnx"}
    session = onnxruntime.InferenceSession(str(tmp_path / "o" / "text.onnx"))
    text = np.arange(40, dtype=np.int64).reshape(5, 8)
    (embedded,) = session.run(["text_vt"], {"text": text})
    ours = vatt.load(pretrained)(text=torch.from_numpy(text)[None]).text_vt[0].detach().numpy()
    np.testing.assert_allclose(embedded, ours, rtol=1e-4, atol=1e-6)


def test_a_graph_that_differs_is_not_written(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("vatt.export.TOLERANCE", 0.0)
    with pytest.raises(VattError, match=r"logits of audio\.onnx is"):
        export_onnx(classifier, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MachineError, match=r"vattctl\[export\]"):
        export_onnx(classifier, tmp_path / "out")


def main_code(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    return int(ended.value.code or 0)


def test_the_command_reports_and_refuses_to_overwrite(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ("export", str(classifier), "--to", "safetensors", "--out", str(tmp_path / "out"))
    assert main_code(*call, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["version"] == 1 and set(answer["files"]) == {"config.json", "model.safetensors"}
    assert main_code(*call) == 2
    assert main_code(*call, "--force") == 0
    own = ("--out", str(classifier), "--force")
    assert main_code("export", str(classifier), "--to", "onnx", *own) == 2
    assert (classifier / "model.safetensors").exists()


# --- transformers ---------------------------------------------------------------------------------

FAR_AWAY = """
import sys
sys.modules["vatt"] = sys.modules["vattctl"] = None  # as where vattctl is not installed
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(dict(model(**inputs)), sys.argv[3])
"""


def far_away(folder: Path, inputs: dict[str, torch.Tensor], work: Path) -> dict[str, torch.Tensor]:
    """What AutoModel makes of `inputs`, in a process that cannot import vattctl."""
    pytest.importorskip("transformers")
    torch.save(inputs, work / "inputs.pt")
    call = [sys.executable, "-c", FAR_AWAY, folder, work / "inputs.pt", work / "outputs.pt"]
    environment = os.environ | {"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=work)
    assert done.returncode == 0, done.stderr
    return torch.load(work / "outputs.pt", weights_only=True)


@pytest.mark.parametrize("backbone", ["specific", "agnostic"])
def test_automodel_gives_our_numbers_without_vattctl(backbone: str, tmp_path: Path) -> None:
    params = model_params(backbone=backbone)
    torch.manual_seed(0)
    checkpoint.save(VATT(params), params, tmp_path / "ours")
    FORMS["huggingface-folder"](tmp_path / "ours", tmp_path / "theirs")
    inputs = {
        "video": torch.rand(2, 4, 16, 16, 3) * 2 - 1,
        "audio": torch.rand(2, params.audio.samples) * 2 - 1,
        "text": torch.tensor([[[5, 7, 0, 0]], [[1, 2, 3, 4]]]),
    }
    theirs = far_away(tmp_path / "theirs", inputs, tmp_path)
    with torch.no_grad():
        ours = vatt.load(tmp_path / "ours")(**inputs)
    assert theirs.keys() == ours.named().keys()
    for name, value in theirs.items():
        torch.testing.assert_close(value, getattr(ours, name), rtol=0, atol=1e-6)


def test_automodel_loads_a_classifier_with_its_labels(classifier: Path, tmp_path: Path) -> None:
    FORMS["huggingface-folder"](classifier, tmp_path / "out")
    inputs = torch.rand(2, 1024) * 2 - 1
    labels = torch.tensor([1, 0])
    theirs = far_away(tmp_path / "out", {"inputs": inputs, "labels": labels}, tmp_path)
    with torch.no_grad():
        ours = vatt.load(classifier)(inputs)
    torch.testing.assert_close(theirs["logits"], ours, rtol=0, atol=1e-6)
    wanted = torch.nn.functional.cross_entropy(ours, labels)
    torch.testing.assert_close(theirs["loss"], wanted)


# --- addresses ------------------------------------------------------------------------------------


def test_a_pushed_checkpoint_is_pulled_and_loaded_by_its_address(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VATT_CACHE", str(tmp_path / "cache"))
    address = f"file://{tmp_path}/there/model"
    assert main_code("push", str(pretrained), address) == 0
    assert main_code("pull", address, "--out", str(tmp_path / "here")) == 0
    for file in pretrained.iterdir():
        assert (tmp_path / "here" / file.name).read_bytes() == file.read_bytes()
    text = torch.ones(1, 1, 8, dtype=torch.long)
    ours, theirs = (vatt.load(place)(text=text).text_vt for place in (pretrained, address))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    assert (
        vatt.vocabulary(address).encode("two", 1)[0]
        == vatt.vocabulary(pretrained).encode("two", 1)[0]
    )


def test_a_checkpoint_is_loaded_from_a_web_server_and_again_when_that_is_away(
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("VATT_CACHE", str(tmp_path / "cache"))
    push(pretrained, f"file://{tmp_path}/model")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/model"
        first = vatt.load(address)
        server.shutdown()
    again = vatt.load(address)
    assert "the copy of an earlier time is used" in caplog.text
    text = torch.ones(1, 1, 8, dtype=torch.long)
    torch.testing.assert_close(again(text=text).text_vt, first(text=text).text_vt, rtol=0, atol=0)


def test_a_push_replaces_what_was_there_and_the_cache_follows(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VATT_CACHE", str(tmp_path / "cache"))
    address, params = f"file://{tmp_path}/there", model_params()
    checkpoint.save(VATT(params), params, tmp_path / "other")
    push(tmp_path / "other", address)
    assert isinstance(vatt.load(address), VATT)
    before = vatt.load(address).state_dict()
    push(pretrained, address)
    assert vatt.load(address).state_dict().keys() != before.keys()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "its sha256 differs"),
        (lambda f: (f / "checksums.json").write_text("["), "cannot be read"),
        (lambda f: (f / "checksums.json").write_text('{"sha256": {"../x": "1"}}'), "name in it"),
        (lambda f: (f / "checksums.json").write_text('{"sha256": {}}'), "push has not ended"),
        (lambda f: (f / "config.json").unlink(), "has no checkpoint"),
    ],
)
def test_a_damaged_address_is_refused_and_nothing_is_written(
    damage: Callable[[Path], object], message: str, pretrained: Path, tmp_path: Path
) -> None:
    push(pretrained, f"file://{tmp_path}/there")
    damage(tmp_path / "there")
    with pytest.raises(DataError, match=message):
        pull(f"file://{tmp_path}/there", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_unknown_kind_of_address_is_a_wrong_option(pretrained: Path) -> None:
    assert main_code("push", str(pretrained), "nothing://there") == 2
    assert main_code("pull", "zip://a::file:///b", "--out", "x") == 2


def test_a_model_card_describes_the_run_of_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, params = Path(__file__).parents[1], model_params()
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    checkpoint.save(VATT(params), params, tmp_path / "runs/checkpoints/pretrained")
    metrics = tmp_path / "reports/metrics"
    metrics.mkdir(parents=True)
    corpus = {"clips": 9, "splits": {"train": 6, "test": 3}, "sources": {"folder": 9}, "hash": "ab"}
    (metrics / "download.json").write_text(json.dumps({"corpus": corpus}))
    r10 = {"value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1, "n": 100}
    names = ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "class_at_1")
    found = {"retrieval": {"pretrained": {"text_to_video": dict.fromkeys(names, r10)}}}
    (metrics / "evaluate.json").write_text(json.dumps(found))
    call = ("export", "runs/checkpoints/pretrained", "--to", "huggingface-folder", "--out", "hf")
    assert main_code(*call, "--licence", "cc-by-4.0") == 0
    card = Path("hf/README.md").read_text()
    assert "9 clips of folder (9)" in card and "50.0 % (40.0 – 60.0)" in card
    assert "license: cc-by-4.0" in card and "3 layers" not in card
