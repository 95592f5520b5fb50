"""Raw signals -> tokens: patches, words, positions, DropToken (the paper's section 3).

B clips, T H W C frames, height, width, channels, S samples, L words, N tokens, K tokens kept,
P values in a patch, D width.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vatt.errors import SettingsError
from vatt.model.operators import Linear
from vatt.senses.form import Cutting, Words

_CUT = {
    1: "b (n a) c -> b n (a c)",
    2: "b (n a) (m d) c -> b (n m) (a d c)",
    3: "b (t a) (h d) (w e) c -> b (t h w) (a d e c)",
}
_LETTERS = {1: "a", 2: "ad", 3: "ade"}


def num_patches(sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Patches along each axis; a last, partial one counts (the paper's ceil)."""
    return tuple(math.ceil(size / step) for size, step in zip(sizes, patch, strict=True))


def cut(inputs: Tensor, patch: Sequence[int]) -> Tensor:  # (B, *sizes, C) -> (B, N, P)
    """Cut into patches, the first axis slowest; zeros fill up partial patches."""
    missing = [-size % step for size, step in zip(inputs.shape[1:-1], patch, strict=True)]
    if any(missing):
        padding = [0, 0]  # of the channels; F.pad counts axes from the last one
        for amount in reversed(missing):
            padding += [0, amount]
        inputs = F.pad(inputs, padding)
    letters = _LETTERS[len(patch)]
    return rearrange(inputs, _CUT[len(patch)], **dict(zip(letters, patch, strict=True)))


def check_input(inputs: Tensor, axes: Sequence[str | int], *, ids: bool = False) -> None:
    """Raise unless the axes after the first (the clips) are these: a name for any size, or a size.

    The values must be floats, or whole numbers with `ids`.
    """
    if not isinstance(inputs, Tensor):
        raise SettingsError(
            f"the input is a {type(inputs).__name__}; allowed is a tensor",
            hint="words: vatt.vocabulary(FOLDER).encode makes their ids; arrays: torch.from_numpy",
        )
    if inputs.is_floating_point() == ids:
        kind = str(inputs.dtype).removeprefix("torch.")
        wanted = "word ids (whole numbers)" if ids else "floats in [-1, 1] for pictures and sound"
        raise SettingsError(f"the input holds {kind}; allowed are {wanted}", hint="convert it")
    allowed = f"(clips, {', '.join(map(str, axes))})"
    came = tuple(inputs.shape)
    if inputs.ndim != len(axes) + 1:
        raise SettingsError(
            f"the input has {inputs.ndim} dimensions, {came}; allowed are {len(axes) + 1}",
            hint=f"give it the shape {allowed}",
        )
    for place, (axis, size) in enumerate(zip(axes, inputs.shape[1:], strict=True), start=1):
        if size < 1 or (isinstance(axis, int) and size != axis):
            limit = str(axis) if isinstance(axis, int) else "1 or more"
            name = "channels" if isinstance(axis, int) else axis
            raise SettingsError(
                f"the input's dimension {place}, {name}, is {size}; allowed is {limit}",
                hint=f"the shape is {came}; it must be {allowed}",
            )


@dataclass(frozen=True, slots=True)
class Patches:
    """An input that is cut already; where `kept` is given, it holds just these patches."""

    values: Tensor  # (B, N, P), or (B, K, P)
    grid: tuple[int, ...]  # patches along each axis, before any is dropped
    kept: Tensor | None  # (B, K)


class PatchEmbedding(nn.Module):
    """Cut the input into patches, project each linearly, add its position.

    `channels` is None for a signal without a channel axis: (B, S) or (B, frames, mel bins). `lift`
    follows the projection where a model has one; the paper's has none.
    """

    def __init__(
        self,
        axes: Sequence[str],
        patch: Sequence[int],
        *,
        channels: int | None,
        positions: nn.Module,
        dim: int,
        dropout: float,
        lift: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.axes, self.patch, self.channels = tuple(axes), tuple(patch), channels
        self.project = Linear(math.prod(patch) * (channels or 1), dim)
        self.lift = lift
        self.positions = positions
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor | Patches, kept: Tensor | None = None) -> Tensor:
        """(B, *sizes, C) -> (B, N, D), or (B, K, D) where `kept` (B, K) names tokens."""
        if not isinstance(inputs, Patches):
            check_input(inputs, self.axes if self.channels is None else (*self.axes, self.channels))
            inputs = self.cut(inputs, kept)
        positions = self.positions(inputs.grid)[None]
        if inputs.kept is not None:
            positions = drop_tokens(positions.expand(len(inputs.kept), -1, -1), inputs.kept)
        tokens = self.project(inputs.values)
        if self.lift is not None:
            tokens = self.lift(tokens)
        return self.dropout(tokens + positions)

    def cut(self, inputs: Tensor, kept: Tensor | None = None) -> Patches:
        """The input's patches, of any type of number.

        What follows acts on each patch alone, so dropping first is the same and cheaper.
        """
        inputs = inputs[..., None] if self.channels is None else inputs
        values, grid = cut(inputs, self.patch), num_patches(inputs.shape[1:-1], self.patch)
        return Patches(values if kept is None else drop_tokens(values, kept), grid, kept)


class WordEmbedding(nn.Module):
    """Look each word up in a table; id 0 is a pad, which the encoder masks."""

    def __init__(self, table: nn.Embedding, *, dropout: float) -> None:
        super().__init__()
        self.table = table
        self.dropout = nn.Dropout(dropout)

    def forward(self, text: Tensor) -> Tensor:  # (B, L) -> (B, L, D)
        return self.dropout(self.table(text))


def grid_of(cutting: Cutting) -> tuple[int, ...]:
    """Patches along each axis of a signal."""
    return num_patches(cutting.sizes, cutting.patch)


def patch_values(cutting: Cutting) -> int:
    """Numbers in a patch."""
    return math.prod(cutting.patch) * (cutting.channels or 1)


def num_tokens(tokens: Cutting | Words) -> int:
    """Tokens of a clip before DropToken, or words of a text; the AGG token is not one."""
    return tokens.length if isinstance(tokens, Words) else math.prod(grid_of(tokens))


# --- positions: one table for each axis, resized for inputs of other sizes ------------------------


class AxisPositions(nn.Module):
    """The position of a token is the sum of its axes' entries."""

    def __init__(self, axes: Sequence[str], grid: Sequence[int], dim: int) -> None:
        super().__init__()
        self.axes = tuple(axes)
        for axis, size in zip(axes, grid, strict=True):
            self.register_parameter(axis, nn.Parameter(torch.empty(size, dim)))

    def forward(self, grid: Sequence[int]) -> Tensor:  # -> (N, D), the first axis slowest
        total: Tensor | None = None
        for axis, size in zip(self.axes, grid, strict=True):
            table = self.resize(self.get_parameter(axis), size)
            total = table if total is None else total[..., None, :] + table
        assert total is not None
        return total.flatten(0, -2)

    def resize(self, table: Tensor, size: int) -> Tensor:  # (n, D) -> (size, D)
        """A table for an axis of another size."""
        return bicubic(table, size)


def bicubic(table: Tensor, size: int) -> Tensor:  # (n, D) -> (size, D)
    """Resize a table as an image one pixel wide.

    The paper resizes the summed positions of an image. Cubic weights sum to one, so resizing each
    axis' table alone gives the same sum.
    """
    if len(table) == size:
        return table
    image = rearrange(table.float(), "n d -> 1 d n 1")
    resized = F.interpolate(image, size=(size, 1), mode="bicubic", align_corners=False)
    return rearrange(resized, "1 d n 1 -> n d")


def fit_tables(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """These weights with their position tables resized to the sizes in `model`.

    What is not a table stays as it is: the caller compares all forms.
    """
    fitted = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, AxisPositions):
            for axis in module.axes:
                key = f"{name}.{axis}" if name else axis
                if key in fitted and _is_table(fitted[key]):
                    size = len(module.get_parameter(axis))
                    fitted[key] = module.resize(fitted[key], size).to(fitted[key].dtype)
    return fitted


def _is_table(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.is_floating_point() and tensor.numel() > 0


# --- DropToken ------------------------------------------------------------------------------------

_SIGN = -(2**31)
_AT_ONCE = 2**17  # numbers drawn at a time on a CPU: with their scratch space, 1 MB of cache


def num_kept(num_tokens: int, drop_rate: float) -> int:
    """How many of `num_tokens` are kept: int(keep rate x tokens), at least one."""
    return max(1, int(round((1 - drop_rate) * num_tokens, 6)))


def draw_kept(
    num_tokens: int,
    drop_rate: float,
    *,
    seed: int,
    step: int,
    samples: Tensor | Sequence[int],
    stream: str = "",
    choose: Callable[[Tensor, Tensor, int, int], Tensor] | None = None,
) -> Tensor:
    """Indices (B, K) of the tokens to keep, ascending in each row.

    `samples` (B,) are the clips' places in the global batch, and `stream` ("video", "audio") keeps
    draws of the same shape apart. A row depends on seed, step, stream, number of tokens and its own
    sample, so it is the same on every device and for any number of processes. Where `samples` is a
    tensor, all work is done on its device. `choose` is `choose_kept`, or its compiled form.
    """
    samples = torch.as_tensor(samples, dtype=torch.long)
    key = _key(f"{seed}/{step}/{stream}/{num_tokens}", samples)
    return (choose or choose_kept)(samples, key, num_tokens, num_kept(num_tokens, drop_rate))


def choose_kept(samples: Tensor, key: Tensor, num_tokens: int, count: int) -> Tensor:
    """The tokens (B, count) with each row's smallest numbers, ascending."""
    first, second = _row_keys(samples, key)
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=samples.device)
    if samples.device.type != "cpu" or torch.compiler.is_compiling():
        numbers = _scatter(tokens, first, second)
        return numbers.topk(count, largest=False, sorted=False).indices.sort().values
    # Faster on a CPU; on a GPU, this selection would wait for the device.
    rows = max(1, _AT_ONCE // num_tokens)
    parts = zip(first.split(rows), second.split(rows), strict=True)
    return torch.cat([_smallest(_scatter(tokens, *keys), count) for keys in parts])


def draw_kept_by_energy(
    energies: Tensor,
    drop_rate: float,
    *,
    random_share: float,
    seed: int,
    step: int,
    samples: Tensor,
    stream: str = "",
) -> Tensor:
    """Indices (B, K) of the tokens to keep, ascending: those with the most energy, and some others.

    `energies` (B, N) are whole numbers. `random_share` of the K, rounded up, are drawn from the
    tokens that are left, so that quiet ones are seen, too. Equal energies are ordered by the
    numbers that `draw_kept` draws: with a share of 1, or without any energy, both keep the same.
    """
    num_tokens = energies.shape[1]
    count = num_kept(num_tokens, drop_rate)
    drawn = math.ceil(round(random_share * count, 6))
    keys = _row_keys(samples, _key(f"{seed}/{step}/{stream}/{num_tokens}", samples))
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=samples.device)
    order = _scatter(tokens, *keys).argsort(dim=1)
    # From here on a token is its place in that order, so that the smallest ones are drawn.
    ranked = energies.gather(1, order).argsort(dim=1, descending=True, stable=True)
    most, rest = ranked.split([count - drawn, num_tokens - count + drawn], dim=1)
    kept = torch.cat([most, rest.sort(dim=1).values[:, :drawn]], dim=1)
    return order.gather(1, kept).sort(dim=1).values


def _key(name: str, samples: Tensor) -> Tensor:
    """A key of 64 bits, on the device of the samples; no device is waited for."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big", signed=True)
    return torch.full((), number, dtype=torch.long, device=samples.device)


def _row_keys(samples: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:  # (B,) -> (B, 1), (B, 1)
    """Two keys of 32 bits for each row.

    A counter-based draw: they encrypt each token's index into 32 bits. Different indices become
    different numbers, so no two tokens of a row tie.
    """
    first = _mix(samples[:, None].int() ^ (key >> 32).int())
    return first, _mix(first ^ key.int())


def _scatter(tokens: Tensor, first: Tensor, second: Tensor) -> Tensor:  # (N,), (B, 1), (B, 1)
    """The tokens' numbers (B, N), encrypted with the two halves of each row's key."""
    return _mix(_mix(tokens ^ first).add_(second)).bitwise_xor_(_SIGN)  # ordered as if unsigned


def _smallest(numbers: Tensor, count: int) -> Tensor:  # (B, N) -> (B, K)
    """The places of each row's smallest numbers, ascending; no two numbers of a row are equal."""
    is_kept = numbers <= numbers.kthvalue(count, dim=1, keepdim=True).values
    places = np.flatnonzero(is_kept.numpy()).reshape(len(numbers), count)
    places -= np.arange(0, numbers.numel(), numbers.shape[1])[:, None]
    return torch.from_numpy(places)


def _mix(numbers: Tensor) -> Tensor:
    """Scatter 32-bit numbers one to one, in place: each output bit depends on every input bit.

    They are used as unsigned; int32 products wrap, and shifts are masked.
    """
    shifted = torch.empty_like(numbers)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):
        torch.bitwise_right_shift(numbers, shift, out=shifted)
        numbers ^= shifted.bitwise_and_((1 << (32 - shift)) - 1)
        if factor != 1:
            numbers *= factor
    return numbers


def drop_tokens(tokens: Tensor, kept: Tensor) -> Tensor:  # (B, N, D), (B, K) -> (B, K, D)
    """The kept tokens of each clip, in the order of `kept`."""
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))


def energy_share(energies: Tensor, kept: Tensor) -> Tensor:  # (B, N), (B, K) -> (B,)
    """The share of a clip's energy that is in the kept tokens; K / N where there is no energy."""
    total, held = energies.sum(1), energies.gather(1, kept).sum(1)
    even = kept.shape[1] / energies.shape[1]
    return torch.where(total > 0, held / total.clamp(min=1), even)
