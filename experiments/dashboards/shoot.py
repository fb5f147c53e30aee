"""Images of a sweep's dashboards, taken by a real browser.

MLflow's table, charts and image grid, and the report.

    # runs the sweep first
    python experiments/dashboards/shoot.py --out experiments/dashboards
    python experiments/dashboards/shoot.py --out experiments/dashboards --sweep multirun/<date>/<time>

Needs chromium and playwright (int8run[dev]). Ends with 1 when a page complained in its console or asked for
anything outside this machine.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Browser, Page

from int8run.tracking.mlflow_view_tag import build_view_link
from int8run.tracking.run_record import Record, find_records

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from browser.chromium import MLFLOW_COMPLAINTS, NO_ASSISTANT, Watch, chromium, mlflow_server, watch

SWEEP = ["lora=stack_a", "lora.strength=0,0.25,0.5,0.75,1", "outlier=none,convrot"]
LARGEST = 500_000  # bytes of an image
WAIT_MS = 60_000
MOST_RUNS = 10  # in MLflow's image grid
MOST_ROWS, ROW_PX = 4, 265  # of the grid in its image
CARD = '[data-testid="experiment-view-compare-runs-card"]'
PHONE = {"width": 390, "height": 844}
PHONE_SCREENS = ("body", "#speed-quality", "#images")  # side by side
GAP_PX = 20  # between them


def run_sweep(folder: Path) -> Path:
    """A sweep of ten jobs on the tiny model, and its database, in a folder."""
    command = [sys.executable, "-m", "int8run.cli", "-m", *SWEEP, "hydra.sweep.dir=strengths-and-outliers"]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=folder)
    return folder / "strengths-and-outliers"


def save_screenshot(screenshot: bytes, path: Path) -> None:
    """An image with as many colours as its file has room for."""
    image = Image.open(BytesIO(screenshot)).convert("RGB")
    image.save(path, optimize=True)
    for colours in (256, 128, 64, 32):
        if path.stat().st_size <= LARGEST:
            break
        image.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size / 1000:.0f} kB")


@dataclass(frozen=True)
class Shot:
    """A page of which an image is taken.

    Args:
        link: of the page.
        look: waits until the page shows what it should, and takes the image.
        file: name of the image.
        context: settings of the browser's context, such as `viewport`.
    """

    link: str
    look: Callable[[Page], bytes]
    file: str
    context: Mapping[str, Any]


def take_screenshot(browser: Browser, shot: Shot, home: str, out: Path) -> Watch:
    """Open a page, save its image, and print what it complained about.

    Args:
        browser: a running one.
        shot: the page.
        home: the address from which everything must come that the page asks for.
        out: folder of the image.
    """
    opened = browser.new_context(**shot.context)
    opened.add_init_script(NO_ASSISTANT)
    page = opened.new_page()
    page.set_default_timeout(WAIT_MS)
    expected_complaints = MLFLOW_COMPLAINTS if home.startswith("http") else ()
    seen = watch(page, home, expected_complaints)
    page.goto(shot.link)
    save_screenshot(shot.look(page), out / shot.file)
    opened.close()
    for complaint in seen.complaints:
        print(f"  console: {complaint}")
    for request in seen.outside:
        print(f"  outside: {request}")
    return seen


def make_viewport(width: int, height: int) -> dict[str, Any]:
    """The setting of a browser's context for the size of its page, in pixels."""
    return {"viewport": {"width": width, "height": height}}


def list_mlflow_shots(address: str, experiment_id: str, records: Sequence[Record]) -> list[Shot]:
    """The view of a sweep in MLflow: table, charts, grid of images.

    Args:
        address: of the server.
        experiment_id: MLflow's.
        records: the jobs of the sweep.
    """
    sweep = records[0].sweep or ""
    with_images = [record for record in records if record.images]
    charts_link = build_view_link(address, experiment_id, sweep, charts=True)
    table_link = build_view_link(address, experiment_id, sweep, charts=False)
    images_per_run = len(with_images[0].images)
    grid_rows = min(images_per_run, MOST_ROWS)
    return [
        Shot(
            link=table_link,
            look=partial(look_at_table, n_runs=len(records)),
            file="mlflow_table.png",
            context=make_viewport(1900, 420 + 32 * len(records)),
        ),
        Shot(
            link=charts_link,
            look=partial(look_at_charts, n_runs=len(records), n_points=2 * len(with_images)),
            file="mlflow_compare.png",
            context=make_viewport(1600, 1500),
        ),
        Shot(
            link=charts_link,
            look=partial(
                look_at_images,
                n_runs=len(records),
                n_images=min(len(with_images), MOST_RUNS) * images_per_run,
            ),
            file="mlflow_images.png",
            context=make_viewport(3100, 265 + ROW_PX * grid_rows),
        ),
    ]


def wait_for_runs(page: Page, n_runs: int) -> None:
    """Wait until MLflow's table has the rows of all runs."""
    page.locator('[role="gridcell"] a[href*="/runs/"]').nth(n_runs - 1).wait_for(state="attached")


def look_at_table(page: Page, n_runs: int) -> bytes:
    """MLflow's table of runs."""
    wait_for_runs(page, n_runs)
    page.get_by_test_id("sort-header-quality/psnr_db").wait_for()
    return page.screenshot()


def look_at_charts(page: Page, n_runs: int, n_points: int) -> bytes:
    """MLflow's charts, when all points of the scatter plots are there."""
    wait_for_runs(page, n_runs)
    # 70 pixels: below the search box
    page.get_by_text("Settings, memory, speed, quality").evaluate(
        "heading => { heading.style.scrollMarginTop = '70px'; heading.scrollIntoView() }"
    )
    page.locator(".parcoords svg .dimension").first.wait_for()
    page.locator(f"{CARD} .scatterlayer .point").nth(n_points - 1).wait_for(state="attached")
    page.locator(f"{CARD} .bars .point").first.wait_for(state="attached")
    page.wait_for_timeout(1000)  # bars grow
    return page.screenshot()


def look_at_images(page: Page, n_runs: int, n_images: int) -> bytes:
    """MLflow's grid of images on the full screen, which is wide enough for the names of the runs."""
    wait_for_runs(page, n_runs)
    page.locator(f"{CARD} img[src*='get-artifact']").first.wait_for()
    full_screen = '[data-component-id="fullscreen_button_chartcard"]'
    page.locator(CARD).first.locator(full_screen).click()
    dialog = page.get_by_role("dialog")
    dialog.locator("img[src*='get-artifact']").nth(n_images - 1).wait_for()
    return dialog.screenshot()


def list_report_shots(report: Path) -> list[Shot]:
    """The report: light, its first screen, dark, and on a phone."""
    link = report.absolute().as_uri()
    screen = {**make_viewport(1280, 900), "offline": True}
    phone = {
        "viewport": PHONE,
        "device_scale_factor": 1.5,
        "is_mobile": True,
        "has_touch": True,
        "offline": True,
    }
    return [
        Shot(link, look_at_whole_page, "report_light.png", {**screen, "color_scheme": "light"}),
        Shot(link, look_at_first_screen, "report_top.png", {**screen, "color_scheme": "light"}),
        Shot(link, look_at_whole_page, "report_dark.png", {**screen, "color_scheme": "dark"}),
        Shot(link, look_at_phone_screens, "report_phone.png", phone),
    ]


def look_at_whole_page(page: Page) -> bytes:
    """The page from top to bottom."""
    return page.screenshot(full_page=True)


def look_at_first_screen(page: Page) -> bytes:
    """The page from its top to the end of the table of runs."""
    runs = page.locator("#runs").bounding_box()
    assert runs is not None, "the report has no table of runs"
    bottom = runs["y"] + runs["height"] + GAP_PX
    return page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": 1280, "height": bottom})


def look_at_phone_screens(page: Page) -> bytes:
    """Some screens of a phone side by side."""
    screens = []
    for part in PHONE_SCREENS:
        page.locator(part).evaluate("part => part.scrollIntoView()")
        screens.append(Image.open(BytesIO(page.screenshot())))
    total_width = sum(screen.width for screen in screens) + GAP_PX * (len(screens) - 1)
    row = Image.new("RGB", (total_width, screens[0].height), "gray")
    left = 0
    for screen in screens:
        row.paste(screen, (left, 0))
        left += screen.width + GAP_PX
    buffer = BytesIO()
    row.save(buffer, "PNG")
    return buffer.getvalue()


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument(
        "--sweep", type=Path, help="folder of a finished sweep; without it the sweep is run first"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        sweep = args.sweep or run_sweep(Path(work))
        records = find_records(sweep)
        report = sweep / "report.html"
        tracked = records[0].tracking if records else {}
        if not tracked or not report.is_file():
            parser.error(
                f"{sweep} is no finished sweep with tracker=mlflow: it needs runs that were logged, and "
                "report.html"
            )
        experiment = MlflowClient(tracked["store"]).get_experiment_by_name(tracked["experiment"])
        with mlflow_server(tracked["store"], Path(work, "server.log")) as address, chromium() as browser:
            mlflow_shots = list_mlflow_shots(address, experiment.experiment_id, records)
            seen = [take_screenshot(browser, shot, address, args.out) for shot in mlflow_shots]
            for shot in list_report_shots(report):
                seen.append(take_screenshot(browser, shot, shot.link, args.out))
    return int(any(page.complaints or page.outside for page in seen))


if __name__ == "__main__":
    sys.exit(main())
