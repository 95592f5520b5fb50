"""Errors a user can fix: what is wrong, the thing by name, what to do next."""


class VattError(Exception):
    """A problem with a remedy; `exit_code` is what the process ends with."""

    exit_code = 1

    def __init__(self, problem: str, *, hint: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem}\n  -> {self.hint}" if self.hint else self.problem


class SettingsError(VattError):
    """A wrong option, or a wrong key or value in params.yaml."""

    exit_code = 2


class DataError(VattError):
    """Data is missing, unreadable, or too little of it is left."""

    exit_code = 3


class MachineError(VattError):
    """The machine cannot do it: no disk space, no network, a missing program."""

    exit_code = 4


class Stopped(VattError):
    """Asked to stop (SIGTERM, SIGUSR1); the state is saved and a rerun continues."""

    exit_code = 75
