"""Is the process that wrote this still alive? Named by machine, number and time of start."""

import json
import socket

import psutil

CLOCK_SECONDS = 2.0  # a start time is derived from the boot time, which may be corrected


def myself() -> str:
    """A name for this process that no other process ever has."""
    process = psutil.Process()
    return json.dumps([socket.gethostname(), process.pid, round(process.create_time(), 2)])


def is_dead(name: str) -> bool:
    """Whether the process so named is surely gone; of another machine's nothing is known."""
    try:
        host, pid, started = json.loads(name)
    except ValueError:
        return False
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(pid)
        return (
            process.status() == psutil.STATUS_ZOMBIE
            or abs(process.create_time() - started) > CLOCK_SECONDS
        )
    except psutil.NoSuchProcess:
        return True
