"""Released checkpoints, converted, give the outputs that the release's own code gave."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vatt
from tests import tf_bundle
from vatt.errors import DataError, SettingsError
from vatt.release.convert import ImportReport, import_checkpoint
from vatt.release.recognise import ONLY, recognise
from vattctl.cli import main

TRIMMED = Path(__file__).parents[1] / "golden"
WHOLE = Path(os.environ["VATT_GOLDEN"]) if "VATT_GOLDEN" in os.environ else None
HEADS = {
    "fac": {"video": 4, "audio": 3, "text": 2},
    "ut": {ONLY: 3},
    "ft_video": {ONLY: 4},
    "ft_video_interp": {"video": 4},
    "ft_video_ut": {"video": 3},
    "ft_audio": {"audio": 3},
    "ft_audio_ut": {ONLY: 3},
    "ft_spectrogram": {ONLY: 3},
}
OUTPUTS = {
    "video_va": "norm/vid_toaud",
    "video_vt": "norm/vid_totxt",
    "audio_va": "norm/aud_tovid",
    "text_vt": "norm/txt_tovid",
    "video_features": "out/video/features_pooled",
    "audio_features": "out/audio/features_pooled",
    "text_features": "out/text/features_pooled",
}


def assert_golden(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """The folder's model gives the golden outputs, within 1e-4."""
    model = vatt.load(folder)
    inputs = {name: torch.from_numpy(a) for name, a in arrays.items() if name.startswith("in/")}
    with torch.no_grad():
        if "in/text" in inputs:
            text = inputs["in/text"].long()
            clips = len(inputs["in/video"])
            out = model(
                inputs["in/video"], inputs["in/audio"][..., 0], text.unflatten(0, (clips, -1))
            )
            ours = {golden: getattr(out, name) for name, golden in OUTPUTS.items()}
        else:
            (given,) = inputs.values()
            logits = model(given if given.shape[-1] == 3 else given[..., 0])
            views = len(logits) // len(arrays["out/logits"])
            ours = {"out/logits": logits.unflatten(0, (-1, views)).mean(1)}
    for name, value in ours.items():
        if name in arrays:
            expected = torch.from_numpy(arrays[name])
            torch.testing.assert_close(
                value.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5
            )


def convert(prefix: Path, out: Path, heads: dict[str, int], **kwargs: Any) -> ImportReport:
    return import_checkpoint(prefix, out, heads=heads, source=str(prefix), **kwargs)


# --- the golden checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ft_audio", "ft_audio_ut", "ft_spectrogram"])
def test_a_real_checkpoint_gives_its_golden_outputs(name: str, tmp_path: Path) -> None:
    imported = convert(TRIMMED / f"ckpt_{name}" / "ckpt-1", tmp_path / "out", HEADS[name])
    assert imported.keys.is_complete
    assert imported.keys.not_weights["optimizer slots"] == len(imported.keys.used)
    assert_golden(tmp_path / "out", dict(np.load(TRIMMED / f"{name}_eval.npz")))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.skipif(WHOLE is None, reason="VATT_GOLDEN does not name the whole reference set")
def test_all_reference_checkpoints_give_their_golden_outputs(name: str, tmp_path: Path) -> None:
    assert WHOLE is not None
    folder = WHOLE / (f"ckpt_{name}" if name.startswith("ft_") else f"ckpt_{name}_pretrain")
    imported = convert(folder / "ckpt-1", tmp_path / "out", HEADS[name])
    every_key = json.loads((folder / "keys.json").read_text())["keys"]
    assert imported.keys.is_complete
    assert len(imported.keys.used) + sum(imported.keys.not_weights.values()) == len(every_key)
    assert_golden(tmp_path / "out", dict(np.load(WHOLE / f"{name}_eval.npz")))


@pytest.mark.parametrize("name", ["fac", "ut", "ft_video_interp"])
def test_golden_weights_written_as_a_checkpoint_give_the_outputs(name: str, tmp_path: Path) -> None:
    tensors = tf_bundle.golden_tensors(np.load(TRIMMED / f"{name}_weights.npz"))
    tf_bundle.write(tmp_path / "ckpt-5", tensors, shards=2)
    imported = convert(tmp_path / "ckpt-5", tmp_path / "out", HEADS[name])
    assert imported.keys.is_complete
    assert imported.keys.not_weights == {"optimizer slots": 1, "counters": 2, "object graph": 1}
    assert len(imported.keys.used) == len(tensors) - 3
    assert_golden(tmp_path / "out", dict(np.load(TRIMMED / f"{name}_eval.npz")))


# --- what the folder says -------------------------------------------------------------------------


def test_the_folder_records_its_source_and_model(tmp_path: Path) -> None:
    prefix = TRIMMED / "ckpt_ft_spectrogram" / "ckpt-1"
    imported = convert(prefix, tmp_path / "out", {ONLY: 3})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    hashes = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(prefix.parent.glob("ckpt-1.*"))
    }
    assert config["source"] == {"prefix": str(prefix), "sha256": hashes}
    assert imported.sha256 == hashes
    assert config["model"]["release"]["scrambled_spectrogram"] is True
    assert config["model"]["audio"] | {"size": None} == {
        "size": None,
        "input": "spectrogram",
        "samples": 48,
        "patch": [16, 5],
        "mel_bins": 20,
    }
    assert len(config["classifier"]["classes"]) == 7


def test_heads_of_64_need_not_be_said_and_named_sizes_are_known() -> None:
    base = _classifier_shapes(depth=12, dim=768, inner=768, mlp_dim=3072)
    assert recognise(base, {}).params.video.size == "base"
    odd = recognise(
        _classifier_shapes(depth=2, dim=32, inner=128, mlp_dim=64), {}
    ).params.video.size
    assert (odd.heads, odd.head_dim) == (2, 64)


def _classifier_shapes(*, depth: int, dim: int, inner: int, mlp_dim: int) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {
        "_base/voxel_to_patch/kernel": (4, 16, 16, 3, dim),
        "_ops/cls/kernel": (dim, 400),
    }
    for axis, size in {"temporal": 8, "vertical": 14, "horizontal": 14}.items():
        key = f"_base/pos_embedding_lookup/{axis}_position_embeddings/embeddings"
        shapes[key] = (size, dim)
    for layer in range(depth):
        shapes[f"_base/tx/layers/{layer}/mha/q/kernel"] = (dim, inner)
        shapes[f"_base/tx/layers/{layer}/feed_forward/mlp/wi/kernel"] = (dim, mlp_dim)
    return shapes


def test_a_word_list_comes_along_when_it_fits_the_table(tmp_path: Path) -> None:
    tensors = tf_bundle.golden_tensors(np.load(TRIMMED / "ut_weights.npz"))
    tf_bundle.write(tmp_path / "ckpt-5", tensors)
    words = tmp_path / "words.txt"
    words.write_text("one\ntwo\n")
    convert(tmp_path / "ckpt-5", tmp_path / "out", {ONLY: 3}, vocabulary=words)
    assert (tmp_path / "out" / "vocabulary.txt").read_text() == "one\ntwo\n"
    model, ids = vatt.load(tmp_path / "out"), vatt.vocabulary(tmp_path / "out").encode("Two!", 8)
    assert ids.tolist() == [3, 0, 0, 0, 0, 0, 0, 0]
    assert model(text=torch.from_numpy(ids)[None, None]).text_vt.shape == (1, 1, 12)
    convert(tmp_path / "ckpt-5", tmp_path / "wordless", {ONLY: 3})
    with pytest.raises(DataError, match=r"no vocabulary\.txt.*\n.*--vocab FILE"):
        vatt.vocabulary(tmp_path / "wordless")
    words.write_text("".join(f"word{n}\n" for n in range(129)))
    with pytest.raises(DataError, match="129 words, the model's table 128 rows"):
        convert(tmp_path / "ckpt-5", tmp_path / "two", {ONLY: 3}, vocabulary=words)


# --- what does not match --------------------------------------------------------------------------


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return tf_bundle.golden_tensors(np.load(TRIMMED / "ft_audio_weights.npz"))


BIAS = f"{tf_bundle.ROOT}_base/tx/layers/1/mha/v/bias{tf_bundle.ENDING}"


def test_a_partial_match_is_refused_unless_allowed(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    tensors[f"{tf_bundle.ROOT}_base/other/kernel{tf_bundle.ENDING}"] = np.ones((2, 2), np.float32)
    tensors["elsewhere/kernel"] = np.ones((2, 2), np.float32)
    del tensors[BIAS]
    head = f"{tf_bundle.ROOT}_ops/cls/bias{tf_bundle.ENDING}"
    tensors[head] = tensors[head][:-1]
    tf_bundle.write(tmp_path / "ckpt-5", tensors)
    with pytest.raises(DataError) as refused:
        convert(tmp_path / "ckpt-5", tmp_path / "out", {ONLY: 3})
    for part in (BIAS, "_base/other/kernel", "elsewhere/kernel", "head.bias: [6] instead of [7]"):
        assert part in str(refused.value)
    assert not (tmp_path / "out").exists()

    imported = convert(tmp_path / "ckpt-5", tmp_path / "out", {ONLY: 3}, allow_partial=True)
    assert imported.keys.missing == [BIAS]
    assert imported.keys.shape == ["head.bias: [6] instead of [7]"]
    joined_with_the_missing_one = [BIAS.replace("/v/", f"/{part}/") for part in "kq"]
    assert set(joined_with_the_missing_one) < set(imported.keys.unused)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    kernel = tensors[f"{tf_bundle.ROOT}_ops/cls/kernel{tf_bundle.ENDING}"]
    torch.testing.assert_close(weights["head.weight"], torch.from_numpy(kernel.T.copy()))
    assert weights["head.bias"].shape == (7,)
    vatt.load(tmp_path / "out")(torch.zeros(1, 1024))


def test_numbers_that_cannot_be_weights_are_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    for bad, message in ((np.full(24, np.nan, np.float32), "finite"), (np.arange(24), "floating")):
        tf_bundle.write(tmp_path / "ckpt-5", tensors | {BIAS: bad})
        with pytest.raises(DataError, match=message):
            convert(tmp_path / "ckpt-5", tmp_path / "out", {ONLY: 3})


def test_other_models_and_wrong_heads_are_named(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    tf_bundle.write(tmp_path / "other", {"layer/kernel": np.ones((2, 2), np.float32)})
    with pytest.raises(DataError, match="not a checkpoint of VATT"):
        convert(tmp_path / "other", tmp_path / "out", {})
    tf_bundle.write(tmp_path / "ckpt-5", tensors)
    for heads, message in (
        ({}, "not a multiple of 64"),
        ({ONLY: 5}, "does not divide 24"),
        ({"video": 3}, "towers of this checkpoint are audio"),
    ):
        with pytest.raises(SettingsError, match=message):
            convert(tmp_path / "ckpt-5", tmp_path / "out", heads)
    specific = tf_bundle.golden_tensors(np.load(TRIMMED / "fac_weights.npz"))
    tf_bundle.write(tmp_path / "fac", specific)
    with pytest.raises(SettingsError, match="one number to a checkpoint of several"):
        convert(tmp_path / "fac", tmp_path / "out", {ONLY: 3})


# --- the command ----------------------------------------------------------------------------------


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    return int(ended.value.code or 0)


def test_the_command_prints_json_and_can_be_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, out = TRIMMED / "ckpt_ft_audio" / "ckpt-1", tmp_path / "out"
    for _ in range(2):
        assert run("import", str(prefix), "--out", str(out), "--heads", "3", "--json") == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["version"] == 1
        assert len(answer["keys"]["used"]) == 42
        assert (
            answer["keys"]["unused"] == answer["keys"]["missing"] == answer["keys"]["shape"] == []
        )
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    taken = ("import", str(prefix), "--out", str(tmp_path / "taken"), "--heads", "3")
    assert run(*taken) == 2
    assert "not an imported checkpoint" in capsys.readouterr().err


def test_the_command_ends_with_the_codes_of_its_errors(tmp_path: Path) -> None:
    prefix = TRIMMED / "ckpt_ft_audio" / "ckpt-1"
    out = ("--out", str(tmp_path / "out"))
    assert run("import", str(prefix), *out) == 2  # heads are not 64 wide
    assert run("import", str(prefix), *out, "--heads", "many") == 2
    assert run("import", str(tmp_path / "none"), *out) == 3
    assert run("import", str(prefix), *out, "--heads", "3", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
