"""The HTML report: that the file stands on its own, and that its sections show what they should."""

import itertools
import json
import math
import re

import pytest
from report.run_folders import (
    make_layer_row,
    make_metrics,
    make_noise_image,
    render_report,
    write_run,
    write_sample,
)
from support.hostile_texts import HOSTILE_TEXTS

from int8run.errors import ConfigError
from int8run.report import label_placement
from int8run.report.html_page import write_report
from int8run.report.page_plots import build_speed_quality_plot
from int8run.report.runs import name_runs
from int8run.tracking.run_record import find_records
from int8run.utils.text import UNSAFE_BUT_LINES, make_visible

HOSTILE_PROMPT = "a fox </script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def sweep_report(tmp_path_factory):
    """Folder, page and HTML of two strengths by two methods, with images and layers, and of a failed run."""
    folder = tmp_path_factory.mktemp("sweep")
    for n, (strength, outlier) in enumerate(itertools.product(("0", "1"), ("none", "convrot"))):
        run_folder, float_image = folder / str(n), make_noise_image(int(strength))
        owl_psnr = "inf" if n == 0 else 30.25
        images = [
            write_sample(
                run_folder,
                "000_fox_s0",
                HOSTILE_PROMPT,
                make_noise_image(10 + n),
                float_image,
                psnr_db=40.0 + n,
            ),
            write_sample(run_folder, "001_owl_s0", "owl", make_noise_image(7), float_image, psnr_db=owl_psnr),
        ]
        layers = [
            make_layer_row("blocks.0.q", 40.0 + n),
            make_layer_row("blocks.0.k", 30.0),
            make_layer_row("norm", why="modulation & more"),
        ]
        overrides = ["lora=stack_a", f"lora.strength={strength}", f"outlier={outlier}"]
        metrics = make_metrics(10 + n, 2 - 0.1 * n, 50.0 + n)
        write_run(folder, n, overrides, {"seed": "0"}, metrics, images, layers)

    overrides = ["lora=stack_a", "lora.strength=2", "outlier=none"]
    error = "FileError: <b>ink</b> is not there"
    write_run(folder, 4, overrides, state="FAILED", error=error, environment=None)
    page, html = render_report(find_records(folder), folder, "sweep <i>one</i>")
    return folder, page, html


# -- the file ------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_elsewhere(sweep_report):
    _, page, html = sweep_report

    assert "http://" not in html and "https://" not in html and "//cdn" not in html
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert not page.find_all("link") and not page.find_all("iframe")
    assert all("src" not in script for script in page.find_all("script"))
    assert all(img["src"].startswith("data:image/") for img in page.find_all("img") if "src" in img)
    assert all(link["href"].startswith("#") for link in page.find_all("a"))


def test_the_page_forbids_loading_anything(sweep_report):
    _, page, _ = sweep_report

    (policy,) = page.find_all("meta", **{"http-equiv": "Content-Security-Policy"})

    assert policy["content"] == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )


def test_elements_are_closed_ids_are_unique_and_links_have_targets(sweep_report):
    _, page, _ = sweep_report

    ids = [element["id"] for element in page.elements if element.get("id")]
    targets = {link["href"][1:] for link in page.find_all("a")}
    targets |= {use["xlink:href"][1:] for use in page.find_all("use")}
    clip_paths = [element.get("clip-path") or "" for element in page.elements]
    targets |= {match for path in clip_paths for match in re.findall(r"url\(#([^)]+)\)", path)}

    assert page.unbalanced == []
    assert len(ids) == len(set(ids))
    assert targets <= set(ids)


def test_text_from_files_is_escaped(sweep_report):
    _, page, html = sweep_report

    assert "<script>alert" not in html and "<b>ink" not in html and "<i>one" not in html
    assert page.find_all("h1")[0]["text"] == "sweep <i>one</i>"
    assert len(page.find_all("script")) == 3  # images, pairs to compare, and the script itself
    captions = [heading["text"].strip() for heading in page.find_all("th", scope="rowgroup")]
    assert captions == [f"{HOSTILE_PROMPT} · seed 0", "owl · seed 0"]


def test_a_small_sweep_is_a_small_file(sweep_report):
    _, _, html = sweep_report

    assert len(html) < 400_000  # 2 MB with images of 64 pixels


def test_the_same_records_give_the_same_file(sweep_report, tmp_path):
    folder, _, html = sweep_report

    write_report(find_records(folder), folder / "again.html", "sweep <i>one</i>")

    again = (folder / "again.html").read_text()
    (folder / "again.html").unlink()
    assert again == html


def test_a_report_without_a_run_is_an_error(tmp_path):
    message = r"there is no run to report on; give a folder that a run or a sweep wrote, or start one"

    with pytest.raises(ConfigError, match=message):
        write_report([], tmp_path / "report.html", "nothing")

    assert not (tmp_path / "report.html").exists()


def test_the_folder_is_made_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a" / "b" / "report.html"

    write_report([write_run(tmp_path, metrics=make_metrics())], path, "t")

    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


# -- which sections there are --------------------------------------------------------------------------------


def test_one_run_is_summarized(tmp_path):
    metrics = make_metrics(5.2, 2.54, 57.9, size=28.7e6)
    record = write_run(tmp_path, metrics=metrics, layers=[make_layer_row("q", 40.0)])

    page, _ = render_report([record], tmp_path)

    assert page.find_all("p", class_="verdict")[0]["text"] == (
        "2.54 times the float model's speed, a denoiser 2.00 times smaller, "
        "images at 57.9 dB PSNR to the float model's."
    )
    facts = [element["text"] for element in page.find_all("dd")]
    assert "5.20 ms per step, 2.54× the float model's speed" in facts
    assert "28.7 MB, 2.00× smaller than float" in facts
    assert not page.find_all("section", id="speed-quality") and not page.find_all("section", id="strength")
    assert page.unbalanced == []


def test_runs_that_all_failed_make_a_page(tmp_path):
    for n, option in enumerate(("none", "convrot")):
        error = f"no {option} here"
        write_run(tmp_path, n, [f"outlier={option}"], state="FAILED", error=error, environment=None)

    page, _ = render_report(find_records(tmp_path), tmp_path)

    assert "nothing to compare" in page.find_all("p", class_="verdict")[0]["text"]
    errors = [cell["text"] for cell in page.find_all("td", class_="error")]
    assert errors == ["#0: no none here", "#1: no convrot here"]
    assert not page.find_all("section", id="images") and not page.find_all("section", id="layers")
    assert page.unbalanced == []


def test_runs_of_other_tasks_are_listed(tmp_path):
    write_run(tmp_path, 0, ["outlier=none"], {"task": "run"}, make_metrics(10, 2, 40))
    write_run(tmp_path, 1, ["outlier=convrot"], {"task": "run"}, make_metrics(11, 1.9, 45))
    write_run(tmp_path, 2, ["task=quantize", "outlier=none"], environment=None)

    page, _ = render_report(find_records(tmp_path), tmp_path)

    values = [cell["text"] for cell in page.find_all("td", class_="setting")]
    assert values == ["none", "run", "convrot", "run", "none", "quantize"]


# -- what the sections show ----------------------------------------------------------------------------------


def test_the_table_of_runs_has_values_to_sort_by(sweep_report):
    _, page, _ = sweep_report

    headings = [heading for heading in page.find_all("th") if "aria-sort" in heading]
    texts = [heading["text"].strip() for heading in headings]
    psnr_cells = [
        cell
        for cell in page.find_all("td", class_="num")
        if cell["text"].endswith(".0") and cell["data-value"].startswith("5")
    ]

    assert texts[:5] == ["run", "lora.strength", "outlier", "state", "step\nms"]
    assert len(page.find_all("button", type="button")) >= len(headings)
    # no PSNR is marked as the best: the strengths have different float images
    assert [cell["data-value"] for cell in psnr_cells] == ["50.0", "51.0", "52.0", "53.0"]


def test_the_table_of_runs_shows_errors(sweep_report):
    _, page, _ = sweep_report

    errors = [cell["text"] for cell in page.find_all("td", class_="error")]

    assert errors[0] == "FileError: <b>ink</b> is not there"


def test_the_gallery_embeds_each_image_once(sweep_report):
    _, page, _ = sweep_report

    tiles = page.find_all("button", class_="tile")
    deferred = json.loads(page.find_all("script", id="deferred-images")[0]["text"])
    held = {img["data-image-id"] for img in page.find_all("img") if "data-image-id" in img}
    shown = {tile[f"data-{kind}"] for tile in tiles for kind in ("int8", "float", "difference")}

    assert len(tiles) == 8 and all(tile["data-float"] and tile["data-difference"] for tile in tiles)
    assert shown == held | deferred.keys()
    assert not held & deferred.keys() and len(held) == 5  # four foxes and an owl


def test_the_gallery_shows_the_psnr_below_each_image(sweep_report):
    _, page, _ = sweep_report

    texts = [" ".join(span["text"].split()) for span in page.find_all("span", class_="below-image")]

    assert texts == [
        "#0 40.0 dB",
        "#1 41.0 dB",
        "#2 42.0 dB",
        "#3 43.0 dB",
        "#0 equal",
        *(f"#{n} 30.2 dB = #0" for n in (1, 2, 3)),
    ]


def test_the_gallery_has_five_modes(sweep_report):
    _, page, _ = sweep_report

    modes = [radio["value"] for radio in page.find_all("input", name="mode")]

    assert modes == ["int8", "float", "slider", "flicker", "difference"]


def test_a_gallery_without_float_images_has_no_modes(tmp_path):
    sample = write_sample(tmp_path / "0", "000_fox_s0", "fox", make_noise_image(1))
    record = write_run(tmp_path, metrics={}, images=[sample])

    page, _ = render_report([record], tmp_path)

    assert not page.find_all("input", name="mode") and page.find_all("input", id="image-size")


def test_the_heatmap_has_values_to_sort_by_and_marks_float_layers(sweep_report):
    _, page, _ = sweep_report

    rows = [row for row in page.find_all("tr") if "data-worst" in row]

    assert [row["data-worst"] for row in rows] == ["40.0", "30.0", "inf"]
    assert rows[2]["class"] == "all-float" and "modulation & more" in rows[2]["text"]
    assert [cell["text"] for cell in page.find_all("td", class_="h9")] == ["42.0", "43.0"]


def test_the_heatmap_names_the_runs_that_show_weights(tmp_path):
    write_run(tmp_path, 0, ["outlier=0"], metrics={}, layers=[make_layer_row("a", 20.0, 44.0)])
    write_run(tmp_path, 1, ["outlier=1"], metrics={}, layers=[make_layer_row("a", None, 45.0)])

    page, _ = render_report(find_records(tmp_path), tmp_path)

    hints = [paragraph["text"] for paragraph in page.find_all("p")]
    assert any("of each layer's output; of its weight in #1" in hint for hint in hints)


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=repr)
def test_hostile_texts_are_shown_and_obeyed_by_nothing(tmp_path, text):
    for number in range(2):
        sample = write_sample(tmp_path / str(number), "000", f"prompt {text}", make_noise_image(number))
        write_run(
            tmp_path,
            number,
            [f"model.location={text}{number}", "lora.strength=1"],
            metrics=make_metrics(10 + number, 2, 50),
            images=[sample],
            layers=[make_layer_row(f"layer {text}".encode(errors="replace").decode(), 30)],
            error=f"error {text}",
            host=f"host {text}",
        )

    page, html = render_report(find_records(tmp_path), tmp_path, f"sweep {text}")

    shown = make_visible(text)
    body = next(element for element in page.elements if element["tag"] == "body")["text"]
    for what in ("sweep", "host"):
        assert f"{what} {shown}" in body
    assert f"layer {shown}" in body or "\udce4" in text, "no layer has such a name"
    assert any(tile.get("data-caption") == f"prompt {shown} · seed 0" for tile in page.find_all("button"))
    assert not UNSAFE_BUT_LINES.search(html)
    assert page.unbalanced == []
    scripts = [script for script in page.find_all("script") if script.get("type") != "application/json"]
    assert not any("alert" in script["text"] for script in scripts)
    assert not any("<" in script["text"] for script in page.find_all("script", type="application/json"))


def test_a_page_without_float_images_says_nothing_of_a_comparison_with_float(tmp_path):
    for number in range(2):
        sample = write_sample(tmp_path / str(number), "000", "fox", make_noise_image(number))
        metrics = make_metrics(10 + number, None, None, None)
        write_run(tmp_path, number, [f"lora.strength={number}"], metrics=metrics, images=[sample])

    page, _ = render_report(find_records(tmp_path), tmp_path)

    body = next(element for element in page.elements if element["tag"] == "body")["text"]
    for claim in ("compared with float", "PSNR to float", "shows float images", "closer to float"):
        assert claim not in body


@pytest.mark.slow
def test_the_work_of_a_page_grows_with_its_runs(tmp_path, monkeypatch):
    calls = []
    compute_overlap = label_placement.compute_overlap

    def count(a, b):
        calls.append(1)
        return compute_overlap(a, b)

    monkeypatch.setattr(label_placement, "compute_overlap", count)
    runs = []
    for number in range(150):
        metrics = make_metrics(10 + number, 2 + number / 100, 90 - number / 4)
        runs.append(write_run(tmp_path, number, [f"rounding={number}"], metrics=metrics))

    def count_overlaps(num_runs):
        calls.clear()
        build_speed_quality_plot(name_runs(runs[:num_runs]))
        return len(calls)

    assert count_overlaps(150) < 3 * count_overlaps(75)


def test_long_values_are_whole_in_the_tables_and_short_in_names(tmp_path):
    for number in range(2):
        write_run(tmp_path, number, [f"prompt={'x' * 3000}{number}"], metrics=make_metrics(10 + number))

    runs = name_runs(find_records(tmp_path))

    assert len({run.label for run in runs}) == 2 and max(len(run.label) for run in runs) < 80
    assert runs[1].varied_settings["prompt"] == "x" * 3000 + "1"


@pytest.mark.parametrize("metric", ["speed/step_ms_p50", "speed/ratio_vs_float", "quality/psnr_db"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.0, 1e300])
def test_a_number_that_no_axis_takes_does_not_cost_the_report(tmp_path, metric, value):
    for number in range(3):
        metrics = make_metrics(10 + number, 2, 50 + number) | ({metric: value} if number == 1 else {})
        write_run(tmp_path, number, [f"lora.strength={number}"], metrics=metrics)

    page, _ = render_report(find_records(tmp_path), tmp_path)

    assert len(page.find_all("section", id="speed-quality")) == 1


def test_a_run_that_failed_looks_like_one_wherever_it_is_listed(sweep_report):
    _, page, html = sweep_report

    assert '<tr id="run-4" class="failed">' in html
    marked = [element["text"] for element in page.find_all("span", class_="state unfinished")]
    assert marked == ["failed", "failed"], "above its settings and its command"


def test_an_empty_cell_of_the_page_shows_its_reason(tmp_path):
    records = [write_run(tmp_path, 0, ["outlier=none"], metrics=make_metrics())]
    without_float = {"metrics.baseline": "none"}
    metrics = make_metrics(ratio=None, psnr=None)
    records.append(write_run(tmp_path, 1, ["outlier=auto"], without_float, metrics=metrics))

    page, html = render_report(records, tmp_path)

    reasons = [cell["title"] for cell in page.find_all("td", class_="num") if "title" in cell]
    assert reasons == ["metrics.baseline=none: the float model did not run"] * 2
    assert "The pointer on a – shows why there is no value." in html


def test_many_settings_stand_behind_the_numbers_of_the_runs(tmp_path):
    keys = ["a", "b", "c", "d", "e"]
    for number in (0, 1):
        overrides = [f"{key}={number}" for key in keys]
        write_run(tmp_path, number, overrides, metrics=make_metrics(10, 2, 40))

    page, _ = render_report(find_records(tmp_path), tmp_path)

    headings = [heading["text"].strip() for heading in page.find_all("th") if "aria-sort" in heading]
    assert headings[:3] == ["run", "state", "step\nms"]
    assert headings[-5:] == keys
    assert [cell["text"] for cell in page.find_all("td", class_="setting")] == ["0"] * 5 + ["1"] * 5
