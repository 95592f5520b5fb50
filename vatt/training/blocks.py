"""What `machine` may do to every block of the encoders; no result changes but for rounding."""

import os
import shutil
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vatt.config import MachineParams
from vatt.errors import MachineError, SettingsError
from vatt.model.transformer import Block
from vatt.training import distributed


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
