"""A job step of Slurm tells its processes what torchrun tells its own."""

import os
import re

FIRST_PORT, PORTS = 20_000, 20_000


def join_step() -> None:
    """Inside `srun` with several tasks, set the variables by which torch's processes find another.

    What is set already stays: MASTER_ADDR and MASTER_PORT may be chosen by the job's script.
    """
    step = os.environ
    if "RANK" in step or int(step.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    job = int(step.get("SLURM_JOB_ID", "0"))
    told = {
        "RANK": step["SLURM_PROCID"],
        "LOCAL_RANK": step["SLURM_LOCALID"],
        "WORLD_SIZE": step["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": first_count(step.get("SLURM_STEP_TASKS_PER_NODE", "1")),
        "MASTER_ADDR": first_host(step["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + job % PORTS),
    }
    for name, value in told.items():
        step.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first machine of a list such as `gpu[07-12,15],login1`."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    assert found is not None, f"no machine in {nodes!r}"
    return "".join(part or "" for part in found.groups())


def first_count(tasks: str) -> str:
    """Tasks on the first machine of `4(x2),1`."""
    return re.split(r"[(,]", tasks)[0]
