"""A large batch in micro-batches, exactly: memory holds the activations of one at a time.

Contrastive losses see the whole batch, so that plain accumulation would change them. Instead the
features of every micro-batch are computed first, without keeping activations; heads and loss run
once on all of them; on the way back each micro-batch is computed again and its share of the
gradient pushed through. The encoders have no batch norm, so this is the same gradient.

It is written as activation checkpointing of a whole encoder. The result is *one* backward pass,
in which autograd first sums a weight's gradient over the micro-batches: ZeRO sees each gradient
once, complete (at stage 3 it would mix up partial ones), and processes talk once a step.
Dropout replays, since the generator's state is restored for the second computation.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def encode_in_micro_batches(
    encode: Callable[..., Tensor], *inputs: Tensor | None, micro_batch_size: int | None
) -> Tensor:
    """`encode(*inputs)`, whose rows are clips, computed `micro_batch_size` rows at a time."""
    rows = next(len(value) for value in inputs if value is not None)
    if micro_batch_size is None or micro_batch_size >= rows:
        return encode(*inputs)
    parts = [
        checkpoint(
            encode, *_rows(inputs, slice(start, start + micro_batch_size)), use_reentrant=False
        )
        for start in range(0, rows, micro_batch_size)
    ]
    return torch.cat(parts)


def _rows(inputs: tuple[Tensor | None, ...], which: slice) -> list[Tensor | None]:
    return [None if value is None else value[which] for value in inputs]
