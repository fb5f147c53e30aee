"""The command line: YAML and overrides in, one checked RunSpec per job out.

Nothing heavy is imported before a job starts: `--help`, `--cfg job` and tab completion load hydra alone.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

from int8run.config.error_messages import explain
from int8run.errors import ConfigError, Int8RunError

log = logging.getLogger(__name__)
HYDRA_MAIN = {"config_path": "pkg://int8run.conf", "config_name": "config", "version_base": "1.3"}
DEBUG_VARIABLES = ("INT8RUN_DEBUG", "HYDRA_FULL_ERROR")


def main() -> None:
    """Entry point of `int8run`. One line per error, exit codes of `int8run.errors`, tracebacks on request only."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        from int8run.config.help import help_page

        sys.stdout.write(help_page())
        return
    debug = any(os.environ.get(name) for name in DEBUG_VARIABLES)
    # hydra prints its own report and exits unless it is told to raise
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    quiet_libraries()
    logging.raiseExceptions = debug  # of a full disk, the log file is no news
    try:
        check_and_run()
    except Exception as error:
        message, code = explain(error)
        if debug or message is None:
            raise
        sys.stderr.write(f"int8run: {message}\n")
        sys.exit(code)
    except KeyboardInterrupt:
        going_on = (
            "; the same command with resume=true goes on" if {"-m", "--multirun"} & set(sys.argv) else ""
        )
        sys.stderr.write(f"int8run: interrupted{going_on}\n")
        sys.exit(130)
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def quiet_libraries() -> None:
    """Defaults for other programs' own switches, where the user set none: no telemetry, no advice in the output, no long waits."""
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DIFFUSERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_LOGGING_LEVEL", "CRITICAL"),
        # a server that is away costs seconds, not minutes
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"),
        ("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
    ):
        os.environ.setdefault(name, value)


def check_and_run() -> None:
    """Compose and check every job first, then let hydra run them."""
    from hydra._internal.utils import get_args_parser

    from int8run.config.renamed import rename_overrides, report_once

    sys.argv = [sys.argv[0], *rename_overrides(sys.argv[1:], report_once())]  # hydra reads them there
    args = get_args_parser().parse_args()
    if args.experimental_rerun:
        raise ConfigError(
            "--experimental-rerun opens a pickled file, which can run code; give the settings on the command line"
        )
    if args.config_path:
        raise ConfigError(
            "--config-path would replace int8run's own settings; --config-dir FOLDER adds yours to them"
        )
    from int8run.config.compose import own_options
    from int8run.jobs.hydra_plugins import register_plugins

    register_plugins()
    with own_options():
        run_hydra(args)


def run_hydra(args: Any) -> None:
    """Check, and hand over to hydra.

    Args:
        args: hydra's own, parsed.
    """
    from hydra import main as hydra_main

    from int8run.config.compose import check_all, compose_all

    config_name = args.config_name or HYDRA_MAIN["config_name"]
    starts_jobs = not (args.cfg or args.info or args.shell_completion or args.hydra_help)
    if args.hydra_help:  # hydra sets up its logging from the config even for its help
        compose_all(args.config_dir, config_name, list(args.overrides), args.multirun)
    if starts_jobs:
        check_all(args.config_dir, config_name, list(args.overrides), args.multirun, print_banner)
    if args.multirun or not starts_jobs:
        hydra_main(**HYDRA_MAIN)(run_job)()
        return
    failures: list[Int8RunError] = []

    def single(config: Any) -> float | None:
        # raised after hydra has gone: it prints a line of its own about every error that passes through it
        try:
            return run_job(config)
        except Int8RunError as error:
            failures.append(error)
            return None

    hydra_main(**HYDRA_MAIN)(single)()
    if failures:
        raise failures[0]


def print_banner(jobs: int, choices: dict[str, str]) -> None:
    """The first line, before anything heavy is imported."""
    from rich import get_console

    from int8run import __version__

    task = choices.get("task", "run")
    groups = ("model", "outlier", "backend", "lora", *(["clip"] if choices.get("clip") != "keep" else []))
    words = " ".join(f"{group}={choices[group]}" for group in groups if group in choices)
    many = f", {jobs} jobs" if jobs > 1 else ""
    said = f": {words}" if task == "run" else ""
    get_console().print(
        f"[bold]int8run {__version__}[/bold] {task}{many}{said}", highlight=False, soft_wrap=True
    )


def run_job(config: Any) -> float | None:
    """One job: the composed config becomes a RunSpec, and its task is executed. Launchers call this in other processes too."""
    from hydra.core.hydra_config import HydraConfig

    from int8run.config.compose import to_spec
    from int8run.jobs.execute import execute_job
    from int8run.jobs.job import make_job

    quiet_libraries()
    logging.raiseExceptions = bool(
        os.environ.get("INT8RUN_DEBUG")
    )  # of a full disk, the log file is no news; workers begin here
    hydra = HydraConfig.get()
    about = make_job(config, hydra, Path(hydra.runtime.output_dir))
    if about.sweep:
        quiet_console()
    spec = to_spec(config)
    return execute_job(spec, about)


def quiet_console() -> None:
    """A sweep's job writes to its log file alone: the parent says how each ended, and at the end each warning once."""
    from rich.logging import RichHandler

    for handler in logging.getLogger().handlers:
        if isinstance(handler, RichHandler):
            handler.setLevel(logging.CRITICAL)


if __name__ == "__main__":
    main()
