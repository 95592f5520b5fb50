"""Sparse experts in place of the MLP of some blocks, and the losses that keep all of them in use.

A router gives each token to one or two of several MLPs, as in V-MoE (Riquelme et al. 2021). Where
modalities share an encoder, the entropies of LIMoE (Mustafa et al. 2022) decide how many experts
each of them uses. docs/beyond.md says where we differ, and why.

A token's way depends on its own clip alone: not on the batch, a micro-batch or a process. What the
losses need of the other clips is summed for each clip (`Routing`) and travels with its features.

B clips, N tokens, D width, M width of an MLP, X experts, k of them for each token, R = B N k pairs
of a token and an expert, Q numbers of a routing.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vatt.config import ExpertsParams, SizeParams
from vatt.model.operators import exact_product, full_precision, product_type


def has_experts(number: int, depth: int, params: ExpertsParams | None) -> bool:
    """Whether block `number`, counted from 1, has experts.

    It is every `every`-th block, counted back from the last but one: the last block computes AGG
    alone.
    """
    return params is not None and number < depth and (depth - 1 - number) % params.every == 0


def most_choices(num_tokens: int, params: ExpertsParams) -> int:
    """How many pairs of a token and an expert are computed for a clip, at most."""
    choices = params.top_k * num_tokens
    if params.capacity is None:
        return choices
    room = math.ceil(choices * params.capacity / params.number - 1e-6)
    return min(choices, params.number * room)


class Experts(nn.Module):
    """MLPs of which each token takes those that the router prefers."""

    def __init__(self, size: SizeParams, params: ExpertsParams, *, dropout: float) -> None:
        super().__init__()
        self.params = params
        self.router = Router(size.dim, params.number)
        self.hidden = ExpertLinear(params.number, size.dim, size.mlp_dim)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.out = ExpertLinear(params.number, size.mlp_dim, size.dim)

    def forward(self, tokens: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, N, D) -> (B, N, D), and the routing of each clip (B, Q).

        Tokens that are not `real` (B, N) are pads: no expert gets them, and they do not count.
        """
        if real is None:
            real = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        logs = self.router(tokens).log_softmax(-1)
        gates, experts = logs.exp().topk(self.params.top_k, dim=-1)  # (B, N, k)
        is_kept = real[..., None] & self._has_room(gates, experts, real)
        asked = self._ask_all if torch.compiler.is_exporting() else self._ask
        answers = asked(tokens, experts, is_kept)  # (B, N, k, D)
        mixed = (answers * (gates * is_kept)[..., None]).sum(2)
        return mixed, _routing(logs, experts, real, is_kept)

    def _ask(self, tokens: Tensor, experts: Tensor, is_kept: Tensor) -> Tensor:
        """The answers of each token's experts; of a choice that is not kept, anything."""
        rows, ends, places = _sorted_by_expert(tokens, experts, is_kept, self.params.number)
        answers = self.out(self.dropout(self.activation(self.hidden(rows, ends))), ends)
        return answers.index_select(0, places).view(*experts.shape, -1)

    def _ask_all(self, tokens: Tensor, experts: Tensor, _: Tensor) -> Tensor:
        """The same from the answers of all experts: more work, but of operators that ONNX has."""
        hidden = self.activation(self.hidden.all_experts(tokens[..., None, :]))
        answers = self.out.all_experts(hidden)  # (B, N, X, D)
        return answers.gather(2, experts[..., None].expand(-1, -1, -1, answers.shape[-1]))

    def _has_room(self, gates: Tensor, experts: Tensor, real: Tensor) -> Tensor:
        """Which choices (B, N, k) an expert accepts: all, or as many of a clip as `capacity` says.

        All first choices come before the second ones; among them, the surest tokens come first.
        """
        if self.params.capacity is None:
            return torch.ones_like(experts, dtype=torch.bool)
        order = torch.arange(gates.shape[1], device=gates.device).expand(gates.shape[:2])
        if self.params.batch_priority:
            order = _from_the_largest(gates[..., 0])
        order = order[..., None].expand_as(experts)
        numbers = torch.arange(self.params.number, device=gates.device)
        is_asked = (experts[..., None] == numbers) & real[..., None, None]  # (B, N, k, X)
        queue = (
            is_asked.gather(1, order[..., None].expand_as(is_asked)).transpose(1, 2).flatten(1, 2)
        )
        before = (queue.cumsum(1) - queue.int()).unflatten(1, (gates.shape[2], -1)).transpose(1, 2)
        taken = before.gather(3, experts.gather(1, order)[..., None])[..., 0]
        choices = self.params.top_k * real.sum(1)
        limit = (choices.double() * self.params.capacity / self.params.number - 1e-6).ceil()
        has_room = taken < limit[:, None, None]
        return torch.empty_like(has_room).scatter_(1, order, has_room)


def _from_the_largest(scores: Tensor) -> Tensor:  # (B, N) -> (B, N)
    """The places of the scores from the largest down, equal ones in their order."""
    if torch.compiler.is_exporting():  # ONNX has no stable sort
        return scores.topk(scores.shape[1], dim=1).indices
    return scores.argsort(dim=1, descending=True, stable=True)


class Router(nn.Linear):
    """Scores the experts for each token, in full precision: rounding could change the choice."""

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__(dim, experts, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, N, D) -> (B, N, X)
        return exact_product(full_precision(tokens), self.weight.t())


class ExpertLinear(nn.Module):
    """A linear layer for each expert."""

    def __init__(self, experts: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(experts, out_dim))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:  # (R, in), (X,) -> (R, out)
        """Rows up to `ends[0]` belong to the first expert, and so on; later ones become zeros."""
        kind = product_type(rows)
        return grouped_linear(rows.to(kind), self.weight.to(kind), self.bias.to(kind), ends)

    def all_experts(self, inputs: Tensor) -> Tensor:  # (..., 1 or X, in) -> (..., X, out)
        """What each expert answers to an input, or to its own input."""
        return (inputs[..., None, :] @ self.weight.transpose(1, 2))[..., 0, :] + self.bias


def _sorted_by_expert(
    tokens: Tensor, experts: Tensor, is_kept: Tensor, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (R, D) in the order of their experts, where each expert's end (X,), and the way back.

    Choices that are not kept come last. `places` (R,) are the rows of the choices in order.
    """
    chosen = torch.where(is_kept, experts, number).flatten()
    order = chosen.argsort(stable=True)
    ends = (chosen[:, None] == torch.arange(number, device=chosen.device)).sum(0).cumsum(0)
    rows = tokens.flatten(0, 1).index_select(0, order // experts.shape[-1])
    return rows, ends, order.argsort()


# --- products by group ----------------------------------------------------------------------------

_NAMESPACE = __name__.replace(".", "_")  # a copy of this file, as Hugging Face makes, has its own


@torch.library.custom_op(f"{_NAMESPACE}::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    """A linear layer for each group of rows: (R, in), (X, out, in), (X, out), (X,) -> (R, out).

    Being one operator, it compiles with fixed sizes.
    """
    answers = rows.new_zeros(len(rows), weight.shape[1])
    for number, (part, around) in enumerate(_parts(rows, ends)):
        found = torch.addmm(bias[number], rows[around], weight[number].t())
        answers[part] = found[_inside(part, around)]
    return answers


@torch.library.custom_op(f"{_NAMESPACE}::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    gradient: Tensor, rows: Tensor, weight: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of rows, weight and bias; those of an expert without rows are zero."""
    to_rows, to_weight = torch.zeros_like(rows), torch.empty_like(weight)
    to_bias = weight.new_empty(weight.shape[:2])
    for number, (part, around) in enumerate(_parts(rows, ends)):
        own = gradient[part]
        if part != around:
            own = torch.zeros_like(gradient[around])
            own[_inside(part, around)] = gradient[part]
        to_rows[part] = (own @ weight[number])[_inside(part, around)]
        torch.mm(own.t(), rows[around], out=to_weight[number])
        torch.sum(own, 0, out=to_bias[number])
    return to_rows, to_weight, to_bias


def _parts(rows: Tensor, ends: Tensor) -> Iterator[tuple[slice, slice]]:
    """The rows of each group, and the rows around them that are multiplied."""
    for start, end in pairwise([0, *ends.tolist()]):
        part, size = slice(start, end), end - start
        if rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and size:
            # oneDNN keeps code for every size that it has multiplied in bf16. Groups have another
            # size in each step, so sizes are rounded up, in steps of at most a quarter.
            step = max(16, 2 ** (size.bit_length() - 3))
            size = min(len(rows), -(-size // step) * step)
            start = min(start, len(rows) - size)
            yield part, slice(start, start + size)
        else:
            yield part, part


def _inside(part: slice, around: slice) -> slice:
    return slice(part.start - around.start, part.stop - around.start)


@grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(len(rows), weight.shape[1])


@_grouped_linear_backward.register_fake
def _(
    gradient: Tensor, rows: Tensor, weight: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weight), weight.new_empty(weight.shape[:2])


def _keep_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    rows, weight, _, ends = inputs
    ctx.save_for_backward(rows, weight, ends)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    return *_grouped_linear_backward(gradient.contiguous(), *ctx.saved_tensors), None


grouped_linear.register_autograd(_gradients, setup_context=_keep_inputs)


# --- how tokens were routed -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens were routed: sums over the tokens of a clip, or of many clips."""

    tokens: Tensor  # (...,) without pads
    dropped: Tensor  # (...,) choices that no expert had room for
    entropy: Tensor  # (...,) of the router's probabilities, in nats, summed over tokens
    probabilities: Tensor  # (..., X) summed over tokens
    chosen: Tensor  # (..., X) choices, before any is dropped

    @classmethod
    def of(cls, numbers: Tensor) -> "Routing":
        """The parts of a routing (..., Q), or of a sum of routings."""
        experts = (numbers.shape[-1] - 3) // 2
        *singles, probabilities, chosen = numbers.split([1, 1, 1, experts, experts], dim=-1)
        tokens, dropped, entropy = (part.squeeze(-1) for part in singles)
        return cls(tokens, dropped, entropy, probabilities, chosen)

    @property
    def shares(self) -> Tensor:
        """The share of the choices at each expert (..., X); without tokens, equal shares."""
        return _shares(self.chosen)

    @property
    def mean_probabilities(self) -> Tensor:
        """The router's mean probabilities (..., X); without tokens, equal ones."""
        return _shares(self.probabilities)


def _shares(sums: Tensor) -> Tensor:
    total = sums.sum(-1, keepdim=True)
    return torch.where(total > 0, sums / total.clamp(min=1e-6), 1 / sums.shape[-1])


def _routing(logs: Tensor, experts: Tensor, real: Tensor, is_kept: Tensor) -> Tensor:
    """The routing of each clip (B, Q) from the router's log-probabilities (B, N, X)."""
    probabilities = logs.exp() * real[..., None]
    entropy = -(probabilities * logs).sum(-1)
    numbers = torch.arange(logs.shape[-1], device=logs.device)
    chosen = ((experts[..., None] == numbers) & real[..., None, None]).sum((1, 2))
    dropped = (real[..., None] & ~is_kept).sum((1, 2))
    singles = torch.stack([real.sum(1), dropped, entropy.sum(1)], dim=-1)
    return torch.cat([singles, probabilities.sum(1), chosen], dim=-1)


_noted: ContextVar[list[Tensor] | None] = ContextVar("routings", default=None)


@contextmanager
def noting_routings() -> Iterator[list[Tensor]]:
    """Within it, an encoder adds the routing (B, Q) of each of its blocks with experts to a list.

    Towers thus answer with features alone, with or without experts.
    """
    noted: list[Tensor] = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def note_routing(routing: Tensor) -> None:
    """Add a block's routing to the list, where there is one; an exported graph has none."""
    noted = None if torch.compiler.is_exporting() else _noted.get()
    if noted is not None:
        noted.append(routing)


def routings_by_tower(
    noted: Sequence[Tensor], towers: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """The routings (B, blocks, Q) of each tower, from those of its blocks, in their order."""
    if not noted:
        return {}
    left = iter(noted)
    found = {}
    for name, tower in towers.items():
        number = sum(isinstance(part, Experts) for part in tower.modules())
        found[name] = torch.stack([next(left) for _ in range(number)], dim=1)
    return found


def towers_by_encoder(towers: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """The names of the towers that each encoder with experts belongs to."""
    names: dict[int, list[str]] = {}
    for name, tower in towers.items():
        first = next((part for part in tower.modules() if isinstance(part, Experts)), None)
        if first is not None:
            names.setdefault(id(first), []).append(name)
    return [tuple(found) for found in names.values()]


# --- losses ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RoutingLosses:
    """`total` joins the loss of a training; `metrics` are for people."""

    total: Tensor
    metrics: dict[str, Tensor]


def routing_losses(
    sums: Mapping[str, Tensor], sharing: Sequence[Sequence[str]], params: ExpertsParams
) -> RoutingLosses:
    """The auxiliary losses of a whole batch, each the mean over its blocks.

    `sums` are routings (blocks, Q) by modality, summed over the clips of the batch; `sharing` names
    the modalities of each encoder.
    """
    routings = {name: Routing.of(full_precision(numbers)) for name, numbers in sums.items()}
    pooled = [Routing.of(torch.stack([sums[name] for name in names]).sum(0)) for names in sharing]
    balance = torch.stack([balance_loss(one) for one in pooled]).sum()
    local = {name: local_entropy(one) for name, one in routings.items()}
    used = {name: entropy(one.mean_probabilities) for name, one in routings.items()}
    least = math.log(params.least_experts)
    missing = torch.stack([F.relu(least - one).mean() for one in used.values()]).sum()
    total = params.balance_weight * balance + params.global_weight * missing
    total = total + params.local_weight * torch.stack(list(local.values())).sum()
    tokens = torch.stack([one.tokens.sum() for one in routings.values()]).sum()
    dropped = torch.stack([one.dropped.sum() for one in routings.values()]).sum()
    metrics = {
        "loss": total,
        "balance": balance,
        "dropped": dropped / (params.top_k * tokens).clamp(min=1),
        **{f"entropy.{name}": value for name, value in local.items()},
        **{f"used.{name}": value.exp().mean() for name, value in used.items()},
    }
    shared = [names for names in sharing if len(names) > 1]
    if shared:
        found = [specialisation([routings[name].shares for name in names]) for names in shared]
        metrics["specialisation"] = torch.stack(found).mean()
    return RoutingLosses(total, {f"experts.{name}": one for name, one in metrics.items()})


def balance_loss(routing: Routing) -> Tensor:
    """X sum_x f_x p_x: f are shares of choices, p mean probabilities; 1 if all experts are equal.

    As in Switch Transformers (Fedus et al. 2021), without noise in the router.
    """
    product = (routing.shares * routing.mean_probabilities).sum(-1)
    return (routing.shares.shape[-1] * product).mean()


def local_entropy(routing: Routing) -> Tensor:
    """LIMoE's local entropy: the mean of H(p(experts | token)), low if routers are sure."""
    return (routing.entropy / routing.tokens.clamp(min=1)).mean()


def entropy(probabilities: Tensor) -> Tensor:  # (..., X) -> (...,)
    """H(p) in nats."""
    kept = probabilities.clamp(min=1e-20)  # the logarithm's gradient stays finite
    return -(kept * kept.log()).sum(-1)


def specialisation(shares: Sequence[Tensor]) -> Tensor:
    """How different the modalities' experts are, from their shares (..., blocks, X) -> (...,).

    0: all modalities use the experts alike; 1: no two modalities share an expert. It is the
    information that an expert gives about the modality, as a share of the largest possible one.
    """
    each = torch.stack(list(shares))
    information = entropy(each.mean(0)) - entropy(each).mean(0)
    return (information / math.log(len(each))).mean(-1)
