"""What a sweep costs beside what it must do.

Its wall time over that of building each model once and generating, measured alone.

    python experiments/sweeps/overhead.py [OVERRIDE ...] [--rounds 3] [--only NAME]

Runs, in turn, `int8run -m OVERRIDES` and one process that builds the same models and draws the same images
and does nothing else: no metrics, no files, no MLflow, no report. Prints both medians and their ratio.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

OVERRIDES = ["lora=stack_a", "lora.strength=0,0.25,0.5,0.75,1", "outlier=none,convrot"]


def run_alone(overrides: list[str]) -> None:
    """Build each model once and let it draw what the jobs of the sweep draw."""
    from int8run.config.compose import compose_jobs, create_run_spec
    from int8run.generate.input_files import read_samples
    from int8run.lora.header_info import read_lora_headers
    from int8run.models.schedulers import set_scheduler
    from int8run.pipeline.build import build_model
    from int8run.pipeline.process_cache import get_or_build
    from int8run.report.console import Progress
    from int8run.tasks.image_writer import ImageWriter
    from int8run.tasks.run_generation import generate_all
    from int8run.tasks.run_inputs import RunInputs

    class NoFiles(ImageWriter):
        """Has the samples of a job and saves none of its images."""

        def write_sample(self, *_: object) -> None:
            pass

    _, configs = compose_jobs(overrides, multirun=True)
    specs = sorted((create_run_spec(config) for config in configs), key=lambda spec: spec.build_key)
    progress = Progress(enabled=False)
    for spec in specs:
        headers = read_lora_headers(spec.lora, spec.model.lora_base, None)
        samples = read_samples(spec.prompts, spec.seed, Path(tempfile.gettempdir()))
        writer = NoFiles(spec, samples, Path())
        create_model = partial(build_model, spec, samples[: spec.sampling.batch], headers, progress)
        built, _ = get_or_build(spec.build_key, create_model)
        set_scheduler(built.pipe, built.scheduler, spec.sampling)
        built.set_strengths(spec.lora.strengths, spec.lora.text_strengths)
        generate_all(spec, built, RunInputs(headers, writer, progress))


def time_command(command: list[str], folder: Path) -> float:
    """Seconds of a command, in a folder of its own."""
    folder.mkdir(parents=True)
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def list_commands(overrides: list[str], work: Path, only: list[str] | None) -> dict[str, list[str]]:
    """The ways to run the sweep, by name; `alone` comes first."""
    sweep = [sys.executable, "-m", "int8run.cli", "-m", *overrides]
    ways = {
        "new mlflow.db": sweep,
        "same mlflow.db": [*sweep, f"tracker.folder={work}"],  # made by the round before
        "tracker=none": [*sweep, "tracker=none"],
    }
    commands = {"alone": [sys.executable, str(Path(__file__).resolve()), *overrides, "--alone"]}
    for name, command in ways.items():
        if only is None or name in only:
            commands[name] = command
    return commands


def time_rounds(overrides: list[str], rounds: int, only: list[str] | None) -> dict[str, list[float]]:
    """Seconds of every round, by way to run. The ways take turns; a round before fills the caches."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        commands = list_commands(overrides, work, only)
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds + 1):
            for name, command in commands.items():
                taken = time_command(command, work / f"{number}-{name}")
                if number > 0:
                    seconds[name].append(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help=f"what to sweep over; default: {' '.join(OVERRIDES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help="of the ways to run, besides `alone`; repeatable")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    overrides = arguments.overrides or OVERRIDES
    if arguments.alone:
        run_alone(overrides)
        return
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    seconds = time_rounds(overrides, arguments.rounds, arguments.only)
    base = statistics.median(seconds["alone"])
    for name, times in seconds.items():
        median = statistics.median(times)
        shown = ", ".join(f"{one:.1f}" for one in times)
        print(f"{name:<20} {median:6.1f} s  {median / base:.2f} x  ({shown})")


if __name__ == "__main__":
    main()
