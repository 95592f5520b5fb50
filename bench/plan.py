"""Forecasts against measurements: peak memory by formula, step time from a short trial.

    python bench/plan.py --memory       any time: each setting in its own process
    python bench/plan.py --time         on an idle machine
    python bench/plan.py --processor    any time: processor seconds of one thread

Memory is the peak of resident memory, without what the process held before the model was built
(after two steps of four clips had loaded all code). Freed tensors return to the system at once (two
settings of glibc's malloc); a second number is measured with glibc's defaults. Time is the median
of three steps on a batch that stays in memory; the forecast comes from one trial per model, of at
most 32 clips and 3 blocks. Processor seconds hardly depend on what else runs: forecasts and steps
take turns in one process. Prints a JSON line for each setting, then a table for docs/benchmarks.md.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vatt.config import Params, load_params
from vatt.plan import trial
from vatt.plan.memory import RUNTIME, BatchSettings, count, memory
from vatt.plan.trial import run_step, run_trial
from vatt.training import distributed

DEMO = Path(__file__).parents[1] / "presets" / "demo.yaml"
CASES: list[dict[str, Any]] = [
    {"size": "tiny", "batch": 64},
    {"size": "tiny", "batch": 64, "zero": 0},
    {"size": "tiny", "batch": 128, "precision": "fp32"},
    {"size": "tiny", "batch": 256},
    {"size": "tiny", "batch": 256, "micro": 32},
    {"size": "tiny", "batch": 128, "checkpointing": True},
    {"size": "tiny", "batch": 128, "micro": 64, "colour": True},
    {"size": "small", "batch": 32},
    {"size": "small", "batch": 64, "micro": 16},
    {"size": "small", "batch": 32, "zero": 0},
]

TURNS = 3  # of a forecast and a step
LARGER: list[dict[str, Any]] = [  # one encoder for all: a quarter of the memory of three
    {"size": "tiny", "batch": 32},
    {"size": "small", "batch": 16, "backbone": "agnostic"},
    {"size": "base", "batch": 8, "backbone": "agnostic"},
    {"size": "medium", "batch": 8, "backbone": "agnostic"},
    {"size": "large", "batch": 4, "backbone": "agnostic"},
]


def settings(case: dict[str, Any]) -> Params:
    """The demo's settings with a case's size, batch and way of computing."""
    params = load_params(DEMO)
    towers: dict[str, Any] = {
        name: getattr(params.model, name).model_copy(update={"size": case["size"]})
        for name in ("video", "audio", "text")
    }
    towers["backbone"] = case.get("backbone", params.model.backbone)
    pretrain: dict[str, Any] = {"batch_size": case["batch"]}
    pretrain["precision"] = case.get("precision", "bf16")
    if case.get("colour"):
        change = {"brightness": 0.1, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}
        pretrain["augmentation"] = params.pretrain.augmentation.model_copy(update=change)
    machine = {
        "micro_batch_size": case.get("micro"),
        "zero_stage": case.get("zero", 1),
        "activation_checkpointing": case.get("checkpointing", False),
    }
    return params.model_copy(
        update={
            "model": params.model.model_copy(update=towers),
            "pretrain": params.pretrain.model_copy(update=pretrain),
            "machine": params.machine.model_copy(update=machine),
        }
    )


def name(case: dict[str, Any]) -> str:
    """A case in words."""
    words = [case["size"], *([case["backbone"]] if "backbone" in case else [])]
    words += [f"batch {case['batch']}", case.get("precision", "bf16")]
    words.append(f"micro-batch {case['micro']}" if "micro" in case else "no cache")
    words.append(f"ZeRO-{case.get('zero', 1)}")
    more = [option for option in ("checkpointing", "colour") if case.get(option)]
    return ", ".join([*words, *more])


def measure_memory(case: dict[str, Any]) -> dict[str, float]:
    """Megabytes by formula, the peak, and the peak with glibc's defaults."""
    params = settings(case)
    setting = BatchSettings(
        micro_batch_size=params.machine.micro_batch_size,
        zero_stage=params.machine.zero_stage,
        activation_checkpointing=params.machine.activation_checkpointing,
    )
    formula = memory(params.model, params.pretrain, setting, count(params.model), batches=1)
    return {
        "forecast": (formula.total - RUNTIME[False]) / 1e6,
        "measured": run_step(params, exact_memory=True).peak / 1e6,
        "defaults": run_step(params, exact_memory=False).peak / 1e6,
    }


def measure_time(case: dict[str, Any], trials: dict[Any, Any]) -> dict[str, float]:
    """Seconds of a step: forecast, median and range of the measured ones."""
    params = settings(case)
    options = ("size", "precision", "zero", "checkpointing", "colour")
    key = tuple(case.get(option) for option in options)
    if key not in trials:
        trials[key] = run_trial(params)
    seconds = run_step(params, exact_memory=False).seconds
    forecast = trials[key].step(case["batch"], rows=case["batch"], cached="micro" in case)
    found = {"forecast": forecast, "measured": statistics.median(seconds)}
    return {**found, "least": min(seconds), "most": max(seconds)}


def measure_processor(case: dict[str, Any]) -> dict[str, float]:
    """Processor seconds of a step in one thread: medians of forecasts and of steps in turns."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # torch joins a group only once
        return pool.apply(take_turns, (case,))


def take_turns(case: dict[str, Any]) -> dict[str, float]:
    """The same, in this process."""
    trial.clock = time.process_time
    params = settings(case)
    one_thread = params.machine.model_copy(update={"threads": 1})
    params = params.model_copy(update={"machine": one_thread})
    forecasts, seconds = [], []
    with distributed.process_group(one_thread):
        step = trial.whole_step(params)
        step()
        for _ in range(TURNS):
            parts = trial.trial(params)
            forecasts.append(parts.step(case["batch"], rows=case["batch"], cached=False))
            began = trial.clock()
            step()
            seconds.append(trial.clock() - began)
    found = {"forecast": statistics.median(forecasts), "measured": statistics.median(seconds)}
    return {**found, "least": min(seconds), "most": max(seconds)}


def main() -> None:
    """Measure what is asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--processor", action="store_true")
    parser.add_argument("--only", help="cases whose name contains this")
    options = parser.parse_args()
    ways: dict[str, tuple[list[dict[str, Any]], Callable[..., dict[str, float]]]] = {
        "memory": (CASES, measure_memory),
        "time": (CASES, partial(measure_time, trials={})),
        "processor": (LARGER, measure_processor),
    }
    for what, (cases, measure) in ways.items():
        rows = []
        for case in cases if getattr(options, what) else []:
            if options.only and options.only not in name(case):
                continue
            found = measure(case)
            rows.append((name(case), found))
            print(json.dumps({"what": what, **case, **found}), flush=True)
        table(what, rows)


def table(what: str, rows: list[tuple[str, dict[str, float]]]) -> None:
    """Markdown."""
    unit, last = ("MB", "glibc's defaults") if what == "memory" else ("s", "range")
    if rows:
        print(f"\n| setting | forecast, {unit} | measured, {unit} | difference | {last} |")
        print("|---|---|---|---|---|")
    for words, found in rows:
        forecast, measured = found["forecast"], found["measured"]
        more = (
            f"{found['defaults']:.0f}"
            if what == "memory"
            else (f"{found['least']:.3f}-{found['most']:.3f}")
        )
        digits = 0 if what == "memory" else 3
        print(
            f"| {words} | {forecast:.{digits}f} | {measured:.{digits}f} "
            f"| {forecast / measured - 1:+.0%} | {more} |"
        )


if __name__ == "__main__":
    main()
