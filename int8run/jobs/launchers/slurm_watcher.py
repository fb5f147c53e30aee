"""Waits for the Slurm jobs of a sweep: for the results that they write, and for the deaths that leave none.

`slurm_launcher.py` adds each job that it submitted. What Slurm knows of a job is asked by `slurm_queue.py`.
"""

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from int8run.jobs.base import WorkerDied
from int8run.jobs.futures import OutcomesFuture
from int8run.jobs.launchers.slurm_queue import describe_job_end, read_job_end, read_queue, run_program

log = logging.getLogger(__name__)
RESULT_POLL_S = 2.0  # how often the folder is searched for results
QUEUE_POLL_S = 20.0  # how often squeue is asked for jobs that are gone
# a file that was written on another machine may be seen later than the end of its job
RESULT_GRACE_S = 30.0
WARN_AFTER_S = 60.0  # that a job waits


@dataclass
class PendingJob:
    """A Slurm job that has not delivered its result. Times are of time.monotonic().

    Args:
        job: submitit's.
        submitted: when it was submitted.
        future: of its result.
        missing_since: when it was first missing in the queue.
        has_warned: that it waits in the queue.
    """

    job: Any
    submitted: float
    future: OutcomesFuture = field(default_factory=OutcomesFuture)
    missing_since: float | None = None
    has_warned: bool = False


class JobWatcher:
    """Looks after all Slurm jobs of a sweep in one thread.

    A result is a file; a death is a job that has left the queue without one.
    """

    def __init__(self) -> None:
        self.pending: dict[str, PendingJob] = {}
        self.num_accepted = 0  # by Slurm
        self.lock = threading.Lock()
        self.stop_event = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self.thread = threading.Thread(target=self.run, daemon=True, name="slurm")
        self.thread.start()

    def stop(self) -> None:
        """Cancel all jobs and end the thread."""
        self.stop_event.set()
        for entry in self.list_pending():
            self.cancel_job(entry)
        if self.thread is not None:
            self.thread.join()

    def list_pending(self) -> list[PendingJob]:
        """Return a copy, because other threads add and take jobs meanwhile."""
        return list(self.pending.values())

    def add_job(self, job: Any) -> PendingJob:
        """Wait for a job of submitit that Slurm has accepted."""
        entry = PendingJob(job, submitted=time.monotonic())
        with self.lock:
            self.pending[job.job_id] = entry
            self.num_accepted += 1
        return entry

    def cancel_job(self, entry: PendingJob) -> None:
        """End a Slurm job that has not delivered its result."""
        if self.take_job(entry):
            run_program("scancel", entry.job.job_id)
            entry.future.set_exception(WorkerDied("its Slurm job was ended by int8run"))

    def take_job(self, entry: PendingJob) -> bool:
        """Stop waiting for a job; whether the caller is the first to do so, and so is to set its future."""
        with self.lock:
            return self.pending.pop(entry.job.job_id, None) is not None

    def run(self) -> None:
        """What the thread does."""
        try:
            self.watch_jobs()
        except Exception as error:  # noqa: BLE001 - raised where the results are awaited, which would wait for ever
            for entry in self.list_pending():
                if self.take_job(entry):
                    entry.future.set_exception(error)

    def watch_jobs(self) -> None:
        """Until the watcher is stopped, search for results often, and look at the queue at times."""
        queue_checked = time.monotonic()
        while not self.stop_event.wait(RESULT_POLL_S):
            self.collect_results()
            now = time.monotonic()
            if self.pending and now - queue_checked >= QUEUE_POLL_S:
                queue_checked = now
                self.check_queue(now)

    def collect_results(self) -> None:
        """Deliver the results that have been written."""
        for entry in self.list_pending():
            if entry.job.paths.result_pickle.exists() and self.take_job(entry):
                deliver_result(entry)

    def check_queue(self, now: float) -> None:
        """Find jobs that wait, and jobs that left the queue without a result.

        Args:
            now: of time.monotonic().
        """
        # those that squeue may not know yet are left out
        entries = [entry for entry in self.list_pending() if now - entry.submitted >= QUEUE_POLL_S]
        queue = read_queue()
        if queue is None:  # Slurm does not answer at the moment; its jobs run on
            return
        for entry in entries:
            if entry.job.job_id in queue:
                entry.missing_since = None
                warn_waiting(entry, queue[entry.job.job_id], now)
            else:
                self.check_missing_job(entry, now)

    def check_missing_job(self, entry: PendingJob, now: float) -> None:
        """Report the death of a job that left the queue, unless its result may still arrive."""
        if entry.missing_since is None:
            entry.missing_since = now
        end = read_job_end(entry.job.job_id)
        may_have_result = end is None or end.state == "COMPLETED"
        if may_have_result and now - entry.missing_since < RESULT_GRACE_S:
            return
        if entry.job.paths.result_pickle.exists():
            return  # delivered at the next search
        if self.take_job(entry):
            entry.future.set_exception(WorkerDied(describe_job_end(entry.job, end)))


def warn_waiting(entry: PendingJob, reason: str, now: float) -> None:
    """Warn, once, that a job waits in the queue.

    Args:
        entry: the job.
        reason: why it waits; empty for a job that does not.
        now: of time.monotonic().
    """
    if not reason or entry.has_warned:
        return
    if now - entry.submitted >= WARN_AFTER_S:
        entry.has_warned = True
        log.warning("Slurm job %s waits: %s", entry.job.job_id, reason)


def deliver_result(entry: PendingJob) -> None:
    """Set the future of a Slurm job from the file that it wrote."""
    from submitit.core.utils import FailedJobError

    try:
        outcomes, error = entry.job.result()
    except FailedJobError as failure:
        # run_call returns the errors of a call: this process could not begin, for instance without int8run
        job_id, log_file = entry.job.job_id, entry.job.paths.stderr
        reason = find_last_line(str(failure))
        error = WorkerDied(f"Slurm job {job_id} could not begin: {reason}; its log: {log_file}")
    except Exception as unreadable:  # noqa: BLE001 - raised where the result is awaited
        error = unreadable
    if error is None:
        entry.future.set_result(outcomes)
    else:
        entry.future.set_exception(error)


def find_last_line(text: str) -> str:
    """Return the last line of the traceback in submitit's text about a failure, which is between dashes."""
    traceback = text.split("\n" + "-" * 22)[1]
    return traceback.strip().splitlines()[-1]
