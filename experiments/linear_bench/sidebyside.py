"""Measure variants side by side: one process each, every slot of a variant between two slots of its base.

Interference from other work only adds time, so a slot is its best call; a ratio compares a slot with the
two base slots around it, so that a drifting clock cancels. `linear_bench` and `model_bench` both measure
with this file.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from int8run.backends.cpu import Cpu
from int8run.report.run_files import collect_environment
from int8run.utils.hardware import describe_instructions

REPOSITORY = Path(__file__).parents[2]
PEERS = ("torch", "diffusers", "torchao", "sdnq", "onnxruntime", "openvino", "triton", "comfy-kitchen")
GATE = ("tests/kernels", "tests/backends")
Reply = dict[str, Any]


class Process:
    """One variant in a process of its own, spoken to in lines of JSON."""

    def __init__(self, script: Path, threads: int, env: Mapping[str, str]):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        thread_variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "SIDE_BY_SIDE_THREADS")
        counts = dict.fromkeys(thread_variables, str(threads))
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **counts, **env},
        )

    def ask(self, operation: str, **request: object) -> Reply:
        """The reply; `{"failed": reason}` when the variant failed or its process ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"operation": operation, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        reason = lines[-1] if lines else "without a word"
        return {"failed": f"its process ended with {self.process.wait()}: {reason}"}

    def slot(self, seconds: float) -> float:
        """The best call of one slot, in seconds.

        Raises:
            RuntimeError: when a variant that was set up fails later.
        """
        reply = self.ask("slot", seconds=seconds)
        if "failed" in reply:
            raise RuntimeError(reply["failed"])
        return reply["best"]

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def serve_requests(
    prepare: Callable[[Reply], tuple[Callable[[], object], Reply]],
    **more: Callable[[Callable[[], object]], Reply],
) -> None:
    """The other end of `Process`: answer requests until the input ends.

    Args:
        prepare: from a set-up request to the call that is timed and what to report about it.
        more: further operations on that call, by name.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not land between the replies
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    threads = int(os.environ["SIDE_BY_SIDE_THREADS"])
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    call: Callable[[], object] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            match request.pop("operation"):
                case "set up":
                    call = None  # the memory of the last one, before the next
                    started = time.perf_counter()
                    call, reply = prepare(request)
                    reply["setup_seconds"] = time.perf_counter() - started
                case "slot":
                    assert call is not None
                    reply = {"best": best_call(call, clock, request["seconds"])}
                case "release":
                    call, reply = None, {}
                case other:
                    assert call is not None
                    reply = more[other](call)
        except Exception as error:  # noqa: BLE001  whatever a peer raises is its result here
            reply = {"failed": describe_error(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def describe_error(error: Exception) -> str:
    """An exception in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}"


def best_call(call: Callable[[], object], clock: Callable[[], float], seconds: float) -> float:
    """Call until `seconds` of the clock are over.

    The fastest call, the first left out unless it is the only one.
    """
    times: list[float] = []
    while not times or sum(times) < seconds:
        started = clock()
        call()
        times.append(clock() - started)
    return min(times[1:] or times)


@dataclass
class Measured:
    """What the cycles gave.

    Best seconds per variant, ratios base / variant per pair, and why a variant stopped on the way.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """How long to measure: cycles are run until the seconds are over, within these numbers of cycles.

    `slot` is the length of one slot, in seconds.
    """

    slot: float
    seconds: float
    cycles: range


def run_cycles(live: Mapping[str, Process], pairs: Sequence[tuple[str, str]], budget: Budget) -> Measured:
    """Run cycles over all (variant, base) pairs of which both are live."""
    names_of_base: dict[str, list[str]] = {}
    for name, base in pairs:
        if name in live and base in live:
            names_of_base.setdefault(base, []).append(name)
    measured = Measured()
    started = time.perf_counter()
    for done in range(budget.cycles.stop):
        is_over = time.perf_counter() - started >= budget.seconds
        if is_over and done >= budget.cycles.start:
            break
        for base, names in names_of_base.items():
            if base not in measured.stopped:
                run_cycle(live, base, names, budget.slot, measured)
    return measured


def run_cycle(
    live: Mapping[str, Process], base: str, names: Sequence[str], slot: float, measured: Measured
) -> None:
    """One slot of each variant, each between two slots of the base."""
    before = live[base].slot(slot)
    for name in names:
        if name in measured.stopped:
            continue
        try:
            own = live[name].slot(slot)
        except RuntimeError as error:
            measured.stopped[name] = str(error)
            continue
        after = live[base].slot(slot)
        measured.ratios.setdefault((name, base), []).append((before + after) / 2 / own)
        measured.seconds.setdefault(name, []).append(own)
        measured.seconds.setdefault(base, []).append(after)
        before = after


@dataclass(frozen=True)
class Quartiles:
    """Low quartile, median and high quartile."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}–{self.high:.2f}]"


def compute_quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles; of a single value three times itself."""
    if len(values) < 2:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def is_wanted(name: str, words: Sequence[str] | None) -> bool:
    """Whether a variant has one of the words of `--only` in its name; without words each is wanted."""
    return not words or any(word in name for word in words)


def run_gate() -> None:
    """Run the kernel and backend tests; no speed is reported unless they pass."""
    print(f"tests first: pytest {' '.join(GATE)}", flush=True)
    answer = subprocess.run([sys.executable, "-m", "pytest", *GATE], cwd=REPOSITORY)
    if answer.returncode:
        sys.exit("the tests of kernels and backends fail here, so no speed is reported")


def collect_facts(device: torch.device) -> Reply:
    """Machine, versions and date, to stand beside the numbers."""
    installed = {}
    for package in PEERS:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    facts = {"date": date.today().isoformat(), **collect_environment(device, installed)}
    facts["instructions"] = describe_instructions(device)
    if device.type == "cpu" and not Cpu().limits.unsupported_reasons(device):
        facts["cpu_kernels"] = Cpu().instruction_set
    return facts


def describe_machine(facts: Reply) -> str:
    """What computes, the versions and the date, for the line above the numbers."""
    versions = facts["versions"]
    if "gpu" in facts:
        return f"{facts['gpu']}, torch {versions['torch']}, triton {versions['triton']}, {facts['date']}"
    kernels = facts.get("cpu_kernels", "not usable")
    return (
        f"{facts['cpu']} ({facts['instructions']}; int8run cpu: {kernels}), torch {versions['torch']}, "
        f"{facts['date']}"
    )


def write_report(path: Path, report: Reply) -> None:
    """Every number, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
