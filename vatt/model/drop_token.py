"""DropToken: only a random part of the video and audio tokens goes on while training.

B clips, N tokens, K tokens kept, D width.
"""

import hashlib

import torch
from torch import Tensor


def num_kept(num_tokens: int, drop_rate: float) -> int:
    """How many of `num_tokens` go on: int(keep rate x tokens), at least one."""
    return max(1, int(round((1 - drop_rate) * num_tokens, 6)))


def draw_kept(
    num_tokens: int,
    drop_rate: float,
    *,
    seed: int,
    step: int,
    samples: list[int],
    stream: str = "",
) -> Tensor:
    """Indices (B, K) of the tokens to keep, fresh for each step and sample.

    `samples` are positions in the global batch, so the draw does not depend on how the batch is
    spread over processes; the release's one draw for a whole batch is sample 0 for all. `stream`
    keeps draws of the same shape apart ("video", "audio").
    """
    kept = num_kept(num_tokens, drop_rate)
    rows = []
    for sample in samples:
        key = f"{seed}/{step}/{sample}/{stream}/{num_tokens}".encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
        generator = torch.Generator().manual_seed(number)
        rows.append(torch.randperm(num_tokens, generator=generator)[:kept])
    return torch.stack(rows)


def drop_tokens(tokens: Tensor, kept: Tensor) -> Tensor:  # (B, N, D), (B, K) -> (B, K, D)
    """The kept tokens of each clip, in the order of `kept`."""
    return torch.take_along_dim(tokens, kept[..., None], dim=1)
