"""A large batch in micro-batches, exactly: memory holds the activations of one at a time.

Contrastive losses see the whole batch, so that plain accumulation would change them. Instead the
features of every micro-batch are computed first, without a graph; heads and loss run once, with
one, on all of them; on the way back each micro-batch is computed again and its share of the
gradient pushed through. The encoders have no batch norm, so this is the same gradient.

All of it happens in *one* backward pass in which each weight gets its gradient once, complete:
ZeRO reduces a gradient as it arrives, and at stage 3 would silently mix up partial ones. To that
end the first clip is encoded the ordinary way; when its gradient reaches a weight, the sum over
all other clips joins it. Dropout replays: each micro-batch's generator state is kept.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Encode = Callable[..., tuple[Tensor, ...]]
Rows = list[Tensor | None]


def encode_in_micro_batches(
    encode: Encode,
    *inputs: Tensor | None,
    weights: Iterable[nn.Parameter],
    micro_batch_size: int | None,
) -> tuple[Tensor, ...]:
    """`encode(*inputs)`, whose rows are clips, computed `micro_batch_size` rows at a time.

    `weights` are all that `encode` uses; every clip must use each of those that are trained.
    """
    rows = next(len(value) for value in inputs if value is not None)
    if micro_batch_size is None or micro_batch_size >= rows:
        return encode(*inputs)
    rest = [_rows(inputs, which) for which in _micro_batches(range(1, rows), micro_batch_size)]
    trained = [weight for weight in weights if weight.requires_grad]
    return _Rejoin.apply(_Replay(encode, rest, trained), *encode(*_rows(inputs, slice(0, 1))))


class _Rejoin(torch.autograd.Function):
    """The first clip's features, with graph, and all others', which know how to be replayed."""

    @staticmethod
    def forward(ctx: Any, replay: "_Replay", *first: Tensor) -> tuple[Tensor, ...]:
        ctx.replay = replay
        return tuple(torch.cat(parts) for parts in zip(first, *replay.features(), strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.replay.push_back([gradient[1:] for gradient in gradients])
        return (None, *(gradient[:1] for gradient in gradients))


class _Replay:
    """Micro-batches that are computed twice: for their features, and for their gradient."""

    def __init__(self, encode: Encode, parts: list[Rows], weights: list[nn.Parameter]) -> None:
        self.encode, self.parts, self.weights = encode, parts, weights
        self.device = next(value for value in parts[0] if value is not None).device
        self.autocast = torch.autocast(
            self.device.type,
            dtype=torch.get_autocast_dtype(self.device.type),
            enabled=torch.is_autocast_enabled(self.device.type),
        )
        self.generators: list[list[Tensor]] = []

    def features(self) -> list[tuple[Tensor, ...]]:
        """Every micro-batch's features, without a graph."""
        found = []
        for part in self.parts:
            self.generators.append(self._generator_states())
            found.append(self.encode(*part))
        return found

    def push_back(self, gradients: list[Tensor]) -> None:
        """Compute the micro-batches again; their weights' gradients wait for the first clip's."""
        totals: list[Tensor] = []
        sizes = [len(next(value for value in part if value is not None)) for part in self.parts]
        shares = zip(*(gradient.split(sizes) for gradient in gradients), strict=True)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            for part, share, states in zip(self.parts, shares, self.generators, strict=True):
                self._set_generators(states)
                self._add_gradients(totals, part, share)
        for weight, total in zip(self.weights, totals, strict=True):
            _add_to_gradient(weight, total)

    def _add_gradients(self, totals: list[Tensor], part: Rows, share: tuple[Tensor, ...]) -> None:
        with self.autocast:
            features = self.encode(*part)
        found = torch.autograd.grad(features, self.weights, share)
        if totals:
            torch._foreach_add_(totals, found)
        else:
            totals.extend(found)

    def _generator_states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return states if self.device.type != "cuda" else [*states, torch.cuda.get_rng_state()]

    def _set_generators(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1])


def _add_to_gradient(weight: nn.Parameter, total: Tensor) -> None:
    """Let the next gradient that reaches `weight` take `total` along."""

    def add(gradient: Tensor) -> Tensor:
        handle.remove()
        return total.add_(gradient)

    handle = weight.register_hook(add)


def _micro_batches(rows: range, size: int) -> list[slice]:
    """A remainder comes first: the memory of a whole one beside the sum is then the peak always."""
    ends = range(rows.stop, rows.start, -size)
    return [slice(max(rows.start, end - size), end) for end in reversed(ends)]


def _rows(inputs: tuple[Tensor | None, ...], which: slice) -> Rows:
    return [None if value is None else value[which] for value in inputs]
