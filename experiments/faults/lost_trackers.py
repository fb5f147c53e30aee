"""Faults of MLflow: its server is away, hangs or never comes; its database is locked.

Each one is a function of a sandbox; `run.py` lists them.
"""

import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from checks import check_all_finished, check_tracked
from sandbox import SMALL, TEN_JOBS, THREE_JOBS, Sandbox, check_said, check_that

from int8run.tracking.run_record import FINISHED, find_records

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from support.servers import MlflowServer, free_port

AWAY_S = 20.0  # how long the server is away


def server_is_started_again(sandbox: Sandbox) -> None:
    """The MLflow server is killed in the middle of a sweep, and comes back after 20 s."""
    with MlflowServer(sandbox.folder) as server:

        def restart() -> None:
            server.__exit__()
            time.sleep(AWAY_S)
            server.__enter__()

        run_while_server_is_away(sandbox, server, restart)


def server_hangs(sandbox: Sandbox) -> None:
    """The MLflow server takes connections and says nothing for 20 s."""
    with MlflowServer(sandbox.folder) as server:

        def pause() -> None:
            os.killpg(server.process.pid, signal.SIGSTOP)
            time.sleep(AWAY_S)
            os.killpg(server.process.pid, signal.SIGCONT)

        run_while_server_is_away(sandbox, server, pause)


def run_while_server_is_away(
    sandbox: Sandbox, server: MlflowServer, stop_for_a_while: Callable[[], None]
) -> None:
    """A sweep of ten during which the server is away; all of it is in MLflow at the end."""
    finished_before = 3
    sweep = sandbox.start(*TEN_JOBS, tracking_uri=server.address)
    sandbox.wait_for_job(sweep, finished=finished_before)
    stop_for_a_while()
    n_meanwhile = sandbox.count_states()[FINISHED] - finished_before

    text = sandbox.wait(sweep, 0)

    check_all_finished(sandbox, 10)
    check_tracked(sandbox, server.address)
    check_that("viewStateShareKey" in text, "no link to the dashboard at the end")
    logs = [(job.folder / "int8run.log").read_text() for job in find_records(sandbox.sweep)]
    n_failed = sum(log.count("upload it later") for log in logs)
    sandbox.findings.append(f"{n_meanwhile} jobs ended meanwhile, {n_failed} of the uploads failed at first")


def server_never_comes(sandbox: Sandbox) -> None:
    """No server at the start nor later; `task=report sync=` when there is one."""
    text = sandbox.run(*THREE_JOBS, tracking_uri=f"http://127.0.0.1:{free_port()}")

    jobs = check_all_finished(sandbox, 3)
    check_that(not any(job.run_id for job in jobs), "a job has a run in MLflow")
    check_that((sandbox.sweep / "report.html").is_file(), "no report")
    warnings = [line for line in text.splitlines() if "does not answer" in line]
    check_that(
        1 <= len(warnings) <= 1 + len(jobs),
        f"it says {len(warnings)} times that nobody answers:\n" + "\n".join(warnings),
    )
    check_said(text, "task=report sync=")
    with MlflowServer(sandbox.folder) as server:
        for n_uploaded in (3, 0):  # the second time nothing is left to do
            text = sandbox.run("task=report", "sync=sweep", tracking_uri=server.address)
            check_said(text, f"{n_uploaded} of 3 runs uploaded")
        check_tracked(sandbox, server.address)
    sandbox.findings.append(f"said {len(warnings)} times in a sweep of 3")


def database_is_locked(sandbox: Sandbox) -> None:
    """Another program keeps mlflow.db for itself during the whole sweep."""
    sandbox.run("seed=9", *SMALL, "hydra.run.dir=run")  # makes the database
    with closing(sqlite3.connect(sandbox.folder / "mlflow.db")) as other_program:
        other_program.execute("begin immediate")
        began = time.monotonic()
        text = sandbox.run(*THREE_JOBS)
        seconds = time.monotonic() - began

    check_all_finished(sandbox, 3)
    check_said(text, "database is locked", "task=report sync=")
    text = sandbox.run("task=report", "sync=sweep")
    check_said(text, "3 of 3 runs uploaded")
    check_tracked(sandbox, sandbox.database)
    sandbox.findings.append(f"3 finished in {seconds:.0f} s, said; uploaded when it was free")
