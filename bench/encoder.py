"""Speed of the encoder compared with other implementations of the same Transformer, as ratios.

On a CPU: forward + backward of the base video tower (784 tokens, width 768, 12 layers) against
Hugging Face's VideoMAE and ViViT, timm's blocks and torch.nn.TransformerEncoder; the forward pass
against the latter's fast path; DropToken 50 % against 0 %; the operators of vatt/model/operators.py
against torch's own. On a GPU (--gpu): the share of the measured bf16 matrix peak that a training
step of the medium and large towers reaches with DropToken 50 % and flash attention, plain and
compiled.

    pip install transformers timm     # in a separate, temporary environment
    python bench/encoder.py --dtype bf16 fp32 --batch 1 4 --threads 2

All candidates alternate within each round, so that a busy machine slows all of them. A ratio is
taken within a round, from the second step of each candidate; its median, lowest and highest value
over the rounds are printed.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vatt.config import AudioParams, ModelParams, TextParams, VideoParams
from vatt.model.operators import plain_operators
from vatt.model.patches import draw_kept
from vatt.model.transformer import SIZES
from vatt.model.vatt import initialise, paper_towers

WIDTH, DEPTH, HEADS, MLP, TOKENS = 768, 12, 12, 3072, 784
FRAMES = 16  # in voxels of 4 x 16 x 16: 4 x 14 x 14 = 784 tokens
Step = Callable[[], Any]


def video_tower(size: str, frames: int, *, dropout: float = 0.0) -> nn.Module:
    """Our video tower: raw frames -> the output of AGG."""
    params = ModelParams(
        recipe="paper",
        backbone="specific",
        video=VideoParams(size=size, frames=frames, frame_size=224, patch=(4, 16, 16)),
        audio=AudioParams(size="tiny", input="waveform", samples=128, patch=128, mel_bins=None),
        text=TextParams(size="tiny", words=16, vocabulary=16),
        va_dim=512,
        vt_dim=256,
        dropout=dropout,
    )
    tower = paper_towers(params)["video"]
    initialise(tower)
    return tower


def competitors(batch: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Other models of the same size, each with an input; those not installed are left out."""
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, MLP, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    tokens = torch.randn(batch, TOKENS + 1, WIDTH)
    found: dict[str, tuple[nn.Module, Tensor]] = {
        "torch.nn.TransformerEncoder": (
            nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False),
            tokens,
        )
    }
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": MLP,
        "num_frames": 8,
        "image_size": 224,
    }
    video = torch.randn(batch, 8, 3, 224, 224)
    try:
        from transformers import VideoMAEConfig, VideoMAEModel, VivitConfig, VivitModel
    except ImportError as error:
        print(f"transformers is left out: {error}")
    else:
        mae = VideoMAEModel(VideoMAEConfig(patch_size=16, tubelet_size=2, **sizes))
        vivit = VivitConfig(
            tubelet_size=[2, 16, 16],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **sizes,
        )
        found["transformers VideoMAE"] = (mae, video)
        found["transformers ViViT"] = (VivitModel(vivit, add_pooling_layer=False), video)
    try:
        from timm.models.vision_transformer import Block
    except (ImportError, RuntimeError) as error:
        print(f"timm is left out: {error}")
    else:
        blocks = nn.Sequential(*(Block(WIDTH, HEADS, qkv_bias=True) for _ in range(DEPTH)))
        found["timm blocks"] = (blocks, tokens)
    return found


def answer(output: Any) -> Tensor:
    """The tensor in the output of a model."""
    return output if isinstance(output, Tensor) else output.last_hidden_state


def precision(dtype: str, device: str = "cpu") -> Any:
    """The context of computing in a type."""
    return torch.autocast(device, torch.bfloat16) if dtype == "bf16" else nullcontext()


def training_step(model: nn.Module, *inputs: Tensor | None, dtype: str) -> Step:
    """Forward + backward; gradients are discarded."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        with precision(dtype):
            loss = answer(model(*inputs)).float().square().mean()
        torch.autograd.grad(loss, parameters, allow_unused=True)

    return step


def forward_step(model: nn.Module, inputs: Tensor, *, dtype: str) -> Step:
    """Only the forward pass, in eval mode, in the weights' type: both call the fast path."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model, inputs = copy.deepcopy(model).to(kind).eval(), inputs.to(kind)

    def step() -> None:
        with torch.inference_mode():
            model(inputs)

    return step


def without_choice(step: Step) -> Step:
    """The same step on torch's own operators."""

    def plain() -> None:
        with plain_operators():
            step()

    return plain


def compare(title: str, steps: dict[str, Step], rounds: int) -> dict[str, Any]:
    """Times of all steps, measured alternately, relative to the first one."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()  # so that the memory is as this step leaves it, not another candidate
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    first = next(iter(steps))
    rows = {}
    print(f"\n{title}, {rounds} rounds")
    for name, values in times.items():
        ratios = [mine / other for mine, other in zip(values, times[first], strict=True)]
        rows[name] = {
            "milliseconds": statistics.median(values) * 1e3,
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
        print(
            "  {0:28} {milliseconds:8.1f} ms  {ratio:5.2f} times the first"
            " ({lowest:.2f} to {highest:.2f})".format(name, **rows[name]),
            flush=True,
        )
    return {"title": title, "rounds": rounds, "rows": rows}


def cpu_benchmarks(dtypes: list[str], batches: list[int], rounds: int) -> list[dict[str, Any]]:
    """Every comparison that needs no GPU."""
    results = []
    for dtype in dtypes:
        for batch in batches:
            tower, video = video_tower("base", FRAMES), torch.randn(batch, FRAMES, 224, 224, 3)
            others = competitors(batch)
            ours = training_step(tower, video, dtype=dtype)
            steps = {"ours": ours, "ours, torch's operators": without_choice(ours)}
            steps |= {
                name: training_step(model, inputs, dtype=dtype)
                for name, (model, inputs) in others.items()
            }
            title = f"forward + backward, base, {TOKENS} tokens, {dtype}, batch {batch}"
            results.append(compare(title, steps, rounds))
            fast = others["torch.nn.TransformerEncoder"]
            steps = {
                "ours": forward_step(tower, video, dtype=dtype),
                "torch.nn.TransformerEncoder": forward_step(*fast, dtype=dtype),
            }
            results.append(compare(f"features, forward, {dtype}, batch {batch}", steps, rounds))
        results.append(drop_token_benchmark(dtype, rounds))
    return results


def drop_token_benchmark(dtype: str, rounds: int) -> dict[str, Any]:
    """A training step with all 1,568 tokens and with half of them."""
    tower, video = video_tower("base", 32), torch.randn(1, 32, 224, 224, 3)
    kept = draw_kept(1568, 0.5, seed=0, step=0, samples=[0])
    steps = {
        "all tokens": training_step(tower, video, None, dtype=dtype),
        "DropToken 50 %": training_step(tower, video, kept, dtype=dtype),
    }
    return compare(f"DropToken, base, 1,568 tokens, {dtype}, batch 1", steps, rounds)


def gpu_benchmarks(batch: int, rounds: int) -> list[dict[str, Any]]:
    """Share of the matrix peak (bf16) that a training step reaches, DropToken 50 %."""
    peak = matrix_peak()
    print(f"measured bf16 matrix peak: {peak / 1e12:.0f} TFLOP/s")
    results = []
    for size in ("medium", "large"):
        tower = video_tower(size, 32).cuda()
        video = torch.randn(batch, 32, 224, 224, 3, device="cuda")
        kept = draw_kept(1568, 0.5, seed=0, step=0, samples=list(range(batch))).cuda()
        work = 3 * batch * forward_operations(size)
        for name, model in (("eager", tower), ("compiled", torch.compile(tower))):
            seconds = gpu_seconds(model, video, kept, rounds)
            share = work / seconds / peak
            print(f"{size}, {name}, batch {batch}: {seconds * 1e3:.1f} ms, MFU {share:.1%}")
            results.append({"size": size, "mode": name, "seconds": seconds, "mfu": share})
    return results


def forward_operations(size: str) -> float:
    """Two per multiply-add of a clip: patches, dense layers, both attention products.

    Of the last block, what follows its keys and values is for one token.
    """
    dims = SIZES[size]
    inner, tokens = dims.heads * dims.head_dim, TOKENS + 1
    projected = tokens * 3 * dims.dim * inner
    of_each = dims.dim * (inner + 2 * dims.mlp_dim) + 2 * tokens * inner
    patches = TOKENS * 4 * 16 * 16 * 3 * dims.dim
    return 2 * (patches + dims.depth * projected + ((dims.depth - 1) * tokens + 1) * of_each)


def matrix_peak(size: int = 8192, rounds: int = 20) -> float:
    """Operations per second of a large bf16 matrix product on this GPU."""
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        left @ left
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        left @ left
    torch.cuda.synchronize()
    return 2 * size**3 * rounds / (time.perf_counter() - start)


def gpu_seconds(model: nn.Module, video: Tensor, kept: Tensor, rounds: int) -> float:
    """Seconds of a training step."""

    def step() -> None:
        with precision("bf16", "cuda"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            loss = model(video, kept).square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="measure MFU on a CUDA device instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is no CUDA device here")
    if options.gpu:
        results = gpu_benchmarks(options.batch[-1], options.rounds)
    else:
        results = cpu_benchmarks(options.dtype, options.batch, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
