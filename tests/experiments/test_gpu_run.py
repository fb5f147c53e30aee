"""The one command for a machine with a GPU: deadlines, what stops it, what it makes of the reports; and all
of it dry on a CPU.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.experiment_script import EXPERIMENTS, load_script, own_imports, run_script


@pytest.fixture(scope="module")
def gpu_run() -> Iterator[ModuleType]:
    with own_imports(EXPERIMENTS / "gpu"):
        yield load_script("gpu/run.py")


@pytest.fixture(scope="module")
def summary() -> Iterator[ModuleType]:
    with own_imports(EXPERIMENTS / "gpu"):
        yield load_script("gpu/summary.py")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# -- steps ---------------------------------------------------------------------------------------------------


def test_a_step_past_its_deadline_leaves_what_it_had_written(gpu_run: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "rows.json"
    code = f"open({str(report)!r}, 'w').write('{{\"rows\": [1]}}'); import time; time.sleep(60)"
    started = time.perf_counter()

    result = gpu_run.run_step(gpu_run.Step("slow", python(code), 9.0, report), {}, tmp_path, 1.0)

    assert time.perf_counter() - started < 30
    assert (result.status, result.reason) == ("cut off", "after 1 s")
    assert result.found == {"rows": [1]}


def test_all_results_are_written_as_they_come_and_a_needed_step_stops_the_rest(
    gpu_run: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        gpu_run.Step("absent", ["no such program"], 9.0, missing="it is not installed"),
        gpu_run.Step("broken", python("print('out of luck'); raise SystemExit(3)"), 9.0),
        gpu_run.Step("needed", python("raise SystemExit('no torch')"), 9.0, is_needed=True),
        gpu_run.Step("never", python("pass"), 9.0),
    ]

    gpu_run.run_all(steps, {}, tmp_path)

    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["name"], line["status"], line["reason"]) for line in lines] == [
        ("absent", "skipped", "it is not installed"),
        ("broken", "failed", "out of luck"),
        ("needed", "failed", "no torch"),
    ]
    assert "nothing else can be measured without it" in capsys.readouterr().err


def test_without_time_left_a_step_is_not_started(gpu_run: ModuleType, tmp_path: Path) -> None:
    result = gpu_run.run_step(gpu_run.Step("late", ["no such program"], 9.0), {}, tmp_path, -1.0)
    assert (result.status, result.reason) == ("skipped", "no time was left")


def test_a_package_is_looked_for_where_the_step_runs(gpu_run: ModuleType, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    step = gpu_run.Step("exact tests", python("import installed_late"), 60.0, package="installed_late")
    environment = {"PYTHONPATH": str(packages)}
    before = gpu_run.run_step(step, environment, tmp_path, 100.0)

    packages.mkdir()
    (packages / "installed_late.py").touch()
    after = gpu_run.run_step(step, environment, tmp_path, 100.0)

    assert (before.status, before.reason) == ("skipped", "installed_late is not installed")
    assert after.status == "done"


def test_chosen_steps_keep_what_they_need(gpu_run: ModuleType, tmp_path: Path) -> None:
    steps = gpu_run.list_steps(tmp_path, "cuda", tmp_path, tmp_path / "packages")

    chosen = gpu_run.select_steps(steps, ["linears", "int_mm"])

    assert [step.name for step in chosen] == ["install", "import", "linears", "int_mm"]
    assert gpu_run.select_steps(steps, []) == steps


def test_pytests_report_is_read_as_counts(gpu_run: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"/>'
        '<testsuite tests="2" failures="0" errors="0" skipped="1"/></testsuites>'
    )
    assert gpu_run.read_report(report) == {"tests": 5, "failures": 1, "errors": 0, "skipped": 2}

    report.write_text("<testsuites><testsuite tests=")
    assert gpu_run.read_report(report) == {}


def test_the_steps_of_a_gpu_are_in_order_and_fit_into_their_time(gpu_run: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "hydra_core.whl").touch()
    steps = gpu_run.list_steps(tmp_path, "cuda", tmp_path, tmp_path / "packages")

    names = "install import compile exact_tests linears grouped steps"
    names += " attention convolutions bandwidth offload int_mm ncu"
    assert [step.name.replace(" ", "_") for step in steps] == names.split()
    by_name = {step.name: step for step in steps}
    assert str(tmp_path / "hydra_core.whl") in by_name["install"].command
    assert {"-m", "gpu"} <= set(by_name["exact tests"].command)
    for name in ("compile", "linears"):
        assert set(gpu_run.TILES) <= set(by_name[name].command)
    assert [step.name for step in steps if step.is_needed] == ["install", "import"]
    assert sum(step.seconds for step in steps) <= 60 * gpu_run.MINUTES - gpu_run.KILL_SECONDS
    assert len(gpu_run.TILES) <= 12


def test_shares_add_up_to_all_of_the_time_and_steps_that_cannot_run_have_none(gpu_run: ModuleType) -> None:
    steps = [
        gpu_run.Step("first", [], 10.0),
        gpu_run.Step("absent", [], 50.0, missing="it is not installed"),
        gpu_run.Step("second", [], 30.0),
    ]

    shared = gpu_run.share_time(steps, 80.0)

    assert [step.seconds for step in shared] == [20.0, 0.0, 60.0]


def test_a_step_gets_what_those_before_it_have_left_and_takes_nothing_from_those_after_it(
    gpu_run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, limits = [0.0], {}

    def run_step(step: Any, environment: Any, out: Path, limit: float) -> Any:
        limits[step.name] = limit
        clock[0] += min(took[step.name], limit)
        return gpu_run.Result(step.name, "done")

    monkeypatch.setattr(gpu_run, "run_step", run_step)
    monkeypatch.setattr(gpu_run.time, "perf_counter", lambda: clock[0])
    took = {"quick": 2.0, "hanging": 1000.0, "last": 1.0}

    gpu_run.run_all([gpu_run.Step(name, [], 10.0) for name in took], {}, tmp_path)

    assert limits == {"quick": 10.0, "hanging": 18.0, "last": 10.0}


# -- targets -------------------------------------------------------------------------------------------------


def make_size(m: int, calls: int, base: float, ours: float, lora: float) -> dict[str, Any]:
    record = {"limit_share": 0.5, "limited_by": "operations"}
    return {
        "layers": [{"name": f"layer of {m}", "m": m, "calls": calls}],
        "methods": {
            "bf16 cuBLAS": {"us": base, **record},
            "int8run triton": {"us": ours, **record},
            "int8run triton, best tile": {"us": ours / 2, **record},
            "int8run triton, LoRA r64": {"us": lora, **record},
        },
    }


def test_targets_are_judged_by_the_reports(summary: ModuleType) -> None:
    linears = {"sizes": [make_size(64, 2, 300.0, 200.0, 220.0), make_size(1, 99, 1.0, 900.0, 900.0)]}
    steps = {"timed": {"int8run triton compile=blocks": {"same_mode": {"median": 1.2}}}}

    tests = {"tests": 5, "failures": 0, "errors": 0, "skipped": 0}
    exact, ratio, step, lora, _ = summary.judge_targets(
        {"linears": linears, "steps": steps, "exact tests": tests}, {"exact tests": "done"}
    )

    assert exact.is_met is True
    assert (ratio.found, ratio.is_met) == ("3.00x", True), "one row is no part of it, the best tile counts"
    assert ratio.limit == "layer of 64 reaches 50 % of the limit by operations"
    assert (step.found, step.is_met) == ("1.20x", False)
    assert (lora.found, lora.is_met) == ("+10.0 %", False)


@pytest.mark.parametrize(
    ("status", "skipped", "is_met"),
    [("done", 0, True), ("done", 1, None), ("done", 4, None), ("failed", 0, False)],
)
def test_a_skipped_test_leaves_exactness_open(
    summary: ModuleType, status: str, skipped: int, is_met: bool | None
) -> None:
    counts = {"tests": 4, "failures": 0, "errors": 0, "skipped": skipped}
    assert summary.judge_exactness(status, counts).is_met is is_met
    assert summary.judge_exactness("done", {}).is_met is None, "pytest's report is missing"


def test_what_was_not_measured_is_no_target_met(summary: ModuleType) -> None:
    targets = summary.judge_targets({}, {"exact tests": "cut off"})

    assert [target.is_met for target in targets] == [None] * 5
    table = summary.format_summary([("import", "done", 1.0, "")], targets, {}, is_dry=False)
    assert table.count("| not measured |") == 5 and "Dry run" not in table


# -- dry -----------------------------------------------------------------------------------------------------


@pytest.mark.slow  # thirteen processes, each of which imports torch
def test_every_step_runs_dry_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    run_script("gpu/run.py", "--dry-run", "--out", tmp_path)

    results = {}
    for line in (tmp_path / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        results[result["name"]] = result
    assert {name for name, result in results.items() if result["status"] != "done"} == {"install"}
    for part in ("compile", "int_mm", "grouped", "bandwidth", "attention", "convolutions", "offload"):
        assert results[part]["found"]["rows"]
    assert results["linears"]["found"]["sizes"] and results["steps"]["found"]["timed"]
    assert "# Dry run on a CPU" in capsys.readouterr().out
    assert "| a dry run |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("part", ["bandwidth", "product"])
def test_a_part_runs_alone(part: str, tmp_path: Path) -> None:
    run_script("gpu/parts.py", part, "--device", "cpu", "--json", tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text())["rows"]


@pytest.mark.slow
def test_one_build_is_compiled_into_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    triton = pytest.importorskip("triton")
    run_script("gpu/compile_table.py", "--only", "sm_90 linear 16x64x256", "--folder", tmp_path)
    rows = (tmp_path / f"compiled_triton_{triton.__version__}.csv").read_text().splitlines()
    assert len(rows) > 1 and all(row.startswith("sm_90,linear 16x64x256") for row in rows[1:])

    run_script("gpu/compile_table.py", "--markdown", "--folder", tmp_path)
    assert "| architecture | Triton | build |" in capsys.readouterr().out


def test_few_bits_are_judged_by_their_slowest_size_and_by_equal_results(summary: ModuleType) -> None:
    def judge(**changes: Any) -> Any:
        rows = [
            {"size": "16x64x64", "bits": 4, "ratio": 0.7, "equal": True},
            {"size": "512x64x64", "bits": 6, "ratio": 1.12, "equal": True, **changes},
        ]
        return summary.judge_grouped({"rows": rows})

    assert (judge().found, judge().is_met) == ("at most 1.12x (6 bits 512x64x64)", True)
    assert judge(ratio=1.2).is_met is False
    wrong = judge(equal=False)
    assert (wrong.found, wrong.is_met) == (
        "at most 1.12x (6 bits 512x64x64); not equal: 6 bits 512x64x64",
        False,
    )
    assert summary.judge_grouped({}).is_met is None
