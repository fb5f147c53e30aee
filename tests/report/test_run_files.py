"""The text files of a run: layers.csv, JSON, YAML, and the facts about its environment."""

import csv
import json
import math
import subprocess

import pytest
import torch
import yaml

from int8run.layers.plan import LayerPlan
from int8run.report.run_files import (
    LAYER_COLUMNS,
    collect_environment,
    read_git_revision,
    write_json,
    write_layers_csv,
    write_yaml,
)

# -- layers.csv ----------------------------------------------------------------------------------------------


def read_layers(path):
    """The rows of a layers.csv."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_int8_layer_has_a_value_in_every_column(tmp_path):
    plan = LayerPlan(
        name="blocks.0.q",
        in_features=96,
        out_features=64,
        skip_reason=None,
        outlier="convrot group_size=64",
        rounding="gptq",
        bits=4,
        bits_reason="a share of the error",
        backend_asked="auto",
        backend_used="onednn",
        backends_left_out="triton: RuntimeError: Failed to find C compiler",
        speedup=1.8375,
        instructions="avx2",
        measured={"weight_sqnr_db": 41.23456789, "output_sqnr_db": math.inf, "saturated_share": 0.015625},
        shape="3x3 stride 2",
        macs_share=0.25,
        lora="bake",
        lora_reason="a branch of rank 64 would be more work than the layer",
    )

    write_layers_csv([plan], tmp_path / "layers.csv")

    (row,) = read_layers(tmp_path / "layers.csv")
    assert tuple(row) == LAYER_COLUMNS
    assert row == {
        "name": "blocks.0.q",
        "kind": "linear",
        "out_features": "64",
        "in_features": "96",
        "shape": "3x3 stride 2",
        "macs_share": "0.25",
        "quantized": "true",
        "why_not": "",
        "outlier": "convrot group_size=64",
        "outlier_why_not": "",
        "rounding": "gptq",
        "bits": "4",
        "bits_why": "a share of the error",
        "lora": "bake",
        "lora_why": "a branch of rank 64 would be more work than the layer",
        "backend_asked": "auto",
        "backend_used": "onednn",
        "backends_left_out": "triton: RuntimeError: Failed to find C compiler",
        "speedup_vs_float": "1.8375",
        "instructions": "avx2",
        "weight_sqnr_db": "41.2346",
        "output_sqnr_db": "inf",
        "saturated_share": "0.015625",
    }


def test_a_float_layer_has_its_reason_and_nothing_else(tmp_path):
    write_layers_csv([LayerPlan("x_embedder", 7, 64, "input embedder, tiny")], tmp_path / "layers.csv")

    (row,) = read_layers(tmp_path / "layers.csv")
    assert tuple(row) == LAYER_COLUMNS
    assert (row["quantized"], row["why_not"], row["in_features"]) == ("false", "input embedder, tiny", "7")
    assert {row[column] for column in LAYER_COLUMNS[8:]} == {""}


def test_a_layer_without_its_outlier_method_has_the_reason(tmp_path):
    reason = "in_features=7 is not a multiple of 4"

    write_layers_csv([LayerPlan("k", 96, 7, None, "none", reason, "absmax")], tmp_path / "layers.csv")

    (row,) = read_layers(tmp_path / "layers.csv")
    assert (row["outlier"], row["outlier_why_not"]) == ("none", reason)


def test_a_measurement_without_a_column_is_an_error(tmp_path):
    plan = LayerPlan("a", 1, 1, None, measured={"sqnr_db_2": 1.0})

    with pytest.raises(ValueError, match="sqnr_db_2"):
        write_layers_csv([plan], tmp_path / "layers.csv")


# -- JSON and YAML -------------------------------------------------------------------------------------------


def reject_constant(constant):
    """For `json.loads`: Python reads Infinity and NaN, other programs do not."""
    raise AssertionError(f"{constant} is not JSON")


def test_json_has_strings_for_infinity_and_nan(tmp_path):
    data = {
        "psnr": math.inf,
        "list": [-math.inf, (math.nan, 1.5)],
        "count": 3,
        "none": None,
        "yes": True,
        1: "key",
    }

    write_json(data, tmp_path / "m.json")

    assert json.loads((tmp_path / "m.json").read_text(), parse_constant=reject_constant) == {
        "psnr": "inf",
        "list": ["-inf", ["nan", 1.5]],
        "count": 3,
        "none": None,
        "yes": True,
        "1": "key",
    }


def test_yaml_keeps_order_and_letters(tmp_path):
    data = {"z": 1, "a": {"prompts": ["狐", "über"]}, "n": None}

    write_yaml(data, tmp_path / "c.yaml")

    text = (tmp_path / "c.yaml").read_text()
    assert yaml.safe_load(text) == data
    assert list(yaml.safe_load(text)) == ["z", "a", "n"]
    assert "狐" in text


# -- the environment -----------------------------------------------------------------------------------------


def test_the_environment_names_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    facts = collect_environment(torch.device("cpu"), {"torch": "1"})

    assert set(facts) == {"python", "platform", "device", "threads", "versions", "git", "cpu"}
    assert (facts["device"], facts["threads"]) == ("cpu", torch.get_num_threads())
    assert (facts["versions"], facts["git"]) == ({"torch": "1"}, None)
    assert facts["cpu"], "a speed means nothing without the name of its CPU"


def run_git(folder, *arguments):
    """Run git with an identity of its own."""
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_revision_is_that_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    run_git(tmp_path, "add", "a")
    run_git(tmp_path, "commit", "-m", "first")

    clean = read_git_revision()
    (tmp_path / "a").write_text("2")
    changed = read_git_revision()

    assert len(clean) == 12 and set(clean) <= set("0123456789abcdef")
    assert changed == f"{clean}-dirty"


def test_a_machine_without_git_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert read_git_revision() is None
