"""Contrastive pre-training: batches -> weights.

B clips of the global batch, K candidate texts of a clip, D feature width. Every process encodes
its part of the batch; features are gathered with their gradients, and heads (with batch norm) and
loss see the whole batch in every process, so that any number of them makes the same update.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vatt.config import ModelParams, PretrainParams, check_share
from vatt.data.loading.batches import Batch
from vatt.losses import FORMS, agreement, anchors_loss, pretraining_loss, weights_of
from vatt.model.experts import (
    RoutingLosses,
    noting_routings,
    routing_losses,
    routings_by_tower,
    towers_by_encoder,
)
from vatt.model.operators import Fused, FusedFunction, full_precision
from vatt.model.patches import (
    PatchEmbedding,
    Patches,
    cut,
    draw_kept,
    draw_kept_by_energy,
    energy_share,
    num_patches,
)
from vatt.model.transformer import set_merging
from vatt.model.vatt import VATT, Embeddings
from vatt.senses import ANCHOR, SENSES
from vatt.senses.form import Cutting
from vatt.senses.video import change_colour_of_patches
from vatt.training import distributed
from vatt.training.engine import Weights
from vatt.training.gradient_cache import encode_in_micro_batches
from vatt.training.loop import Objective, Training, train
from vatt.training.state import flatten
from vatt.training.telemetry import pretraining_work

# Settings that shape no weight: changing them does not make a saved state useless.
SHAPELESS = {
    *("save_every", "keep_states", "keep_states_every", "report_every"),
    *("evaluate_every", "evaluate_clips"),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What `Pretraining` takes: this process's part of a batch, by sense."""

    signals: dict[str, Tensor]  # (B / processes, ...), as stored
    kept: dict[str, Tensor]  # (B / processes, K) the tokens that DropToken keeps
    changes: dict[str, Tensor]  # (B / processes, ...) what `Sense.change` names
    present: dict[str, Tensor]  # (B / processes,), and (B / processes, K) for text
    energy: dict[str, Tensor]  # (B / processes,) of the signal, the share in the kept tokens

    def tensors(self) -> list[Tensor]:
        """All of them."""
        groups = (self.signals, self.kept, self.changes, self.present, self.energy)
        return [value for group in groups for value in group.values()]

    def by_clip(self) -> list[Tensor | None]:
        """Signal, kept tokens and change of each sense in turn: what encoding needs of a clip."""
        return [
            group.get(name)
            for name in self.signals
            for group in (self.signals, self.kept, self.changes)
        ]


class Pretraining(nn.Module):
    """A step's forward pass: this process's clips in, the whole batch's losses out."""

    def __init__(
        self,
        model: VATT,
        params: PretrainParams,
        *,
        micro_batch_size: int | None = None,
        kept_micro_batches: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.params = params
        self.micro_batch_size = micro_batch_size
        self.kept_micro_batches = kept_micro_batches
        embed = model.get_submodule(f"{ANCHOR.name}.embed")
        assert isinstance(embed, PatchEmbedding)
        self.visible = Visible(embed)
        self.anchors_loss = FusedFunction(anchors_loss)
        self.sharing = towers_by_encoder({name: getattr(model, name) for name in model.senses})
        set_merging(model, params.merge_rate)

    def forward(self, inputs: Inputs, weighs_text: bool = False) -> dict[str, Tensor]:
        """Losses of the global batch by name; `loss` is the one to minimise."""
        names = tuple(inputs.signals)
        own = encode_in_micro_batches(
            partial(self._encode, names),
            *inputs.by_clip(),
            weights=self._encoder_weights(),
            micro_batch_size=self.micro_batch_size,
            kept=self.kept_micro_batches,
        )
        device = own[0].device.type
        # Heads and loss are small next to the encoders, and better off in full precision.
        with torch.autocast(device, enabled=False):
            whole = [distributed.gather(part) for part in own]
            features = dict(zip(names, whole, strict=False))
            routings = dict(zip(names, whole[len(names) :], strict=False))
            present = {
                name: distributed.gather_flags(there) for name, there in inputs.present.items()
            }
            embeddings = self.model.project(features, present)
            valid = present["video"][:, None] & present["text"]
            weights, facts = self._text_weights(embeddings, valid, weighs=weighs_text)
            losses = pretraining_loss(
                embeddings,
                present,
                temperature=self.params.temperature,
                mil_nce_weight=self.params.mil_nce_weight,
                senses_weight=self.params.senses_weight,
                form=FORMS[self.model.params.recipe],
                text_weights=weights,
                compiled=self.anchors_loss.forward,
            )
            found = {"loss": losses.total, "nce": losses.nce, "mil_nce": losses.mil_nce, **facts}
            found |= {SENSES[name].loss: value for name, value in losses.more.items()}
            found |= {
                f"kept_energy.{name}": distributed.gather(share).mean()
                for name, share in inputs.energy.items()
            }
            if routings:
                more = self._routing_losses(routings, present)
                found |= {"loss": losses.total + more.total, **more.metrics}
        return found

    def _routing_losses(
        self, routings: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> RoutingLosses:
        """Of routings (B, 1 or K, blocks, Q); what a clip lacks does not count."""
        sums = {}
        for name, numbers in routings.items():
            weights = present[name].view(*numbers.shape[:2], 1, 1).to(numbers.dtype)
            sums[name] = (numbers * weights).sum((0, 1))
        assert self.model.params.experts is not None
        return routing_losses(sums, self.sharing, self.model.params.experts)

    def _text_weights(
        self, embeddings: Embeddings, valid: Tensor, *, weighs: bool
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The weights of the candidates, None before they count, and what to report of them."""
        setting = self.params.text_weighting
        if setting is None:
            return None, {}
        video, text = embeddings.vt["video"], embeddings.vt["text"]
        found = agreement(video, text, self.params.temperature, valid=valid)
        weights = weights_of(found, kind=setting.kind, least=setting.least) if weighs else None
        number = valid.sum().clamp(min=1)
        left_out = 0 * found if weights is None else (valid & (weights == 0)).to(found.dtype)
        facts = {
            "text_agreement": found.sum() / number,
            "text_dropped_share": left_out.sum() / number,
        }
        return weights, facts

    def _encode(self, names: tuple[str, ...], *rows: Tensor | None) -> tuple[Tensor, ...]:
        """Features of some clips, then their routings; `rows` as `Inputs.by_clip` has them."""
        # In here, so that floats of a whole batch, four times its bytes, never exist at once.
        kind = next(self.model.parameters()).dtype
        given: dict[str, Any] = {}
        clips = 0
        for name, values, kept, change in zip(names, *(rows[k::3] for k in range(3)), strict=True):
            assert values is not None
            clips = len(values)
            if name == ANCHOR.name:
                seen = self.visible(values, change, kept, kind)
                given[name] = self.visible.patches(seen, values, kept)
            else:
                scaled = SENSES[name].scaled(values, change)
                given[name] = scaled.to(kind) if scaled.is_floating_point() else scaled
            given[f"kept_{name}"] = kept
        with noting_routings() as noted:
            features = self.model.encode(**given)
        towers = {name: self.model.get_submodule(name) for name in features}  # as they ran
        routings = routings_by_tower(noted, towers)
        return (
            *(full_precision(features[name]) for name in names),
            *(routings[name].unflatten(0, (clips, -1)) for name in names if routings),
        )

    def _encoder_weights(self) -> list[nn.Parameter]:
        heads = set(self.model.heads.parameters())
        return [weight for weight in self.model.parameters() if weight not in heads]


class Visible(Fused):
    """What the encoder gets of a uint8 video, in [-1, 1]; only kept patches are worked on.

    Compiled, it is one pass from the video to the encoder's type, and before it one for the means
    of each frame's channels, about which contrast changes.
    """

    def __init__(self, embed: PatchEmbedding) -> None:
        super().__init__()
        self.patch, self.cut = embed.patch, embed.cut

    def forward(
        self,
        video: Tensor,  # (B, T, H, W, C) uint8
        colour: Tensor | None,  # (B, 4)
        kept: Tensor | None,  # (B, K)
        kind: torch.dtype,
    ) -> Tensor:  # (B, K, P), or (B, T, H, W, C) where all is kept or a patch is partial
        sizes = zip(video.shape[1:4], self.patch, strict=True)
        if kept is None or any(size % step for size, step in sizes):
            # The padding of a partial patch is 0.0, which no uint8 scales to.
            return ANCHOR.scaled(video, colour).to(kind)
        patches = self.cut(video, kept)
        depth = self.patch[0]
        values = patches.values.unflatten(-1, (depth, -1, video.shape[-1])).float() / 255
        if colour is not None:
            first = kept // math.prod(patches.grid[1:]) * depth
            frames = first[..., None] + torch.arange(depth, device=kept.device)
            values = change_colour_of_patches(values, frames, video, colour)
        return (values * 2 - 1).flatten(2).to(kind)

    def patches(self, values: Tensor, video: Tensor, kept: Tensor | None) -> Tensor | Patches:
        """What `forward` has returned, as the encoder takes it."""
        grid = num_patches(video.shape[1:4], self.patch)
        return values if values.dim() == video.dim() else Patches(values, grid, kept)


def pretrain(model: VATT, params: PretrainParams, training: Training) -> Weights:
    """Train, or go on training, `model`; returns its weights in rank 0, nothing elsewhere."""
    check_share(params.batch_size, distributed.world_size(), setting="pretrain.batch_size")
    seed = training.seed

    setting = params.text_weighting

    def inputs_of(batch: Batch, step: int) -> tuple[Any, ...]:
        inputs = pretraining_inputs(
            model,
            batch,
            step,
            drop_rate=params.drop_rate,
            seed=seed,
            random_share=params.random_share,
        )
        return (*inputs, setting is not None and step >= setting.warmup_steps)

    objective = Objective(
        Pretraining(model, params, **training.micro_batches()),
        inputs_of,
        pretraining_work(model.params, params),
        fingerprint(params, model.params, data_hash=training.data_hash, seed=seed),
        keep_states=params.keep_states,
        keep_states_every=params.keep_states_every,
        evaluate_every=params.evaluate_every,
    )
    return train(objective, params, training)


def pretraining_inputs(
    model: VATT,
    batch: Batch,
    step: int,
    *,
    drop_rate: float,
    seed: int,
    random_share: float = 1.0,
) -> tuple[Inputs]:
    """A batch as `Pretraining.forward` takes it, with the tokens that DropToken keeps.

    `random_share` of the kept ones are drawn; the others are those with the most motion or sound.
    """
    batch = batch.to(distributed.device())
    signals = {name: batch.signals[name] for name in model.senses}
    first = distributed.rank() * len(batch.clip_ids)
    device = signals[ANCHOR.name].device
    samples = torch.arange(first, first + len(batch.clip_ids), device=device)
    if model.drops_alike:
        samples = torch.zeros_like(samples)
    kept: dict[str, Tensor] = {}
    energies: dict[str, Tensor] = {}
    for name, number in model.token_counts.items() if drop_rate > 0 else ():
        draw: dict[str, Any] = {"seed": seed, "step": step, "samples": samples, "stream": name}
        if random_share == 1:
            kept[name] = draw_kept(number, drop_rate, **draw, choose=model.choose.forward)
            continue
        energy = _energy(model, signals[name], name)
        kept[name] = draw_kept_by_energy(energy, drop_rate, random_share=random_share, **draw)
        energies[name] = energy_share(energy, kept[name])
    present = {name: there for name, there in batch.has().items() if name in signals}
    return (Inputs(signals, kept, batch.changes, present, energies),)


def _energy(model: VATT, values: Tensor, name: str) -> Tensor:  # -> (B, N)
    """How much there is to see or to hear in each token."""
    sense = SENSES[name]
    cutting = sense.tokens(sense.section(model.params))
    assert isinstance(cutting, Cutting)
    energy = sense.energy(values)
    return cut(energy if cutting.channels else energy[..., None], cutting.patch).sum(-1)


def fingerprint(
    params: PretrainParams, model: ModelParams, *, data_hash: str, seed: int
) -> dict[str, Any]:
    """What shapes the weights, key by key."""
    return flatten(
        {
            "pretrain": params.model_dump(mode="json", exclude=SHAPELESS),
            "model": model.model_dump(mode="json"),
            "data": data_hash,
            "seed": seed,
        }
    )
