"""Batches in memory: labelled clips whose picture shows the label, for the evaluation's tests."""

from collections.abc import Iterator

import torch

from vatt.config import AudioParams, ModelParams, SizeParams, TextParams, VideoParams
from vatt.data.loading.batches import Batch

CLASSES = ("dark", "bright", "red")
SMALL = SizeParams(depth=1, dim=8, mlp_dim=16, heads=2, head_dim=4)

MODEL = ModelParams(
    recipe="paper",
    backbone="specific",
    video=VideoParams(size=SMALL, frames=2, frame_size=8, patch=(1, 4, 4)),
    audio=AudioParams(size=SMALL, input="waveform", samples=16, patch=4, mel_bins=None),
    text=TextParams(size=SMALL, words=3, vocabulary=16),
    va_dim=8,
    vt_dim=8,
    dropout=0.1,
)


def batches(
    *, clips: int = 12, batch_size: int = 4, views: int = 1, seed: int = 0
) -> Iterator[Batch]:
    """`clips` clips of three classes, in batches; the views of a clip are adjacent."""
    rows = [(clip, view) for clip in range(clips) for view in range(views)]
    for first in range(0, len(rows), batch_size * views):
        yield _batch(rows[first : first + batch_size * views], seed)


def _batch(rows: list[tuple[int, int]], seed: int) -> Batch:
    video, audio, text = [], [], []
    for clip, view in rows:
        generator = torch.Generator().manual_seed(1000 * seed + 10 * clip + view)
        shade = torch.tensor([[20, 20, 20], [220, 220, 220], [220, 20, 20]])[clip % 3]
        noise = torch.randint(-15, 15, (2, 8, 8, 3), generator=generator)
        video.append((shade + noise).clamp(0, 255).to(torch.uint8))
        audio.append(torch.randint(-9000, 9000, (16,), generator=generator, dtype=torch.int16))
        words = torch.tensor([[2 + clip % 3, 5, 0], [6 + clip % 5, 0, 0]])
        # Every fourth clip has one text only, every sixth none.
        words[1] *= clip % 4 != 3
        text.append(words * (clip % 6 != 5))
    labels = [CLASSES[clip % 3] for clip, _ in rows]
    return Batch(
        clip_ids=[f"clip-{clip:03d}" for clip, _ in rows],
        signals={
            "video": torch.stack(video),
            "audio": torch.stack(audio),
            "text": torch.stack(text),
        },
        present={
            "video": torch.ones(len(rows), dtype=torch.bool),
            "audio": torch.tensor([clip % 7 != 6 for clip, _ in rows]),
        },
        labels={"shade": labels, "rare": ["" for _ in rows]},
    )
