"""What surrounds a pre-training step: the loop with DeepSpeed and MLflow, the loader, processes.

    python bench/pretrain_loop.py engine      # DeepSpeed and logging against a bare loop
    python bench/pretrain_loop.py loader      # CPU seconds of a batch of the demo's clips
    python bench/pretrain_loop.py processes   # two processes of one thread against one

The model and the way of measuring are in bench/reference.py.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import torch
import yaml
from reference import (
    DEMO,
    RATE,
    ROOT,
    machine,
    mean_step,
    random_batch,
    reference_model,
    run_parts,
    settings,
    show,
)
from torch import nn

from vatt.checkpoint import build
from vatt.config import ModelParams
from vatt.data.loading.batches import Batch, Sampling, train_batches
from vatt.tracking import mlflow
from vatt.tracking.mlflow import Run
from vatt.tracking.session import Outputs, Session
from vatt.training import distributed
from vatt.training.engine import DeepSpeedEngine
from vatt.training.loop import Training
from vatt.training.optimizer import make_optimizer
from vatt.training.pretrain import Pretraining, pretrain, pretraining_inputs
from vatt.training.telemetry import Meter, pretraining_work


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
    """The batches, with the time at which each was requested."""
    for batch in batches:
        times.append(time.perf_counter())
        yield batch


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
            outputs = Outputs(model, folder / "checkpoint", folder / "metrics.json")
            session = Session(run, lambda done, total, note="": None, folder / "state", outputs)
            torch.manual_seed(0)

            def batches_from(first_step: int) -> Iterator[Batch]:
                return timed(repeat(batch), times)

            training = Training(batches_from, here, 0, folder / "state", "", session)
            pretrain(build(model), params, training)
            reports.append(report_seconds(run, session, Meter(pretraining_work(model, params))))
    return mean_step(times[:steps])


def report_seconds(run: Run, session: Session, meter: Meter, count: int = 200) -> float:
    """CPU seconds of one report of the loop, until it is in the store."""
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
    model = build(model_params)
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

    from vatt.data.loading.reader import ShardIndex

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = yaml.safe_load((ROOT / "presets" / "demo.yaml").read_text(encoding="utf-8"))
        raw["data"]["demo"] |= {"train_clips": 256, "test_clips": 32, "dead_links": 0}
        raw["data"]["min_clips"] = 16
        (folder / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        (folder / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        for stage in ("download", "preprocess"):
            command = [sys.executable, "-m", f"stages.{stage}"]
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
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
        "--nproc_per_node", str(number), __file__, "worker", str(clips),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split("samples/s:")[1].split()[0])


def worker(clips: int, steps: int = 10) -> None:
    """One of several processes; rank 0 prints the speed."""
    here = machine(threads=1, zero_stage=1)
    with distributed.process_group(here):
        torch.manual_seed(0)
        params = settings(batch_size=clips)
        model = build(reference_model())
        trained = DeepSpeedEngine(Pretraining(model, params), params.optimizer, "bf16", here)
        batch = random_batch(model.params, clips // distributed.world_size(), 1)
        times = []
        for _ in range(steps):
            times.append(time.perf_counter())
            losses = trained(*pretraining_inputs(model, batch, 0, drop_rate=0.0, seed=0))
            trained.update(losses["loss"], learning_rate=RATE)
        if distributed.rank() == 0:
            print(f"samples/s: {clips / mean_step(times):.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:  # a process of `processes`
        worker(int(sys.argv[2]))
    else:
        parts = {"engine": engine, "loader": loader, "processes": processes}
        run_parts(parts, __doc__.splitlines()[0])
