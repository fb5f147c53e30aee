"""The command line: YAML and overrides in, one checked RunSpec per job out.

Nothing heavy is imported before a job starts: `--help`, `--cfg job` and tab completion load hydra alone.
"""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8run.config.error_messages import explain_error
from int8run.errors import ConfigError, Int8RunError
from int8run.utils.text import make_lines_visible

if TYPE_CHECKING:
    from int8run.config.compose import SingleRun
    from int8run.config.run_spec import RunSpec

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
    "HF_HUB_VERBOSITY": "error",  # else each of its five retries is four lines
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
        is_sweep = bool({"-m", "--multirun", "task=search"} & set(sys.argv))
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

    Overrides and other flags on it are not looked at, except the folder with options of the user's.
    """
    from int8run.config.help import render_help

    flag = next(argument for argument in arguments if argument in HELP_FLAGS)
    following = arguments[arguments.index(flag) + 1 :]
    topic = None
    if following and not following[0].startswith("-") and "=" not in following[0]:
        topic = following[0]
    page = render_help(topic, find_config_dir(arguments))
    sys.stdout.write(make_lines_visible(page))


def find_config_dir(arguments: Sequence[str]) -> str | None:
    """The folder of `--config-dir`; None: the command line has none."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--config-dir", "-cd")
    try:
        known, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:  # the flag without a folder
        return None
    folder: str | None = known.config_dir
    return folder


def quiet_libraries() -> None:
    """Set QUIET_VARIABLES in the environment, except those that the user has set."""
    for name, value in QUIET_VARIABLES.items():
        os.environ.setdefault(name, value)


def check_and_run() -> None:
    """Parse the command line, and let hydra see int8run's own launchers and sweeper."""
    from hydra._internal.utils import get_args_parser

    from int8run.config.help import check_flags
    from int8run.config.plugins import add_plugin_options
    from int8run.config.prompt_argument import rewrite_negative_prompt, rewrite_prompt_arguments
    from int8run.config.recipe import insert_recipe
    from int8run.config.renamed import rename_overrides, report_once
    from int8run.config.unquoted_values import quote_keep_blocks

    arguments = rewrite_prompt_arguments(rewrite_negative_prompt(sys.argv[1:]))
    check_flags(arguments)
    arguments = insert_recipe(arguments, print_warning)
    arguments = quote_keep_blocks(arguments)
    arguments = add_plugin_options(rename_overrides(arguments, report_once()))
    args = get_args_parser().parse_intermixed_args(arguments)
    # hydra reads them there once more
    sys.argv = [sys.argv[0], *move_overrides_to_front(arguments, args.overrides)]
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


def move_overrides_to_front(arguments: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The arguments with all overrides first: hydra's parser takes those that stand together.

    Args:
        arguments: of the command line.
        overrides: those of them that are overrides, in their order.
    """
    flags = list(arguments)
    for override in overrides:
        flags.remove(override)
    return [*overrides, *flags]


def run_hydra(args: Any) -> None:
    """Compose and check every job first, then let hydra run them.

    Args:
        args: of the command line, as hydra parses them.
    """
    from hydra import main as hydra_main

    from int8run.config.compose import check_command, compose_jobs

    command = {
        "config_dir": args.config_dir,
        "config_name": args.config_name or HYDRA_MAIN["config_name"],
        "multirun": args.multirun,
    }
    if args.hydra_help:  # hydra sets up its logging from the config even for its help
        compose_jobs(args.overrides, **command)
    # --resolve belongs to --cfg, and alone hydra refuses it
    only_shows = args.cfg or args.info or args.shell_completion or args.hydra_help or args.resolve
    single = None if only_shows else check_command(args.overrides, announce=print_banner, **command)
    if single is None:
        hydra_main(**HYDRA_MAIN)(run_job)()
    else:
        run_single(single)


def run_single(single: "SingleRun") -> None:
    """Run the one job of the command line in the config that was composed for the check.

    Does what hydra does for a single run: sets up logging, makes the output folder and writes `.hydra/` into
    it. Hydra itself would compose twice more.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core import utils as hydra_utils
    from hydra.types import HydraContext, RunMode
    from omegaconf import read_write

    from int8run.jobs.hydra_files import masked_hydra_files

    config = single.config
    single.spec.task.check(single.spec)
    with claim_output_folder(single), masked_hydra_files():
        with read_write(config.hydra):
            if config.hydra.mode is None:
                config.hydra.mode = RunMode.RUN
                config.hydra.overrides.hydra.append("hydra.mode=RUN")
        hydra_utils.configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        outcome = hydra_utils.run_job(
            hydra_context=HydraContext(config_loader=single.loader, callbacks=Callbacks(config)),
            task_function=partial(run_job, spec=single.spec),
            config=config,
            job_dir_key="hydra.run.dir",
            job_subdir_key=None,
        )
    if outcome.status is hydra_utils.JobStatus.FAILED and isinstance(outcome._return_value, Int8RunError):
        raise outcome._return_value
    _ = outcome.return_value  # raises any other error, after a line of hydra's


@contextmanager
def claim_output_folder(single: "SingleRun") -> Iterator[None]:
    """Take the output folder of a single run before anything is written into it, and tell hydra its name.

    Args:
        single: a task without a record leaves no folder.
    """
    from hydra.core.override_parser.types import Quote, QuotedString
    from omegaconf import read_write

    from int8run.jobs.folders import RUN_SETTING, claim_run_folder, resolve_run_folder
    from int8run.jobs.resume import find_search_folder

    if not single.spec.task.recorded:
        yield
        return
    hydra_settings = single.config.hydra
    folder, setting = resolve_run_folder(single.config)
    goes_on = False
    if single.spec.task.makes_runs:
        place = find_search_folder(single.config, folder)
        folder, goes_on = place.path, place.goes_on
    with claim_run_folder(folder, setting, print_warning, goes_on=goes_on) as claimed:
        quoted = QuotedString(str(claimed), Quote.single).with_quotes()
        with read_write(hydra_settings):
            hydra_settings.run.dir = str(claimed)
            # .hydra/hydra.yaml shows it as an override
            hydra_settings.overrides.hydra.append(f"{RUN_SETTING}={quoted}")
        yield


def print_warning(text: str) -> None:
    """Print a warning before logging is set up."""
    from rich.text import Text

    from int8run.report.console import make_plain, print_lines

    print_lines(Text.assemble(("Warning: ", "bold yellow"), make_plain(text)))


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


def run_job(config: Any, spec: "RunSpec | None" = None) -> float | None:
    """Run one job. Launchers call this in other processes, too.

    Args:
        config: composed.
        spec: made from it; None: it is made here.

    Returns:
        The value of the job for a sweeper.
    """
    from hydra.core.hydra_config import HydraConfig

    from int8run.config.compose import create_run_spec
    from int8run.jobs.execute import execute_job
    from int8run.jobs.job import make_job, quiet_console

    # again, because a worker's process begins here
    quiet_libraries()
    logging.raiseExceptions = bool(os.environ.get("INT8RUN_DEBUG"))
    hydra_config = HydraConfig.get()
    job = make_job(config, hydra_config, Path(hydra_config.runtime.output_dir))
    if job.sweep is not None:
        quiet_console()
    return execute_job(spec or create_run_spec(config), job)


if __name__ == "__main__":
    main()
