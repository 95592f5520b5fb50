"""Operators that one pre-training step calls, and the bytes that they read and write.

    python bench/operators.py                              # of this checkout, not compiled
    python bench/operators.py --compiled                   # as it runs by default on a GPU
    PYTHONPATH=CHECKOUT python bench/operators.py --json   # of another checkout, to compare

One step of the tiny model (bench/reference.py) from the uint8 batch to the new weights, with
DropToken 50 % and colours on, bf16: at once, and cached in micro-batches. Operators are counted
where torch dispatches them, after autograd and autocast: what a GPU would start one by one. Its
operators are torch's own, so those for bf16 on a CPU are turned off. Views move nothing and are
left out. The counts do not depend on the machine's speed.

With --compiled, what a GPU compiles by default (blocks, batch norms, relative positions, colours,
DropToken's draw, losses) is compiled, here for the CPU. A kernel that torch.compile has fused, and
a product that it calls, count as one operator each; their bytes are those that inductor counts:
inputs and outputs, each once. Its kernels for a GPU are divided a little differently. It needs a
C++ compiler and some minutes.
"""

import argparse
import importlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import vatt
from vatt.config import (
    AudioParams,
    ModelParams,
    PretrainParams,
    TextParams,
    VideoParams,
    load_params,
)
from vatt.model.operators import plain_operators
from vatt.model.vatt import VATT
from vatt.training.engine import LocalEngine
from vatt.training.pretrain import Pretraining, pretraining_inputs

DEMO = Path(vatt.__file__).parents[1] / "presets" / "demo.yaml"  # of the checkout that is counted
VIEWS = {"_unsafe_view", "detach", "alias", "lift_fresh"}
CLIPS, MICRO, CANDIDATES = 16, 4, 5
MODEL = ModelParams(
    recipe="paper",
    backbone="specific",
    video=VideoParams(size="tiny", frames=8, frame_size=64, patch=(4, 16, 16)),
    audio=AudioParams(size="tiny", input="waveform", samples=16_000, patch=128, mel_bins=None),
    text=TextParams(size="tiny", words=16, vocabulary=8192),
    va_dim=512,
    vt_dim=256,
    dropout=0.0,
)


class OperatorCount(TorchDispatchMode):
    """Counts calls and bytes by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run as it is: `Kernels` counts it."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:  # type: ignore[no-untyped-def]
        answer = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in VIEWS:
            self.calls[name] += 1
            self.bytes[name] += sum(map(_bytes, _tensors((args, kwargs, answer))))
        return answer


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    """The bytes of what a tensor shows; an expanded one is read once."""
    sizes = [n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step or n == 0]
    return torch.Size(sizes).numel() * tensor.element_size()


class Kernels:
    """A backend of torch.compile: inductor, which counts what each call of its code runs."""

    def __init__(self) -> None:
        self.counted = OperatorCount()
        inductor = importlib.import_module("torch._inductor.compile_fx")
        inductor.inductor_metrics_log.setLevel(logging.INFO)  # else it does not count bytes
        inductor.inductor_metrics_log.propagate = False
        self._inductor = inductor
        self._metrics = importlib.import_module("torch._inductor.metrics")

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return self._inductor.compile_fx(graph, inputs, inner_compile=self._compile)

    def _compile(self, graph: Any, inputs: Any, **options: Any) -> Any:
        metrics = self._metrics
        kernels, size = len(metrics.nodes_num_elem), metrics.num_bytes_accessed
        with torch._inductor.config.patch(force_disable_caches=True):
            run = self._inductor.compile_fx_inner(graph, inputs, **options)
        kernels = len(metrics.nodes_num_elem) - kernels
        size = metrics.num_bytes_accessed - size

        def call(values: list[Any]) -> Any:
            self.counted.calls["compiled kernels"] += kernels
            self.counted.bytes["compiled kernels"] += size
            with _disable_current_modes():
                return run(values)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call


def count(micro: int | None, *, compiled: bool = False) -> OperatorCount:
    """Of the last of two steps, or of three where the first one compiles."""
    torch.manual_seed(0)
    preset = load_params(DEMO).pretrain
    changes = {"drop_rate": 0.5, "text_candidates": CANDIDATES, "batch_size": CLIPS}
    params = PretrainParams.model_validate(preset.model_dump() | changes)
    model = _build()
    module = Pretraining(model, params, micro_batch_size=micro)
    kernels = Kernels() if compiled else None
    if kernels is not None:
        machine = load_params(DEMO).machine.model_copy(
            update={"compile": True, "micro_batch_size": micro}
        )
        importlib.import_module("vatt.training.engine").apply_options(
            module, machine, backend=kernels
        )
    options: dict[str, Any] = {"compiled": True} if compiled else {}  # unknown to old checkouts
    engine = LocalEngine(module, params.optimizer, "bf16", **options)
    batch = _batch()
    for step in range(3 if compiled else 2):
        counted = OperatorCount()
        if kernels is not None:
            kernels.counted = counted
        watched = counted if step or not compiled else nullcontext()  # nothing compiles in a mode
        with plain_operators(), watched:
            losses = engine(*pretraining_inputs(model, batch, step, drop_rate=0.5, seed=0))
            engine.update(losses["loss"], learning_rate=1e-4)
    return counted


def _build() -> VATT:
    try:
        return importlib.import_module("vatt.checkpoint").build(MODEL)
    except TypeError:  # checkouts in which the class builds the towers
        return VATT(MODEL)


def _batch() -> Any:
    try:
        batches = importlib.import_module("vatt.data.loading.batches")
    except ModuleNotFoundError:  # checkouts before the folder data was divided
        batches = importlib.import_module("vatt.data.batches")
    torch.manual_seed(1)
    signals = {
        "video": torch.randint(256, (CLIPS, 8, 64, 64, 3), dtype=torch.uint8),
        "audio": torch.randint(-(2**15), 2**15, (CLIPS, 16_000), dtype=torch.int16),
        "text": torch.randint(1, 8192, (CLIPS, CANDIDATES, 16)),
    }
    names, there = [str(number) for number in range(CLIPS)], torch.ones(CLIPS, dtype=torch.bool)
    colour = torch.tensor([0.1, 1.2, 0.8, 0.1]).repeat(CLIPS, 1)
    try:
        present = {"video": there, "audio": there}
        return batches.Batch(names, signals, present, labels={}, changes={"video": colour})
    except TypeError:  # checkouts in which a batch has a field for each of three modalities
        return batches.Batch(
            clip_ids=names, **signals, has_video=there, has_audio=there, colour=colour, labels={}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="all operators, to compare")
    parser.add_argument("--top", type=int, default=12, help="operators shown")
    parser.add_argument("--compiled", action="store_true", help="as by default on a GPU")
    options = parser.parse_args()
    found = {
        "plain": count(None, compiled=options.compiled),
        f"cached by {MICRO}": count(MICRO, compiled=options.compiled),
    }
    if options.json:
        content = {name: {"calls": one.calls, "bytes": one.bytes} for name, one in found.items()}
        print(json.dumps(content))
        return
    for name, one in found.items():
        print(f"{name}: {one.calls.total():,} operators, {one.bytes.total() / 1e6:,.0f} MB")
        for operator, size in one.bytes.most_common(options.top):
            print(f"  {operator:44} {one.calls[operator]:6,}  {size / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
