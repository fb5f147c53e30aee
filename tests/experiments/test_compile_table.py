"""The table of what Triton makes of the kernels: one small build, and how versions stand below each other."""

import csv
from pathlib import Path

import pytest
from support.experiment_script import run_script

Capture = pytest.CaptureFixture[str]
HEAD = "architecture,build,registers,shared_bytes,spills,instruction,permutes,asynchronous,wrong\n"


@pytest.mark.slow  # a compiler
def test_a_build_is_compiled_into_a_row(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")

    run_script("gpu/compile_table.py", "--only", "sm_80 quantize row of 4096", "--folder", tmp_path)

    (file,) = tmp_path.glob("compiled_triton_*.csv")
    with file.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["architecture"], row["build"]) == ("sm_80", "quantize row of 4096")
    assert int(row["registers"]) > 0 and row["spills"] == "0" and row["wrong"] == ""


def test_versions_of_triton_stand_below_each_other(tmp_path: Path, capsys: Capture) -> None:
    for version, instruction in (("3.6.0", "mma.sync m16n8k32"), ("3.9.0", "tcgen05.mma")):
        rows = f"sm_100,linear 128x128x128 w8 s4,150,98304,0,{instruction},0,-,\nsm_100,other,1,2,0,,0,-,\n"
        (tmp_path / f"compiled_triton_{version}.csv").write_text(HEAD + rows)

    run_script("gpu/compile_table.py", "--markdown", "--folder", tmp_path)

    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| sm_100 | 3.6.0 | linear 128x128x128 w8 s4 | 150 | 98304 | 0 | mma.sync m16n8k32 | - |",
        "| sm_100 | 3.9.0 | linear 128x128x128 w8 s4 | 150 | 98304 | 0 | tcgen05.mma | - |",
    ]
