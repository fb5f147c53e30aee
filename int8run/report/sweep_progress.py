"""What a sweep shows while it runs: a line for every job that ends, the time left and the highest so far."""

import logging
import math
import textwrap
import time
from collections.abc import Sequence

from rich.text import Text

from int8run.metrics.base import MORE, NEITHER
from int8run.metrics.names import HIGH, LOW, METRICS, UNKNOWN
from int8run.report.console import is_interactive, make_bold, make_plain, print_lines
from int8run.report.difference_text import format_interval
from int8run.report.formatting import format_decibels, format_duration
from int8run.tracking.run_record import FINISHED, Record
from int8run.tracking.setting_names import shorten_value

log = logging.getLogger(__name__)

MAX_ERROR_LENGTH = 100  # of a job's error while the sweep continues; the end of the sweep shows it whole
METRIC_NAMES = {"quality/psnr_db": "PSNR"}


class SweepProgress:
    """Reports the jobs of a sweep, in the process that started it.

    Args:
        total: number of jobs of the sweep.
        finished: of jobs that an earlier sweep has finished.
        objective: the metric that the best job is chosen by; None where jobs differ in what their images
            show alone, so that none is better.
        enabled: whether to show anything.
    """

    def __init__(self, total: int, finished: Sequence[Record], objective: str | None, *, enabled: bool):
        self.total = total
        self.num_ended = len(finished)
        self.num_ran = 0  # in this process and its workers
        self.objective = objective
        self.enabled = enabled
        self.started_at = time.monotonic()
        self.best: Record | None = None
        for record in finished:
            self.best = choose_better(self.best, record, objective)

    def report_start(self, number: int, name: str) -> None:
        """Name a job above its own bars; elsewhere than on a terminal it has none."""
        if self.enabled and is_interactive():
            print_lines(Text.assemble(make_bold(f"Job {number}"), make_plain(f" {shorten_value(name)} …")))

    def report_end(self, record: Record) -> None:
        """Tell how a job ended, how much is left, and which job has the best number so far."""
        self.num_ran += 1
        self.num_ended += 1
        self.best = choose_better(self.best, record, self.objective)
        if not self.enabled:
            return

        outcome = f"Job {record.number} ({shorten_value(record.name)}): {describe_outcome(record)}"
        line = " · ".join([outcome, self.describe_remaining(), *self.describe_best()])
        if is_interactive():
            print_lines(line)
        elif record.state == FINISHED:
            log.info("%s", line)
        else:
            log.error("%s", line)

    def describe_remaining(self) -> str:
        """`2 of 4 done, 1:00 elapsed, about 2:00 left`."""
        elapsed = time.monotonic() - self.started_at
        text = f"{self.num_ended} of {self.total} done, {format_duration(elapsed)} elapsed"
        if self.num_ended < self.total:
            left = elapsed / self.num_ran * (self.total - self.num_ended)
            text += f", about {format_duration(left)} left"
        return text

    def describe_best(self) -> list[str]:
        """The highest number so far and whose it is, once there are two jobs.

        It is no verdict: whether samples tell the jobs apart is said at the end of the sweep.
        """
        if self.best is None or self.objective is None or self.num_ended < 2:
            return []
        name = METRIC_NAMES.get(self.objective, self.objective)
        value = format_metric(self.best, self.objective)
        extreme = "highest" if METRICS[self.objective].direction == MORE else "lowest"
        return [f"{extreme} {name} so far {value}: {shorten_value(self.best.label)}"]


def describe_outcome(record: Record) -> str:
    """How a job ended: its main metrics, or its error."""
    if record.state != FINISHED:
        return textwrap.shorten(f"{record.state}: {record.error}", MAX_ERROR_LENGTH, placeholder=" …")
    metrics = record.metrics
    phrases = []
    if "quality/psnr_db" in metrics:
        phrases.append(f"PSNR {format_decibels(metrics['quality/psnr_db'])}")
    if "speed/ratio_vs_float" in metrics:
        phrases.append(f"{metrics['speed/ratio_vs_float']:.2f}× float's speed")
    if "speed/step_ms_p50" in metrics:
        phrases.append(f"{metrics['speed/step_ms_p50']:.1f} ms per step")
    return ", ".join(phrases) or "finished"


def format_metric(record: Record, name: str) -> str:
    """One metric of a job as text, with its interval where it has one: `55.1 dB [54.0, 56.2]`."""
    value = record.metrics[name]
    low, high = record.metrics.get(f"{name}{LOW}"), record.metrics.get(f"{name}{HIGH}")
    is_decibel = name.endswith("_db")
    text = format_decibels(value) if is_decibel else f"{value:.4g}"
    if low is None or high is None:
        return text
    if is_decibel:
        return f"{text} {format_interval(low, high, 1)}"
    return f"{text} [{low:.4g}, {high:.4g}]"


def choose_better(best: Record | None, record: Record, objective: str | None) -> Record | None:
    """The better of two jobs; None where more of a metric is neither better nor worse.

    Args:
        best: the best job so far; None where there is none.
        record: the job that ended.
        objective: the metric to compare by.
    """
    if objective is None:
        return None
    direction = METRICS.get(objective, UNKNOWN).direction  # that of a plug-in is not known here
    if direction == NEITHER:
        return None
    if record.state != FINISHED:
        return best
    value = record.metrics.get(objective)
    if value is None or math.isnan(value):
        return best
    if best is None:
        return record
    gain = direction * (value - best.metrics[objective])
    return record if gain > 0 else best
