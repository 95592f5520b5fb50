"""DVC as a subprocess, run from here only: stages run, what changed, signals passed on."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from vatt.errors import MachineError, VattError

STAGES = ("download", "preprocess", "pretrain", "finetune", "evaluate", "report")


class StageFailed(VattError):
    """A stage ended with its own code and message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = code


def stages_here() -> list[str]:
    """The stages that this project runs itself, in their order: an experiment lacks some."""
    import yaml

    declared = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return [name for name in STAGES if name in declared]


def run_dvc(arguments: list[str], *, quiet: bool) -> None:
    """Run dvc with this interpreter first on PATH; raise a failed stage's own code and message."""
    from vatt.process import OUTCOME, read_outcome

    here = Path.cwd()  # an experiment's stage may wait for one of the project above it
    projects = [folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()]
    for project in projects:
        (project / OUTCOME).unlink(missing_ok=True)
    folder = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",
        "DVC_NO_ANALYTICS": "1",
        "VATTCTL": "1",
    }
    # dvc's own talk is progress, not a result, so its stdout goes to stderr
    command = [sys.executable, "-m", "dvc", *arguments, *(["--quiet"] if quiet else [])]
    with subprocess.Popen(command, env=environment, stdout=sys.stderr.fileno()) as process:
        forward_signals(process.pid)
        code = process.wait()
    if code == 0:
        return
    for project in projects:
        if (outcome := read_outcome(project)) is not None:
            raise StageFailed(*outcome)
    if code in (-signal.SIGINT, 128 + signal.SIGINT):
        raise KeyboardInterrupt
    raise MachineError(
        f"dvc {arguments[0]} ended with {code}",
        hint="its message is above; the same command continues where it stopped",
    )


def forward_signals(parent: int) -> None:
    """Hand SIGTERM and SIGUSR1 to the stage: dvc itself would die and leave it as an orphan.

    To the stage alone: its launcher and its processes get them from it, in the right order.
    """

    def forward(signum: int, frame: FrameType | None) -> None:
        import psutil

        for child in psutil.Process(parent).children(recursive=True):  # parents come first
            try:
                if _is_stage(child.cmdline()):
                    child.send_signal(signum)
                    return
            except psutil.Error:  # it ended while we looked
                continue

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGUSR1, forward)


def _is_stage(command: list[str]) -> bool:
    """Whether this is `python -m stages.<name>`: not a shell or a launcher that names it."""
    return command[1:2] == ["-m"] and command[2:3] != [] and command[2].startswith("stages.")


def changed_stages(files: Sequence[Path] = (Path("dvc.yaml"),)) -> dict[str, list[str]]:
    """What DVC finds changed, by stage, in these of the repository's dvc.yaml that exist."""
    there = [str(file) for file in files if file.exists()]
    if not there:
        return {}
    command = [sys.executable, "-m", "dvc", "status", "--json", *there]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise MachineError(f"dvc status failed: {lines[-1] if lines else done.returncode}")
    found = {}
    for stage, changes in json.loads(done.stdout or "{}").items():
        found[stage] = [f"{kind}: {name}" for kind, name in _leaves(changes)]
    return found


def _leaves(changes: list[Any]) -> list[tuple[str, str]]:
    """dvc's nested answer as (what happened, to what)."""
    found = []
    for change in changes:
        if isinstance(change, str):
            found.append((change, "the stage"))
            continue
        for things in change.values():
            for name, kind in things.items():
                nested = kind if isinstance(kind, dict) else {name: kind}
                found += [(str(value), str(key)) for key, value in nested.items()]
    return found
