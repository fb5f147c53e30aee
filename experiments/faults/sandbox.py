"""The folder in which one fault happens, and the real command in it.

Used by every fault of this folder. It starts commands, waits for them, and reads the jobs they left; what
must be in those jobs is checked by `checks.py`.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from int8run.tracking.run_record import FINISHED, RUNNING, Record, find_records

# sweeps of the tiny model: two steps and one prompt for each job
SMALL = ("sampler.steps=2", "prompts.prompts=[fox]")
TEN_JOBS = ("-m", "lora=stack_a", "lora.strength=0,0.25,0.5,0.75,1", "outlier=none,convrot", *SMALL)
THREE_JOBS = ("-m", "seed=0,1,2", *SMALL)
TWO_PROCESSES = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")

COMMAND_LIMIT_S = 900.0  # for one command, on a machine that is busy
POLL_S = 0.02
LAST_CHARACTERS = 1500  # of what a command printed, in the message of a fault


class LostError(Exception):
    """Something is missing, doubled or not said."""


def check_that(holds: bool, message: str) -> None:
    """Raise LostError with a message unless something is as it must be."""
    if not holds:
        raise LostError(message)


def check_said(text: str, *phrases: str) -> None:
    """What a command printed holds each of these phrases."""
    missing = [phrase for phrase in phrases if phrase not in text]
    check_that(not missing, f"it does not say {missing}: {text[-LAST_CHARACTERS:]}")


@dataclass
class Sandbox:
    """A folder in which one fault happens.

    Args:
        folder: the commands run in it.
        findings: what was counted, for the line that is printed.
        environment: variables that commands get besides those of this process.
        command_prefix: a command that runs the command, such as `unshare`.
    """

    folder: Path
    findings: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    command_prefix: list[str] = field(default_factory=list)

    @property
    def sweep(self) -> Path:
        """The sweep's folder."""
        return self.folder / "sweep"

    @property
    def database(self) -> str:
        """MLflow's SQLite store in this folder, as an address."""
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def start(
        self, *overrides: str, tracking_uri: str | None = None, own_session: bool = False
    ) -> "subprocess.Popen[bytes]":
        """Start the command; what it prints goes to log.txt.

        Args:
            overrides: the words of the command line.
            tracking_uri: the address of an MLflow server; None: a database in this folder.
            own_session: give the command and its children a process group of their own, which one signal
                reaches.
        """
        command = [*self.command_prefix, sys.executable, "-m", "int8run.cli", *overrides]
        if "-m" in overrides:
            command.append("hydra.sweep.dir=sweep")
        command.append("cache.folder=cache")

        with (self.folder / "log.txt").open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._make_environment(tracking_uri),
                stdout=log,
                stderr=log,
                start_new_session=own_session,
            )

    def _make_environment(self, tracking_uri: str | None) -> dict[str, str]:
        environment = dict(os.environ)
        environment.pop("MLFLOW_TRACKING_URI", None)
        environment["COLUMNS"] = "400"
        environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
        if tracking_uri is not None:
            environment["MLFLOW_TRACKING_URI"] = tracking_uri
        return environment | self.environment

    def run(self, *overrides: str, tracking_uri: str | None = None, exit_code: int = 0) -> str:
        """Run the command from start to end, and return what it printed."""
        return self.wait(self.start(*overrides, tracking_uri=tracking_uri), exit_code)

    def wait(self, process: "subprocess.Popen[bytes]", exit_code: int) -> str:
        """Wait for a command, which must end with this code and without a traceback.

        Returns:
            what it printed.
        """
        found = process.wait(COMMAND_LIMIT_S)
        text = self.read_log()
        check_that(found == exit_code, f"exit code {found} in place of {exit_code}: {self.read_log_end()}")
        check_that("Traceback" not in text, f"a traceback: {text[-2 * LAST_CHARACTERS :]}")
        return text

    def read_log(self) -> str:
        """What the last command printed so far."""
        return (self.folder / "log.txt").read_text(errors="replace")

    def read_log_end(self) -> str:
        """The last lines of that."""
        return self.read_log()[-LAST_CHARACTERS:]

    def find_jobs(self) -> list[Record]:
        """The jobs that there are."""
        if not self.sweep.is_dir():
            return []
        return find_records(self.sweep)

    def count_states(self) -> Counter[str]:
        """How many jobs are in each state."""
        return Counter(job.state for job in self.find_jobs())

    def wait_for_job(self, process: "subprocess.Popen[bytes]", finished: int) -> Record:
        """Wait until so many jobs are finished and one more runs, which MLflow knows, too.

        Returns:
            the job that runs.
        """
        end = time.monotonic() + COMMAND_LIMIT_S
        while time.monotonic() < end:
            jobs = self.find_jobs()
            n_finished = sum(job.state == FINISHED for job in jobs)
            running = [job for job in jobs if job.state == RUNNING and job.run_id]
            if n_finished >= finished and running:
                return running[0]
            check_that(process.poll() is None, f"the command ended before: {self.read_log_end()}")
            time.sleep(POLL_S)
        raise LostError(f"no job came up: {self.read_log_end()}")

    def wait_for_file(self, process: "subprocess.Popen[bytes]", file: Path) -> None:
        """Wait until a command that still runs has made a file."""
        end = time.monotonic() + COMMAND_LIMIT_S
        while not file.exists() and time.monotonic() < end:
            check_that(process.poll() is None, f"the command ended before: {self.read_log_end()}")
            time.sleep(POLL_S)
