"""Faults of processes: a sweep or one of its workers is killed, interrupted or terminated.

Each one is a function of a sandbox; `run.py` lists them.
"""

import os
import signal
import subprocess
import time

import psutil
from checks import check_all_finished, check_states, check_tracked, find_processes, find_runs
from mlflow import MlflowClient
from mounts import require_root
from sandbox import TEN_JOBS, THREE_JOBS, TWO_PROCESSES, Sandbox, check_said, check_that

from int8run.tracking.process_identity import is_process_gone
from int8run.tracking.run_record import FINISHED, KILLED, RUNNING, find_records, read_record

WORKERS_END_S = 2.0  # how long worker processes may outlive their sweep


def killed_in_the_fourth_job(sandbox: Sandbox) -> None:
    """kill -9 in the middle of job 4 of 10; then the same with resume=true."""
    store = sandbox.database
    sweep = sandbox.start(*TEN_JOBS)
    victim = sandbox.wait_for_job(sweep, finished=3)
    sweep.kill()
    sweep.wait()
    started_before = {job.number: job.started for job in find_records(sandbox.sweep)}
    check_that(read_record(victim.folder).state == KILLED, "the job had ended when it was killed: try again")
    (dead_run,) = (run for run in find_runs(store, str(victim.sweep)) if run.info.status == RUNNING)

    text = sandbox.run(*TEN_JOBS, "resume=true")

    check_said(text, "3 of 10 jobs are finished already")
    jobs = check_all_finished(sandbox, 10)
    again = []
    for job in jobs:
        if job.number in started_before and job.started != started_before[job.number]:
            again.append(job.number)
    check_that(again == [victim.number], f"these ran twice: {again}")
    check_tracked(sandbox, store, killed=1)
    dead_run = MlflowClient(store).get_run(dead_run.info.run_id)
    check_that(dead_run.info.status == KILLED, f"the dead run is {dead_run.info.status}")
    check_said(dead_run.data.tags["error"], "without an error message")
    sandbox.findings.insert(0, f"3 finished before, job {victim.number} killed, 7 after")


def interrupted(sandbox: Sandbox) -> None:
    """Ctrl-C in the third of ten jobs; then resume=true."""
    interrupt_and_resume(sandbox)


def interrupted_in_processes(sandbox: Sandbox) -> None:
    """Ctrl-C while two processes work; then resume=true."""
    interrupt_and_resume(sandbox, *TWO_PROCESSES)


def interrupt_and_resume(sandbox: Sandbox, *overrides: str) -> None:
    """Ctrl-C as a terminal sends it: the signal reaches every process of the sweep."""
    sweep = sandbox.start(*TEN_JOBS, *overrides, own_session=True)
    sandbox.wait_for_job(sweep, finished=2)
    os.killpg(sweep.pid, signal.SIGINT)
    check_stopped_and_resume(sandbox, sweep, 130, "interrupted", *overrides)


def terminated(sandbox: Sandbox) -> None:
    """SIGTERM to the sweep's own process alone, as batch systems and `kill` send it."""
    sweep = sandbox.start(*TEN_JOBS)
    sandbox.wait_for_job(sweep, finished=2)
    sweep.send_signal(signal.SIGTERM)
    check_stopped_and_resume(sandbox, sweep, 143, "ended by SIGTERM")


def check_stopped_and_resume(
    sandbox: Sandbox, sweep: "subprocess.Popen[bytes]", exit_code: int, reason: str, *overrides: str
) -> None:
    """A sweep that got a signal ends in order, and goes on later."""
    text = sandbox.wait(sweep, exit_code)
    check_said(text, f"int8run: {reason}; the same command with resume=true goes on")
    time.sleep(WORKERS_END_S)
    left = find_processes(sandbox)
    check_that(not left, f"processes are left: {left}")
    states = sandbox.count_states()
    check_that(states[KILLED] >= 1 and states[FINISHED] >= 2, str(states))
    check_that(set(states) == {KILLED, FINISHED}, str(states))

    sandbox.run(*TEN_JOBS, *overrides, "resume=true")

    check_all_finished(sandbox, 10)
    check_tracked(sandbox, sandbox.database, killed=states[KILLED])


def worker_killed(sandbox: Sandbox) -> None:
    """kill -9 to one of two worker processes."""
    sweep = sandbox.start(*TEN_JOBS, *TWO_PROCESSES)
    victim = sandbox.wait_for_job(sweep, finished=2)
    psutil.Process(victim.status["pid"]).kill()

    text = sandbox.wait(sweep, 1)

    check_said(
        text,
        f"job {victim.number} ({victim.name}) KILLED: its process was killed by signal 9 (SIGKILL)",
        "1 of 10 jobs did not finish",
    )
    states = dict.fromkeys(range(10), FINISHED)
    states[victim.number] = KILLED
    check_states(sandbox, states)
    check_tracked(sandbox, sandbox.database)
    host, pid, started = (victim.status[key] for key in ("host", "pid", "process_started"))
    check_that(is_process_gone(host, pid, started), "the worker lives")


def no_shared_memory(sandbox: Sandbox) -> None:
    """/dev/shm takes nothing, as in some containers; two worker processes."""
    require_root("mount over /dev/shm")
    script = 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"'
    sandbox.command_prefix = ["unshare", "--mount", "sh", "-c", script, "sh"]

    text = sandbox.run(*THREE_JOBS, *TWO_PROCESSES, exit_code=4)

    check_said(text, "joblib needs shared memory")
    sandbox.run(*THREE_JOBS)
    check_all_finished(sandbox, 3)
    sandbox.findings.append("joblib is refused with exit code 4; without it 3 finished")
