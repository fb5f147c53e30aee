"""Everything that is to be found out on a GPU, in one command of at most nine minutes.

    python experiments/gpu/run.py                       # on a machine with a GPU
    python experiments/gpu/run.py --wheels FOLDER       # packages that are missing there lie in FOLDER
    python experiments/gpu/run.py --dry-run             # on a CPU: every step on tiny sizes, no numbers

Each step is a process with a share of the time; all shares together are the nine minutes, and what a step
leaves of its share goes to the next ones. What it has found is written when it ends or is cut off:
`results.jsonl` has a line for each step, `table.md` the summary, `home/` the table of the fastest tiles.
"""

import argparse
import json
import os
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from summary import format_summary, judge_targets

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parents[1]
MINUTES = 9.0
DRY_PATIENCE = 4  # how many times as long all may take in a dry run, on whatever CPU
KILL_SECONDS = 3.0  # of what is left, for a process to end and the summary to be written
# beside the defaults, on a Hopper GPU; the last part names the kernel that is not Triton's own pipeline
TILES = (
    "128x256x128/8/3",
    "128x256x128/8/4",
    "256x128x128/8/3",
    "128x128x128/4/3",
    "128x128x128/8/3",
    "64x256x128/8/3",
    "128x256x128/8/3/hopper",
    "128x256x128/8/4/hopper",
    "256x128x128/8/3/hopper",
    "128x128x128/4/3/hopper",
    "128x128x128/8/4/hopper",
    "64x256x128/4/3/hopper",
)


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name: of the step.
        command: the words of its command line.
        seconds: its share of the time.
        report: the JSON file that it writes; None: its output is all.
        is_needed: whether nothing else makes sense where it fails.
        missing: why it cannot be run here; empty: it can.
        package: that it is skipped without; looked for when it is to start, after the others were installed.
    """

    name: str
    command: Sequence[str]
    seconds: float
    report: Path | None = None
    is_needed: bool = False
    missing: str = ""
    package: str = ""


@dataclass
class Result:
    """How a step ended.

    Args:
        name: of the step.
        status: `done`, `failed`, `cut off` or `skipped`.
        seconds: that it took.
        reason: why it is not done.
        found: what its report holds.
    """

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    found: Mapping[str, Any] = field(default_factory=dict)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, on tiny sizes")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first, beside what is there")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORD",
        default=[],
        help="steps with one of these words, after the needed ones",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    return parser.parse_args()


def list_steps(out: Path, device: str, wheels: Path | None, packages: Path) -> list[Step]:
    """All steps, in order.

    Args:
        out: where reports are written.
        device: `cpu` is a dry run.
        wheels: packages that the machine lacks.
        packages: where they are installed.
    """
    is_dry = device == "cpu"
    tiles = ["--tiles", *TILES]
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
    install += ["--target", str(packages), *map(str, sorted(wheels.glob("*.whl")) if wheels else ())]
    linear = [*run_experiment("linear_bench/gpu.py", device), "--models", "flux", "--no-gate"]
    model = [*run_experiment("model_bench/gpu.py", device), "--no-gate", "--only", "int8run triton"]
    if is_dry:
        linear += ["--rounds", "1", "--only", "int8run triton"]
        model += ["--rounds", "1", "--size", "tiny"]
    else:
        linear += ["--rounds", "15", *tiles]
        model += ["--rounds", "8"]
    product = run_part("product", device, out)
    profiled = ["ncu", "--kernel-name", "regex:int8_linear", "--launch-count", "1", *product]
    # by worth: what decides first, what explains last
    return [
        Step("install", install, 40, is_needed=True, missing="" if wheels else "no --wheels"),
        make_part_step("import", device, out, 30, is_needed=True),
        make_part_step("compile", device, out, 45, *tiles),
        make_test_step(out, is_dry=is_dry),
        Step("linears", [*linear, "--json", str(out / "linears.json")], 95, out / "linears.json"),
        make_part_step("grouped", device, out, 35),
        Step("steps", [*model, "--json", str(out / "steps.json")], 100, out / "steps.json"),
        make_part_step("attention", device, out, 25),
        make_part_step("convolutions", device, out, 20),
        make_part_step("bandwidth", device, out, 15),
        make_part_step("offload", device, out, 25),
        make_part_step("int_mm", device, out, 10),
        choose_profiler(profiled, product, is_dry=is_dry),
    ]


def share_time(steps: Sequence[Step], seconds: float) -> list[Step]:
    """The steps with shares that add up to all of the time; one that cannot run has none.

    Args:
        steps: with shares in proportion.
        seconds: of all together.
    """
    wanted = sum(step.seconds for step in steps if not step.missing)
    return [replace(step, seconds=0.0 if step.missing else step.seconds * seconds / wanted) for step in steps]


def select_steps(steps: Sequence[Step], words: Sequence[str]) -> list[Step]:
    """The steps with one of some words in their names, and what is needed for all; without words all."""
    if not words:
        return list(steps)
    return [step for step in steps if step.is_needed or any(word in step.name for word in words)]


def run_part(part: str, device: str, out: Path, *words: str) -> list[str]:
    """The command line of one part of `parts.py`."""
    report = str(out / f"{part}.json")
    return [sys.executable, str(FOLDER / "parts.py"), part, "--device", device, "--json", report, *words]


def make_part_step(
    part: str, device: str, out: Path, seconds: float, *words: str, is_needed: bool = False
) -> Step:
    """The step of one part of `parts.py`, by its name."""
    command = run_part(part, device, out, *words)
    return Step(part, command, seconds, out / f"{part}.json", is_needed=is_needed)


def run_experiment(script: str, device: str) -> list[str]:
    """The command line of another experiment, for a device."""
    return [sys.executable, str(FOLDER.parent / script), "--device", device]


def make_test_step(out: Path, *, is_dry: bool) -> Step:
    """The exact tests of the kernels on a GPU; in a dry run a file that needs none."""
    report = out / "exact_tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    command += [f"--junitxml={report}"]
    if is_dry:
        command += ["tests/kernels/test_triton_tile.py"]
    else:
        command += ["-m", "gpu", "tests/kernels", "tests/backends"]
    return Step("exact tests", command, 85, report, package="pytest")


def choose_profiler(profiled: list[str], product: list[str], *, is_dry: bool) -> Step:
    """One product under Nsight Compute; in a dry run alone."""
    if is_dry:
        return Step("ncu", product, 12)
    missing = "" if shutil.which("ncu") else "ncu is not installed"
    return Step("ncu", profiled, 12, missing=missing)


def find_missing_package(name: str, environment: Mapping[str, str]) -> str:
    """Why a package cannot be used; empty: it can.

    Args:
        name: of the package, or empty.
        environment: of the process that needs it: its path is not this one's.
    """
    if not name:
        return ""
    search = f"import sys; from importlib.util import find_spec; sys.exit(find_spec({name!r}) is None)"
    found = subprocess.run([sys.executable, "-c", search], env=dict(environment), check=False)
    return "" if found.returncode == 0 else f"{name} is not installed"


def make_environment(out: Path, packages: Path, scratch: Path) -> dict[str, str]:
    """Environment variables of the steps: they find packages and this tree; tables come back with results.

    Args:
        out: where results are written.
        packages: that were installed.
        scratch: compiled kernels, which stay on the machine.
    """
    paths = [str(packages), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUSERBASE": site.getuserbase(),  # what is installed for the user does not go with the home
        "HOME": str(out / "home"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }


def run_step(step: Step, environment: Mapping[str, str], out: Path, limit: float) -> Result:
    """Run a step until it ends or its deadline is there.

    Args:
        step: to run.
        environment: of its process.
        out: has a log for each step.
        limit: seconds until its deadline.
    """
    missing = step.missing or find_missing_package(step.package, environment)
    if missing:
        return Result(step.name, "skipped", reason=missing)
    if limit <= 0:
        return Result(step.name, "skipped", reason="no time was left")
    started = time.perf_counter()
    log = out / f"{step.name.replace(' ', '_')}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command,
            cwd=REPOSITORY,
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own processes end with it
        )
        is_cut_off = not wait_for(process, limit)
    result = Result(step.name, "done", time.perf_counter() - started, found=read_report(step.report))
    if is_cut_off:
        result.status, result.reason = "cut off", f"after {limit:.0f} s"
    elif process.returncode:
        result.status, result.reason = "failed", read_last_line(log)
    return result


def wait_for(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for a process, and kill one that takes longer with all that it started; False: it was killed."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    return True


def read_report(path: Path | None) -> Mapping[str, Any]:
    """What a step has written so far; empty where that is nothing."""
    if path is None or not path.is_file():
        return {}
    if path.suffix == ".xml":
        return read_test_counts(path)
    try:
        report: Mapping[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError:  # it was cut off while it wrote
        return {}
    return report


def read_test_counts(path: Path) -> Mapping[str, int]:
    """How many tests ran, failed and were skipped, from pytest's report; empty where it was cut off."""
    try:
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    except ElementTree.ParseError:
        return {}
    counts = {}
    for name in ("tests", "failures", "errors", "skipped"):
        counts[name] = sum(int(suite.get(name, 0)) for suite in suites)
    return counts


def read_last_line(log: Path) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def run_all(steps: Sequence[Step], environment: Mapping[str, str], out: Path) -> list[Result]:
    """Run steps in turn, and write each result when it is there.

    A step may take its own share and what those before it have left of theirs, so that none takes from those
    after it.

    Args:
        steps: in order, with shares in seconds.
        environment: of their processes.
        out: where results are written.
    """
    results: list[Result] = []
    deadline = time.perf_counter()
    for step in steps:
        deadline += step.seconds
        result = run_step(step, environment, out, deadline - time.perf_counter())
        results.append(result)
        with (out / "results.jsonl").open("a") as lines:
            lines.write(json.dumps(asdict(result)) + "\n")
        print(f"{step.name}: {result.status}, {result.seconds:.0f} s {result.reason}".rstrip(), flush=True)
        if step.is_needed and result.status in ("failed", "cut off"):
            print(f"nothing else can be measured without it; see {out}", file=sys.stderr)
            break
    return results


def main() -> None:
    args = parse_arguments()
    minutes = args.minutes * DRY_PATIENCE if args.dry_run else args.minutes
    device = "cpu" if args.dry_run else args.device
    out = args.out.absolute()
    (out / "home").mkdir(parents=True, exist_ok=True)
    (out / "results.jsonl").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="int8run-gpu-") as scratch:
        packages = Path(scratch) / "packages"
        steps = list_steps(out, device, args.wheels, packages)
        steps = share_time(select_steps(steps, args.only), 60 * minutes - KILL_SECONDS)
        environment = make_environment(out, packages, Path(scratch))
        results = run_all(steps, environment, out)

    found = {result.name: result.found for result in results}
    statuses = {result.name: result.status for result in results}
    rows = [(result.name, result.status, result.seconds, result.reason) for result in results]
    table = format_summary(rows, judge_targets(found, statuses), found, is_dry=device == "cpu")
    (out / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\nwritten to {out}")
    failed = [result for result in results if result.status == "failed"]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
