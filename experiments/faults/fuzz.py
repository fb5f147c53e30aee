"""Damaged inputs for every reader, for as long as one likes.

    python experiments/faults/fuzz.py --minutes 60 --seed 1
    python experiments/faults/fuzz.py --reader lora --seed 1 --only 5982    # one input again

Each input must be refused in one line or read as an independent reader reads it (`tests/fuzzing`). Prints
what was neither, what took more than two seconds, and a table; ends with 1 when there was any. One that does
not come back within a minute is a hang, and ends the run with its place in the code.
"""

import argparse
import faulthandler
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from fuzzing.rule import CRASH, READERS, REFUSED, RIGHT, SILENT, try_input

SLOW_S = 2.0  # of processor time
HANG_S = 60  # until the run is ended
SLOW = "over 2 s"
Counts = Counter[tuple[str, str]]  # (reader, column of the table) -> inputs


def try_and_report(name: str, seed: int, number: int, folder: Path, counts: Counts) -> None:
    """Try one input and count it; what must not be is printed."""
    faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__)
    outcome = try_input(name, seed, number, folder)
    faulthandler.cancel_dump_traceback_later()
    counts[name, outcome.kind] += 1
    if outcome.detail:
        print(f"{name}, seed {seed}, input {number}: {outcome.kind}\n{outcome.detail}", flush=True)
    if outcome.cpu_s > SLOW_S:
        counts[name, SLOW] += 1
        print(f"{name}, seed {seed}, input {number}: took {outcome.cpu_s:.1f} s", flush=True)


def try_until(end: float, names: Sequence[str], seed: int, folder: Path, counts: Counts) -> None:
    """Try rounds of a thousand inputs, of each reader its share, until a time of the monotonic clock."""
    number_of_round = 0
    while number_of_round == 0 or time.monotonic() < end:
        for name in names:
            share = READERS[name].share
            for number in range(number_of_round * share, (number_of_round + 1) * share):
                try_and_report(name, seed, number, folder, counts)
        number_of_round += 1


def print_table(names: Sequence[str], counts: Counts) -> None:
    """What came of the inputs of each reader."""
    columns = (REFUSED, RIGHT, SLOW, CRASH, SILENT)
    print("| reader | inputs |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 2) + "|")
    for name in names:
        inputs = sum(counts[name, column] for column in columns if column != SLOW)
        print(f"| {name} | {inputs} |", " | ".join(str(counts[name, column]) for column in columns), "|")


def parse_arguments() -> argparse.Namespace:
    """The words of the command line."""
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1, help="0 is that of the tests")
    parser.add_argument("--reader", choices=[*READERS], help="only this one")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one input of --reader, again")
    arguments = parser.parse_args()
    if arguments.only is not None and arguments.reader is None:
        parser.error("--only needs --reader")
    return arguments


def main() -> int:
    """Try inputs until the time is over."""
    arguments = parse_arguments()
    logging.disable(logging.CRITICAL)  # the readers' warnings
    torch.set_num_threads(1)
    names = [arguments.reader] if arguments.reader else [*READERS]
    end = time.monotonic() + 60 * arguments.minutes
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try_input(name, 0, 0, Path(folder))  # the first one imports libraries, which takes seconds
        if arguments.only is None:
            try_until(end, names, arguments.seed, Path(folder), counts)
        else:
            try_and_report(arguments.reader, arguments.seed, arguments.only, Path(folder), counts)
    print_table(names, counts)
    return int(any(counts[name, column] for name in names for column in (SLOW, CRASH, SILENT)))


if __name__ == "__main__":
    sys.exit(main())
