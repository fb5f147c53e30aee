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
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Browser, Page

from int8run.tracking.mlflow_dashboard import build_view_link
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


def run_sweep(folder: Path) -> Path:
    """A sweep of ten jobs on the tiny model, and its database, in a folder."""
    command = [sys.executable, "-m", "int8run.cli", "-m", *SWEEP, "hydra.sweep.dir=strengths-and-outliers"]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=folder)
    return folder / "strengths-and-outliers"


def save_screenshot(shot: bytes, path: Path) -> None:
    """An image with as many colours as its file has room for."""
    image = Image.open(BytesIO(shot)).convert("RGB")
    image.save(path, optimize=True)
    for colours in (256, 128, 64, 32):
        if path.stat().st_size <= LARGEST:
            break
        image.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size / 1000:.0f} kB")


def take_screenshot(
    browser: Browser, link: str, home: str, look: Callable[[Page], bytes], path: Path, **context: object
) -> Watch:
    """Open a page, take its image, and say what it complained about."""
    opened = browser.new_context(**context)
    opened.add_init_script(NO_ASSISTANT)
    page = opened.new_page()
    page.set_default_timeout(WAIT_MS)
    seen = watch(page, home, MLFLOW_COMPLAINTS if home.startswith("http") else ())
    page.goto(link)
    save_screenshot(look(page), path)
    opened.close()
    for complaint in seen.complaints:
        print(f"  console: {complaint}")
    for request in seen.outside:
        print(f"  outside: {request}")
    return seen


def mlflow_pictures(
    browser: Browser, address: str, experiment_id: str, records: list[Record], out: Path
) -> list[Watch]:
    """The view of the sweep: table, charts, grid."""
    sweep, drawn = records[0].sweep or "", [r for r in records if r.images]
    charts, table = (
        build_view_link(address, experiment_id, sweep, charts=wanted) for wanted in (True, False)
    )

    def wait_for_runs(page: Page) -> None:
        page.locator('[role="gridcell"] a[href*="/runs/"]').nth(len(records) - 1).wait_for(state="attached")

    def look_at_table(page: Page) -> bytes:
        wait_for_runs(page)
        page.get_by_test_id("sort-header-quality/psnr_db").wait_for()
        return page.screenshot()

    def look_at_charts(page: Page) -> bytes:
        wait_for_runs(page)
        # 70 pixels: below the search box
        page.get_by_text("Settings, memory, speed, quality").evaluate(
            "heading => { heading.style.scrollMarginTop = '70px'; heading.scrollIntoView() }"
        )
        page.locator(".parcoords svg .dimension").first.wait_for()
        page.locator(f"{CARD} .scatterlayer .point").nth(2 * len(drawn) - 1).wait_for(state="attached")
        page.locator(f"{CARD} .bars .point").first.wait_for(state="attached")
        page.wait_for_timeout(1000)  # bars grow
        return page.screenshot()

    def look_at_pictures(page: Page) -> bytes:
        wait_for_runs(page)
        page.locator(f"{CARD} img[src*='get-artifact']").first.wait_for()
        page.locator(CARD).first.locator(
            '[data-component-id="fullscreen_button_chartcard"]'
        ).click()  # wide enough for the runs' names
        dialog = page.get_by_role("dialog")
        dialog.locator("img[src*='get-artifact']").nth(
            min(len(drawn), MOST_RUNS) * len(drawn[0].images) - 1
        ).wait_for()
        return dialog.screenshot()

    size = lambda width, height: {"viewport": {"width": width, "height": height}}  # noqa: E731
    return [
        take_screenshot(
            browser,
            table,
            address,
            look_at_table,
            out / "mlflow_table.png",
            **size(1900, 420 + 32 * len(records)),
        ),
        take_screenshot(
            browser, charts, address, look_at_charts, out / "mlflow_compare.png", **size(1600, 1500)
        ),
        take_screenshot(
            browser,
            charts,
            address,
            look_at_pictures,
            out / "mlflow_images.png",
            **size(3100, 265 + ROW_PX * min(len(drawn[0].images), MOST_ROWS)),
        ),
    ]


def report_pictures(browser: Browser, report: Path, out: Path) -> list[Watch]:
    """The report: light, dark, and on a phone."""

    def whole(page: Page) -> bytes:
        return page.screenshot(full_page=True)

    def screens(page: Page) -> bytes:
        shots = []
        for part in PHONE_SCREENS:
            page.locator(part).evaluate("part => part.scrollIntoView()")
            shots.append(Image.open(BytesIO(page.screenshot())))
        row = Image.new("RGB", (sum(s.width + 20 for s in shots) - 20, shots[0].height), "gray")
        for place, shot in enumerate(shots):
            row.paste(shot, (place * (shot.width + 20), 0))
        buffer = BytesIO()
        row.save(buffer, "PNG")
        return buffer.getvalue()

    link = report.absolute().as_uri()
    screen = {"viewport": {"width": 1280, "height": 900}, "offline": True}
    phone = {
        "viewport": PHONE,
        "device_scale_factor": 1.5,
        "is_mobile": True,
        "has_touch": True,
        "offline": True,
    }
    return [
        take_screenshot(browser, link, link, whole, out / "report_light.png", color_scheme="light", **screen),
        take_screenshot(browser, link, link, whole, out / "report_dark.png", color_scheme="dark", **screen),
        take_screenshot(browser, link, link, screens, out / "report_phone.png", **phone),
    ]


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
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
            seen = mlflow_pictures(browser, address, experiment.experiment_id, records, args.out)
            seen += report_pictures(browser, report, args.out)
    return int(any(page.complaints or page.outside for page in seen))


if __name__ == "__main__":
    sys.exit(main())
