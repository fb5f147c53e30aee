"""What Slurm says of its jobs: which ones wait, and how one ended. Asked with Slurm's own programs.

Called by `slurm_watcher.py`. It knows nothing of results and sweeps.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from int8run.jobs.futures import describe_exit_code

# what the user can do about, or should know of, a state of Slurm
STATE_HINTS = {
    "TIMEOUT": "; hydra.launcher.time_min allows more",
    "OUT_OF_MEMORY": "; hydra.launcher.mem_gb asks for more",
    "PREEMPTED": ": another job took its place",
    "NODE_FAIL": ": its machine is gone",
}


@dataclass(frozen=True)
class JobEnd:
    """What Slurm knows of a job that ended.

    Args:
        state: Slurm's word, such as TIMEOUT.
        exit_code: of the script; as a shell counts, above 128 where a signal ended it.
    """

    state: str
    exit_code: int


def read_queue() -> dict[str, str] | None:
    """Read the jobs of this user from Slurm's queue.

    Returns:
        Slurm job -> why it waits, an empty string for one that does not; None when Slurm does not answer.
    """
    text = run_program("squeue", "--me", "--noheader", "--format=%i|%T|%r")
    if text is None:
        return None
    reasons = {}
    for line in text.splitlines():
        if line.count("|") < 2:
            continue
        job_id, state, reason = line.strip().split("|", 2)
        reasons[job_id] = reason if state == "PENDING" else ""
    return reasons


def read_job_end(job_id: str) -> JobEnd | None:
    """Ask Slurm how a job ended; None where it has forgotten the job."""
    text = run_program("scontrol", "--oneliner", "show", "job", job_id) or ""
    state = re.search(r"\bJobState=(\w+)", text)
    exit_code = re.search(r"\bExitCode=(\d+):", text)
    # the controller forgets a job after minutes, the accounting does not
    if state is None and shutil.which("sacct"):
        options = ("--allocations", "--noheader", "--parsable2", "--format=State,ExitCode")
        text = run_program("sacct", *options, "--jobs", job_id) or ""
        state = re.match(r"(\w+)", text)
        exit_code = re.search(r"\|(\d+):", text)
    if state is None:
        return None
    if exit_code is None:
        return JobEnd(state[1], exit_code=0)
    return JobEnd(state[1], exit_code=int(exit_code[1]))


def describe_job_end(job: Any, end: JobEnd | None) -> str:
    """Say how a job ended that left no result.

    Args:
        job: submitit's.
        end: what Slurm says of it; None where Slurm has forgotten the job.
    """
    return f"Slurm job {job.job_id} ended without a result: {explain_end(end)}; its log: {job.paths.stderr}"


def explain_end(end: JobEnd | None) -> str:
    """Say what happened to a job, and what can be done about it; see `describe_job_end`."""
    if end is None:
        return "gone from the queue"
    if end.state in STATE_HINTS:
        return f"{end.state}{STATE_HINTS[end.state]}"
    if end.exit_code > 128:
        return f"{end.state}: {describe_exit_code(128 - end.exit_code)}"
    return end.state


def run_program(*command: str) -> str | None:
    """Return what a program of Slurm prints; None when it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else None
