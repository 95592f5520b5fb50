"""What a pre-training step costs: against plain torch modules, and with cached gradients.

    python bench/pretrain_step.py modules     # against the same model of plain torch modules
    python bench/pretrain_step.py caching     # gradient caching: its price, its memory
    python bench/pretrain_step.py draw        # DropToken's indices of 2,048 clips

The model and the way of measuring are in bench/reference.py.
"""

import gc
import math
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from reference import RATE, Step, compare, random_batch, reference_model, run_parts, settings
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from vatt.checkpoint import build
from vatt.data.loading.batches import model_inputs
from vatt.model.patches import draw_kept
from vatt.model.transformer import SIZES
from vatt.model.vatt import VATT
from vatt.training.engine import LocalEngine
from vatt.training.pretrain import Pretraining, pretraining_inputs

MICRO = 32


def our_step(
    clips: int,
    *,
    candidates: int = 1,
    micro: int | None = None,
    kept: int = 1,
    precision: str = "bf16",
) -> Step:
    """A step of plain torch's engine on a batch in memory."""
    torch.manual_seed(0)
    params = settings(text_candidates=candidates, batch_size=clips, precision=precision)
    model = build(reference_model())
    engine = LocalEngine(
        Pretraining(model, params, micro_batch_size=micro, kept_micro_batches=kept),
        params.optimizer,
        params.precision,
    )
    batch = random_batch(model.params, clips, candidates)

    def step() -> float:
        losses = engine(*pretraining_inputs(model, batch, 0, drop_rate=0.0, seed=0))
        engine.update(losses["loss"], learning_rate=RATE)
        return losses["loss"].item()

    return step


# --- the same model of plain torch modules --------------------------------------------------------


class PlainTower(nn.Module):
    """Tokens -> nn.TransformerEncoderLayer -> the AGG token's answer."""

    def __init__(self, agg_token: Tensor) -> None:
        super().__init__()
        size = SIZES["tiny"]
        self.agg_token = nn.Parameter(agg_token.detach().clone())
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                size.dim, size.heads, size.mlp_dim, dropout=0.0, activation="gelu",
                layer_norm_eps=1e-6, batch_first=True, norm_first=True,
            )
            for _ in range(size.depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(size.dim, eps=1e-6)

    def forward(self, tokens: Tensor, biases: tuple[Tensor | None, ...] = (None,) * 4) -> Tensor:
        tokens = torch.cat([self.agg_token.expand(len(tokens), 1, -1), tokens], dim=1)
        for layer, bias in zip(self.layers, biases, strict=True):
            tokens = layer(tokens, src_mask=bias)
        return self.norm(tokens)[:, 0]

    def take(self, tower: nn.Module) -> None:
        """Weights of our tower."""
        for plain, ours in zip(self.layers, tower.encoder.blocks, strict=True):
            pairs = {
                plain.norm1: ours.attention_norm,
                plain.norm2: ours.mlp_norm,
                plain.self_attn.out_proj: ours.attention.out,
                plain.linear1: ours.mlp.hidden,
                plain.linear2: ours.mlp.out,
            }
            for here, there in pairs.items():
                here.load_state_dict(there.state_dict())
            qkv = ours.attention.qkv
            plain.self_attn.in_proj_weight.data.copy_(qkv.weight)
            plain.self_attn.in_proj_bias.data.copy_(qkv.bias)
        self.norm.load_state_dict(tower.encoder.norm.state_dict())


class PlainVatt(nn.Module):
    """The reference model of nn.Linear, nn.TransformerEncoderLayer and nn.BatchNorm1d."""

    def __init__(self, model: VATT) -> None:
        super().__init__()
        dim, words = SIZES["tiny"].dim, model.params.text.vocabulary
        self.video_patches, self.audio_patches = (
            nn.Linear(4 * 16 * 16 * 3, dim),
            nn.Linear(128, dim),
        )
        self.words = nn.Embedding(words, dim)
        self.relative = nn.Embedding(32, SIZES["tiny"].heads)
        self.video, self.audio, self.text = (
            PlainTower(tower.agg_token) for tower in (model.video, model.audio, model.text)
        )
        for name in ("video", "audio", "text"):
            getattr(self, name).take(getattr(model, name))
        self.video_patches.load_state_dict(model.video.embed.project.state_dict())
        self.audio_patches.load_state_dict(model.audio.embed.project.state_dict())
        self.words.load_state_dict(model.text.embed.table.state_dict())
        self.relative.load_state_dict(model.text.relative.table.state_dict())
        self.video_positions = nn.Parameter(model.video.embed.positions((2, 4, 4)).detach())
        self.audio_positions = nn.Parameter(model.audio.embed.positions((125,)).detach())
        self.heads = nn.ModuleDict(
            {
                "video_1": head(dim, 512),
                "video_2": head(512, 512),
                "audio": head(dim, 512),
                "video_text": head(512, 256),
                "text": head(dim, 256),
            }
        )
        ours = model.heads
        pairs = {
            "video_1": ours.video_to_va[0],
            "video_2": ours.video_to_va[2],
            "audio": ours.audio_to_va,
            "video_text": ours.va_to_vt,
            "text": ours.text_to_vt,
        }
        for name, other in pairs.items():
            self.heads[name][0].load_state_dict(other.linear.state_dict())

    def forward(self, video: Tensor, audio: Tensor, text: Tensor) -> Tensor:
        """The loss: every clip has all three, every sentence all words."""
        clips, _, words = text.shape
        cut = video.view(clips, 2, 4, 4, 16, 4, 16, 3).permute(0, 1, 3, 5, 2, 4, 6, 7)
        video_tokens = self.video_patches(cut.reshape(clips, 32, -1)) + self.video_positions
        audio_tokens = self.audio_patches(audio.view(clips, 125, 128)) + self.audio_positions
        bias = self.relative(self.buckets(words + 1)).permute(2, 0, 1)
        bias = bias.repeat(clips, 1, 1)  # (clips x heads, words, words)
        spoken = self.text(self.words(text[:, 0]), (bias, None, None, None))
        seen, heard = self.video(video_tokens), self.audio(audio_tokens)
        with torch.autocast("cpu", enabled=False):
            return self.loss(seen.float(), heard.float(), spoken.float())

    def loss(self, seen: Tensor, heard: Tensor, spoken: Tensor) -> Tensor:
        """NCE of video and audio + NCE of video and text."""
        heads = self.heads
        video_va = heads["video_2"](F.relu(heads["video_1"](seen)))
        total = seen.new_zeros(())
        for one, other in (
            (video_va, heads["audio"](heard)),
            (heads["video_text"](video_va), heads["text"](spoken)),
        ):
            scores = F.normalize(one, dim=1) @ F.normalize(other, dim=1).T / 0.07
            own = torch.eye(len(scores), dtype=torch.bool)
            both = torch.cat([scores, scores.T.masked_fill(own, -1e30)], dim=1)
            total = total + (both.logsumexp(1) - scores.diagonal()).mean()
        return total

    def buckets(self, tokens: int) -> Tensor:
        """T5's buckets of a distance."""
        place = torch.arange(tokens)
        distance = place[None] - place[:, None]
        size = distance.abs()
        far = 8 + (torch.log(size.clamp(min=1) / 8) / math.log(64 / 8) * 8).long()
        return torch.where(size < 8, size, far.clamp(max=15)) + 16 * (distance > 0)


def head(in_dim: int, out_dim: int) -> nn.Sequential:
    """A linear layer and its batch norm."""
    return nn.Sequential(nn.Linear(in_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim))


def plain_step(clips: int, precision: str = "bf16") -> Step:
    """A step of the model of plain modules with torch's own fused Adam."""
    torch.manual_seed(0)
    ours = build(reference_model())
    model = PlainVatt(ours).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    batch = random_batch(ours.params, clips, 1)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(*model_inputs(batch).values())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def modules(rounds: int) -> None:
    """Our model against the same one of plain torch modules."""
    weights = sum(weight.numel() for weight in build(reference_model()).parameters())
    losses = [step() for step in (our_step(32, precision="fp32"), plain_step(32, "fp32"))]
    print(f"{weights / 1e6:.2f} million weights; first loss, fp32: {losses[0]:.6f} ours, "
          f"{losses[1]:.6f} plain modules")  # fmt: skip
    assert abs(losses[0] - losses[1]) < 1e-3, "these are two models"
    steps = {"plain torch modules": plain_step(32), "ours": our_step(32)}
    ratios = compare("a step of 32 clips, bf16", steps, 3 * rounds)
    print(f"  samples/s of ours over theirs: {statistics.median(ratios):.2f} (wanted: 1.3)")


# --- gradient caching -----------------------------------------------------------------------------


def caching(rounds: int) -> None:
    """The price of caching gradients at an equal batch, and its memory at growing ones."""
    for clips in (64, 128):
        steps = {"cached": our_step(clips, micro=MICRO), "plain": our_step(clips)}
        ratios = compare(f"a step of {clips} clips, micro-batches of {MICRO}", steps, rounds)
        print(f"  cached over plain: {statistics.median(ratios):.2f} (wanted: at most 1.45)")
        gc.collect()
    print(
        f"\npeak memory of a step beyond inputs and features, 5 texts a clip, micro-batch {MICRO}"
    )
    for kept in (1, 0):
        print(f"  the activations of {kept} micro-batches are kept")
        for clips in (64, 256, 1024, 2048):
            command = [sys.executable, __file__, "memory", str(clips), str(kept)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"  {done.stdout.strip()}")


def draw(rounds: int) -> None:
    """The indices that DropToken keeps of 2,048 clips of 1,568 tokens."""
    samples, seconds = torch.arange(2048), []
    for step in range(rounds + 1):
        began = time.perf_counter()
        draw_kept(1568, 0.5, seed=0, step=step, samples=samples, stream="video")
        seconds.append(time.perf_counter() - began)
    slowest, fastest = max(seconds[1:]), min(seconds[1:])
    print(
        f"2,048 x 1,568 indices, {torch.get_num_threads()} threads: "
        f"{1e3 * statistics.median(seconds[1:]):.0f} ms "
        f"({1e3 * fastest:.0f} to {1e3 * slowest:.0f}; wanted: at most 100)"
    )


def memory(clips: int, kept: int, micro: int = MICRO, candidates: int = 5) -> None:
    """Allocations of one step, counted by torch's profiler; starts in a process of its own."""
    step = our_step(clips, candidates=candidates, micro=micro, kept=kept)
    step()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    assert found.profiler is not None
    events = [
        (event.start_ns(), event.nbytes())
        for event in found.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, grown in sorted(events):
        held += grown
        peak = max(peak, held)
    # Features of video, audio and texts, and their gradients.
    features = 2 * clips * (2 + candidates) * SIZES["tiny"].dim * 4
    print(f"batch {clips:5}: beyond {(peak - features) / 1e6:7.1f} MB "
          f"(features {features / 1e6:.1f} MB; resident in all {resident:.0f} MB)")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:  # a process of `caching`
        torch.set_num_threads(2)
        memory(int(sys.argv[2]), int(sys.argv[3]))
    else:
        run_parts({"modules": modules, "caching": caching, "draw": draw}, __doc__.splitlines()[0])
