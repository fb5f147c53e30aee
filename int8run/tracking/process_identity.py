"""Which process runs a job, and whether it is still there: a job that was killed looks like one that runs.

The record of a job and the tracker keep these facts; others read them, on this machine or on another one.
"""

import os
import socket
from pathlib import Path
from typing import Any

import psutil

BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")  # another one after each start of the machine
MAX_CLOCK_ERROR_S = 1.0  # two starts of one number that are further apart are those of two processes


def describe_process() -> dict[str, Any]:
    """This process, so that others can tell whether it is still running."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": process.create_time(),
        "process_since_boot": describe_start(process),
    }


def describe_start(process: psutil.Process) -> str:
    """When a process started: the boot of the machine, and the seconds since then.

    The Unix time of a start moves when the clock is set, and a process that runs would seem to be another.
    """
    try:
        boot = BOOT_ID_FILE.read_text(encoding="utf-8").strip()
    except OSError:
        boot = "-"  # another system than Linux
    return f"{boot} {process.create_time() - psutil.boot_time():.2f}"


def is_process_gone(host: str, pid: int, started: float, since_boot: str | None = None) -> bool:
    """Whether a process has ended; False for one of another machine, about which nothing is known.

    Args:
        host: its machine.
        pid: its number.
        started: when it started, as Unix time in seconds: the number may belong to another process by now.
        since_boot: the same from `describe_start`, which is believed instead; None: of an earlier int8run.
    """
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(pid)
        if since_boot is None:
            return abs(process.create_time() - started) > MAX_CLOCK_ERROR_S
        return not is_same_start(describe_start(process), since_boot)
    except psutil.NoSuchProcess:
        return True


def is_same_start(start: str, earlier_start: str) -> bool:
    """Whether two texts of `describe_start` are of one process."""
    boot, _, seconds = start.rpartition(" ")
    earlier_boot, _, earlier_seconds = earlier_start.rpartition(" ")
    return boot == earlier_boot and abs(float(seconds) - float(earlier_seconds)) <= MAX_CLOCK_ERROR_S
