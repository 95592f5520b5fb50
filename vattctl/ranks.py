"""`vattctl pretrain` as one of the processes that torchrun or Slurm starts."""

import os
import sys
from typing import Any

from vatt.errors import SettingsError
from vatt.slurm import join_step


def pretrain_as_rank(settings: dict[tuple[str, ...], Any], *, quiet: bool) -> bool:
    """Take part in the stage: rank 0 by driving DVC, the others at once. False when alone."""
    from vattctl.pipeline import run_dvc

    join_step()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    if settings:
        raise SettingsError(
            "several processes cannot change params.yaml at once",
            hint="change it first, then start them without options",
        )
    if os.environ["RANK"] != "0":
        os.execv(sys.executable, [sys.executable, "-m", "stages.pretrain"])
    # Whatever DVC thinks of it, the stage must run: the others wait in it.
    run_dvc(["repro", "--force", "--single-item", "pretrain"], quiet=quiet)
    return True
