"""The atlas: results of other people, read with distrust and laid out with honest gaps."""

import csv
import io
import json
import math

import pytest
from report.run_folders import MACHINE, ParsedPage, make_metrics, write_run

from int8run.errors import FileError
from int8run.report.atlas import build_atlas, render_csv, render_html, render_latex, render_markdown
from int8run.report.columns import PSNR_DB, SPEED_RATIO
from int8run.report.shared_results import collect_results

RECIPE = {"Precision": "INT8", "Outlier": "convrot"}


def write_result(path, metrics=None, model="tiny", device="EPYC", **changes):
    """A metrics.json as a run of today writes it."""
    texts = {}
    for name, value in (metrics or make_metrics()).items():
        texts[name] = str(value) if isinstance(value, float) and not math.isfinite(value) else value
    content = {
        "schema": 1,
        "int8run": "1.0",
        "model": model,
        "recipe": RECIPE,
        "environment": MACHINE | {"cpu": device},
        "metrics": texts,
        "images": [{}, {}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | changes))
    return path


@pytest.fixture
def collection(tmp_path):
    """Two machines, two models, one of them on one machine alone."""
    write_result(tmp_path / "anna" / "a.json" / "metrics.json", make_metrics(psnr=50.0, ratio=2.0))
    write_result(tmp_path / "ben" / "metrics.json", make_metrics(psnr=51.0, ratio=1.5), device="Xeon")
    interval = {f"{PSNR_DB}_low": 30.0, f"{PSNR_DB}_high": 34.0}
    flux = make_metrics(psnr=32.0) | interval
    write_result(tmp_path / "cleo" / "metrics.json", flux, model="flux", device="Xeon")
    return collect_results([tmp_path])


def test_what_nobody_measured_is_grey(collection):
    atlas = build_atlas(collection)

    assert atlas.devices == ["EPYC, 2 threads", "Xeon, 2 threads"]
    flux, tiny = atlas.models
    (recipe, cells) = flux.rows[0]
    assert (flux.name, recipe) == ("flux", "INT8 · convrot")
    assert [bool(cell.results) for cell in cells] == [False, True]
    assert [bool(cell.results) for cell in tiny.rows[0][1]] == [True, True]
    page = ParsedPage(render_html(atlas))
    assert page.unbalanced == []
    assert [cell["text"] for cell in page.find_all("td", class_="unmeasured")] == ["not measured"]


def test_a_number_has_its_interval(collection):
    (_, cells) = build_atlas(collection).models[0].rows[0]

    texts = {number.label: number.text for number in cells[1].numbers}
    assert texts["PSNR dB"] == "32.0 [30.0, 34.0]"


def test_several_results_are_their_median_and_range(tmp_path):
    for number, ratio in enumerate((1.0, 3.0, 2.0)):
        write_result(tmp_path / str(number) / "metrics.json", make_metrics(ratio=ratio))

    (_, (cell,)) = build_atlas(collect_results([tmp_path])).models[0].rows[0]

    assert cell.numbers[0].text == "2.00× [1.00×, 3.00×]"
    assert cell.note == "3 results, 6 images"


def test_the_median_of_two_results_is_between_them(tmp_path):
    for number, ratio in enumerate((1.0, 2.0)):
        write_result(tmp_path / str(number) / "metrics.json", make_metrics(ratio=ratio))

    (_, (cell,)) = build_atlas(collect_results([tmp_path])).models[0].rows[0]

    assert cell.numbers[0].text == "1.50× [1.00×, 2.00×]"


def test_a_spreadsheet_computes_nothing_of_others(tmp_path):
    metrics = make_metrics() | {"=1+1": 1.0, "half \ud800": 2.0}
    write_result(tmp_path / "metrics.json", metrics, model='=HYPERLINK("http://x")')

    text = render_csv(build_atlas(collect_results([tmp_path])))

    header, row = csv.reader(io.StringIO(text))
    assert row[0] == '\'=HYPERLINK("http://x")' and "'=1+1" in header
    assert r"half \ud800" in header and text.encode()


def test_impossible_numbers_are_left_out_and_listed(tmp_path):
    write_result(tmp_path / "a" / "metrics.json", make_metrics(psnr=-5.0))

    collection = collect_results([tmp_path])

    (result,) = collection.results
    assert PSNR_DB not in result.metrics and SPEED_RATIO in result.metrics
    (left_out,) = collection.left_out
    assert left_out.metric == "quality/psnr_db=-5.0" and "outside" in left_out.reason
    assert "quality/psnr_db=-5.0" in render_html(build_atlas(collection))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "its schema is 2, and this version of int8run reads up to 1"),
        ({"schema": "1"}, "its schema is 1"),
        ({"schema": True}, "its schema is True"),
        ({"schema": 0}, "it is of an earlier version"),
        ({"recipe": "convrot"}, "it does not say its model"),
        ({"environment": None}, "it does not say its model"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, changes, reason):
    write_result(tmp_path / "good" / "metrics.json")
    bad = write_result(tmp_path / "bad" / "metrics.json", **changes)

    collection = collect_results([tmp_path])

    assert len(collection.results) == 1
    (left_out,) = collection.left_out
    assert left_out.path == bad and left_out.metric == "" and reason in left_out.reason


def test_a_damaged_file_is_named(tmp_path):
    write_result(tmp_path / "good" / "metrics.json")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "metrics.json").write_text("{")
    (tmp_path / "metrics.json").write_text('{"metrics": []}')

    reasons = [item.reason for item in collect_results([tmp_path]).left_out]

    assert len(reasons) == 2
    assert "is not JSON" in reasons[0] and reasons[1] == "it is no metrics.json of int8run"


def test_a_copy_counts_once(tmp_path):
    write_result(tmp_path / "a" / "metrics.json")
    copy = write_result(tmp_path / "b" / "metrics.json")
    copy.write_text(json.dumps(json.loads(copy.read_text()), indent=4))

    collection = collect_results([tmp_path])

    assert len(collection.results) == 1 and "it is a copy of" in collection.left_out[0].reason


def test_a_run_of_an_earlier_version_is_read_with_the_files_beside_it(tmp_path):
    write_run(tmp_path, 0, ["outlier=convrot"], {"rounding": "absmax"}, metrics=make_metrics())

    (result,) = collect_results([tmp_path]).results

    assert (result.model, result.recipe) == ("tiny", "convrot · absmax")
    assert result.device == "EPYC, 2 threads" and result.version == "an earlier version"


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("status.json", "{", "status.json is not JSON"),
        ("status.json", '{"task": "run", "params": "convrot"}', "it is of an earlier version"),
        ("status.json", "[]", "it is of an earlier version"),
        ("environment.json", "{", "environment.json is not JSON"),
        ("environment.json", "[" * 100_000, "is nested in more than"),
        ("environment.json", '["EPYC"]', "it does not say its model"),
    ],
)
def test_damaged_files_beside_a_result_are_named(tmp_path, file, text, reason):
    write_result(tmp_path / "good" / "metrics.json")
    record = write_run(tmp_path, 0, ["outlier=convrot"], metrics=make_metrics())
    (record.folder / file).write_text(text)

    (left_out,) = collect_results([tmp_path]).left_out

    assert reason in left_out.reason


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_nothing_to_show_is_an_error(tmp_path, name):
    (tmp_path / "empty").mkdir()

    with pytest.raises(FileError, match=r"task\.atlas"):
        collect_results([tmp_path / name])


def test_names_of_others_stay_text(tmp_path):
    write_result(tmp_path / "metrics.json", model="<script>alert(1)</script>|x", device="a & b\n%")
    atlas = build_atlas(collect_results([tmp_path]))

    html, markdown = render_html(atlas), render_markdown(atlas)

    assert "<script>alert" not in html
    assert (
        r"\|x" in markdown and "\n%" not in markdown and r"a \& b\textbackslash{}n\%" in render_latex(atlas)
    )


def test_csv_has_every_metric_of_every_result(collection):
    rows = list(csv.DictReader(io.StringIO(render_csv(build_atlas(collection)))))

    assert len(rows) == 3
    assert {row["device"] for row in rows} == {"EPYC, 2 threads", "Xeon, 2 threads"}
    assert sorted(float(row[PSNR_DB]) for row in rows) == [32.0, 50.0, 51.0]


def test_a_speed_from_times_that_scatter_is_marked(collection, tmp_path):
    assert "?" not in render_markdown(build_atlas(collection))
    scattered = make_metrics(10.0, 2.0, **{"speed/step_ms_p90": 21.0})
    write_result(tmp_path / "dora" / "metrics.json", scattered, device="i7")

    atlas = build_atlas(collect_results([tmp_path]))

    assert "2.00× ?" in render_markdown(atlas) and "1.50× ?" not in render_markdown(atlas)
    for text in (render_markdown(atlas), render_latex(atlas), render_html(atlas)):
        assert "? behind a speed" in text
