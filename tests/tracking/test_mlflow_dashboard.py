"""The dashboard of a sweep as a state and as a tag; tests/browser asks whether MLflow understands it."""

import hashlib
import json
import random
import string

import pytest
from mlflow import MlflowClient

from int8run.tracking import mlflow_view_tag
from int8run.tracking.mlflow_dashboard import build_view_state, find_varying_params, is_plottable
from int8run.tracking.mlflow_view_tag import (
    MAX_TAG_LENGTH,
    VIEW_TAG_PREFIX,
    build_experiment_link,
    build_view_link,
    decode_view,
    encode_view,
    make_view_key,
    pack_view,
    write_view,
)

METRICS = [
    "quality/psnr_db",
    "quality/ssim",
    "speed/step_ms_p50",
    "memory/denoiser_bytes",
    "series/step_ms",
    "plain",
]
PARAMS = {"outlier": ["none", "convrot"], "lora.strength": ["0", "0.5"]}
KEYS = ["sample/000_fox_s0", "sample/001_cat_s0"]


def find_charts(state, kind):
    """The charts of one kind."""
    return [chart for chart in state["compareRunCharts"] if chart["type"] == kind]


def test_varying_settings_have_the_values_of_all_runs():
    runs = [
        {"model": "tiny", "outlier": "none", "lora.strength": "0"},
        {"model": "tiny", "outlier": "convrot", "lora.strength": "0"},
    ]

    assert find_varying_params(runs) == {"outlier": ["none", "convrot"]}
    assert find_varying_params(runs[:1]) == find_varying_params([]) == {}
    assert find_varying_params([{"a": "1"}, {}]) == {"a": ["1", None]}


def test_settings_that_an_option_decides_are_left_out():
    runs = [
        {"outlier": o, "outlier.block": b, "lora": "x", "lora.strength": s}
        for o, b in (("none", "0"), ("convrot", "64"))
        for s in "01"
    ]

    assert list(find_varying_params(runs)) == ["outlier", "lora.strength"]
    # once the block varies within an option, it counts
    assert list(find_varying_params([*runs, {**runs[-1], "outlier.block": "32"}])) == [
        "outlier",
        "outlier.block",
        "lora.strength",
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["0", "0.25", "-1e-3", ".5"], True),
        (["none", "convrot"], True),
        (["True", "False"], True),
        (["None", "4"], False),
        (["inf", "4"], False),
        (["4", None], False),
    ],
)
def test_an_axis_takes_only_numbers_or_only_words(values, expected):
    assert is_plottable(values) is expected


def test_a_setting_with_numbers_and_words_is_a_column_but_not_an_axis():
    state = build_view_state({**PARAMS, "int8.max_rows": ["None", "4"]}, METRICS, KEYS)

    assert "params.`int8.max_rows`" in state["selectedColumns"]
    assert find_charts(state, "PARALLEL")[0]["selectedParams"] == list(PARAMS)


def test_only_what_exists_is_shown():
    state = build_view_state(PARAMS, METRICS, KEYS, "a-sweep")

    assert state["searchFilter"] == "tags.sweep = 'a-sweep'"
    assert state["selectedColumns"] == [
        "params.`outlier`",
        "params.`lora.strength`",
        "metrics.`quality/psnr_db`",
        "metrics.`speed/step_ms_p50`",
        "metrics.`memory/denoiser_bytes`",
        "metrics.`quality/ssim`",
    ]
    assert [chart["metricKey"] for chart in find_charts(state, "BAR")] == [
        "quality/psnr_db",
        "speed/step_ms_p50",
        "memory/denoiser_bytes",
    ]
    assert [chart["metricKey"] for chart in find_charts(state, "LINE")] == ["series/step_ms"]
    assert [chart["imageKeys"] for chart in find_charts(state, "IMAGE")] == [KEYS]
    assert find_charts(build_view_state(PARAMS, METRICS, []), "IMAGE") == []


@pytest.mark.parametrize(
    ("params", "metrics"),
    [({}, []), ({}, METRICS), (PARAMS, []), (PARAMS, ["speed/step_ms_p50"]), ({}, ["quality/psnr_db"])],
)
def test_charts_name_only_metrics_that_exist(params, metrics):
    state = build_view_state(params, metrics, [])
    for chart in find_charts(state, "PARALLEL"):
        assert chart["selectedParams"] and chart["selectedMetrics"]
    named = {chart["metricKey"] for kind in ("BAR", "LINE") for chart in find_charts(state, kind)}
    named |= {chart[axis]["key"] for chart in find_charts(state, "SCATTER") for axis in ("xaxis", "yaxis")}

    assert named <= set(metrics)
    assert state["searchFilter"] == ""


def test_sections_and_charts_have_unique_ids():
    state = build_view_state(PARAMS, METRICS, KEYS)
    places = [part["uuid"] for part in state["compareRunSections"]]

    assert len(set(places)) == len(places)
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} <= set(places)
    assert len({chart["uuid"] for chart in state["compareRunCharts"]}) == len(state["compareRunCharts"])

    names = [part["name"] for part in state["compareRunSections"]]

    assert len(set(names)) == len(names)


def test_sections_that_mlflow_fills_are_closed():
    opened = {
        part["name"]: part["display"]
        for part in build_view_state(PARAMS, METRICS, KEYS)["compareRunSections"]
    }

    # each image alone and quality/ssim have no chart of ours; all of speed/, memory/ and series/ has
    assert [name for name, is_open in opened.items() if not is_open] == ["sample", "quality"]


def test_a_tag_that_would_be_too_long_loses_images_from_its_end():
    chance = random.Random(0)
    keys = [f"sample/{n:03d}_{''.join(chance.choices(string.ascii_letters, k=40))}" for n in range(200)]
    value, left_out = encode_view(build_view_state(PARAMS, METRICS, keys), "v")
    kept = find_charts(decode_view(value), "IMAGE")[0]["imageKeys"]

    assert 0 < left_out < 200 and kept == keys[: 200 - left_out]
    assert MAX_TAG_LENGTH - 100 < len(value) <= MAX_TAG_LENGTH


@pytest.mark.parametrize("num_images", [200, 10_000])
def test_the_images_that_fit_are_found_in_a_few_tries(monkeypatch, num_images):
    tries = []

    def pack(*arguments):
        tries.append(arguments)
        return pack_view(*arguments)

    monkeypatch.setattr(mlflow_view_tag, "pack_view", pack)
    keys = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(num_images)]

    value, left_out = encode_view(build_view_state(PARAMS, METRICS, keys), "v")

    assert len(tries) <= 16 and 0 < left_out < num_images and len(value) <= MAX_TAG_LENGTH


@pytest.mark.parametrize(
    ("sweep", "key"), [("2026-11-21_22-30-00-a3f9", "2026-11-21_22-30-00-a3f9"), ("a.b", "a.b")]
)
def test_a_view_is_called_like_its_sweep(sweep, key):
    assert make_view_key(sweep) == key


def test_views_of_sweeps_with_unusual_names_have_names_that_mlflow_takes(tmp_path):
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("e")
    sweeps = ["lr=1,x=[2]", "lr=1,x=(2)", "it's", "狐", "a//b", "..", "x" * 400, "x" * 401, "a b%c?d#e"]

    keys = [make_view_key(sweep) for sweep in sweeps]
    for key in keys:
        write_view(client, experiment, key, build_view_state({}, METRICS, [], "s"))

    assert len(client.get_experiment(experiment).tags) >= len(set(keys)) == len(sweeps)


def test_a_setting_is_compared_with_those_that_it_may_belong_to_alone():
    names = [f"prompts.{n}.text" for n in range(300)]
    asked = []

    class Watched(str):
        def startswith(self, *arguments):
            asked.append(arguments)
            return super().startswith(*arguments)

    runs = [{Watched(name): f"{name} {run}" for name in names} for run in range(2)]

    assert list(find_varying_params(runs)) == names
    assert len(asked) <= len(names), "not each name with each other"


def test_the_longest_names_that_mlflow_takes_fit():
    chance = random.Random(0)
    names = ["".join(chance.choices(string.ascii_letters + string.digits, k=250)) for _ in range(20)]
    value, left_out = encode_view(build_view_state({name: ["0", "1"] for name in names}, METRICS, KEYS), "v")

    assert len(value) <= MAX_TAG_LENGTH and left_out == 0


def test_a_view_is_read_back_and_replaced(tmp_path):
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("e")
    first, second = build_view_state(PARAMS, METRICS, KEYS, "s"), build_view_state({}, METRICS, [], "s")

    assert write_view(client, experiment, "2026-11-21_22-30-00-a3f9", first) == 0

    tags = client.get_experiment(experiment).tags
    value = tags[f"{VIEW_TAG_PREFIX}2026-11-21_22-30-00-a3f9"]

    assert (
        decode_view(value) == json.loads(json.dumps(first))
        and json.loads(value)["name"] == "2026-11-21_22-30-00-a3f9"
    )

    write_view(client, experiment, "2026-11-21_22-30-00-a3f9", second)

    assert (
        decode_view(client.get_experiment(experiment).tags[f"{VIEW_TAG_PREFIX}2026-11-21_22-30-00-a3f9"])
        == second
    )


def test_links_are_escaped_and_name_the_view():
    plain = build_experiment_link("http://host:5000/", "7")

    assert plain == "http://host:5000/#/experiments/7/runs?workflowType=machine_learning"
    assert (
        build_view_link("http://host:5000", "7", "a b&c")
        == f"{plain}&viewStateShareKey=a%20b%26c&compareRunsMode=CHART"
    )
    assert build_view_link("http://host:5000", "7", "a", charts=False).endswith(
        "viewStateShareKey=a&compareRunsMode=TABLE"
    )
