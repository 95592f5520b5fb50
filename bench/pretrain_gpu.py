"""The paper's pre-training step on one GPU: seconds, clips a second, MFU, memory.

    python bench/pretrain_gpu.py [--compile]

Medium-Base-Small at the paper's batch and DropToken, bf16: at once for one micro-batch, and with
cached gradients at ZeRO-1, 2 and 3.
"""

import argparse
import gc
import statistics
import time

import torch
from reference import RATE, ROOT, machine, random_batch, show

from vatt.checkpoint import build
from vatt.config import MachineParams, load_params
from vatt.training import distributed
from vatt.training.engine import make_engine
from vatt.training.pretrain import Pretraining, pretraining_inputs
from vatt.training.telemetry import measured_flops, pretraining_work

PAPER = load_params(ROOT / "presets" / "paper.yaml")


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
    params, model = PAPER.pretrain, build(PAPER.model)
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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clips", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=64, help="micro-batch size")
    parser.add_argument("--compile", action="store_true", help="machine.compile")
    options = parser.parse_args()
    if torch.cuda.is_available():
        gpu(options.clips, options.micro, options.rounds, compiled=options.compile)
    else:
        print("no GPU here: nothing to measure")


if __name__ == "__main__":
    main()
