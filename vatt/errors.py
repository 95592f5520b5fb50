"""Errors a user can fix: what is wrong, the thing by name, what to do next."""

import errno


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


FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def machine_error(error: OSError) -> MachineError | None:
    """A full disk or a place that may not be written or read, as such an error; else None."""
    place = error.filename or "a file"
    if error.errno in FULL:
        return MachineError(
            f"the disk is full: {place}",
            hint="free some space, then run it again: it continues where it stopped",
        )
    if error.errno in READ_ONLY:
        return MachineError(
            f"no permission: {place}: {error.strerror}",
            hint="change the permissions, or name another place in `paths` of params.yaml",
        )
    return None
