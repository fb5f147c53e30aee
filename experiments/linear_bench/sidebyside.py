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

from int8run.report.run_files import collect_environment

REPOSITORY = Path(__file__).parents[2]
PEERS = ("torch", "diffusers", "torchao", "sdnq", "onnxruntime", "openvino", "triton", "comfy-kitchen")
GATE = ("tests/kernels", "tests/backends")
Reply = dict[str, Any]


class Process:
    """One variant in a process of its own, spoken to in lines of JSON."""

    def __init__(self, script: Path, threads: int, env: Mapping[str, str]):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        counts = {
            name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "SIDE_BY_SIDE_THREADS")
        }
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
        said = self.errors.read().strip().splitlines()[-1:] or ["without a word"]
        return {"failed": f"its process ended with {self.process.wait()}: {said[0]}"}

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
            reply = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


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


def run_cycles(
    live: Mapping[str, Process], pairs: Sequence[tuple[str, str]], slot: float, budget: float, cycles: range
) -> Measured:
    """Run cycles over all (variant, base) pairs until the budget is used.

    At least `cycles.start`, and at most `cycles.stop`.
    """
    pairs = [(name, base) for name, base in pairs if name in live and base in live]
    bases = list(dict.fromkeys(base for _, base in pairs))
    measured = Measured()
    started, done = time.perf_counter(), 0
    while done < cycles.start or (done < cycles.stop and time.perf_counter() - started < budget):
        for base in bases:
            if base in measured.stopped:
                continue
            before = live[base].slot(slot)
            for name in (n for n, b in pairs if b == base and n not in measured.stopped):
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
        done += 1
    return measured


def compute_quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Low quartile, median, high quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


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
    return {"date": date.today().isoformat(), **collect_environment(device, installed)}


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
