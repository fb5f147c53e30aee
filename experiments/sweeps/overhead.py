"""What a sweep costs beside what it must do.

Its wall time over that of building each model once and generating, measured alone.

    python experiments/sweeps/overhead.py [--rounds 3] [--only NAME ...]

Runs, in turn, `int8run -m WORDS` and one process that builds the same models and draws the same images
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

WORDS = ["lora=stack_a", "lora.strength=0,0.25,0.5,0.75,1", "outlier=none,convrot"]


def run_alone(words: list[str]) -> None:
    """Build each model once and let it draw what the jobs of the sweep draw."""
    from int8run.config.compose import compose_jobs, create_run_spec
    from int8run.generate.prompts import build_samples
    from int8run.lora.header_info import read_lora_headers
    from int8run.models.schedulers import set_scheduler
    from int8run.pipeline.build import build_model
    from int8run.pipeline.process_cache import get_or_build
    from int8run.report.console import Progress
    from int8run.tasks.image_writer import ImageWriter
    from int8run.tasks.run import generate_all

    class NoFiles(ImageWriter):
        """Has the samples of a job and saves none of its images."""

        def write_sample(self, *_: object) -> None:
            pass

    _, configs = compose_jobs(None, "config", words, multirun=True)
    specs = sorted((create_run_spec(config) for config in configs), key=lambda spec: spec.build_key)
    progress = Progress(False)
    for spec in specs:
        headers = read_lora_headers(spec.lora, spec.model.lora_base, None)
        samples = build_samples(spec.prompts.read(), spec.prompts.seeds_per_prompt, spec.seed)
        writer = NoFiles(spec, samples, Path())
        create_model = partial(build_model, spec, samples[: spec.sampling.batch], headers, progress)
        built, _ = get_or_build(spec.build_key, create_model)
        set_scheduler(built.pipe, built.scheduler, spec.sampling)
        built.set_strengths(spec.lora.strengths, spec.lora.text_strengths)
        generate_all(spec, built, spec.candidate, writer, progress)


def time_command(command: list[str], folder: Path) -> float:
    """Seconds of a command, in a folder of its own."""
    folder.mkdir(parents=True)
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", help="of the ways to run, besides `alone`")
    args = parser.parse_args()
    if args.alone:
        run_alone(WORDS)
        return
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory() as work:
        sweep = [sys.executable, "-m", "int8run.cli", "-m", *WORDS]
        ways = {
            "new mlflow.db": sweep,
            "same mlflow.db": [*sweep, f"tracker.folder={work}"],  # made by the round before
            "tracker=none": [*sweep, "tracker=none"],
        }
        commands = {"alone": [sys.executable, str(Path(__file__).resolve()), "--alone"]}
        commands |= {
            name: command for name, command in ways.items() if args.only is None or name in args.only
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(args.rounds + 1):  # the first fills the caches
            for name, command in commands.items():
                taken = time_command(command, Path(work) / f"{turn}-{name}")
                if turn:
                    seconds[name].append(taken)
    base = statistics.median(seconds["alone"])
    for name, times in seconds.items():
        shown = ", ".join(f"{t:.1f}" for t in times)
        print(
            f"{name:<20} {statistics.median(times):6.1f} s  {statistics.median(times) / base:.2f} x  "
            f"({shown})"
        )


if __name__ == "__main__":
    main()
