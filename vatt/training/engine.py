"""Runs a step: plain torch in this process, or DeepSpeed over any number of processes.

A module that an engine trains takes a step's tensors and answers with named scalars (0-d tensors);
`update` makes one optimiser step from one of them. The learning rate is given with every update.
The first forward pass of an engine checks its precision by the types that come out
(`ProvenPrecision`); docs/many-gpus.md describes how to see them.
"""

import logging
import os
import shutil
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from vatt.config import MachineParams, OptimizerParams, Precision
from vatt.errors import MachineError, SettingsError
from vatt.model.experts import ExpertLinear
from vatt.model.operators import Fused, Linear
from vatt.model.transformer import Block, RelativeBias, Tower
from vatt.model.vatt import BatchNorm, Heads
from vatt.training import distributed
from vatt.training.distributed import TensorState, read_shares, write_share
from vatt.training.optimizer import Adam, Sgd, make_optimizer

Weights = dict[str, Tensor]


class Engine(Protocol):
    """One interface for both engines."""

    kind: str  # noted in a state; any kind reads what another wrote

    @property
    def facts(self) -> dict[str, str]:
        """In which types it computes, by name; complete after the first call."""

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        """Run the module in the chosen precision."""

    def update(self, loss: Tensor, *, learning_rate: float) -> Tensor | float:
        """Back-propagate and make one step; returns the gradient norm before clipping."""

    def save(self, folder: Path) -> None:
        """Write everything a later `load` needs; called by every process."""

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""

    def weights(self) -> Weights:
        """The module's whole state dict on the CPU, in rank 0; called by every process."""


EngineMaker = Callable[[nn.Module, OptimizerParams, Precision, MachineParams], Engine]


class LocalEngine:
    """Plain torch in one process: what DeepSpeed must agree with."""

    kind = "plain torch, one process"

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerParams,
        precision: Precision,
        *,
        compiled: bool = False,
    ) -> None:
        self.module = module.to(distributed.device()).train()
        self.optimizer = make_optimizer(module.parameters(), optimizer)
        self.clip_norm = optimizer.clip_norm
        self.run = ProvenPrecision(self.module, precision, compiled=compiled)

    @property
    def facts(self) -> dict[str, str]:
        """In which types it computes; complete after the first call."""
        return self.run.facts

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        """Run the module in the chosen precision."""
        return self.run(*inputs)

    def update(self, loss: Tensor, *, learning_rate: float) -> Tensor | float:
        """Back-propagate and make one step; returns the gradient norm before clipping."""
        loss.backward()
        norm = _clip(self.module, self.clip_norm)
        _set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def save(self, folder: Path) -> None:
        """Write everything a later `load` needs."""
        write_share(folder, self._entries(), updates=self.optimizer.updates)

    def load(self, folder: Path) -> None:
        """Go on from what any engine's `save` wrote."""
        updates, entries = read_shares(folder)
        for name, tensor in _tensors(self.module):
            entry = {
                key: value.to(tensor.device, copy=True) for key, value in entries[name].items()
            }
            tensor.data.copy_(entry.pop("value"))
            if tensor.requires_grad:
                self.optimizer.restore(tensor, entry, updates=updates)

    def weights(self) -> Weights:
        """The module's whole state dict on the CPU."""
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}

    def _entries(self) -> Iterator[tuple[str, TensorState]]:
        for name, tensor in _tensors(self.module):
            keys = self.optimizer.moments if tensor.requires_grad else ()
            yield name, {"value": tensor, **{k: self.optimizer.state[tensor][k] for k in keys}}


class DeepSpeedEngine:
    """DeepSpeed's ZeRO over all processes; weights, gradients and their reduction stay fp32."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerParams,
        precision: Precision,
        machine: MachineParams,
    ) -> None:
        _check_offload(machine)
        deepspeed = _import_deepspeed()
        self.zero_stage = machine.zero_stage
        self.clip_norm = optimizer.clip_norm
        self.kind = f"ZeRO-{machine.zero_stage}, processes: {distributed.world_size()}"
        self.module = module.to(distributed.device()).train()
        self.run = ProvenPrecision(self.module, precision, compiled=compiles(machine))
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.run,
            optimizer=make_optimizer(module.parameters(), optimizer),
            config=_deepspeed_config(module, optimizer, machine),
            # `distributed.process_group` has joined the processes: DeepSpeed must not look for MPI.
            dist_init_required=False,
        )
        self.run.expect("precision.reduction", self.engine.communication_data_type)

    @property
    def facts(self) -> dict[str, str]:
        """In which types it computes; complete after the first call."""
        return self.run.facts

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        """Run the module in the chosen precision."""
        return self.engine(*inputs)

    def update(self, loss: Tensor, *, learning_rate: float) -> Tensor | float:
        """Back-propagate and make one step; returns the gradient norm before clipping."""
        _set_learning_rate(self.optimizer, learning_rate)
        self.engine.backward(loss)
        if self.zero_stage == 0:  # DeepSpeed clips here too, but does not return the norm
            norm = _clip(self.module, self.clip_norm)
            self.engine.step()
            return norm
        self.engine.step()
        return self.engine.get_global_grad_norm()

    def save(self, folder: Path) -> None:
        """Write everything a later `load` needs; called by every process."""
        write_share(folder, self._entries(), updates=self._own.updates)

    def load(self, folder: Path) -> None:
        """Go on from what any engine's `save` wrote; called by every process."""
        updates, entries = read_shares(folder)
        for name, tensor in _tensors(self.module):
            with self._whole([tensor], changed_by=0):
                tensor.data.copy_(entries[name].pop("value"))
        for part in self._parts():
            moments = {key: torch.zeros_like(part) for key in self._own.moments}
            self._own.restore(part, moments, updates=updates)
        if self.zero_stage > 0:
            self.optimizer.refresh_fp32_params()
        if self.zero_stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
        for name, weight in self.module.named_parameters():
            for key, value in entries[name].items():
                self._set_moment(weight, key, value.to(weight.device))

    def weights(self) -> Weights:
        """The module's whole state dict on the CPU, in rank 0; called by every process."""
        with self._whole(list(self.module.parameters())):
            if distributed.rank() > 0:
                return {}
            values = self.module.state_dict().items()
            return {name: value.detach().cpu().clone() for name, value in values}

    def _entries(self) -> Iterator[tuple[str, TensorState]]:
        for name, tensor in _tensors(self.module):
            with self._whole([tensor]):
                value = tensor.detach().clone()
            keys = self._own.moments if tensor.requires_grad else ()
            yield name, {"value": value, **{key: self._moment(tensor, key) for key in keys}}

    @property
    def _own(self) -> Adam | Sgd:
        """Our optimiser, inside ZeRO's."""
        return self.optimizer.optimizer if self.zero_stage > 0 else self.optimizer

    def _parts(self) -> list[Tensor]:
        """What our optimiser updates: weights, or this process's part of them in one row."""
        if self.zero_stage == 0:
            return [weight for group in self._own.param_groups for weight in group["params"]]
        if self.zero_stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def _moment(self, weight: Tensor, key: str) -> Tensor:
        if self.zero_stage == 0:
            return self._own.state[weight][key]
        if self.zero_stage == 3:
            return self.optimizer.get_full_hp_param(weight, key)
        return weight.get_full_hp_param(key)  # type: ignore[attr-defined]

    def _set_moment(self, weight: Tensor, key: str, value: Tensor) -> None:
        if self.zero_stage == 0:
            self._own.state[weight][key].copy_(value)
        elif self.zero_stage == 3:
            share = weight.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = torch.zeros(share * distributed.world_size(), device=value.device)
            padded[: value.numel()] = value.flatten()
            own = padded.split(share)[distributed.rank()]
            self.optimizer.set_local_hp_param(own, weight, key)
        else:
            weight.set_full_hp_param(value, key)  # type: ignore[attr-defined]

    def _whole(
        self, tensors: list[Tensor], changed_by: int | None = None
    ) -> AbstractContextManager[Any]:
        """At stage 3, gather the weights in the body; a change in one process applies to all."""
        parts = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
        return _import_deepspeed().zero.GatheredParameters(
            parts, modifier_rank=changed_by, enabled=bool(parts)
        )


def make_engine(
    module: nn.Module, optimizer: OptimizerParams, precision: Precision, machine: MachineParams
) -> Engine:
    """The engine of the pipeline."""
    apply_options(module, machine)
    return DeepSpeedEngine(module, optimizer, precision, machine)


def apply_options(
    module: nn.Module, machine: MachineParams, *, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile blocks, and compute them again in the backward pass, as the settings say."""
    if compiles(machine):
        torch._dynamo.config.recompile_limit = MAX_FORMS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for part in _parts_of(module, COMPILED):
            compiled = torch.compile(part.forward, backend=backend)
            if machine.micro_batch_size is not None:
                compiled = partial(_for_any_number, compiled)
            part.forward = compiled
    if machine.activation_checkpointing:
        for block in _parts_of(module, Block):
            again = partial(checkpoint, block.forward, use_reentrant=False)
            block.forward = again  # type: ignore[method-assign]


COMPILED = (Block, BatchNorm, RelativeBias, Fused)
# A part has a form for each tower's width, for its first and last block, with and without a
# gradient, in training and in tests. Over torch's limit of 8, it would silently not be compiled.
MAX_FORMS = 64


def _for_any_number(compiled: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """Micro-batches may differ by one clip: compile once for both sizes."""
    rows = [value for value in tree_leaves(inputs) if isinstance(value, Tensor) and value.dim()]
    for value in rows:
        if len(value) == len(rows[0]):
            torch._dynamo.maybe_mark_dynamic(value, 0)
    return compiled(*inputs, **named)


def compiles(machine: MachineParams) -> bool:
    """Whether blocks are compiled; `auto` compiles on a GPU if nothing prevents it."""
    on_gpu = distributed.device().type == "cuda"
    compiler = os.environ.get("CC", "cc") if on_gpu else os.environ.get("CXX", "g++")
    has_compiler = shutil.which(compiler) is not None
    if machine.compile == "auto":
        return on_gpu and has_compiler and machine.zero_stage < 3
    if machine.compile and machine.zero_stage == 3:
        raise SettingsError(
            "machine.compile does not work with machine.zero_stage 3, which moves weights",
            hint="set machine.zero_stage=2, or machine.compile=false",
        )
    if machine.compile and not has_compiler:
        raise MachineError(
            f"machine.compile needs a compiler, and there is no {compiler}",
            hint=f"install one and name it in {'CC' if on_gpu else 'CXX'}, or set "
            "machine.compile=false",
        )
    return bool(machine.compile)


LARGEST_BUCKET = 50_000_000  # elements that ZeRO reduces at once


def _deepspeed_config(
    module: nn.Module, optimizer: OptimizerParams, machine: MachineParams
) -> dict[str, Any]:
    elements = sum(weight.numel() for weight in module.parameters())
    bucket = min(elements + elements % 2, LARGEST_BUCKET)  # ZeRO takes even ones only
    on_gpu = distributed.device().type == "cuda"
    zero: dict[str, Any] = {
        "stage": machine.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # Weights used again within so many elements stay whole; the default keeps all of a model.
        "stage3_max_reuse_distance": bucket,
        # Against fragmentation and idling of a GPU; on a CPU they only cost copies.
        "contiguous_gradients": on_gpu,
        "overlap_comm": on_gpu,
    }
    if machine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if machine.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        # Counts that DeepSpeed wants to know; the batch is ours, one forward and backward a step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": (optimizer.clip_norm or 0.0) if machine.zero_stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers by name; a shared one comes once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _check_offload(machine: MachineParams) -> None:
    needed = {"none": 0, "optimizer": 1, "all": 3}[machine.offload]
    if machine.zero_stage < needed:
        raise SettingsError(
            f"machine.offload: {machine.offload} needs machine.zero_stage {needed} or more",
            hint=f"set machine.zero_stage={needed}, or machine.offload=none",
        )


def _import_deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", distributed.device().type)
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    import deepspeed

    logger.setLevel(logging.WARNING)  # the import has changed it
    # At every reduction, of names that torch will drop one day.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # It would compile a shared-memory collective: 20 s, and a compiler that may not be there.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """Drop one warning of DeepSpeed: our optimisers are tested under ZeRO."""
    return "untested optimizer" not in record.getMessage()


def _clip(module: nn.Module, most: float | None) -> Tensor:
    """The norm of all gradients; a larger one than `most` is scaled down to it."""
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if most is not None:
        nn.utils.clip_grads_with_norm_(module.parameters(), most, norm)
    return norm


def _set_learning_rate(optimizer: Any, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


# --- precision ------------------------------------------------------------------------------------

TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class ProvenPrecision(nn.Module):
    """A module that computes in a precision; its first forward pass checks that it really does.

    Autocast begins here, inside DeepSpeed: on a GPU, DeepSpeed's forward ends any autocast that
    began outside. (Its own bf16 mode would cast the running statistics of batch norms too.)
    """

    def __init__(self, module: nn.Module, precision: Precision, *, compiled: bool = False) -> None:
        super().__init__()
        self.module, self.precision, self.compiled = module, precision, compiled
        self.facts: dict[str, str] = {}
        self._is_proven = False

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """Run the module; the first time, raise MachineError if it is not in its precision."""
        kind, enabled = distributed.device().type, self.precision == "bf16"
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=enabled):
            if self._is_proven:
                return self.module(*inputs)
            watch = _TypeWatch(self.module, compiled=self.compiled)
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its start on stderr
            # There can be one profile at a time, and somebody else may have begun one.
            is_free = not torch.autograd.profiler._is_profiler_enabled
            # acc_events: without it some versions of torch warn
            profile = torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True)
            try:
                with profile if is_free else nullcontext():
                    answer = self.module(*inputs)
            finally:
                watch.stop()
        if is_free:
            self.facts["attention.kernel"] = attention_kernels(profile, compiled=self.compiled)
        watch.seen["loss"] = {value.dtype for value in answer.values()}
        watch.seen["weights"] = {weight.dtype for weight in self.module.parameters()}
        for name, types in sorted(watch.seen.items()):
            self.expect(f"precision.{name}", *types)
        self._is_proven = True
        return answer

    def expect(self, name: str, *types: torch.dtype) -> None:
        """Record the types; raise MachineError unless all are the type that `name` should have."""
        casts = name.startswith(("precision.encoder.", "precision.classifier"))
        wanted = self.precision if casts else "fp32"
        self.facts[name] = ", ".join(sorted(TYPE_NAMES.get(kind, str(kind)) for kind in types))
        if self.facts[name] != wanted:
            raise MachineError(
                f"{name} should be {wanted} at precision {self.precision}, but is "
                f"{self.facts[name]}",
                hint="another version of torch or DeepSpeed may be the cause: install those of "
                "constraints.txt, and please report this",
            )


MARK = "tower: "  # names a tower's part of a profile
COMPILED_MARK = "Torch-Compiled Region"  # torch's own, around compiled code
KERNELS = {  # attention by the operators in which torch computes it, and by our own
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_efficient_attention": "memory-efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cuDNN",
    "aten::_scaled_dot_product_attention_math": "math",
    "_ChunkedAttention": "chunked",
}


def attention_kernels(profile: torch.profiler.profile, *, compiled: bool) -> str:
    """The kernels of attention that ran, each with its towers: `flash (audio, video)`."""
    towers: dict[str, set[str]] = defaultdict(set)
    name, tower_ends, region_ends = "", 0.0, 0.0
    for event in sorted(profile.events() or [], key=lambda event: event.time_range.start):
        began, ended = event.time_range.start, event.time_range.end
        if event.name.startswith(MARK):
            name, tower_ends = event.name.removeprefix(MARK), ended
        elif event.name.startswith(COMPILED_MARK):
            region_ends = ended
        # While a block is compiled, torch tries operators that may not run later.
        elif event.name in KERNELS and began < (region_ends if compiled else tower_ends):
            towers[KERNELS[event.name]].add(name)
    return ", ".join(f"{kernel} ({', '.join(sorted(of))})" for kernel, of in sorted(towers.items()))


LAYERS = (Linear, ExpertLinear)
NORMS = (nn.LayerNorm, nn.RMSNorm, BatchNorm)
Part = TypeVar("Part", bound=nn.Module)


class _TypeWatch:
    """Records the types that linear layers and norms return, by tower, until `stop`."""

    def __init__(self, module: nn.Module, *, compiled: bool) -> None:
        self.seen: dict[str, set[torch.dtype]] = defaultdict(set)  # by place
        self._running: list[str] = []  # towers: an agnostic encoder belongs to all of them
        self._marks: list[record_function] = []
        self._heads = {part for top in _parts_of(module, Heads) for part in top.modules()}
        self._handles: list[RemovableHandle] = []
        # A hook inside of a compiled block would stay in its code.
        blocks = _parts_of(module, Block) if compiled else []
        unseen = {part for block in blocks for part in block.modules()}
        for name, part in module.named_modules():
            if part not in unseen:
                self._hook(part, name.rpartition(".")[2])
        for block in blocks:
            self._handles.append(block.register_forward_pre_hook(self._try))

    def stop(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, part: nn.Module, name: str) -> None:
        if isinstance(part, Tower):
            enter = part.register_forward_pre_hook(lambda *_: self._enter(name))
            self._handles += [enter, part.register_forward_hook(self._leave)]
        elif isinstance(part, (*LAYERS, *NORMS)):
            self._handles.append(part.register_forward_hook(self._note))

    def _enter(self, tower: str) -> None:
        self._running.append(tower)
        self._marks.append(record_function(f"{MARK}{tower}"))
        self._marks[-1].__enter__()

    def _leave(self, *_: Any) -> None:
        self._running.pop()
        self._marks.pop().__exit__(None, None, None)

    def _note(self, part: nn.Module, _: Any, answer: Tensor) -> None:
        outside = "heads" if part in self._heads else "classifier"
        place = f"encoder.{self._running[-1]}" if self._running else outside
        self.seen[place if isinstance(part, LAYERS) else "norms"].add(answer.dtype)

    def _try(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Compute one token outside the compiled block, under the same autocast."""
        assert isinstance(block, Block)
        with torch.no_grad():
            token = block.attention_norm(inputs[0][:1, :1])
            self._note(block.attention_norm, None, token)
            self._note(block.attention.qkv, None, block.attention.qkv(token))


def _parts_of(module: nn.Module, kind: type[Part] | tuple[type[Part], ...]) -> list[Part]:
    return [part for part in module.modules() if isinstance(part, kind)]
