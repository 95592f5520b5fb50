"""A checkpoint's folder alone rebuilds the model, or says why not."""

import json
import subprocess
import sys

import pytest
import torch

import vatt
from tests.model.small import small_inputs, small_params, spectrogram_params
from vatt import checkpoint
from vatt.errors import DataError
from vatt.model.vatt import VATT, Classifier


@pytest.mark.parametrize("backbone", ["specific", "agnostic"])
@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_a_saved_model_answers_the_same_after_loading(tmp_path, recipe, backbone):
    params = small_params(recipe=recipe, backbone=backbone)
    model = checkpoint.build(params).eval()
    model.heads.video_to_va[0].norm.running_mean += 1
    checkpoint.save(model, params, tmp_path / "model", extra={"step": 7})
    loaded = vatt.load(tmp_path / "model")
    assert not loaded.training
    assert loaded.params == params
    assert checkpoint.load_config(tmp_path / "model")["step"] == 7
    left, right = model(*small_inputs()), loaded(*small_inputs())
    for name in ("video_va", "audio_va", "video_vt", "text_vt", "video_features"):
        assert torch.equal(getattr(left, name), getattr(right, name))
    if backbone == "agnostic":
        assert loaded.video.encoder is loaded.text.encoder


def test_a_state_dict_is_saved_as_well_as_a_model(tmp_path):
    params = small_params(backbone="agnostic")
    weights = {name: value.clone() for name, value in VATT(params).state_dict().items()}
    checkpoint.save(weights, params, tmp_path / "model")
    loaded = vatt.load(tmp_path / "model").state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.mark.parametrize("make", [small_params, spectrogram_params])
def test_a_classifier_comes_back_with_its_classes(tmp_path, make):
    params = make()
    model = Classifier(params, modality="audio", num_classes=3, head_dropout=0.5).eval()
    task = {"classifier": {"modality": "audio", "classes": ["a", "b", "c"]}}
    checkpoint.save(model, params, tmp_path / "model", extra=task)
    loaded = vatt.load(tmp_path / "model")
    audio = torch.rand(2, 64) if make is small_params else torch.rand(2, 32, 20)
    assert torch.equal(loaded(audio), model(audio))
    assert checkpoint.load_config(tmp_path / "model")["classifier"]["classes"] == ["a", "b", "c"]


def test_the_vocabulary_goes_along(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("a\nb\n")
    params = small_params()
    checkpoint.save(VATT(params), params, tmp_path / "model", vocabulary=words)
    assert (tmp_path / "model" / checkpoint.VOCABULARY).read_text() == "a\nb\n"


def test_weights_that_do_not_fit_are_named(tmp_path):
    params = small_params()
    weights = VATT(params).state_dict()
    weights["nobody"] = weights.pop("video.agg_token")
    weights["audio.encoder.norm.weight"] = torch.ones(5)
    with pytest.raises(DataError) as error:
        checkpoint.load_weights(VATT(params), weights)
    for part in ("video.agg_token", "nobody", "audio.encoder.norm.weight", "(5,) instead of (12,)"):
        assert part in str(error.value)


def test_tables_of_another_size_are_resized_on_loading():
    small, large = VATT(small_params()).eval(), small_params().model_copy()
    video = large.video.model_copy(update={"frames": 6, "frame_size": 48})
    model = VATT(large.model_copy(update={"video": video})).eval()
    checkpoint.load_weights(model, small.state_dict())
    clip = torch.rand(1, 6, 48, 48, 3)
    torch.testing.assert_close(model(video=clip).video_va, small(video=clip).video_va)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", None),
        ("config.json", "{"),
        ("config.json", "{}"),
        ("config.json", '{"model": {"recipe": "other"}}'),
        ("model.safetensors", None),
        ("model.safetensors", "garbage"),
    ],
)
def test_a_broken_folder_is_one_clear_error(tmp_path, name, text):
    params = small_params()
    checkpoint.save(VATT(params), params, tmp_path / "model")
    file = tmp_path / "model" / name
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError) as error:
        vatt.load(tmp_path / "model")
    assert error.value.hint


def test_the_config_is_readable_json(tmp_path):
    params = small_params()
    checkpoint.save(VATT(params), params, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["version"] == 1
    assert config["model"]["recipe"] == "paper"


def test_importing_vatt_imports_nothing_heavy():
    code = (
        "import vatt, sys; print([m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
