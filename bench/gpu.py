"""One short visit to a GPU: tests, precision, speed and memory of each part, in one table.

    make gpu                                        # the same as: python bench/gpu.py
    python bench/gpu.py [--shards DIR] [--only PART ...] [--json FILE] [--tiny]

Each part is a process with a time limit of its own, so that one that hangs or fails costs the
others nothing. After eight minutes in all, what is left is stopped or left out. MFU is given twice:
of the matrix peak measured in the same process, and of the data sheet. What a step computes twice
(a gradient cache's first pass) counts once. The stage trains on ready shards (--shards, such as the
demo's data/shards); without them it is left out. --tiny runs every part on any machine with a small
model, so that the script cannot break unseen; its figures mean nothing.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from reference import DEMO, RATE, ROOT, machine, random_batch
from torch import Tensor, nn

from vatt.checkpoint import build, build_classifier
from vatt.config import ModelParams, PretrainParams, load_params
from vatt.data.loading.batches import Batch
from vatt.evaluation.features import extract
from vatt.flops import num_video_tokens, video_flops
from vatt.model.patches import draw_kept, num_kept
from vatt.plan.forecast import GIB, GpuSpeed, Place, forecast
from vatt.plan.memory import BatchSettings, count
from vatt.plan.trial import Job, chosen
from vatt.training import distributed
from vatt.training.engine import apply_options, make_engine
from vatt.training.finetune import Finetuning, finetuning_inputs, task_model
from vatt.training.pretrain import Pretraining, Visible, pretraining_inputs
from vatt.training.telemetry import (
    GPUS,
    Device,
    finetuning_work,
    measured_flops,
    named_like,
    pretraining_work,
)

Row = dict[str, Any]
PAPER = load_params(ROOT / "presets" / "paper.yaml")
COLOUR = (0.1, 1.2, 0.8, 0.1)  # brightness, contrast, saturation, hue: as the recipe changes them
WARM_UP = 2  # steps, in addition to those that compile


# --- what is measured -----------------------------------------------------------------------------


class Scale:
    """The paper's model on a GPU, or the demo's in tiny form."""

    def __init__(self, *, tiny: bool) -> None:
        params = DEMO if tiny else PAPER
        self.tiny = tiny
        self.params = params
        self.model: ModelParams = params.model
        self.pretrain: PretrainParams = params.pretrain
        self.rounds = 2 if tiny else 7
        self.clips = (2, 4) if tiny else (64, 128)  # of a plain step
        self.cached = 4 if tiny else 2048  # clips of a cached step
        self.micro = 2 if tiny else 64
        self._batches: dict[int, Batch] = {}

    def batch(self, clips: int) -> Batch:
        """Noise on the device, as the training's second stream brings it there early."""
        if clips not in self._batches:
            batch = random_batch(self.model, clips, self.pretrain.text_candidates)
            batch.changes["video"] = torch.tensor(COLOUR).repeat(clips, 1)
            self._batches = {clips: batch.to(distributed.device())}
        return self._batches[clips]

    def modes(self) -> tuple[bool, ...]:
        """Eager, then compiled; a CPU may have no compiler."""
        return (False,) if self.tiny else (False, True)


def device_sheet() -> Device | None:
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    return named_like(facts.name, facts.total_memory / GIB)


def clock(
    step: Callable[[], Any], rounds: int, warm_up: int = WARM_UP
) -> tuple[list[float], float]:
    """Seconds of each round after the warm-up, and the peak of memory in GiB (0 on a CPU)."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for number in range(rounds + warm_up):
        began = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        if number >= warm_up:
            times.append(time.perf_counter() - began)
    return times, torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0


def figures(name: str, times: list[float], flops: float, clips: int, gib: float) -> Row:
    """A row: the median, the spread, clips a second, and both shares of the peak."""
    seconds, sheet = statistics.median(times), device_sheet()
    row: Row = {
        "what": name,
        "seconds": seconds,
        "low": min(times),
        "high": max(times),
        "clips_per_second": clips / seconds,
        "gib": gib,
        "mfu_measured": flops / seconds / measured_flops("bf16"),
    }
    if sheet is not None:
        row["mfu_data_sheet"] = flops / seconds / sheet.bf16_flops
    return row


def tests(scale: Scale) -> Iterator[Row]:
    """The tests marked gpu: each must pass on a GPU, and be skipped with its reason elsewhere."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/model", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if " in " in line and "s" in line]
    if done.returncode != 0:
        raise SystemExit(done.stdout[-2000:])
    dots = sum(done.stdout.splitlines()[0].count(mark) for mark in ".s")
    yield {"what": "pytest -m gpu tests/model", "note": lines[-1] if lines else f"{dots} ran"}


def precision(scale: Scale) -> Iterator[Row]:
    """The types in which each part of a step really computed, at every ZeRO stage."""
    for stage in (0, 1, 2, 3):
        trained, _ = pretraining(scale, clips=2, micro=None, stage=stage, compiled=False)
        facts = ", ".join(f"{key}={value}" for key, value in sorted(trained.run.facts.items()))
        yield {"what": f"precision at ZeRO-{stage}", "note": facts}


def encoder(scale: Scale) -> Iterator[Row]:
    """Forward and backward of the video tower alone, DropToken 50 %."""
    batch = 2 if scale.tiny else 16
    for size in ("tiny",) if scale.tiny else ("medium", "large"):
        video = scale.model.video.model_copy(update={"size": size})
        torch.manual_seed(0)
        tower = build(scale.model.model_copy(update={"video": video})).video
        tower = tower.to(distributed.device())
        for compiled in scale.modes():
            run: nn.Module = torch.compile(tower) if compiled else tower  # type: ignore[assignment]
            clips = random_batch(scale.model, batch, 1).video.float().to(distributed.device())
            places = torch.arange(batch, device=clips.device)
            kept = draw_kept(num_video_tokens(video), 0.5, seed=0, step=0, samples=places)
            work = 3 * batch * video_flops(video, drop_rate=0.5, convention="true")
            name = f"{size} encoder, {batch} clips, {'compiled' if compiled else 'eager'}"
            times, gib = clock(tower_step(run, clips / 127.5 - 1, kept), scale.rounds)
            yield figures(name, times, work, batch, gib)


def tower_step(tower: nn.Module, video: Tensor, kept: Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast(video.device.type, torch.bfloat16):
            loss = tower(video, kept).square().mean()
        loss.backward()
        tower.zero_grad(set_to_none=True)

    return step


def pretraining(
    scale: Scale, *, clips: int, micro: int | None, stage: int, compiled: bool, kept: int = 1
) -> tuple[Any, Callable[[], None]]:
    """An engine that has made one step, and the step."""
    here = machine(zero_stage=stage, micro_batch_size=micro, compile=compiled)
    params = scale.pretrain.model_copy(update={"batch_size": clips, "precision": "bf16"})
    torch.manual_seed(0)
    model = build(scale.model)
    module = Pretraining(model, params, micro_batch_size=micro, kept_micro_batches=kept)
    trained = make_engine(module, params.optimizer, "bf16", here)
    batch = scale.batch(clips)
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        inputs = pretraining_inputs(model, batch, number, drop_rate=params.drop_rate, seed=0)
        losses = trained(*inputs)
        trained.update(losses["loss"], learning_rate=RATE)

    step()
    return trained, step


def plain(scale: Scale) -> Iterator[Row]:
    """A step with all activations kept, ZeRO-1, its inputs (DropToken's draw) included."""
    for clips in scale.clips:
        for compiled in scale.modes():
            yield timed_step(scale, clips, None, 1, compiled=compiled)


def cached(scale: Scale) -> Iterator[Row]:
    """The paper's batch in micro-batches: ZeRO-1, 2 and 3, and with nothing kept from the first."""
    clips, micro, best = scale.cached, scale.micro, scale.modes()[-1]
    yield timed_step(scale, clips, micro, 1, compiled=False)
    yield timed_step(scale, clips, micro, 2, compiled=best)
    yield timed_step(scale, clips, micro, 3, compiled=False)  # its weights come and go
    if best:
        yield timed_step(scale, clips, micro, 1, compiled=True)
    yield timed_step(scale, clips, micro, 1, compiled=best, kept=0)


def automatic(scale: Scale) -> Iterator[Row]:
    """`micro_batch_size: auto`: its choice for the paper's batch, and a step with it."""
    settings = scale.pretrain.model_copy(update={"batch_size": scale.cached, "precision": "bf16"})
    here = machine(micro_batch_size="auto", compile=scale.modes()[-1])
    params = scale.params.model_copy(update={"pretrain": settings, "machine": here})
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found, kept = chosen(Job(params, Path(folder)))
    size = found.micro_batch_size
    note = f"{size or 'all'} of {scale.cached} clips at once, {kept} kept"
    yield {"what": "auto", "seconds": time.perf_counter() - began, "note": note}
    assert size != "auto"
    yield timed_step(scale, scale.cached, size, 1, compiled=scale.modes()[-1], kept=kept)


def colours(scale: Scale) -> Iterator[Row]:
    """Colours and scaling of the kept patches, plain and compiled: at most 3 ms on a GPU."""
    clips = 2 if scale.tiny else 64
    batch, model = scale.batch(clips), build(scale.model)
    places = torch.arange(clips, device=batch.video.device)
    kept = draw_kept(model.token_counts["video"], 0.5, seed=0, step=0, samples=places)
    for compiled in scale.modes():
        visible = Visible(model.video.get_submodule("embed"))  # type: ignore[arg-type]
        apply_options(visible, machine(compile=compiled))
        run = partial(visible, batch.video, batch.changes.get("video"), kept, torch.bfloat16)
        times, _ = clock(run, scale.rounds)
        name = f"colours of {clips} clips, {'compiled' if compiled else 'plain'}"
        yield {"what": name, "seconds": statistics.median(times), "low": min(times),
               "high": max(times)}  # fmt: skip


def timed_step(
    scale: Scale, clips: int, micro: int | None, stage: int, *, compiled: bool, kept: int = 1
) -> Row:
    """A measured step, with the forecast of `vattctl plan` next to it."""
    trained, step = pretraining(
        scale, clips=clips, micro=micro, stage=stage, compiled=compiled, kept=kept
    )
    is_long = micro is not None  # the engine has made a first step already
    times, gib = clock(step, 2 if is_long else scale.rounds, 0 if is_long else WARM_UP)
    params = scale.pretrain.model_copy(update={"batch_size": clips})
    way = "plain" if micro is None else f"in micro-batches of {micro}"
    name = f"step of {clips} clips, {way}, ZeRO-{stage}, {'compiled' if compiled else 'eager'}"
    name += "" if micro is None else f", {kept} kept"
    row = figures(name, times, pretraining_work(scale.model, params).flops, clips, gib)
    setting = BatchSettings(
        micro_batch_size=micro, kept_micro_batches=kept, zero_stage=stage, on_gpu=True
    )
    row["attention"] = trained.run.facts["attention.kernel"]
    return row | planned(scale, params, setting, compiled=compiled)


def planned(scale: Scale, params: PretrainParams, setting: BatchSettings, *, compiled: bool) -> Row:
    """Seconds and memory by the formula; for a machine without a GPU, those of an H200."""
    sheet = device_sheet() or GPUS["h200-141gb"]
    counts = count(scale.model)
    speed = GpuSpeed(sheet, scale.model, params, counts, compiled=compiled)
    place = Place(sheet.name, sheet.memory_gb * GIB, sheet.watts, True, sheet)
    whole = scale.params.model_copy(update={"pretrain": params})
    found = forecast(whole, setting, place, speed, counts)
    return {"plan_seconds": found.seconds.total, "plan_gib": found.memory.total / GIB}


def finetuning(scale: Scale) -> Iterator[Row]:
    """A step of the paper's recipes: Kinetics-400 at 224 and 320 pixels, AudioSet."""
    recipes = (
        {name: DEMO.finetune.tasks[name] for name in ("action", "audio")}
        if scale.tiny
        else recipes_of_the_paper()
    )
    for name, task in recipes.items():
        clips = 2 if scale.tiny else 16
        task = task.model_copy(update={"batch_size": clips, "precision": "bf16"})
        classes = [str(number) for number in range(4 if scale.tiny else 400)]
        params = task_model(scale.model, task)
        torch.manual_seed(0)
        model = build_classifier(
            params, modality=task.modality, num_classes=len(classes), head_dropout=task.head_dropout
        )
        trained = make_engine(Finetuning(model, task), task.optimizer, "bf16", machine())
        batch = replace(random_batch(params, clips, 1), labels={task.label: ["0"] * clips})
        step = finetuning_step(trained, model, batch, task, classes)
        times, gib = clock(step, scale.rounds)
        work = finetuning_work(params, task).flops
        yield figures(f"fine-tuning {name}, {clips} clips", times, work, clips, gib)


def recipes_of_the_paper() -> dict[str, Any]:
    video, audio = PAPER.finetune.tasks["kinetics400"], PAPER.finetune.tasks["audioset"]
    small = video.model_copy(update={"frame_size": 224})
    return {"kinetics400 at 224": small, "kinetics400 at 320": video, "audioset": audio}


def finetuning_step(
    trained: Any, model: Any, batch: Batch, task: Any, classes: list[str]
) -> Callable[[], None]:
    def step() -> None:
        inputs = finetuning_inputs(model, batch, 0, params=task, classes=classes, seed=0)
        trained.update(trained(*inputs)["loss"], learning_rate=RATE)

    return step


def features(scale: Scale) -> Iterator[Row]:
    """Features of whole clips, as probes and retrieval take them."""
    torch.manual_seed(0)
    model = build(scale.model).to(distributed.device())
    clips = 2 if scale.tiny else 32
    batch = random_batch(scale.model, clips, 1)
    whole = scale.pretrain.model_copy(update={"drop_rate": 0.0, "text_candidates": 1})
    work = pretraining_work(scale.model, whole.model_copy(update={"batch_size": clips})).flops / 3

    def step() -> None:
        extract({"pretrained": model}, [batch], progress=lambda *_: None, total=clips)

    times, gib = clock(step, scale.rounds)
    yield figures(f"features of {clips} clips, all tokens", times, work, clips, gib)


def indices(scale: Scale) -> Iterator[Row]:
    """DropToken's draw for the paper's batch: at most 5 ms on a GPU."""
    tokens, clips = num_video_tokens(PAPER.model.video), 2048
    places = torch.arange(clips, device=distributed.device())

    def step() -> None:
        draw_kept(tokens, 0.5, seed=0, step=0, samples=places, stream="video")

    times, _ = clock(step, scale.rounds)
    middle = statistics.median(times)
    note = f"{num_kept(tokens, 0.5)} of {tokens} tokens of {clips} clips"
    yield {"what": "DropToken's indices", "seconds": middle, "low": min(times), "high": max(times),
           "note": note}  # fmt: skip


def stage(scale: Scale) -> Iterator[Row]:
    """The pre-training stage on ready shards, with MLflow on SQLite."""
    shards = os.environ.get("VATT_GPU_SHARDS")
    if not shards:
        yield {"what": "stages.pretrain on ready shards", "note": "left out: no --shards"}
        return
    with tempfile.TemporaryDirectory() as name:
        project = Path(name)
        for file in ("params.yaml", "dvc.yaml"):
            shutil.copy(ROOT / file, project / file)
        for folder in ("stages", "vatt"):
            (project / folder).symlink_to(ROOT / folder)
        settings = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
        settings["pretrain"] |= {"steps": 8 if scale.tiny else 200, "report_every": 4}
        settings["pretrain"]["optimizer"]["warmup_steps"] = 2
        if scale.tiny:
            settings["pretrain"] |= {"batch_size": 4, "save_every": 8}
        (project / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        (project / "data").mkdir()
        shutil.copytree(shards, project / settings["paths"]["shards"])
        began = time.monotonic()
        command = [sys.executable, "-m", "stages.pretrain"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=project, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(done.stderr[-2000:])
        last = done.stderr.strip().splitlines()[-1]
        yield {"what": "stages.pretrain on ready shards", "note": last[:120],
               "seconds": time.monotonic() - began}  # fmt: skip


# --- the visit ------------------------------------------------------------------------------------

MOST = 480  # seconds that a visit takes
PARTS: dict[str, tuple[Callable[[Scale], Iterator[Row]], int]] = {  # name -> part, seconds at most
    "tests": (tests, 60),
    "precision": (precision, 60),
    "indices": (indices, 20),
    "encoder": (encoder, 60),
    "plain": (plain, 80),
    "colours": (colours, 30),
    "cached": (cached, 200),
    "auto": (automatic, 80),
    "finetuning": (finetuning, 60),
    "features": (features, 30),
    "stage": (stage, 60),
}


def run_parts(names: Sequence[str], *, tiny: bool) -> None:
    """Print one JSON line a row, as soon as it is measured."""
    with distributed.process_group(machine()):
        for name in names:
            part, _ = PARTS[name]
            for row in part(Scale(tiny=tiny)):
                print(json.dumps({"part": name} | row), flush=True)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


def visit(name: str, *, tiny: bool, limit: float) -> tuple[list[Row], str]:
    """Run a part in a process of its own; its rows so far, and what became of it."""
    command = [sys.executable, __file__, "--part", name, *(["--tiny"] if tiny else [])]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=limit)
        state = "ok" if process.returncode == 0 else f"failed: {errors.strip()[-600:]}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, _ = process.communicate()
        state = f"stopped after {limit:.0f} s"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return rows, state


SHOWN = {  # a row's columns, in order
    "seconds": "{:.4g} s",
    "low": "from {:.4g}",
    "high": "to {:.4g}",
    "clips_per_second": "{:.0f} clips/s",
    "mfu_measured": "{:.1%} of the measured peak",
    "mfu_data_sheet": "{:.1%} of the data sheet's",
    "attention": "attention {}",
    "gib": "{:.1f} GiB",
    "plan_seconds": "plan: {:.4g} s",
    "plan_gib": "{:.1f} GiB",
    "note": "{}",
}


def shown(row: Row) -> str:
    """A row as a line of the table."""
    parts = [form.format(row[key]) for key, form in SHOWN.items() if key in row]
    return f"  {row['what']}: {', '.join(parts)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--shards", type=Path, metavar="DIR", help="ready shards for the stage")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("gpu.json"))
    parser.add_argument("--tiny", action="store_true", help="a small model, on any machine")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_parts([options.part], tiny=options.tiny)
        return 0
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny tries every part without one")
    if unknown := set(options.only or ()) - PARTS.keys():
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    if options.shards:
        os.environ["VATT_GPU_SHARDS"] = str(options.shards.resolve())
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine's CPU"
    print(f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    found, failed, started = {}, [], time.monotonic()
    for part in options.only or PARTS:
        began = time.monotonic()
        left = math.inf if options.tiny else MOST - (began - started)
        limit = min(left, (4 if options.tiny else 1) * PARTS[part][1])
        if limit < 1:
            rows, state = [], f"left out: the {MOST} s are over; --only {part} runs it"
        else:
            rows, state = visit(part, tiny=options.tiny, limit=limit)
        print(f"{part}: {state} ({time.monotonic() - began:.0f} s)")
        print("\n".join(map(shown, rows)), flush=True)
        found[part] = {"state": state, "rows": rows}
        failed += [part] if state != "ok" else []
    options.json.write_text(json.dumps({"device": name, "parts": found}, indent=1) + "\n")
    print(f"written: {options.json}" + (f"; not ok: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
