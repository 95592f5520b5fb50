"""Who runs the step: plain torch in this process, or DeepSpeed over any number of them.

A module that an engine trains takes a step's tensors and answers with named scalars (0-d tensors);
`update` makes one optimiser step from one of them. The learning rate is given with every update.
"""

import logging
import os
import sys
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from vatt.config import MachineParams, OptimizerParams
from vatt.errors import SettingsError
from vatt.training import distributed
from vatt.training.optimizer import make_optimizer

Weights = dict[str, Tensor]
Precision = Literal["fp32", "bf16"]

LARGEST_BUCKET = 50_000_000  # elements that ZeRO reduces at once


class Engine(Protocol):
    """One interface for both engines."""

    kind: str  # what wrote a state; only the same kind reads it

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

    kind = "local"

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
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / "local.pt")

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(folder / "local.pt", map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])

    def weights(self) -> Weights:
        """The module's whole state dict on the CPU."""
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}


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
        self.kind = f"deepspeed-zero{machine.zero_stage}-processes{distributed.world_size()}"
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
        self.engine.save_checkpoint(str(folder), tag="zero", save_latest=False)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        path, _ = self.engine.load_checkpoint(
            str(folder), tag="zero", load_lr_scheduler_states=False
        )
        assert path is not None, f"DeepSpeed finds no state in {folder}"

    def weights(self) -> Weights:
        """The module's whole state dict on the CPU, in rank 0; called by every process."""
        module = self.engine.module
        with self._whole(module):
            if distributed.rank() > 0:
                return {}
            return {
                name: value.detach().cpu().clone() for name, value in module.state_dict().items()
            }

    def _whole(self, module: nn.Module) -> AbstractContextManager[Any]:
        deepspeed = _import_deepspeed()
        return deepspeed.zero.GatheredParameters(
            list(module.parameters()), enabled=self.zero_stage == 3
        )


def make_engine(
    module: nn.Module, optimizer: OptimizerParams, precision: Precision, machine: MachineParams
) -> Engine:
    """The engine of the pipeline."""
    return DeepSpeedEngine(module, optimizer, precision, machine)


def _deepspeed_config(
    module: nn.Module, optimizer: OptimizerParams, machine: MachineParams
) -> dict[str, Any]:
    elements = sum(weight.numel() for weight in module.parameters())
    bucket = min(elements, LARGEST_BUCKET)
    on_gpu = distributed.device().type == "cuda"
    zero: dict[str, Any] = {
        "stage": machine.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
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
