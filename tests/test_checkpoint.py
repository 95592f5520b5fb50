"""A checkpoint's folder alone rebuilds the model, or says why not."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vatt
from tests.data.corpus import TEST_DATA, needs_data
from tests.model.small import small_inputs, small_params, spectrogram_params
from vatt import checkpoint
from vatt.config import ModelParams
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


def model_folder(tmp_path, config):
    params = small_params()
    checkpoint.save(VATT(params), params, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    whole = json.loads(file.read_text())
    file.write_text(config(whole) if callable(config) else config)
    return tmp_path / "model"


def changed(place, value):
    """config.json with one value changed; `place` is its path of keys."""

    def change(config):
        section = config
        for key in place[:-1]:
            section = section.setdefault(key, {})
        section[place[-1]] = value
        return json.dumps(config)

    return change


TASK = {"modality": "audio", "classes": ["a", "b"]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[" * 100_000, "recursion limit"),
        ("[]", "does not describe a model"),
        ('{"model": ' + "9" * 5000 + "}", "config.json"),
        (" " * 17_000_000, "larger than 16 MB"),
        (changed(["version"], 2), "version"),
        (changed(["model", "va_dim"], 10**9), r"model\.va_dim"),
        (changed(["model", "va_dim"], "wide"), r"model\.va_dim"),
        (changed(["model", "dropout"], float("nan")), r"model\.dropout"),
        (changed(["model", "video", "frames"], 8 * 10**7), r"model\.video\.frames"),
        (changed(["model", "video", "frames"], 8 * 10**4), "video of .* tokens, more than 65,536"),
        (changed(["model", "video", "size"], {"depth": 10**5, "dim": 8, "mlp_dim": 8, "heads": 1,
                                              "head_dim": 8}), r"SizeParams\.depth"),
        (changed(["model", "text", "vocabulary"], 10**9), "model of .* GB, but"),
        (changed(["model", "audio", "samples"], 10**9), "audio of .* tokens, more than"),
        (changed(["classifier"], "x"), "classifier"),
        (changed(["classifier"], {}), r"classifier\.(modality|classes)"),
        (changed(["classifier"], TASK | {"classes": 7}), r"classifier\.classes"),
        (changed(["classifier"], TASK | {"modality": "smell"}), r"classifier\.modality"),
        (changed(["classifier"], TASK | {"head_dropout": "x"}), r"classifier\.head_dropout"),
    ],
)  # fmt: skip
def test_a_damaged_config_is_one_clear_error_before_memory_is_taken(tmp_path, config, message):
    folder = model_folder(tmp_path, config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=message) as error:
        vatt.load(folder)
    assert str(folder) in error.value.problem
    with pytest.raises(DataError):
        checkpoint.load_config(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_weights_of_another_type_are_named(tmp_path):
    weights = VATT(small_params()).state_dict()
    weights["video.agg_token"] = weights["video.agg_token"].to(torch.int8)
    with pytest.raises(DataError, match=r"video\.agg_token: .* of whole numbers instead of"):
        checkpoint.load_weights(VATT(small_params()), weights)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 8)])
def test_a_position_table_of_another_rank_is_named(shape):
    weights = VATT(small_params()).state_dict()
    name = next(name for name in weights if name.endswith("positions.temporal"))
    weights[name] = torch.zeros(shape)
    with pytest.raises(DataError, match=f"{name}: .* instead of"):
        checkpoint.load_weights(VATT(small_params()), weights)


@needs_data
@pytest.mark.parametrize(
    "name", sorted(path.name for path in Path(TEST_DATA or ".").glob("attack/ck-*"))
)
def test_attacks_on_a_checkpoint_are_clear_errors(tmp_path, name):
    attack = Path(TEST_DATA) / "attack" / name
    params = ModelParams.model_validate(
        json.loads((attack.parent / "ck-s" / "config.json").read_text())["model"]
    )
    checkpoint.save(VATT(params), params, tmp_path / "model")
    for file in attack.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    if name == "ck-frames800":  # a longer video: its table is resized
        assert vatt.load(tmp_path / "model").params.video.frames == 800
    else:
        with pytest.raises(DataError, match=str(tmp_path / "model")):
            vatt.load(tmp_path / "model")
