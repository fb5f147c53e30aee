"""The command line: YAML and overrides in, one checked RunSpec per job out.

Nothing heavy is imported before a job starts: `--help`, `--cfg job` and tab completion load hydra alone.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from int8run.config.error_messages import explain_error
from int8run.errors import ConfigError, Int8RunError
from int8run.utils.text import make_lines_visible

log = logging.getLogger(__name__)
HYDRA_MAIN = {"config_path": "pkg://int8run.conf", "config_name": "config", "version_base": "1.3"}
HYDRA_RAISES = "HYDRA_FULL_ERROR"
DEBUG_VARIABLES = ("INT8RUN_DEBUG", HYDRA_RAISES)
# switches of other programs: no telemetry, no advice in the output, no long waits
QUIET_VARIABLES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    # a server that is away costs seconds, not minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
HELP_FLAGS = {"--help", "-h"}
EXIT_INTERRUPTED = 130  # as shells have it for Ctrl-C
EXIT_SIGNAL = 128  # and, plus its number, for a signal
# what a batch system, a shell that closes or `kill` sends; a run ends in order, as after Ctrl-C
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """A signal asks this process to end."""

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


def main() -> None:
    """Run the command: one line per error, exit codes of `int8run.errors`, tracebacks on request."""
    arguments = sys.argv[1:]
    if "--version" in arguments:
        from int8run import __version__

        sys.stdout.write(f"int8run {__version__}\n")
        return
    is_debug = any(os.environ.get(name) for name in DEBUG_VARIABLES)
    # hydra prints its own report of an error and exits, unless this variable makes it raise
    hydra_raises = os.environ.get(HYDRA_RAISES)
    os.environ[HYDRA_RAISES] = "1"
    quiet_libraries()
    logging.raiseExceptions = is_debug  # else logging prints a traceback when the log file's disk is full
    try:
        if HELP_FLAGS & set(arguments):
            print_help(arguments)
            return
        with raise_on_signals():
            check_and_run()
    except Exception as error:
        message, exit_code = explain_error(error)
        if is_debug or message is None:
            raise
        sys.stderr.write(f"int8run: {make_lines_visible(message)}\n")
        sys.exit(exit_code)
    except KeyboardInterrupt as interrupt:
        is_sweep = bool({"-m", "--multirun"} & set(sys.argv))
        hint = "; the same command with resume=true goes on" if is_sweep else ""
        reason, exit_code = "interrupted", EXIT_INTERRUPTED
        if isinstance(interrupt, Terminated):
            reason, exit_code = str(interrupt), EXIT_SIGNAL + interrupt.number
        sys.stderr.write(f"int8run: {reason}{hint}\n")
        sys.exit(exit_code)
    finally:
        if hydra_raises is None:
            del os.environ[HYDRA_RAISES]
        else:
            os.environ[HYDRA_RAISES] = hydra_raises


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise Terminated where a signal would end the process at once, so that a run writes what it has.

    A signal that is ignored (`nohup`) or that a program around us handles stays as it is.
    """

    def end(number: int, frame: object) -> None:
        raise Terminated(number)

    is_main_thread = threading.current_thread() is threading.main_thread()
    caught = [
        number for number in ENDING_SIGNALS if is_main_thread and signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def print_help(arguments: Sequence[str]) -> None:
    """Print the page of help that the command line asks for: `--help`, or `--help GROUP`.

    Overrides and other flags on it are not looked at.
    """
    from int8run.config.help import render_help

    following = arguments[1 + next(n for n, argument in enumerate(arguments) if argument in HELP_FLAGS) :]
    topics = [argument for argument in following[:1] if not argument.startswith("-") and "=" not in argument]
    sys.stdout.write(render_help(topics[0] if topics else None))


def quiet_libraries() -> None:
    """Set QUIET_VARIABLES in the environment, except those that the user has set."""
    for name, value in QUIET_VARIABLES.items():
        os.environ.setdefault(name, value)


def check_and_run() -> None:
    """Parse the command line, and let hydra see int8run's own launchers and sweeper."""
    from hydra._internal.utils import get_args_parser

    from int8run.config.help import check_flags
    from int8run.config.prompt_argument import rewrite_negative_prompt, rewrite_prompt_arguments
    from int8run.config.renamed import rename_overrides, report_once

    # hydra reads the overrides there
    arguments = rewrite_prompt_arguments(rewrite_negative_prompt(sys.argv[1:]))
    check_flags(arguments)
    sys.argv = [sys.argv[0], *rename_overrides(arguments, report_once())]
    args = get_args_parser().parse_args()
    if args.experimental_rerun:
        raise ConfigError(
            "--experimental-rerun opens a pickled file, which can run code; "
            "give the settings on the command line"
        )
    if args.config_path:
        raise ConfigError(
            "--config-path would replace int8run's own settings; --config-dir FOLDER adds yours to them"
        )
    from int8run.config.compose import int8run_options
    from int8run.jobs.hydra_plugins import register_plugins

    register_plugins()
    with int8run_options():
        run_hydra(args)


def run_hydra(args: Any) -> None:
    """Compose and check every job first, then let hydra run them.

    Args:
        args: of the command line, as hydra parses them.
    """
    from hydra import main as hydra_main

    from int8run.config.compose import check_command, compose_jobs

    config_name = args.config_name or HYDRA_MAIN["config_name"]
    overrides = list(args.overrides)
    if args.hydra_help:  # hydra sets up its logging from the config even for its help
        compose_jobs(args.config_dir, config_name, overrides, args.multirun)
    starts_jobs = not (args.cfg or args.info or args.shell_completion or args.hydra_help)
    single = None
    if starts_jobs:
        single = check_command(args.config_dir, config_name, overrides, args.multirun, print_banner)
    if single is None:
        hydra_main(**HYDRA_MAIN)(run_job)()
        return
    with claim_output_folder(single, overrides):
        run_single(hydra_main)


@contextmanager
def claim_output_folder(single: Any, overrides: list[str]) -> Iterator[None]:
    """Take the output folder of a single run before hydra writes into it, and tell hydra its name.

    Args:
        single: the composed config and its RunSpec; a task without a record leaves no folder.
        overrides: of the command line.
    """
    from int8run.jobs.folders import RUN_SETTING, claim_run_folder, resolve_run_folder

    config, spec = single
    if not spec.task.recorded:
        yield
        return
    folder, setting = resolve_run_folder(config)
    with claim_run_folder(folder, setting, print_warning) as claimed:
        text = str(claimed).replace("\\", "\\\\").replace("'", "\\'")
        sys.argv = insert_override(sys.argv, overrides, f"{RUN_SETTING}='{text}'")
        yield


def insert_override(arguments: list[str], overrides: list[str], override: str) -> list[str]:
    """Add an override to a command line, behind those that it has; the last one of a key wins.

    Args:
        arguments: of the command.
        overrides: those among them that are overrides.
        override: to add.
    """
    position = len(arguments)
    if overrides:
        position -= arguments[::-1].index(overrides[-1])
    return [*arguments[:position], override, *arguments[position:]]


def print_warning(text: str) -> None:
    """Print a warning before logging is set up."""
    from rich.text import Text

    from int8run.report.console import make_plain, print_lines

    print_lines(Text.assemble(("Warning: ", "bold yellow"), make_plain(text)))


def run_single(hydra_main: Any) -> None:
    """Let hydra run the one job of the command line.

    Args:
        hydra_main: hydra's decorator.
    """
    from int8run.jobs.hydra_files import masked_hydra_files

    errors: list[Int8RunError] = []

    def run_single_job(config: Any) -> float | None:
        # raised after hydra has ended: it prints a line of its own for every error that passes through it
        try:
            return run_job(config)
        except Int8RunError as error:
            errors.append(error)
            return None

    with masked_hydra_files():
        hydra_main(**HYDRA_MAIN)(run_single_job)()
    if errors:
        raise errors[0]


def print_banner(jobs: int, choices: dict[str, str]) -> None:
    """Print the first line, before anything heavy is imported.

    Args:
        jobs: number of jobs.
        choices: group -> option; of a sweep the values given with commas.
    """
    from rich.text import Text

    from int8run import __version__
    from int8run.report.console import make_bold, make_plain, print_lines

    task = choices.get("task", "run")
    line = f" {task}"
    if jobs > 1:
        line += f", {jobs} jobs"
    if task == "run":
        groups = ["model", "outlier", "backend", "lora"]
        if choices.get("clip") != "keep":
            groups.append("clip")
        line += ": " + " ".join(f"{group}={choices[group]}" for group in groups if group in choices)
    print_lines(Text.assemble(make_bold(f"int8run {__version__}"), make_plain(line)))


def run_job(config: Any) -> float | None:
    """Run one job. Launchers call this in other processes, too.

    Args:
        config: composed; becomes the RunSpec.

    Returns:
        The value of the job for a sweeper.
    """
    from hydra.core.hydra_config import HydraConfig

    from int8run.config.compose import create_run_spec
    from int8run.jobs.execute import execute_job
    from int8run.jobs.job import make_job

    # again, because a worker's process begins here
    quiet_libraries()
    logging.raiseExceptions = bool(os.environ.get("INT8RUN_DEBUG"))
    hydra_config = HydraConfig.get()
    job = make_job(config, hydra_config, Path(hydra_config.runtime.output_dir))
    if job.sweep is not None:
        quiet_console()
    spec = create_run_spec(config)
    return execute_job(spec, job)


def quiet_console() -> None:
    """Let a sweep's job log to its file alone.

    The parent prints how each job ended, and at the end each warning once.
    """
    from rich.logging import RichHandler

    from int8run.report.console import ConsoleHandler

    for handler in logging.getLogger().handlers:
        if isinstance(handler, ConsoleHandler | RichHandler):
            handler.setLevel(logging.CRITICAL)


if __name__ == "__main__":
    main()
