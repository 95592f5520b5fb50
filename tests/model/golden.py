"""The reference arrays: where they lie, and their names and layouts turned into ours.

A trimmed set is in tests/golden; VATT_GOLDEN names a folder with the whole one.
"""

import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vatt.config import ModelParams

FOLDER = Path(os.environ.get("VATT_GOLDEN", Path(__file__).parents[1] / "golden"))
TRIMMED = "VATT_GOLDEN" not in os.environ
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
DEVICES = ["cpu", CUDA]

_TOWERS = [
    (r"_base_layer/vid_backbone/_base/", "video."),
    (r"_base_layer/aud_backbone/_base/", "audio."),
    (r"_base_layer/txt_backbone/embedding/", "text.embed.table."),
    (r"_base_layer/txt_backbone/pre_proj/", "text.lift.0."),
    (r"_base_layer/txt_backbone/(base_lm/)?", "text."),
    (r"_base_layer/unified_backbone/unified_transformer/(.*)", r"shared.\1"),
    (r"shared.(vid|aud|txt)_agg_embedding", r"\1.agg_embedding"),
    (r"shared.(raw_to_embeddings)/text/", "text.embed.table."),
    (r"shared.(\w+)/(video|audio|text)/", r"\2.\1/"),
    (r"shared.", "video."),
    (r"^vid\.", "video."),
    (r"^aud\.", "audio."),
    (r"^txt\.", "text."),
    (r"^_base/", "backbone."),
    (r"^_ops/cls/", "head."),
    (r"_head_layer/_bridge_heads/0/", "heads."),
]
_HEADS = [
    (r"vid_to_hid/", "video_to_va.0.linear."),
    (r"hid_to_va/pre_bn/", "video_to_va.0.norm."),
    (r"hid_to_va/dense/", "video_to_va.2.linear."),
    (r"hid_to_va/bn/", "video_to_va.2.norm."),
    (r"va_to_vat/dense/", "va_to_vt.1.linear."),
    (r"va_to_vat/bn/", "va_to_vt.1.norm."),
    (r"aud_to_va/", "audio_to_va.linear."),
    (r"txt_to_vat/", "text_to_vt.linear."),
]
_PARTS = [
    (r"agg_embedding", "agg_token"),
    (r"(voxel_to_patch|wave_to_patch|spectrum_to_patch|raw_to_embeddings)/", "embed.project."),
    (r"pos_embedding_lookup/spectoral", "pos_embedding_lookup/spectral"),
    (r"pos_embedding_lookup/(\w+)_position_embeddings/embeddings", r"embed.positions.\1"),
    (r"pos_embedding_lookup/layernorm/", "embed.positions.norm."),
    (r"pre_proj/", "embed.lift.linear."),
    (r"post_proj/", "post.linear."),
    (r"(tx/)?layers/(\d+)/", r"encoder.blocks.\2."),
    (r"self_attention/attention/relative_attention_bias/", "relative.table."),
    (r"encoder.blocks.0.relative", "relative"),
    (r"self_attention/attention/", "attention."),
    (r"self_attention/layer_norm/", "attention_norm."),
    (r"mha/", "attention."),
    (r"feed_forward/layer_norm/", "mlp_norm."),
    (r"feed_forward/mlp/wi/", "mlp.hidden."),
    (r"feed_forward/mlp/wo/", "mlp.out."),
    (r"(tx/)?final_layer_norm/", "encoder.norm."),
    (r"blocks\.(\d+)\.layer_norm/", r"blocks.\1.attention_norm."),
    (r"attention\.o/", "attention.out."),
    (r"attention\.([qkv])/", r"attention.\1."),
    (r"(kernel|gamma|embeddings)$", "weight"),
    (r"beta$", "bias"),
    (r"moving_mean$", "running_mean"),
    (r"moving_variance$", "running_var"),
]


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of a file; a training file's inputs are its evaluation file's."""
    with np.load(FOLDER / f"{name}.npz") as file:
        found = {key: file[key] for key in file.files}
    evaluation = re.sub(r"_train(_droptoken)?$", "_eval", name)
    if evaluation != name:
        for key, value in arrays(evaluation).items():
            if key.startswith(("in/", "label/")):
                found.setdefault(key, value)
    return found


def tensor(name: str, key: str) -> Tensor:
    """One array of a file."""
    return torch.from_numpy(arrays(name)[key])


def group(name: str, prefix: str) -> dict[str, np.ndarray]:
    """The arrays under a prefix, by the rest of their keys."""
    return {
        key.removeprefix(prefix): value
        for key, value in arrays(name).items()
        if key.startswith(prefix)
    }


def ours(theirs: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Weights, or gradients of weights, by our names and in our layouts."""
    found: dict[str, Tensor] = {}
    for key, value in theirs.items():
        name = key.removeprefix("model/layer_with_weights-0/")
        rules = _TOWERS + (_HEADS if "_head_layer" in name else []) + _PARTS
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        assert "/" not in name, f"{key} -> {name}"
        array = torch.from_numpy(value)
        if key.endswith("kernel"):
            array = array.flatten(0, -2).T
        found[name] = array.contiguous()
    for name in [name for name in found if ".attention.q." in name]:
        parts = [found.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        found[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return found


def pretraining_params(name: str) -> ModelParams:
    """The settings of the small reference models `fac` (specific) and `ut` (agnostic)."""
    sizes = {
        "video": {"depth": 2, "dim": 32, "mlp_dim": 64, "heads": 4, "head_dim": 8},
        "audio": {"depth": 2, "dim": 24, "mlp_dim": 48, "heads": 3, "head_dim": 8},
        "text": {"depth": 2, "dim": 16, "mlp_dim": 40, "heads": 2, "head_dim": 12},
    }
    if name == "ut":
        sizes = dict.fromkeys(sizes, sizes["audio"])
    return ModelParams.model_validate(
        {
            "recipe": "release",
            "backbone": "specific" if name == "fac" else "agnostic",
            "video": {
                "size": sizes["video"],
                "frames": 8,
                "frame_size": (32, 48) if name == "fac" else 32,
                "patch": (4, 16, 16),
            },
            "audio": {
                "size": sizes["audio"],
                "input": "waveform",
                "samples": 1024,
                "patch": 128,
                "mel_bins": None,
            },
            "text": {"size": sizes["text"], "words": 8, "vocabulary": 128},
            "va_dim": 20,
            "vt_dim": 12,
            "dropout": 0.0,
            "release": {"word_dim": 20, "post_dim": 20},
        }
    )


def finetuning_params(name: str) -> ModelParams:
    """The settings of the small fine-tuned reference models."""
    base = pretraining_params("ut" if name.endswith("_ut") else "fac")
    if name == "ft_video_interp":
        video = base.video.model_copy(update={"frame_size": (48, 80)})
        return base.model_copy(update={"video": video})
    if name == "ft_spectrogram":
        audio = base.audio.model_copy(
            update={"input": "spectrogram", "samples": 48, "patch": (16, 5), "mel_bins": 20}
        )
        release = base.release.model_copy(update={"scrambled_spectrogram": True})
        return base.model_copy(update={"audio": audio, "release": release})
    return base
