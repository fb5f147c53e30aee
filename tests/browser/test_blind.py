"""The blind comparison in a browser: pairs without names, keys and taps, and a file that int8run counts."""

import json
from pathlib import Path

import pytest
from report.run_folders import make_metrics, make_noise_image, write_run, write_sample

from int8run.report.html_page import write_report
from int8run.tracking.run_record import find_records

pytestmark = pytest.mark.browser
NUM_SAMPLES = 6


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    """Two runs of six samples and their float images."""
    folder = tmp_path_factory.mktemp("runs")
    for number, outlier in enumerate(("none", "convrot")):
        images = []
        for sample in range(NUM_SAMPLES):
            image, float_image = make_noise_image(10 * number + sample), make_noise_image(100 + sample)
            key = f"{sample:03d}_s{sample}"
            entry = write_sample(
                folder / str(number), key, "fox", image, float_image, seed=sample, psnr_db=33.25
            )
            images.append(entry)
        write_run(folder, number, [f"outlier={outlier}"], metrics=make_metrics(), images=images)
    return folder


@pytest.fixture(scope="module")
def report_path(tmp_path_factory, runs_folder):
    """A report in a folder that holds nothing else."""
    path = Path(tmp_path_factory.mktemp("alone"), "report.html")
    write_report(find_records(runs_folder), path, "a sweep")
    return path


@pytest.fixture
def page(browser, report_path):
    """The page on a screen; it may neither complain nor ask for anything outside its file."""
    from browser.chromium import watch

    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    opened = context.new_page()
    seen = watch(opened, report_path.as_uri())
    opened.goto(report_path.as_uri())
    yield opened
    context.close()
    assert seen.complaints == [] and seen.outside == []


def save_votes(page, folder):
    """Press the button: the path of the file, and its content."""
    with page.expect_download() as download:
        page.locator("#blind-save").click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path, json.loads(path.read_text())


def start(page, seed=7):
    page.locator("#blind-seed").fill(str(seed))
    page.locator("#blind-start").click()


def read_images(page):
    return page.locator(".blind-pair img").evaluate_all("images => images.map(i => i.src)")


def test_votes_by_keys_become_a_file_that_is_counted(page, runs_folder, tmp_path):
    page.locator("#blind-second").select_option("#1")
    start(page)
    for key in ("ArrowLeft", "ArrowRight", "=", "ArrowLeft", "Backspace", "ArrowRight", "=", "ArrowRight"):
        page.keyboard.press(key)
    assert not page.locator("#blind-dialog").is_visible(), "the last vote ends it"
    # the dialog's close event, which shows the result, comes after the key's
    page.locator("#blind-results > *").first.wait_for()
    shown = page.locator("#blind-results").inner_text()

    path, content = save_votes(page, tmp_path)

    assert [vote["choice"] for vote in content["votes"]] == [
        "left",
        "right",
        "equal",
        "right",
        "equal",
        "right",
    ]
    assert sorted(vote["sample"] for vote in content["votes"]) == list(range(NUM_SAMPLES))
    assert {vote["left"] for vote in content["votes"]} == {"float", "#1"}, "sides are shuffled, too"
    (tally,) = write_report(find_records(runs_folder), tmp_path / "again.html", "renamed", [path])
    assert tally.num_decided == 4 and tally.ties == 2
    assert shown.rstrip(".") == tally.describe()
    assert tally.describe().startswith(tally.second) and tally.second in (tmp_path / "again.html").read_text()


def test_nothing_in_the_dialog_tells_which_is_which(page):
    start(page)
    html = page.locator("#blind-dialog").evaluate('d => d.outerHTML.replace(/src="[^"]*"/g, \'\')')
    text = page.locator("#blind-dialog").inner_text()

    assert "Which one is better? fox" in text and "1 of 6" in text
    assert "float" not in html and "convrot" not in html and "#0" not in html and "33.2" not in html


def test_a_seed_gives_the_same_order_and_another_seed_another(page):
    orders = []
    for seed in (7, 7, 8):
        start(page, seed)
        images = []
        for _ in range(3):
            images += read_images(page)
            page.keyboard.press("=")
        orders.append(images)
        page.locator("#blind-dialog").get_by_text("Stop").click()

    assert orders[0] == orders[1] != orders[2]


def test_a_tap_on_an_image_is_a_vote_for_it_on_a_phone(browser, report_path, tmp_path):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(report_path.as_uri())
    start(page)

    page.locator('.blind-pair [data-choice="right"]').tap()
    page.locator('.blind-answers [data-choice="equal"]').tap()
    width = page.evaluate("document.documentElement.scrollWidth")
    page.locator("#blind-dialog").get_by_text("Stop").tap()
    _, content = save_votes(page, tmp_path)
    context.close()

    assert [vote["choice"] for vote in content["votes"]] == ["right", "equal"]
    assert width <= 390


def test_two_equal_contenders_cannot_be_compared(page):
    page.locator("#blind-second").select_option("float")

    assert page.locator("#blind-start").is_disabled()
    assert page.locator("#blind-count").inner_text() == "Choose two different ones."
