"""What a pre-training step costs, as ratios within one run, for the tiny reference model.

The model: 8.2 million weights; video 8 x 64 x 64 (patch 4 x 16 x 16), audio of 16,000 samples
(patch 128), sentences of 16 words from 8,192; bf16, all tokens kept.

    python bench/pretrain_step.py modules     # against the same model of plain torch modules
    python bench/pretrain_step.py caching     # gradient caching: its price, its flat memory
    python bench/pretrain_step.py engine      # DeepSpeed and logging against a bare loop
    python bench/pretrain_step.py loader      # CPU seconds of a batch of the demo's clips
    python bench/pretrain_step.py processes   # two processes of one thread against one
    python bench/pretrain_step.py --gpu       # the paper's model and batch on one GPU

What is compared runs in turn within each round, so that a busy machine slows both; a time is the
median over rounds, and the spread from the fastest round to the slowest is shown.
"""

import argparse
import gc
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from vatt.config import (
    AudioParams,
    MachineParams,
    ModelParams,
    PretrainParams,
    TextParams,
    VideoParams,
    load_params,
)
from vatt.data.loading.batches import Batch, scaled
from vatt.model.transformer import SIZES
from vatt.model.vatt import VATT
from vatt.tracking import mlflow
from vatt.tracking.mlflow import Run
from vatt.tracking.session import Session
from vatt.training import distributed
from vatt.training.engine import DeepSpeedEngine, LocalEngine, make_engine
from vatt.training.optimizer import make_optimizer
from vatt.training.pretrain import Pretraining, pretrain, pretraining_inputs
from vatt.training.telemetry import Meter, measured_flops, pretraining_work

ROOT = Path(__file__).parents[1]
DEMO, PAPER = (load_params(ROOT / "presets" / f"{name}.yaml") for name in ("demo", "paper"))
RATE = 1e-4
MICRO = 32
Step = Callable[[], object]


def reference_model() -> ModelParams:
    """The tiny reference model."""
    return ModelParams(
        recipe="paper",
        backbone="specific",
        video=VideoParams(size="tiny", frames=8, frame_size=64, patch=(4, 16, 16)),
        audio=AudioParams(size="tiny", input="waveform", samples=16_000, patch=128, mel_bins=None),
        text=TextParams(size="tiny", words=16, vocabulary=8192),
        va_dim=512,
        vt_dim=256,
        dropout=0.0,
    )


def settings(**changes: Any) -> PretrainParams:
    """The demo's pre-training, all tokens kept."""
    base = {"drop_rate": 0.0, "precision": "bf16", "text_candidates": 1, "batch_size": 32}
    return PretrainParams.model_validate(DEMO.pretrain.model_dump() | base | changes)


def machine(**changes: Any) -> MachineParams:
    """The demo's machine."""
    return MachineParams.model_validate(DEMO.machine.model_dump() | changes)


def random_batch(model: ModelParams, clips: int, candidates: int) -> Batch:
    """Noise of the right shapes."""
    size = model.video.frame_size
    assert isinstance(size, int)
    words = model.text.vocabulary
    torch.manual_seed(1)
    return Batch(
        clip_ids=[str(number) for number in range(clips)],
        video=torch.randint(256, (clips, model.video.frames, size, size, 3), dtype=torch.uint8),
        audio=torch.randint(-(2**15), 2**15, (clips, model.audio.samples), dtype=torch.int16),
        text=torch.randint(1, words, (clips, candidates, model.text.words)),
        has_video=torch.ones(clips, dtype=torch.bool),
        has_audio=torch.ones(clips, dtype=torch.bool),
        colour=torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(clips, 1),
        labels={},
    )


def our_step(
    clips: int, *, candidates: int = 1, micro: int | None = None, precision: str = "bf16"
) -> Step:
    """A step of plain torch's engine on a batch in memory."""
    torch.manual_seed(0)
    params = settings(text_candidates=candidates, batch_size=clips, precision=precision)
    model = VATT(reference_model())
    engine = LocalEngine(
        Pretraining(model, params, micro_batch_size=micro), params.optimizer, params.precision
    )
    batch = random_batch(model.params, clips, candidates)

    def step() -> float:
        losses = engine(*pretraining_inputs(model, batch, 0, drop_rate=0.0, seed=0))
        engine.update(losses["loss"], learning_rate=RATE)
        return losses["loss"].item()

    return step


def compare(title: str, steps: dict[str, Step], rounds: int) -> list[float]:
    """Seconds of the steps taken in turn, printed; returns each round's first / second."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - began)
    first, second = times.values()
    ratios = [one / other for one, other in zip(first, second, strict=True)]
    print(f"\n{title}")
    for name, values in times.items():
        print(f"  {name:44} {show(values, 'ms', 1e3)}")
    print(f"  {' / '.join(steps):44} {show(ratios, 'x', 1)}")
    return ratios


def show(values: list[float], unit: str, scale: float) -> str:
    """The median and the spread."""
    low, middle, high = (scale * f(values) for f in (min, statistics.median, max))
    return f"{middle:8.2f} {unit} ({low:.2f} to {high:.2f})"


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
    ours = VATT(reference_model())
    model = PlainVatt(ours).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    batch = random_batch(ours.params, clips, 1)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(*scaled(batch.video, batch.audio, batch.colour), batch.text)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def modules(rounds: int) -> None:
    """Our model against the same one of plain torch modules."""
    weights = sum(weight.numel() for weight in VATT(reference_model()).parameters())
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
    peaks = []
    for clips in (64, 256, 1024, 2048):
        command = [sys.executable, __file__, "memory", "--clips", str(clips)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(f"  {told.strip()}")
        peaks.append(float(told.split("beyond ")[1].split()[0]))
    print(f"  largest over smallest: {max(peaks) / min(peaks):.3f} (wanted: at most 1.05)")


def memory(clips: int, micro: int = MICRO, candidates: int = 5) -> None:
    """Allocations of one step, counted by torch's profiler; starts in a process of its own."""
    step = our_step(clips, candidates=candidates, micro=micro)
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


# --- DeepSpeed and logging ------------------------------------------------------------------------


def engine(rounds: int) -> None:
    """The pipeline's loop, DeepSpeed and MLflow included, against a bare one."""
    model, steps = reference_model(), 25
    batch = random_batch(model, 32, 1)
    reports: list[float] = []
    steps_of = {
        "DeepSpeed and MLflow": lambda: pipeline_seconds(model, batch, steps, reports),
        "bare loop": lambda: bare_seconds(model, batch, steps),
    }
    times: dict[str, list[float]] = {name: [] for name in steps_of}
    with distributed.process_group(machine()):
        for number in range(rounds + 1):
            for name, seconds in steps_of.items():
                taken = seconds()
                if number:
                    times[name].append(taken)
    print("\na step of 32 clips from memory, bf16, one process")
    for name, values in times.items():
        print(f"  {name:44} {show(values, 'ms', 1e3)}")
    first, second = times.values()
    ratios = [one / other for one, other in zip(first, second, strict=True)]
    print(f"  {'ratio (wanted: at most 1.10)':44} {show(ratios, 'x', 1)}")
    cost, every = statistics.median(reports), DEMO.pretrain.report_every
    share = cost / every / statistics.median(second)
    print(f"  {'a report, CPU time, MLflow included':44} {show(reports, 'ms', 1e3)}")
    print(f"  {f'of a step, with one every {every} steps':44} {share:8.2%} (wanted: under 1 %)")


def timed(batches: Iterator[Batch], times: list[float]) -> Iterator[Batch]:
    """The batches, with the time at which each was asked for."""
    for batch in batches:
        times.append(time.perf_counter())
        yield batch


def mean_step(times: list[float]) -> float:
    """Seconds from one batch to the next, without the first ones."""
    return (times[-1] - times[3]) / (len(times) - 4)


def pipeline_seconds(model: ModelParams, batch: Batch, steps: int, reports: list[float]) -> float:
    """Seconds of a step of the stage's loop; notes the CPU seconds of a report."""
    times: list[float] = []
    params = settings(steps=steps, save_every=10**6, report_every=10, evaluate_every=None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        here = machine(mlflow_uri=f"sqlite:///{folder}/mlflow.db")
        paths = DEMO.paths.model_copy(update={"runs": folder / "runs"})
        whole = DEMO.model_copy(update={"machine": here, "paths": paths})
        with mlflow.run("pretrain", whole, stage_hash="bench") as run:
            session = Session(run, folder / "state", lambda done, total, note="": None)
            torch.manual_seed(0)
            pretrain(
                VATT(model), lambda first: timed(repeat(batch), times), params,
                machine=here, seed=0, state=folder / "state", data_hash="", **session.hooks(),
            )  # fmt: skip
            reports.append(report_seconds(run, session, Meter(pretraining_work(model, params))))
    return mean_step(times[:steps])


def report_seconds(run: Run, session: Session, meter: Meter, count: int = 200) -> float:
    """CPU seconds of one report of what the loop tells, until it is in the store."""
    losses = dict.fromkeys(("loss", "nce", "mil_nce", "gradient_norm", "learning_rate"), 1.0)
    began = time.process_time()
    for number in range(count):
        session.report(10**6 + number, losses | meter.read())
    run.flush()
    return (time.process_time() - began) / count


def bare_seconds(model_params: ModelParams, batch: Batch, steps: int) -> float:
    """Seconds of a step of a loop that does nothing else: forward, backward, clip, update."""
    times: list[float] = []
    params = settings()
    torch.manual_seed(0)
    model = VATT(model_params)
    module = Pretraining(model, params).train()
    optimizer = make_optimizer(module.parameters(), params.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    for number, one in enumerate(timed(repeat(batch), times)):
        if number == steps - 1:
            break
        with torch.autocast("cpu", torch.bfloat16):
            losses = module(*pretraining_inputs(model, one, number, drop_rate=0.0, seed=0))
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return mean_step(times)


def loader(rounds: int) -> None:
    """CPU seconds that a batch of real clips costs, made and packed by the demo's stages."""
    import yaml

    from vatt.data.loading.batches import Sampling, train_batches
    from vatt.data.loading.reader import ShardIndex

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = yaml.safe_load((ROOT / "presets" / "demo.yaml").read_text(encoding="utf-8"))
        raw["data"]["demo"] |= {"train_clips": 256, "test_clips": 32, "dead_links": 0}
        raw["data"]["min_clips"] = 16
        (folder / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        (folder / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
        told = os.environ | {"PYTHONPATH": str(ROOT)}
        for stage in ("download", "preprocess"):
            command = [sys.executable, "-m", f"stages.{stage}"]
            subprocess.run(command, cwd=folder, env=told, check=True, capture_output=True)
        batches = train_batches(
            ShardIndex.load(folder / "data" / "shards", split="train"),
            Sampling.for_pretraining(DEMO.model, DEMO.pretrain),
            batch_size=32,
            steps=range(1 + 3 * rounds),
            seed=0,
        )
        next(batches)
        began, count = time.process_time(), 0
        for _ in batches:
            count += 1
        spent = (time.process_time() - began) / count
    print(f"  the loader's CPU seconds for a batch of 32 demo clips: {spent:.3f} "
          f"({spent / 32 * 1e3:.1f} ms a clip, H.264 decoded, cropped, not cached)")  # fmt: skip


# --- processes ------------------------------------------------------------------------------------


def processes(rounds: int) -> None:
    """Two processes of one thread each against one of one thread, DeepSpeed ZeRO-1."""
    for clips in (64, 128):
        speeds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for number, values in speeds.items():
                values.append(launched_speed(number, clips))
        print(f"\na global batch of {clips}, bf16, one thread a process")
        for number, values in speeds.items():
            print(f"  {f'processes: {number}':44} {show(values, 'samples/s', 1)}")
        ratios = [two / one for one, two in zip(*speeds.values(), strict=True)]
        print(f"  {'two over one (wanted: at least 1.6)':44} {show(ratios, 'x', 1)}", flush=True)


def launched_speed(number: int, clips: int) -> float:
    """Samples a second of `worker` in so many processes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc_per_node", str(number), __file__, "worker", "--clips", str(clips),
    ]  # fmt: skip
    told = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=True)
    return float(done.stdout.split("samples/s:")[1].split()[0])


def worker(clips: int, steps: int = 10) -> None:
    """One of several processes; rank 0 tells the speed."""
    here = machine(threads=1, zero_stage=1)
    with distributed.process_group(here):
        torch.manual_seed(0)
        params = settings(batch_size=clips)
        model = VATT(reference_model())
        trained = DeepSpeedEngine(Pretraining(model, params), params.optimizer, "bf16", here)
        batch = random_batch(model.params, clips // distributed.world_size(), 1)
        times = []
        for _ in range(steps):
            times.append(time.perf_counter())
            losses = trained(*pretraining_inputs(model, batch, 0, drop_rate=0.0, seed=0))
            trained.update(losses["loss"], learning_rate=RATE)
        if distributed.rank() == 0:
            print(f"samples/s: {clips / mean_step(times):.2f}")


# --- one GPU --------------------------------------------------------------------------------------


def gpu(clips: int, micro: int, rounds: int, *, compiled: bool) -> None:
    """The paper's model (Medium-Base-Small), batch and DropToken: memory, samples/s, MFU."""
    peak = measured_flops("bf16")
    print(f"{torch.cuda.get_device_name()}: bf16 matrix peak, measured: {peak / 1e12:.0f} TFLOP/s")
    params, plain = PAPER.pretrain, 0.0
    work = pretraining_work(PAPER.model, params).flops / params.batch_size
    with distributed.process_group(machine()):
        for stage, cached in ((1, False), (1, True), (2, True), (3, True)):
            size = clips if cached else micro
            can_compile = compiled and stage < 3  # ZeRO-3's weights come and go
            here = machine(zero_stage=stage, micro_batch_size=micro, compile=can_compile)
            times, peak_bytes = gpu_step(here, size, rounds)
            seconds = statistics.median(times)
            plain = plain or seconds / size
            print(f"  ZeRO-{stage}, batch {size}, {'cached' if cached else 'plain'}"
                  f"{', compiled' if can_compile else ''}: {show(times, 's', 1)}, "
                  f"{size / seconds:.0f} samples/s, MFU {work * size / seconds / peak:.1%} (what "
                  f"runs twice counts once), peak {peak_bytes / 2**30:.1f} GiB, "
                  f"{seconds / size / plain:.2f} times the plain seconds a clip")  # fmt: skip
            gc.collect()
            torch.cuda.empty_cache()


def gpu_step(here: MachineParams, clips: int, rounds: int) -> tuple[list[float], int]:
    """Seconds of the paper's step with settings of `machine`, and its peak memory."""
    torch.manual_seed(0)
    params, model = PAPER.pretrain, VATT(PAPER.model)
    module = Pretraining(model, params, micro_batch_size=here.micro_batch_size)
    trained = make_engine(module, params.optimizer, "bf16", here)
    batch = random_batch(PAPER.model, clips, params.text_candidates)
    batch.colour = torch.tensor([0.1, 1.2, 0.8, 0.1]).repeat(clips, 1)  # as the recipe changes them
    times = []
    torch.cuda.reset_peak_memory_stats()
    for number in range(rounds + 2):
        inputs = pretraining_inputs(model, batch, number, drop_rate=params.drop_rate, seed=0)
        torch.cuda.synchronize()
        began = time.perf_counter()
        losses = trained(*inputs)
        trained.update(losses["loss"], learning_rate=RATE)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        del inputs, losses
    return times[2:], torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {
        "modules": modules, "caching": caching, "engine": engine, "loader": loader,
        "processes": processes,
    }  # fmt: skip
    parser.add_argument("part", nargs="*", choices=[*parts, "memory", "worker"], default=[*parts])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clips", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=64, help="micro-batch size on a GPU")
    parser.add_argument("--gpu", action="store_true", help="measure the paper's step on a GPU")
    parser.add_argument("--compile", action="store_true", help="on a GPU: machine.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.gpu:
        gpu(options.clips, options.micro, options.rounds, compiled=options.compile)
    elif options.part == ["memory"]:
        memory(options.clips)
    elif options.part == ["worker"]:
        worker(options.clips)
    else:
        for name in options.part:
            parts[name](options.rounds)


if __name__ == "__main__":
    main()
