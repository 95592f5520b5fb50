"""A large batch in micro-batches, exactly: memory holds the activations of a few at a time.

Contrastive losses see the whole batch, so that plain accumulation would change them. Instead the
features of every micro-batch are computed first; heads and loss run once on all of them; on the way
back each micro-batch is computed again and its share of the gradient pushed through. The encoders
have no batch norm, so this is the same gradient.

The last micro-batches need not be computed again: their activations are kept, and they are the
first on the way back. Keeping one of them takes no memory, since one micro-batch at a time has all
its activations anyway. Gradients are summed in the same order however many are kept, so the sum is
the same bit for bit. Dropout replays: each micro-batch's generator state is kept.

All of it happens in *one* backward pass in which each weight gets its gradient once, complete: ZeRO
reduces a gradient as it arrives. At stage 3, where weights are divided, autograd does not accept a
whole gradient for them. There the first clip is encoded the ordinary way, and when its gradient
reaches a weight, the sum over all other clips joins it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
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
    kept: int = 1,
) -> tuple[Tensor, ...]:
    """`encode(*inputs)`, whose rows are clips, computed at most `micro_batch_size` rows at a time.

    `weights` are all that `encode` uses; every clip must use each of those that are trained. The
    activations of the last `kept` micro-batches are kept for the backward pass.
    """
    rows = next(len(value) for value in inputs if value is not None)
    if micro_batch_size is None or micro_batch_size >= rows:
        return encode(*inputs)
    trained = [weight for weight in weights if weight.requires_grad]
    are_divided = any(hasattr(weight, "ds_id") for weight in trained)
    first = int(are_divided)
    parts = [_rows(inputs, part) for part in _micro_batches(first, rows, micro_batch_size)]
    replay = _Replay(encode, parts, trained, kept)
    if are_divided:
        return _RejoinFirst.apply(replay, *encode(*_rows(inputs, slice(0, 1))))
    return _Rejoin.apply(replay, *trained)


class _Rejoin(torch.autograd.Function):
    """All features, from weights that get their whole gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, replay: "_Replay", *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.replay = replay
        return tuple(torch.cat(parts) for parts in zip(*replay.features(), strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.replay.push_back(gradients)


class _RejoinFirst(torch.autograd.Function):
    """The first clip's features, with graph, and all others', which know how to be replayed."""

    @staticmethod
    def forward(ctx: Any, replay: "_Replay", *first: Tensor) -> tuple[Tensor, ...]:
        ctx.replay = replay
        return tuple(torch.cat(parts) for parts in zip(first, *replay.features(), strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        totals = ctx.replay.push_back([gradient[1:] for gradient in gradients])
        for weight, total in zip(ctx.replay.weights, totals, strict=True):
            _add_to_gradient(weight, total)
        return (None, *(gradient[:1] for gradient in gradients))


class _Replay:
    """Micro-batches that are computed twice, for features and for gradients, but for the kept."""

    def __init__(
        self, encode: Encode, parts: list[Rows], weights: list[nn.Parameter], kept: int
    ) -> None:
        self.encode, self.parts, self.weights = encode, parts, weights
        self.first_kept = max(0, len(parts) - kept)
        self.device = next(value for value in parts[0] if value is not None).device
        self.autocast = torch.autocast(
            self.device.type,
            dtype=torch.get_autocast_dtype(self.device.type),
            enabled=torch.is_autocast_enabled(self.device.type),
        )
        self.generators: list[list[Tensor]] = []
        self.graphs: dict[int, tuple[Tensor, ...]] = {}  # features of the kept ones

    def features(self) -> list[tuple[Tensor, ...]]:
        """Every micro-batch's features, without a graph of their own."""
        found = []
        for number, part in enumerate(self.parts):
            if number >= self.first_kept:
                # Autocast remembers cast weights; those of a pass without a graph have none.
                torch.clear_autocast_cache()
                with torch.enable_grad():
                    self.graphs[number] = self.encode(*part)
                found.append(tuple(value.detach() for value in self.graphs[number]))
            else:
                self.generators.append(self._generator_states())
                found.append(self.encode(*part))
        return found

    def push_back(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The sums of the weights' gradients, from the last micro-batch to the first."""
        totals: list[Tensor] = []
        sizes = [len(next(value for value in part if value is not None)) for part in self.parts]
        shares = list(zip(*(gradient.split(sizes) for gradient in gradients), strict=True))
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            for number in reversed(range(len(self.parts))):
                features = self.graphs.pop(number, None) or self._again(number)
                found = torch.autograd.grad(features, self.weights, shares[number])
                if totals:
                    torch._foreach_add_(totals, found)
                else:
                    totals.extend(found)
        return totals

    def _again(self, number: int) -> tuple[Tensor, ...]:
        self._set_generators(self.generators[number])
        with self.autocast:
            return self.encode(*self.parts[number])

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


def micro_batch_sizes(rows: int, most: int) -> list[int]:
    """As few micro-batches of at most so many rows as there can be; sizes differ by one at most.

    So a compiled encoder sees two sizes at most. The larger ones come last, where they are kept.
    """
    number = math.ceil(rows / most)
    small, larger = divmod(rows, number)
    return [small] * (number - larger) + [small + 1] * larger


def _micro_batches(first: int, last: int, most: int) -> list[slice]:
    ends = list(accumulate(micro_batch_sizes(last - first, most), initial=first))
    return [slice(*ends) for ends in pairwise(ends)]


def _rows(inputs: tuple[Tensor | None, ...], which: slice) -> Rows:
    return [None if value is None else value[which] for value in inputs]
