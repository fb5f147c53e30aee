"""What goes wrong on purpose, with the real command on the tiny model.

    python experiments/faults/run.py [--only NAME ...] [--keep FOLDER]

Prints a line for every fault and ends with 1 when one of them lost, doubled or hid anything. The full disk
is a tmpfs, which only root can mount.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import broken_homes
import full_disks
import lost_trackers
import stopped_sweeps
from sandbox import LostError, Sandbox

Fault = Callable[[Sandbox], None]

FAULTS: Sequence[Fault] = (
    stopped_sweeps.killed_in_the_fourth_job,
    lost_trackers.server_is_started_again,
    lost_trackers.server_hangs,
    lost_trackers.server_never_comes,
    full_disks.image_too_large,
    full_disks.disk_full_to_the_last_byte,
    stopped_sweeps.interrupted,
    stopped_sweeps.interrupted_in_processes,
    stopped_sweeps.worker_killed,
    stopped_sweeps.terminated,
    broken_homes.kernel_build_is_killed,
    broken_homes.two_first_builds,
    broken_homes.home_is_read_only,
    broken_homes.home_is_absent,
    broken_homes.home_without_execution,
    lost_trackers.database_is_locked,
    stopped_sweeps.no_shared_memory,
)


def try_fault(fault: Fault, folder: Path) -> bool:
    """Let one thing go wrong in a new folder, and print a line; whether nothing was lost."""
    sandbox = Sandbox(folder)
    sandbox.folder.mkdir(parents=True)
    began = time.monotonic()
    try:
        fault(sandbox)
    except LostError as error:
        passed, line = False, f"FAIL  {error}"
    else:
        passed, line = True, f"PASS  {'; '.join(sandbox.findings)}"
    print(f"{fault.__name__:<28} {time.monotonic() - began:4.0f} s  {line}", flush=True)
    return passed


def parse_arguments() -> argparse.Namespace:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    names = [fault.__name__ for fault in FAULTS]
    parser.add_argument("--only", nargs="*", choices=names, help="these faults alone")
    parser.add_argument(
        "--keep", type=Path, help="a new folder for what the commands leave; else a temporary one"
    )
    return parser.parse_args()


def main() -> int:
    """Exit code 1 when a fault lost, doubled or hid anything."""
    arguments = parse_arguments()
    faults = FAULTS
    if arguments.only:
        faults = [fault for fault in FAULTS if fault.__name__ in arguments.only]
    # a shell's `&` ignores SIGINT, and every program that is started from here would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)

    with tempfile.TemporaryDirectory() as temporary:
        parent = (arguments.keep or Path(temporary)).absolute()
        results = [try_fault(fault, parent / fault.__name__) for fault in faults]
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
