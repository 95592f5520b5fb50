"""Floating-point operations of tables 1, 5 and 6, in the paper's counting and in a true one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vatt.config import SizeName
from vatt.flops import Convention, multimodal_flops, num_video_tokens, video_flops
from vatt.model.patches import num_kept
from vatt.model.transformer import Encoder
from vatt.model.vatt import VATT
from vatt.verify.parameters import build_classifier, build_model, model_params, video_params
from vatt.verify.row import Check, compare, published

VIEWS = 12  # 4 clips x 3 crops
CONVENTIONS: tuple[Convention, ...] = ("paper", "true")
NAMES = {
    "paper": "the paper's counting (TensorFlow profiler, no query x key)",
    "true": "true count (2 a multiply-add, both attention products)",
}

# How far the fitted formula may be from each published number (docs/model.md, "Counting
# operations"): half a unit of the last digit where it rounds to it, else the known difference.
TABLE_1: dict[str, tuple[SizeName, float]] = {
    "VATT-Base": ("base", 0.0051),
    "VATT-Medium": ("medium", 0.0077),
    "VATT-Large": ("large", 0.0138),
    "VATT-MA-Medium": ("medium", 0.0077),
}
TABLE_5 = {"drop_75": (0.75, 0.05), "drop_50": (0.5, 0.07), "drop_25": (0.25, 0.05)}
TABLE_5 |= {"drop_0": (0.0, 0.05)}
TABLE_6 = (
    ("drop_0", 0.0, 32, 224),
    ("drop_0", 0.0, 64, 224),
    ("drop_75", 0.75, 32, 320),
    ("drop_50", 0.5, 32, 320),
    ("drop_25", 0.25, 32, 320),
    ("drop_0", 0.0, 32, 320),
)
_COUNTED = "expected: matrix products of the built model, every token in every block, by torch"


def operation_rows() -> list[Check]:
    """Every published number of operations, in both conventions."""
    return [row for table in (_table_1, _table_5, _table_6) for row in table()]


def _table_1() -> list[Check]:
    rows = []
    for name, (size, tolerance) in TABLE_1.items():
        video = video_params(size, frame_size=320)
        paper = published("table1_action_recognition", name, "tflops")
        title, scale = f"{name}, {VIEWS} views of 32x320x320", VIEWS / 1e12
        ours = video_flops(video, convention="paper") * scale
        rows.append(_paper_row(title, "table 1", "TFLOPs", ours, paper, tolerance))
        model = build_classifier(size, "paper", modality="video", num_classes=400)
        counted = _count(model.backbone, _video(32, 320)) * scale
        rows.append(
            _true_row(
                title, "table 1", "TFLOPs", video_flops(video, convention="true") * scale, counted
            )
        )
    return rows


def _table_5() -> list[Check]:
    rows = []
    params, model = model_params("MBS", "paper"), build_model("MBS", "paper")
    for column, (rate, tolerance) in TABLE_5.items():
        paper = published("table5_droptoken_pretraining", "multimodal_gflops", column)
        title = f"VATT-MBS, 32x224x224, 153600 samples, 16 words, DropToken {rate:.0%}"
        ours = multimodal_flops(params, drop_rate=rate, training=True, convention="paper") / 1e9
        rows.append(_paper_row(title, "table 5", "GFLOPs", ours, paper, tolerance))
        ours = multimodal_flops(params, drop_rate=rate, convention="true") / 1e9
        rows.append(_true_row(title, "table 5", "GFLOPs", ours, _count_all(model, rate) / 1e9))
    return rows


def _table_6() -> list[Check]:
    rows = []
    model = build_classifier("medium", "paper", modality="video", num_classes=400)
    for column, rate, frames, side in TABLE_6:
        video = video_params("medium", frames=frames, frame_size=side)
        view = f"{frames}x{side}x{side}"
        paper = published("table6_droptoken_finetuning", f"{view} gflops", column)
        title = f"VATT-Medium, {view}, DropToken {rate:.0%}"
        ours = video_flops(video, drop_rate=rate, training=rate > 0, convention="paper") / 1e9
        rows.append(_paper_row(title, "table 6", "GFLOPs", ours, paper, 0.05))
        ours = video_flops(video, drop_rate=rate, convention="true") / 1e9
        counted = _count(model.backbone, _video(frames, side), _kept(num_video_tokens(video), rate))
        rows.append(_true_row(title, "table 6", "GFLOPs", ours, counted / 1e9))
    return rows


def _paper_row(
    title: str, source: str, unit: str, ours: float, paper: float, tolerance: float
) -> Check:
    return compare(
        f"{title}, {NAMES['paper']}",
        source=source,
        unit=unit,
        ours=ours,
        expected=paper,
        tolerance=tolerance,
        paper=paper,
    )


def _true_row(title: str, source: str, unit: str, ours: float, counted: float) -> Check:
    return compare(
        f"{title}, {NAMES['true']}",
        source=source,
        unit=unit,
        ours=ours,
        expected=counted,
        tolerance=1e-9 * counted,
        reason=_COUNTED,
    )


def _count(model: nn.Module, *inputs: Tensor | None, **kept: Tensor | None) -> float:
    encoders = [part for part in model.modules() if isinstance(part, Encoder)]
    hooks = [each.register_forward_pre_hook(_every_token, with_kwargs=True) for each in encoders]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs, **kept)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops()


def _every_token(
    encoder: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Our last block computes only AGG's output; the paper's, which is counted, every token's."""
    return inputs, options | {"wanted": None}


def _count_all(model: VATT, rate: float) -> float:
    return _count(
        model,
        _video(32, 224),
        torch.empty(1, 153_600, device="meta"),
        torch.ones(1, 1, 16, dtype=torch.long, device="meta"),
        kept_video=_kept(model.num_video_tokens, rate),
        kept_audio=_kept(model.num_audio_tokens, rate),
    )


def _video(frames: int, side: int) -> Tensor:
    return torch.empty(1, frames, side, side, 3, device="meta")


def _kept(num_tokens: int, rate: float) -> Tensor | None:
    if not rate:
        return None
    return torch.zeros(1, num_kept(num_tokens, rate), dtype=torch.long, device="meta")
