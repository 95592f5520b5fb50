"""How many tokens an input becomes, and how many DropToken leaves."""

from collections.abc import Sequence

import torch

from vatt.model.drop_token import draw_kept, drop_tokens
from vatt.model.patches import cut
from vatt.verify.row import Row, compare

VIDEOS = {  # frames x height x width, patch, what the paper says of it
    "32x224x224 / 4x16x16": ("table 9", 1568),
    "64x224x224 / 4x16x16": ("table 6", 3136),
    "32x320x320 / 4x16x16": ("tables 1 and 6", 3200),
    "4x384x384 / 4x16x16": ("table 3", 576),
    "32x200x200 / 5x16x16": ("table 9", 7 * 13 * 13),
    "32x224x224 / 5x16x16": ("table 9", 7 * 14 * 14),
    "64x224x224 / 5x16x16": ("table 9", 13 * 14 * 14),
    "32x224x224 / 8x16x16": ("table 9", 4 * 14 * 14),
    "32x224x224 / 8x32x32": ("table 9", 4 * 7 * 7),
}
AUDIOS = {
    "153600 / 128": ("table 10", 1200),
    "153600 / 256": ("table 10", 600),
    "153600 / 512": ("table 10", 300),
    "153600 / 1024": ("table 10", 150),
    "144x80 / 16x5": ("table 10", 9 * 16),
}
DROPPED = (0.75, 0.5, 0.25, 0.0)
KEPT = {1568: (392, 784, 1176, 1568), 3200: (800, 1600, 2400, 3200), 1200: (300, 600, 900, 1200)}


def token_rows() -> list[Row]:
    """Tokens of the paper's inputs: ours are counted in the patches that the model cuts."""
    rows = []
    for kind, inputs, channels in (("video", VIDEOS, 3), ("audio", AUDIOS, 1)):
        for name, (source, expected) in inputs.items():
            sizes, patch = (
                tuple(map(int, part.split("x"))) for part in name.replace(" ", "").split("/")
            )
            rows.append(
                compare(
                    f"tokens, {kind} {name}",
                    source=source,
                    unit="tokens",
                    ours=_num_cut(sizes, patch, channels),
                    expected=expected,
                    tolerance=0,
                )
            )
    return rows


def drop_token_rows() -> list[Row]:
    """Tokens that go on: ours are counted in what `drop_tokens` returns, each of them different."""
    rows = []
    for num_tokens, expected in KEPT.items():
        for rate, number in zip(DROPPED, expected, strict=True):
            kept = draw_kept(num_tokens, rate, seed=0, step=0, samples=[0])
            places = torch.arange(num_tokens, dtype=torch.float32)[None, :, None]
            rows.append(
                compare(
                    f"DropToken {rate:.0%} of {num_tokens} tokens",
                    source="paper (SPEC section 1), tables 5 and 6",
                    unit="tokens",
                    ours=drop_tokens(places, kept).unique().numel(),
                    expected=number,
                    tolerance=0,
                )
            )
    return rows


def _num_cut(sizes: Sequence[int], patch: Sequence[int], channels: int) -> int:
    return cut(torch.empty(1, *sizes, channels, device="meta"), patch).shape[1]
