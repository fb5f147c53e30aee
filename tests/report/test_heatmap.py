"""The heatmap of layers: values, colors, and which layers are kept."""

import math

from report.run_folders import make_layer_row, write_run

from int8run.report.heatmap import OUTPUT_SQNR, WEIGHT_SQNR, build_heatmap
from int8run.report.page_sections import describe_heatmap_metric
from int8run.report.runs import name_runs


def write_layer_runs(folder, *layers_of_runs):
    """A named run for each list of rows of layers.csv."""
    records = [
        write_run(folder, number, [f"outlier={number}"], metrics={}, layers=layers)
        for number, layers in enumerate(layers_of_runs)
    ]
    return name_runs(records)


def test_layers_are_rows_and_runs_are_columns(tmp_path):
    first = [make_layer_row("a", 20.0), make_layer_row("b", 40.0), make_layer_row("c", why="norm")]
    second = [make_layer_row("a", 30.0), make_layer_row("b", "inf"), make_layer_row("d", 25.0)]

    heatmap = build_heatmap(write_layer_runs(tmp_path, first, second))

    assert {row.name: [cell.text for cell in row.cells] for row in heatmap.rows} == {
        "a": ["20.0", "30.0"],
        "b": ["40.0", "equal"],
        "c": ["float", "–"],
        "d": ["–", "25.0"],
    }
    assert [row.worst_sqnr for row in heatmap.rows] == [20.0, 40.0, math.inf, 25.0]
    assert (heatmap.min_sqnr, heatmap.max_sqnr) == (20.0, 40.0)
    assert [[cell.color for cell in row.cells] for row in heatmap.rows] == [
        [0, 5],
        [9, 9],
        [None, None],
        [None, 2],
    ]


def test_a_cell_describes_its_layer(tmp_path):
    layers = [make_layer_row("a", 20.0), make_layer_row("c", why="norm")]

    heatmap = build_heatmap(write_layer_runs(tmp_path, layers))

    int8_row, float_row = heatmap.rows
    assert "cpu" in int8_row.cells[0].description and not int8_row.is_float
    assert "kept float: norm" in float_row.cells[0].description
    assert float_row.float_reasons == "norm" and float_row.is_float


def test_weight_ratios_replace_outputs_that_were_not_measured(tmp_path):
    with_output, without = [make_layer_row("a", 20.0, 44.0)], [make_layer_row("a", None, 45.0)]

    heatmap = build_heatmap(write_layer_runs(tmp_path, with_output, without))

    assert heatmap.metrics == [OUTPUT_SQNR, WEIGHT_SQNR]
    assert [cell.text for cell in heatmap.rows[0].cells] == ["20.0", "45.0"]
    assert describe_heatmap_metric(heatmap) == "of each layer's output; of its weight in #1"


def test_runs_without_layers_have_no_heatmap(tmp_path):
    assert build_heatmap(name_runs([write_run(tmp_path, metrics={})])) is None


def test_the_worst_layers_are_kept_when_there_are_too_many(tmp_path):
    runs = write_layer_runs(tmp_path, [make_layer_row(f"l{i}", float(i)) for i in range(10, 0, -1)])

    heatmap = build_heatmap(runs, max_cells=4)

    assert [row.name for row in heatmap.rows] == ["l4", "l3", "l2", "l1"]
    assert heatmap.num_left_out == 6
