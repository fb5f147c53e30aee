"""The report in a browser: opened from a disk, with no network, on a screen and on a phone."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from int8run.report.html_page import write_report
from int8run.tracking.run_record import find_records

pytestmark = pytest.mark.browser

STRENGTHS = (0, 0.5, 1)
DRAWN = [("fox", 0), ("a very long prompt about a grey cat on a windowsill in the evening", 1)]


def write_job(folder, number, strength, outlier):
    """The output folder of a job, as int8run/tracking/run_record.py reads it."""
    (folder / "images").mkdir(parents=True)
    rotated = outlier == "convrot"
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
    images = []
    for place, (prompt, seed) in enumerate(DRAWN):
        files = {"file": f"images/{place:03d}.png", "float": f"images/{place:03d}_float.png"}
        for red, name in ((100, files["float"]), (110 + 20 * number, files["file"])):
            Image.new("RGB", (64, 64), (red, 80 * seed, 60)).save(folder / name)
        images.append(
            {
                "key": f"{place:03d}_s{seed}",
                "prompt": prompt,
                "seed": seed,
                "psnr_db": 30.0 - number,
                "ssim": 0.9,
                **files,
            }
        )
    # one picture equals float: its PSNR is infinite
    metrics = {
        "quality/psnr_db": "inf" if number == 0 else 41 - 9 * strength + 5 * rotated,
        "speed/step_ms_p50": 21 + 4 * strength + rotated,
        "speed/ratio_vs_float": 1.6 - 0.1 * strength,
        "memory/denoiser_bytes": 6e6,
        "memory/denoiser_ratio": 0.27,
    }
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "metrics.json").write_text(
        json.dumps({"metrics": metrics, "series": {}, "sampling": {}, "images": images})
    )
    (folder / "environment.json").write_text(json.dumps({"host": "here", "versions": {"torch": "2.13"}}))
    (folder / "config.yaml").write_text("model: tiny\n")
    rows = [f"blocks.{n}.linear_with_a_long_name,true,,{40 + n + 3 * rotated},{35 + n}" for n in range(6)]
    (folder / "layers.csv").write_text(
        "\n".join(["name,quantized,why_not,weight_sqnr_db,output_sqnr_db", *rows]) + "\n"
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of six runs in a folder that holds nothing else."""
    folder = tmp_path_factory.mktemp("sweep")
    jobs = [(strength, outlier) for strength in STRENGTHS for outlier in ("none", "convrot")]
    for number, job in enumerate(jobs):
        write_job(folder / str(number), number, *job)
    path = Path(tmp_path_factory.mktemp("alone"), "report.html")
    write_report(find_records(folder), path, "lora.strength x outlier")
    return path


@pytest.fixture
def opened(browser, report):
    """A function that opens the report in a window and returns the page; at the end nobody may have complained or asked outside."""
    from browser.chromium import watch

    contexts, watches = [], []

    def open_report(width=1280, height=900, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        watches.append(watch(page, report.as_uri()))
        page.goto(report.as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert [seen.complaints for seen in watches] == [[]] * len(watches)
    assert [seen.outside for seen in watches] == [[]] * len(watches)


def test_all_pictures_are_in_the_file(opened):
    page = opened()
    sizes = page.locator("img").evaluate_all("images => images.map(i => i.naturalWidth)")
    assert len(sizes) == 6 * len(DRAWN) and min(sizes) > 0


def test_a_click_on_a_heading_sorts(opened):
    page = opened()
    heads = page.locator("table.runs thead th")
    place = next(n for n, text in enumerate(heads.all_inner_texts()) if "psnr" in text.lower())

    def values():
        cells = page.locator("table.runs tbody tr").evaluate_all(
            f"rows => rows.map(row => row.cells[{place}].dataset.value)"
        )
        return [float(cell) for cell in cells]

    before = values()
    heads.nth(place).get_by_role("button").click()
    assert values() == sorted(before) != before
    heads.nth(place).get_by_role("button").click()
    assert values() == sorted(before, reverse=True)
    assert values()[0] == math.inf


def test_the_modes_of_the_wall(opened):
    page = opened()
    looks = {}
    for word in ("INT8", "float", "slider", "flicker", "difference"):
        page.locator(".modes label").filter(has_text=word).click()
        shot = page.locator("#wall .shot").nth(2)
        looks[word] = [
            (img.get_attribute("class").split()[0], img.get_attribute("src"))
            for img in shot.locator("img").all()
        ]
        assert shot.locator("img").evaluate_all("images => images.every(i => i.naturalWidth > 0)")
    (ours,), (base,), (difference,) = looks["INT8"], looks["float"], looks["difference"]
    assert len({ours[1], base[1], difference[1]}) == 3
    assert looks["slider"] == looks["flicker"] == [base, ("over", ours[1])]


def test_the_slider_cuts_the_pictures(opened):
    page = opened()
    page.locator(".modes label").filter(has_text="slider").click()
    over = page.locator("#wall .shot .over").first
    cuts = []
    for percent in ("20", "80"):
        page.locator("#cut").fill(percent)
        cuts.append(over.evaluate("img => getComputedStyle(img).clipPath + getComputedStyle(img).maskImage"))
    assert cuts[0] != cuts[1]


def test_flicker_goes_back_and_forth(opened):
    page = opened()
    page.locator(".modes label").filter(has_text="flicker").click()
    page.locator("#wall.second").wait_for()
    page.locator("#wall:not(.second)").wait_for()


def test_a_picture_is_enlarged_and_closed(opened):
    page = opened()
    page.locator("#wall .shot").first.click()
    assert page.locator("#large-shot img").first.bounding_box()["width"] > 200
    page.keyboard.press("ArrowRight")
    assert "convrot" in page.locator("#large-words").inner_text()
    page.keyboard.press("Escape")
    page.locator("#large").wait_for(state="hidden")


def luminance(page, part):
    """How light the colour of a part is, 0..255: of its letters, and of the page behind it."""
    colours = page.locator(part).first.evaluate(
        "e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
    )
    return [
        sum(float(v) for v in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3 for colour in colours
    ]


def test_dark_and_light(opened):
    page = opened(scheme="light")
    letters, ground = luminance(page, "h1")
    assert ground - letters > 150
    page.emulate_media(color_scheme="dark")
    letters, ground = luminance(page, "h1")
    assert letters - ground > 150
    page.locator("#theme").click()
    letters, ground = luminance(page, "h1")
    assert ground - letters > 150


@pytest.mark.parametrize("mode", ["INT8", "slider"])
def test_a_phone_scrolls_in_one_direction(opened, mode):
    page = opened(390, 844)
    page.locator(".modes label").filter(has_text=mode).click()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390


def test_parts_that_have_no_scroll_box_fit_a_phone(opened):
    page = opened(390, 844)
    wide = """all => all.filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > 391).map(e => e.outerHTML.slice(0, 80))"""
    assert page.locator("main > section *:not(.unseen):not(pre)").evaluate_all(wide) == []
