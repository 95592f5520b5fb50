"""Checkpoints as MLflow models: they answer for files and words, and hold no pickle."""

import json
import shutil
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest
import torch

from tests.data.corpus import demo_params
from tests.test_search import FPS, SECONDS, film
from tests.training.tiny import model_params
from vatt import checkpoint
from vatt.errors import DataError
from vatt.model.vatt import VATT, Classifier
from vatt.search import Embedder, embed_file
from vatt.tracking import mlflow

NAMES = {"pretrain": "small", "finetune-action-scratch": "small-action-scratch"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose two trainings have logged their checkpoints, and its settings.

    Its store is in another folder, as an experiment's is.
    """
    torch.set_num_threads(1)
    folder, model = tmp_path_factory.mktemp("project"), model_params()
    demo = demo_params()
    changed = {"workers": 0, "experiment": "small", "mlflow_uri": "sqlite:///store/mlflow.db"}
    params = demo.model_copy(update={"machine": demo.machine.model_copy(update=changed)})
    task = params.finetune.tasks["action"].model_copy(
        update={"frames": model.video.frames, "frame_size": model.video.frame_size, "fps": FPS}
    )
    finetune = params.finetune.model_copy(update={"tasks": {"action": task}, "run": ("action",)})
    params = params.model_copy(update={"finetune": finetune, "model": model})
    film(folder / "red.mp4", (200, 10, 10))
    (folder / "words.txt").write_text("red\t2\nblue\t1\n")
    torch.manual_seed(0)
    checkpoint.save(VATT(model), model, folder / "vatt", vocabulary=folder / "words.txt")
    said = {"modality": "video", "classes": ["up", "down"], "label": "action"}
    classifier = Classifier(model, modality="video", num_classes=2, head_dropout=0.0)
    checkpoint.save(classifier, model, folder / "tuned", extra={"classifier": said})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage, place in zip(NAMES, ("vatt", "tuned"), strict=True):
            with mlflow.run(stage, params, stage_hash=stage) as run:
                run.checkpoint(folder / place)
    return folder, params


def loaded(project, name):
    import mlflow as library

    folder, params = project
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        library.set_tracking_uri(mlflow.store_uri(params.machine))
    try:
        return library.pyfunc.load_model(f"models:/{name}/1")
    finally:
        library.set_tracking_uri(None)


def test_models_are_kept_in_the_project_s_store_alone(project):
    folder, params = project
    assert [file.relative_to(folder) for file in folder.rglob("*.db")] == [Path("store/mlflow.db")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        client = mlflow._connect(params.machine)
    versions = {version.name: version for version in client.search_model_versions()}
    assert versions.keys() == set(NAMES.values())
    for version in versions.values():
        model = client.get_logged_model(version.source.removeprefix("models:/"))
        assert model.source_run_id == version.run_id


def test_models_of_a_project_that_was_moved_lead_to_the_files_that_came_along(project, tmp_path):
    folder, params = project
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    for file in (moved / "store").rglob("MLmodel"):
        file.write_text(file.read_text() + "moved: true\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(moved)
        client = mlflow._connect(params.machine)
    for version in client.search_model_versions():
        model = client.get_logged_model(version.source.removeprefix("models:/"))
        place = client.get_model_version_download_uri(version.name, version.version)
        for kept in (model.artifact_location, place):
            assert kept.startswith((moved / "store").as_uri())
            assert (Path(url2pathname(urlsplit(kept).path)) / "MLmodel").is_file()


def test_a_registered_encoder_embeds_a_video_and_a_sentence(project, tmp_path):
    folder, params = project
    model = loaded(project, "small")
    assert model.metadata.signature.inputs.input_names() == ["video", "audio", "text"]
    answers = model.predict([{"text": "red"}, {"video": str(folder / "red.mp4")}])
    text, video = answers.to_dict("records")
    embedder = Embedder(folder / "vatt")
    np.testing.assert_allclose(text["vt"], embedder.text("red"), atol=1e-6)
    moments = embed_file(
        embedder, folder / "red.mp4", params, work=tmp_path, progress=lambda *_: None
    )
    assert len(moments) == SECONDS * FPS // params.model.video.frames
    mean = np.mean([vector for _, vector in moments], axis=0)
    np.testing.assert_allclose(video["vt"], mean / np.linalg.norm(mean), atol=1e-6)
    assert len(video["va"]) == params.model.va_dim
    assert text["va"] is None or np.isnan(text["va"])


def test_a_registered_classifier_answers_with_labels(project):
    folder, _ = project
    answers = loaded(project, "small-action-scratch").predict([{"video": str(folder / "red.mp4")}])
    (row,) = answers.to_dict("records")
    assert row["label"] == row["labels"][0] and set(row["labels"]) == {"up", "down"}
    assert sum(row["probabilities"]) == pytest.approx(1)
    assert row["probability"] == max(row["probabilities"])


def test_a_row_without_one_input_and_a_missing_file_are_clear_errors(project):
    model = loaded(project, "small")
    with pytest.raises(DataError, match="row 0 has 2 inputs"):
        model.predict([{"text": "red", "video": "x.mp4"}])
    with pytest.raises(DataError, match=r"x\.mp4 is missing"):
        model.predict([{"video": "x.mp4"}])


def test_a_model_holds_no_pickle_and_no_secret(project):
    folder, _ = project
    kept = [file for file in (folder / "store/mlartifacts").rglob("*") if file.is_file()]
    names = {file.name for file in kept}
    assert {"MLmodel", "model.safetensors", "params.json", "input_example.json"} <= names
    assert not [file for file in kept if file.suffix in (".pkl", ".pickle", ".bin", ".pth")]
    for file in (file for file in kept if file.name == "params.json"):
        machine = json.loads(file.read_text())["params"]["machine"]
        assert (machine["proxy"], machine["cookies"]) == (None, None)


@pytest.mark.parametrize(
    "form", ["models:/small/1", "models:/small/latest", "runs:/{}", "runs:/{:.8}"]
)
def test_an_address_leads_to_the_checkpoint(project, form, monkeypatch):
    folder, params = project
    monkeypatch.chdir(folder)
    run_id = json.loads((params.paths.runs / "pretrain.json").read_text())["run_id"]
    found = mlflow.checkpoint_of(params, form.format(run_id))
    weights = Path("vatt", "model.safetensors")
    assert (found / weights.name).read_bytes() == weights.read_bytes()
    assert isinstance(checkpoint.load(found), VATT)


@pytest.mark.parametrize(
    ("address", "why"),
    [("models:/other/1", "cannot be read"), ("runs:/zz", "no stage run begins with 'zz'")],
)
def test_an_address_that_leads_nowhere_says_so(project, address, why, monkeypatch):
    folder, params = project
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match=why):
        mlflow.checkpoint_of(params, address)
