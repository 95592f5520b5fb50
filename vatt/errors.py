"""Errors a user can fix: what is wrong, the thing by name, what to do next."""

import errno
import logging
import re
import time
from types import FrameType
from typing import Any

HIDDEN = "***"
# user:password@ before a host; the second form is a password with a slash, but not host:port/path
_USER = re.compile(
    r"(?<=://)(?:[^/\s?#\x22\x27]*@|[^/\s@:\x22\x27]*:(?!\d+(?:/|$))[^\s@\x22\x27]*@)"
)
_QUERY = re.compile(r"([?&;][^\s=&;?#]*=)([^\s&;#\x22\x27]+)")
_SECRET = re.compile(
    r"token|key|sig|secret|pass|pwd|pw=|auth|cred|session|jwt|access|policy|code|x-amz",
    re.IGNORECASE,
)


def redact(text: str, *, every_query: bool = False) -> str:
    """A text without the passwords and tokens of the addresses in it.

    With `every_query` no value of a query is kept, as in a setting that is only to be recognised.
    """
    if "://" not in text and "?" not in text:
        return text
    text = _USER.sub(f"{HIDDEN}@", text)
    return _QUERY.sub(
        lambda found: found[1] + HIDDEN if every_query or _SECRET.search(found[1]) else found[0],
        text,
    )


def redact_logs() -> None:
    """Redact every log line of this process, whichever library writes it."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            said = record.getMessage()
        except (TypeError, ValueError):  # logging reports it where it is written
            return record
        record.msg, record.args = redact(said), ()
        return record

    make_redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_redacted)


class VattError(Exception):
    """A problem with a remedy; `exit_code` is what the process ends with."""

    exit_code = 1

    def __init__(self, problem: str, *, hint: str | None = None) -> None:
        self.problem = redact(problem)
        self.hint = hint and redact(hint)
        super().__init__(self.problem)

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


class Interrupted(Stopped):
    """Asked to stop by Ctrl-C; the state is saved here, too."""

    exit_code = 130


REPEAT_SECONDS = 2.0  # queues signal every process: one signal may come by several ways
_stopped: list[float] = []  # when, in this process


def stop(signum: int, frame: FrameType | None) -> None:
    """Signal handler: what is on disk is complete at any moment, so it can stop anywhere."""
    if _stopped and time.monotonic() - _stopped[-1] < REPEAT_SECONDS:
        return
    _stopped.append(time.monotonic())
    raise Stopped("stopped by a signal", hint="run it again: it continues where it stopped")


BUG = 101  # exit code of a fault of our own
FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
FAILING = (errno.EIO, errno.ESTALE, errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def machine_error(error: OSError) -> MachineError | None:
    """A disk that is full, failing or may not be written, as such an error; else None."""
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
    if error.errno in FAILING:
        return MachineError(
            f"{error.strerror}: {place}",
            hint="repair what the system reports, then run it again: it continues",
        )
    return None
