"""What a job costs when there were many before it, in the same process.

    python experiments/faults/many.py jobs 1000         # one sweep
    python experiments/faults/many.py runs 200          # one command after the other
    python experiments/faults/many.py runs 200 --minutes 60   # as many of them as an hour is enough for
    python experiments/faults/many.py jobs 100 tracker=mlflow
    python experiments/faults/many.py jobs 1000 --empty   # jobs that do nothing: what is around them alone

Prints Python's objects, the memory of the process, open files, threads and the time of a job, for tenths of
them. Ends with 1 when objects, files or threads grow: more than OBJECTS_PER_JOB for each job of the second
half.
"""

import argparse
import gc
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from hydra.core.global_hydra import GlobalHydra

from int8run import cli
from int8run.errors import FileError
from int8run.jobs import worker
from int8run.tasks import run as run_task

OBJECTS_PER_JOB = 400  # a sweep keeps the settings and the outcome of each job until its end
TENTHS = 10
SETTINGS = (
    "sampler.steps=1",
    "sampler.width=16",
    "sampler.height=16",
    "prompts.prompts=[fox]",
    "metrics.baseline=none",
    "metrics.system_s=0",
    "backend=reference",
    "progress=false",
    "cache.folder=cache",
)


@dataclass(frozen=True)
class Sample:
    """The process after a job."""

    seconds: float  # when, of time.perf_counter()
    objects: int
    resident_bytes: int
    open_files: int
    threads: int


def take_sample() -> Sample:
    """Look at this process, without the garbage."""
    gc.collect()
    process = psutil.Process()
    return Sample(
        time.perf_counter(),
        len(gc.get_objects()),
        process.memory_info().rss,
        process.num_fds(),
        process.num_threads(),
    )


@contextmanager
def sample_each_job(samples: list[Sample]) -> Iterator[None]:
    """Take a sample after each job of a sweep."""
    run_job = worker.run_sweep_job

    def run_and_sample(*arguments: object) -> object:
        outcome = run_job(*arguments)
        samples.append(take_sample())
        return outcome

    worker.run_sweep_job = run_and_sample
    try:
        yield
    finally:
        worker.run_sweep_job = run_job


@contextmanager
def do_nothing_in_jobs() -> Iterator[None]:
    """Let each job end before a model is built, as one does whose file is missing."""
    run = run_task.run

    def end(*arguments: object) -> object:
        raise FileError("there is nothing to do")

    run_task.run = end
    try:
        with suppress(SystemExit):
            yield
    finally:
        run_task.run = run


def run_command(arguments: Sequence[str]) -> None:
    """Run the command in this process; raises SystemExit where it fails."""
    GlobalHydra.instance().clear()
    sys.argv = ["int8run", *arguments]
    cli.main()


def sample_jobs(samples: list[Sample], count: int, settings: Sequence[str]) -> None:
    """One sweep of so many jobs; a sample after each."""
    with sample_each_job(samples):
        run_command(["-m", f"seed=range({count})", *settings, "hydra.sweep.dir=sweep"])


def sample_runs(samples: list[Sample], count: int, settings: Sequence[str], *, minutes: float) -> None:
    """So many runs, one command after the other, of which none begins later; a sample after each."""
    end = time.perf_counter() + 60 * minutes
    for number in range(count):
        if time.perf_counter() > end:
            print(f"{number} of {count} runs in {minutes:g} minutes")
            return
        run_command([f"seed={number}", *settings, f"hydra.run.dir=runs/{number}"])
        samples.append(take_sample())


def count_growth(samples: Sequence[Sample]) -> float:
    """Objects that a job of the second half leaves behind, in the median of what each leaves."""
    half = samples[len(samples) // 2 :]
    return statistics.median(after.objects - before.objects for before, after in itertools.pairwise(half))


def print_table(samples: Sequence[Sample]) -> None:
    """A line for each tenth."""
    print(f"{'after':>6} {'objects':>9} {'memory, MB':>11} {'files':>6} {'threads':>8} {'s per job':>10}")
    step = max(1, len(samples) // TENTHS)
    for end in range(step, len(samples), step):
        before, last = samples[end - step], samples[end]
        seconds = (last.seconds - before.seconds) / step
        print(
            f"{end + 1:>6} {last.objects:>9} {last.resident_bytes / 1e6:>11.1f} {last.open_files:>6} "
            f"{last.threads:>8} {seconds:>10.3f}",
            flush=True,
        )


def main() -> int:
    """Exit code 1 when a job leaves more behind than what the sweep keeps of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("jobs", "runs"))
    parser.add_argument("count", type=int)
    parser.add_argument("settings", nargs="*", help="further settings; without a tracker unless one is named")
    parser.add_argument("--minutes", type=float, default=math.inf, help="with runs: when the last one begins")
    parser.add_argument("--empty", action="store_true", help="with jobs: each ends before a model is built")
    arguments = parser.parse_args()
    settings = ["tracker=none", *SETTINGS, *arguments.settings]
    if any(word.startswith("tracker=") for word in arguments.settings):
        settings = settings[1:]
    home = Path.cwd()
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with do_nothing_in_jobs() if arguments.empty else nullcontext():
                if arguments.kind == "jobs":
                    sample_jobs(samples, arguments.count, settings)
                else:
                    sample_runs(samples, arguments.count, settings, minutes=arguments.minutes)
        finally:
            os.chdir(home)
    print_table(samples)
    growth = count_growth(samples)
    half = samples[len(samples) // 2 :]
    leaks = half[-1].open_files - half[0].open_files, half[-1].threads - half[0].threads
    print(f"objects per job: {growth:g}; files and threads more at the end than half way: {leaks}")
    return int(growth > OBJECTS_PER_JOB or max(leaks) > 2)


if __name__ == "__main__":
    sys.exit(main())
