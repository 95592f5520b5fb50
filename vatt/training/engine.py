"""Runs a step: plain torch in this process, or DeepSpeed over any number of processes.

A module that an engine trains takes a step's tensors and answers with named scalars (0-d tensors);
`update` makes one optimiser step from one of them. The learning rate is given with every update.
"""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vatt.config import MachineParams, OptimizerParams
from vatt.errors import MachineError, SettingsError
from vatt.model.transformer import Block
from vatt.training import distributed
from vatt.training.distributed import TensorState, read_shares, write_share
from vatt.training.optimizer import Adam, Sgd, make_optimizer


def apply_options(module: nn.Module, machine: MachineParams) -> None:
    """Compile blocks, and compute them again on the way back, as the settings say."""
    if machine.compile:
        _check_compile(machine)
        for block in _blocks(module):
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    if machine.activation_checkpointing:
        for block in _blocks(module):
            again = partial(checkpoint, block.forward, use_reentrant=False)
            block.forward = again  # type: ignore[method-assign]


def _blocks(module: nn.Module) -> Iterator[Block]:
    return (part for part in module.modules() if isinstance(part, Block))


def _check_compile(machine: MachineParams) -> None:
    if machine.zero_stage == 3:
        raise SettingsError(
            "machine.compile does not go with machine.zero_stage 3, whose weights come and go",
            hint="set machine.zero_stage=2, or machine.compile=false",
        )
    compiler = os.environ.get("CXX", "g++")
    if distributed.device().type == "cpu" and shutil.which(compiler) is None:
        raise MachineError(
            f"machine.compile needs a C++ compiler, and there is no {compiler}",
            hint="install one and name it in CXX, or set machine.compile=false",
        )


Weights = dict[str, Tensor]
Precision = Literal["fp32", "bf16"]

LARGEST_BUCKET = 50_000_000  # elements that ZeRO reduces at once


class Engine(Protocol):
    """One interface for both engines."""

    kind: str  # told of a state; any kind reads what another wrote

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        """Run the module in the chosen precision."""

    def update(self, loss: Tensor, *, learning_rate: float) -> float:
        """Back-propagate and make one step; returns the gradient norm before clipping."""

    def save(self, folder: Path) -> None:
        """Write everything a later `load` needs; called by every process."""

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""

    def weights(self) -> Weights:
        """The module's whole state dict on the CPU, in rank 0; called by every process."""


class LocalEngine:
    """Plain torch in one process: what DeepSpeed must agree with."""

    kind = "plain torch, one process"

    def __init__(self, module: nn.Module, optimizer: OptimizerParams, precision: Precision) -> None:
        self.module = module.to(distributed.device()).train()
        self.optimizer = make_optimizer(module.parameters(), optimizer)
        self.clip_norm = optimizer.clip_norm or float("inf")
        self.precision = precision

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        """Run the module in the chosen precision."""
        with _autocast(self.precision):
            return self.module(*inputs)

    def update(self, loss: Tensor, *, learning_rate: float) -> float:
        """Back-propagate and make one step; returns the gradient norm before clipping."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_norm)
        _set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

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
    """DeepSpeed's ZeRO over all processes; the module runs under autocast, weights stay fp32."""

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
        self.clip_norm = optimizer.clip_norm or float("inf")
        self.kind = f"ZeRO-{machine.zero_stage}, processes: {distributed.world_size()}"
        self.precision = precision
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module.to(distributed.device()).train(),
            optimizer=make_optimizer(module.parameters(), optimizer),
            config=_deepspeed_config(module, optimizer, machine),
        )

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        """Run the module in the chosen precision."""
        with _autocast(self.precision):
            return self.engine(*inputs)

    def update(self, loss: Tensor, *, learning_rate: float) -> float:
        """Back-propagate and make one step; returns the gradient norm before clipping."""
        _set_learning_rate(self.optimizer, learning_rate)
        self.engine.backward(loss)
        if self.zero_stage == 0:  # DeepSpeed clips here too, but does not tell the norm
            norm = nn.utils.clip_grad_norm_(self.engine.module.parameters(), self.clip_norm)
            self.engine.step()
            return float(norm)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def save(self, folder: Path) -> None:
        """Write everything a later `load` needs; called by every process."""
        write_share(folder, self._entries(), updates=self._own.updates)

    def load(self, folder: Path) -> None:
        """Go on from what any engine's `save` wrote; called by every process."""
        updates, entries = read_shares(folder)
        for name, tensor in _tensors(self.engine.module):
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
        for name, weight in self.engine.module.named_parameters():
            for key, value in entries[name].items():
                self._set_moment(weight, key, value.to(weight.device))

    def weights(self) -> Weights:
        """The module's whole state dict on the CPU, in rank 0; called by every process."""
        module = self.engine.module
        with self._whole(list(module.parameters())):
            if distributed.rank() > 0:
                return {}
            return {
                name: value.detach().cpu().clone() for name, value in module.state_dict().items()
            }

    def _entries(self) -> Iterator[tuple[str, TensorState]]:
        for name, tensor in _tensors(self.engine.module):
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
        """At stage 3, weights come together within it; one process's change then holds in all."""
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
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # At every reduction, of names that torch will drop one day.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # It would compile a shared-memory collective: 20 s, and a compiler that may not be there.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


def _set_learning_rate(optimizer: Any, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def _autocast(precision: Precision) -> torch.autocast:
    # Not DeepSpeed's bf16 mode: it would cast the batch norms' running statistics too.
    return torch.autocast(
        distributed.device().type, dtype=torch.bfloat16, enabled=precision == "bf16"
    )
