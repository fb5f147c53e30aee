"""The table of runs: how numbers are written, which columns there are, and what is marked."""

import math

import pytest
from report.run_folders import SSIM, make_metrics, write_run, write_runs

from int8run.metrics.names import SCATTERS
from int8run.report.columns import DENOISER_BYTES, METRIC_COLUMNS, PSNR_DB, SPEED_RATIO, STEP_MS, find_column
from int8run.report.missing_metrics import explain_missing
from int8run.report.runs import name_runs
from int8run.report.runs_table import build_runs_table


@pytest.mark.parametrize(
    ("metric", "values", "shown"),
    [
        (PSNR_DB, [math.inf, 57.84, None], ["equal", "57.8", "–"]),
        (SSIM, [1.0, 0.99997, 0.99994, 0.5], ["1.0000", ">0.9999", "0.9999", "0.5000"]),
        (STEP_MS, [4.567, 812.3], ["4.57", "812.30"]),
        (STEP_MS, [412.34, 812.3], ["412", "812"]),
        (DENOISER_BYTES, [28.7e6], ["28.7"]),
        (DENOISER_BYTES, [12.1e9], ["12100"]),
        (SPEED_RATIO, [2.544, 0.5], ["2.54×", "0.50×"]),
        ("quality/latent_rel_err", [0.0, 0.00001, 0.0054], ["0.00", "<0.01", "0.54"]),
    ],
)
def test_rounding_never_hides_a_difference(metric, values, shown):
    column = next(column for column in METRIC_COLUMNS if column.metric == metric)

    decimals = column.choose_decimals([value for value in values if value is not None])

    assert [column.format(value, decimals) for value in values] == shown


def test_the_best_of_a_column_and_the_pareto_front_are_marked(tmp_path):
    metrics = [make_metrics(10, 2.0, 40), make_metrics(11, 1.8, 45), make_metrics(12, 1.7, 44)]

    table = build_runs_table(write_runs(tmp_path, metrics, ("a", "b", "c")))

    is_best = {
        column.metric: [row.cells[index].is_best for row in table.rows]
        for index, column in enumerate(table.columns)
    }
    assert is_best[STEP_MS] == [True, False, False]
    assert is_best[PSNR_DB] == [False, True, False]
    assert is_best[DENOISER_BYTES] == [False] * 3, "all are equal"
    assert [row.is_on_front for row in table.rows] == [True, True, False]
    assert "quality/lpips" not in is_best, "no run has it"


def test_no_time_is_the_best_where_times_scatter(tmp_path):
    metrics = [make_metrics(10, 2.0, 40), make_metrics(11, 1.8, 45)]
    metrics[1][SCATTERS] = 1.0

    table = build_runs_table(write_runs(tmp_path, metrics, ("a", "b")))

    best = {
        column.metric
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
        if cell.is_best
    }
    assert table.has_scattered_times
    assert PSNR_DB in best
    assert not any(metric.startswith("speed/") for metric in best)


def test_int8_parts_have_columns_where_a_run_has_them(tmp_path):
    part = {"quant/attention_sqnr_db_mean": 41.26, "vae/psnr_db": 56.51, "vae/decode_ratio": 2.5}
    float_parts = make_metrics() | {"quant/macs_int8_share": 0.957}
    int8_parts = make_metrics() | part | {"quant/macs_int8_share": 0.99996}

    table = build_runs_table(write_runs(tmp_path, [float_parts, int8_parts]))

    shown = {
        column.metric: [row.cells[index].text for row in table.rows]
        for index, column in enumerate(table.columns)
    }
    assert shown["quant/attention_sqnr_db_mean"] == ["–", "41.3"]
    assert shown["quant/macs_int8_share"] == ["95.7", ">99.9"]
    assert shown["vae/psnr_db"] == ["–", "56.5"]
    assert shown["vae/decode_ratio"] == ["–", "2.50×"]


def test_a_share_that_all_runs_have_needs_no_column(tmp_path):
    metrics = make_metrics() | {"quant/macs_int8_share": 0.957}

    table = build_runs_table(write_runs(tmp_path, [metrics, metrics]))

    names = {column.metric for column in table.columns}
    assert PSNR_DB in names and not {"quant/macs_int8_share", "vae/psnr_db"} & names


def test_the_objective_has_a_column_of_its_own(tmp_path):
    metrics = make_metrics() | {"lora/overhead_ratio": 1.25}
    record = write_run(tmp_path, metrics=metrics, objective="lora/overhead_ratio")

    table = build_runs_table(name_runs([record]))

    assert table.columns[-1].heading == "lora/overhead_ratio"
    assert table.rows[0].cells[-1].text == "1.25"


def test_an_objective_of_another_version_has_a_column(tmp_path):
    metrics = make_metrics() | {"quality/of_tomorrow": 1.25}
    record = write_run(tmp_path, metrics=metrics, objective="quality/of_tomorrow")

    table = build_runs_table(name_runs([record]))

    assert table.columns[-1].heading == "quality/of_tomorrow"


@pytest.mark.parametrize(
    ("params", "metric", "reason"),
    [
        ({"metrics.baseline": "none"}, PSNR_DB, "metrics.baseline=none: the float model did not run"),
        ({"metrics.baseline": "none"}, SPEED_RATIO, "metrics.baseline=none: the float model did not run"),
        (
            {"metrics.baseline": "cached"},
            SPEED_RATIO,
            "metrics.baseline=cached: the float model's images are of an earlier run",
        ),
        (
            {"metrics.baseline": "cached"},
            "quant/output_sqnr_db_min",
            "metrics.baseline=cached: the float model was not in memory",
        ),
        ({"metrics.layers": "False"}, "quant/output_sqnr_db_min", "metrics.layers=false"),
        ({"int8.enable": "False"}, "quant/output_sqnr_db_min", "int8.enable=false: no layer is INT8"),
        ({"int8.enable": "False"}, "quant/macs_int8_share", "int8.enable=false: no layer is INT8"),
        ({"int8.vae": "float"}, "vae/psnr_db", "int8.vae=float"),
        ({"int8.vae": "int8"}, "vae/psnr_db", "not measured"),
        ({}, "vae/decode_ratio", "int8.vae=float"),
        ({"int8.attention": "float"}, "quant/attention_sqnr_db_mean", "int8.attention=float"),
        ({"clip": "keep"}, "clip/cosine_mean", "clip=keep: the text encoders are not quantized"),
        ({}, "quality/lpips", "metrics.perceptual does not name lpips, or it could not be computed"),
        ({}, "quality/ms_ssim", "the images are too small for it"),
        ({}, "speed/frames_per_s", "images have no frames"),
        ({}, "quality/masked_psnr_db", "no input tells a mask, or all pixels are on its other side"),
        ({}, "quality/flicker_err", "images have no neighbouring frames"),
        ({}, "quality/drift", "no video begins with an image"),
        ({}, STEP_MS, "not measured"),
    ],
)
def test_an_empty_cell_says_why(tmp_path, params, metric, reason):
    record = write_run(tmp_path, params=params, metrics={})

    assert explain_missing(record, metric) == reason


@pytest.mark.parametrize(
    ("state", "reason"),
    [("RUNNING", "the run has not ended"), ("FAILED", "the run failed"), ("KILLED", "the run was killed")],
)
def test_an_empty_cell_says_that_the_run_is_not_finished(tmp_path, state, reason):
    status = {"pid": 1, "process_started": 0.0, "host": "elsewhere"}
    record = write_run(tmp_path, metrics=None, state=state, **status)

    assert explain_missing(record, PSNR_DB) == reason


def test_only_empty_cells_have_a_reason(tmp_path):
    table = build_runs_table(write_runs(tmp_path, [make_metrics(), make_metrics(psnr=math.nan)]))

    reasons = [[cell.missing_reason for cell in row.cells if cell.missing_reason] for row in table.rows]
    assert reasons == [[], ["the result is not a number"]]


def test_no_quality_is_the_best_of_runs_with_different_images(tmp_path):
    metrics = [make_metrics(10, psnr=40), make_metrics(11, psnr=45)]

    table = build_runs_table(write_runs(tmp_path, metrics, ("0", "1"), key="lora.strength"))

    best = [
        column.metric for column, cell in zip(table.columns, table.rows[0].cells, strict=True) if cell.is_best
    ]
    assert best == [STEP_MS]
    assert not any(cell.is_best for cell in table.rows[1].cells)
    assert table.has_different_images and not table.has_front


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (3.02, 1.57, 6.86, "[1.57, 6.86]"),
        (3.02, 2.42, 3.60, "±0.59"),
        (3.02, 3.017, 3.0201, "±<0.01"),
        (3.02, None, None, ""),
    ],
)
def test_a_lopsided_interval_shows_both_ends(value, low, high, shown):
    assert find_column(SPEED_RATIO).format_spread(value, low, high, 2) == shown
