"""Files that int8run and comfy-kitchen write for each other, where that package is installed."""

import json
from pathlib import Path

import pytest
from support.experiment_script import run_script


def test_files_mean_the_same_to_both(tmp_path: Path) -> None:
    pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
    run_script("w4a8/exchange.py", "--json", tmp_path / "rows.json")

    for row in json.loads((tmp_path / "rows.json").read_text()):
        assert row.get("differing_int8", 0) == 0, row
        assert row.get("relative_distance", 0) < 1e-6, row
        assert row["grade"] in "AB", row
        assert not row["findings"], row
