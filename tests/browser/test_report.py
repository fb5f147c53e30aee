"""The report in a browser: opened from a disk, with no network, on a screen and on a phone."""

import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from int8run.report.html_page import write_report
from int8run.tracking.run_record import find_records

pytestmark = pytest.mark.browser
WAIT_MS = 60_000  # for what happens in a second on a quiet machine

STRENGTHS = (0, 0.5, 1)
SAMPLES = [("fox", 0), ("a very long prompt about a grey cat on a windowsill in the evening", 1)]


def write_job(folder, number, strength, outlier):
    """The output folder of a job, as int8run/tracking/run_record.py reads it."""
    (folder / "images").mkdir(parents=True)
    write_status(folder, number, strength, outlier)
    write_metrics(folder, number, strength, is_rotated=outlier == "convrot")
    write_layers(folder, is_rotated=outlier == "convrot")
    (folder / "environment.json").write_text(json.dumps({"host": "here", "versions": {"torch": "2.13"}}))
    (folder / "config.yaml").write_text("model: tiny\n")


def write_status(folder, number, strength, outlier):
    """status.json of a finished job."""
    choices = {"model": "tiny", "outlier": outlier, "lora": "stack_a"}
    status = {
        "state": "FINISHED",
        "error": None,
        "task": "run",
        "name": f"lora.strength={strength} outlier={outlier}",
        "overrides": [f"lora.strength={strength}", f"outlier={outlier}"],
        "choices": choices,
        "params": choices | {"lora.strength": str(strength), "seed": "0"},
        "sweep": "s",
        "number": number,
        "config_hash": f"{number:016x}",
        "build_key": outlier,
        "objective": "quality/psnr_db",
        "started": 1.79e9 + number,
        "ended": 1.79e9 + number + 1,
        "host": "here",
        "pid": 1,
        "process_started": 1.0,
        "jobs_at_once": 1,
        "tracking": None,
    }
    (folder / "status.json").write_text(json.dumps(status))


def write_metrics(folder, number, strength, *, is_rotated):
    """metrics.json and the images that it names."""
    # the images of the first job equal float: their PSNR is infinite
    metrics = {
        "quality/psnr_db": "inf" if number == 0 else 41 - 9 * strength + 5 * is_rotated,
        "speed/step_ms_p50": 21 + 4 * strength + is_rotated,
        "speed/ratio_vs_float": 1.6 - 0.1 * strength,
        "memory/denoiser_bytes": 6e6,
        "memory/denoiser_ratio": 0.27,
    }
    images = []
    for index, (prompt, seed) in enumerate(SAMPLES):
        files = {"file": f"images/{index:03d}.png", "float": f"images/{index:03d}_float.png"}
        for red, name in ((100, files["float"]), (110 + 20 * number, files["file"])):
            Image.new("RGB", (64, 64), (red, 80 * seed, 60)).save(folder / name)
        sample = {"key": f"{index:03d}_s{seed}", "prompt": prompt, "seed": seed}
        images.append({**sample, "psnr_db": 30.0 - number, "ssim": 0.9, **files})
    images[0]["inputs"] = [
        write_input(folder, "image", "cat.png", (200, 200, 0)),
        write_input(folder, "mask_image", "mask.png", (255, 255, 255)),
    ]
    content = {"metrics": metrics, "series": {}, "sampling": {}, "images": images}
    (folder / "metrics.json").write_text(json.dumps(content))


def write_input(folder, column, name, color):
    """The image of an input, and its entry in metrics.json."""
    Image.new("RGB", (64, 64), color).save(folder / "images" / name)
    return {"column": column, "name": name, "sha256": name, "images": [f"images/{name}"]}


def write_layers(folder, *, is_rotated):
    """layers.csv with six INT8 layers."""
    header = "name,quantized,why_not,weight_sqnr_db,output_sqnr_db"
    rows = [f"blocks.{n}.linear_with_a_long_name,true,,{40 + n + 3 * is_rotated},{35 + n}" for n in range(6)]
    (folder / "layers.csv").write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture(scope="module")
def report_path(tmp_path_factory):
    """A report of six runs in a folder that holds nothing else."""
    folder = tmp_path_factory.mktemp("sweep")
    jobs = [(strength, outlier) for strength in STRENGTHS for outlier in ("none", "convrot")]
    for number, (strength, outlier) in enumerate(jobs):
        write_job(folder / str(number), number, strength, outlier)
    path = Path(tmp_path_factory.mktemp("alone"), "report.html")
    write_report(find_records(folder), path, "lora.strength x outlier")
    return path


@pytest.fixture
def open_report(browser, report_path):
    """A function that opens the report in a window and returns the page.

    At the end no page may have complained, or have asked for anything outside its file.
    """
    from browser.chromium import watch

    contexts, watches = [], []

    def open_page(width=1280, height=900, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        watches.append(watch(page, report_path.as_uri()))
        page.goto(report_path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [seen.complaints for seen in watches] == [[]] * len(watches)
    assert [seen.outside for seen in watches] == [[]] * len(watches)


def choose_mode(page, name):
    """Press a button above the gallery."""
    page.locator(".modes label").filter(has_text=re.compile(rf"^\s*{name}")).click()


def test_all_images_are_in_the_file(open_report):
    page = open_report()

    widths = page.locator("img[src]").evaluate_all("images => images.map(i => i.naturalWidth)")

    num_inputs = 2
    assert len(widths) == 6 * len(SAMPLES) + num_inputs and min(widths) > 0


def test_a_click_on_a_heading_sorts(open_report):
    page = open_report()
    headings = page.locator("table.runs thead th")
    column = next(n for n, text in enumerate(headings.all_inner_texts()) if "psnr" in text.lower())

    def read_values():
        cells = page.locator("table.runs tbody tr").evaluate_all(
            f"rows => rows.map(row => row.cells[{column}].dataset.value)"
        )
        return [float(cell) for cell in cells]

    before = read_values()
    headings.nth(column).get_by_role("button").click()
    ascending = read_values()
    headings.nth(column).get_by_role("button").click()
    descending = read_values()

    assert ascending == sorted(before) != before
    assert descending == sorted(before, reverse=True)
    assert descending[0] == math.inf


def test_each_mode_of_the_gallery_shows_its_images(open_report):
    page = open_report()
    shown = {}

    for mode in ("INT8", "float", "slider", "flicker", "difference"):
        choose_mode(page, mode)
        tile = page.locator("#gallery .tile[data-int8]").nth(2)
        shown[mode] = [
            (img.get_attribute("class").split()[0], img.get_attribute("src"))
            for img in tile.locator("img").all()
        ]
        assert tile.locator("img").evaluate_all("images => images.every(i => i.naturalWidth > 0)")

    (int8,), (float_image,), (difference,) = shown["INT8"], shown["float"], shown["difference"]
    assert len({int8[1], float_image[1], difference[1]}) == 3
    assert shown["slider"] == shown["flicker"] == [float_image, ("over", int8[1])]


def test_the_slider_moves_the_divider_of_the_images(open_report):
    page = open_report()
    choose_mode(page, "slider")
    over = page.locator("#gallery .tile .over").first
    cuts = []

    for percent in ("20", "80"):
        page.locator("#divider").fill(percent)
        cuts.append(over.evaluate("img => getComputedStyle(img).clipPath + getComputedStyle(img).maskImage"))

    assert cuts[0] != cuts[1]


def test_results_are_laid_over_their_input(open_report):
    page = open_report()
    choose_mode(page, "input slider")
    result = page.locator("#gallery .tile[data-int8]").first
    given = page.locator("#gallery .tile[data-fixed]").first

    shown = [img.get_attribute("src") for img in result.locator("img").all()]
    assert shown[0] == given.locator("img").get_attribute("src") != shown[1]
    assert given.locator("img").count() == 1, "the input itself stays as it is"
    assert page.locator("#divider-label").inner_text().split() == ["input", "INT8"]

    page.locator("#divider").fill("25")
    assert "25%" in result.locator(".over").evaluate("img => getComputedStyle(img).clipPath")
    without_input = page.locator("#gallery .tile[data-int8]").last
    assert "no-input" in without_input.get_attribute("class")


def test_an_input_is_enlarged_in_every_mode(open_report):
    page = open_report()
    choose_mode(page, "difference")
    given = page.locator("#gallery .tile[data-fixed]").nth(1)

    given.click()

    assert page.locator("#lightbox-caption").inner_text() == "input mask_image: mask.png · fox · seed 0"
    images = page.locator("#lightbox-tile img")
    assert images.count() == 1
    assert images.first.get_attribute("src") == given.locator("img").get_attribute("src")
    page.keyboard.press("ArrowRight")
    assert "#0" in page.locator("#lightbox-caption").inner_text()


def test_flicker_goes_back_and_forth(open_report):
    page = open_report()

    choose_mode(page, "flicker")

    page.locator("#gallery.second").wait_for()
    page.locator("#gallery:not(.second)").wait_for()


def test_an_image_is_enlarged_and_closed(open_report):
    page = open_report()

    page.locator("#gallery .tile[data-int8]").first.click()
    assert page.locator("#lightbox-tile img").first.bounding_box()["width"] > 200

    page.keyboard.press("ArrowRight")
    assert "convrot" in page.locator("#lightbox-caption").inner_text()

    page.keyboard.press("Escape")
    page.locator("#lightbox").wait_for(state="hidden")


def measure_brightness(page, selector):
    """How bright, 0..255, the text of an element and the page behind it are."""
    colors = page.locator(selector).first.evaluate(
        "e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
    )
    return [sum(float(v) for v in color[color.index("(") + 1 : -1].split(",")[:3]) / 3 for color in colors]


def test_the_page_follows_the_systems_theme_until_the_button_is_pressed(open_report):
    page = open_report(scheme="light")
    text, background = measure_brightness(page, "h1")
    assert background - text > 150

    page.emulate_media(color_scheme="dark")
    text, background = measure_brightness(page, "h1")
    assert text - background > 150

    page.locator("#theme").click()
    text, background = measure_brightness(page, "h1")
    assert background - text > 150


def test_the_heatmap_filters_and_sorts_layers(open_report):
    page = open_report()
    visible = page.locator("#heatmap tbody tr:not([hidden]) th")

    page.locator("#filter").fill("blocks.3")
    assert visible.all_inner_texts() == ["blocks.3.linear_with_a_long_name"]
    assert page.locator("#num-layers").inner_text() == "1 of 6 layers"

    page.locator("#filter").fill("")
    page.locator("#worst-first").check()
    assert visible.first.inner_text() == "blocks.0.linear_with_a_long_name"


@pytest.mark.parametrize("mode", ["INT8", "slider", "input slider"])
def test_a_phone_scrolls_in_one_direction(open_report, mode):
    page = open_report(390, 844)

    choose_mode(page, mode)

    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390


def test_parts_without_a_scroll_box_fit_a_phone(open_report):
    page = open_report(390, 844)
    find_wide = """all => all
        .filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > 391)
        .map(e => e.outerHTML.slice(0, 80))"""

    wide = page.locator("main > section *:not(.visually-hidden):not(pre)").evaluate_all(find_wide)

    assert wide == []
