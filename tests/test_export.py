"""Exported forms hold the same model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import vatt
from tests import tf_bundle
from vatt.errors import MachineError, VattError
from vatt.export import FORMS, export_onnx
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
    assert config["architectures"] == ["Classifier"]
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
