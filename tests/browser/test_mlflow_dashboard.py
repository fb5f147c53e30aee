"""The view of a sweep, opened in MLflow's own page: nothing else can tell whether MLflow understands it."""

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from PIL import Image

from int8run.tracking.mlflow_dashboard import build_view_state, find_varying_params
from int8run.tracking.mlflow_view_tag import build_experiment_link, build_view_link, write_view

pytestmark = [pytest.mark.browser, pytest.mark.slow]

KEYS = ["sample/000_fox_s0", "sample/001_grey cat_s1"]
RUN_LINKS = '[role="gridcell"] a[href*="/runs/"]'
CARDS = '[data-testid="experiment-view-compare-runs-card"]'
SPEED_QUALITY = "speed/step_ms_p50 vs. quality/psnr_db"
HAS_PIXELS = """canvas => {
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    return pixels.some(value => value > 0);
}"""
WAIT_MS = 60_000  # for what happens in a second on a quiet machine


def log_run(client, experiment_id, sweep, strength, outlier):
    """A run as int8run logs one, with the names of design.md."""
    name = f"lora.strength={strength} outlier={outlier}"
    run_id = client.create_run(experiment_id, tags={"sweep": sweep}, run_name=name).info.run_id
    rotated = outlier == "convrot"
    values = {
        "quality/psnr_db": 41 - 9 * strength + 5 * rotated,
        "speed/step_ms_p50": 21 + 4 * strength + rotated,
        "memory/denoiser_bytes": 6e6,
    }
    now = int(time.time() * 1000)
    series = [Metric("series/step_ms", 20 + step, now, step) for step in range(4)]
    params = {"model": "tiny", "outlier": outlier, "lora.strength": str(strength)}
    client.log_batch(
        run_id,
        [Metric(k, v, now, 0) for k, v in values.items()] + series,
        [Param(k, v) for k, v in params.items()],
    )
    for key in KEYS:
        client.log_image(
            run_id, Image.new("RGB", (64, 64), (200, int(200 * strength), 80 * rotated)), key=key, step=0
        )
    client.set_terminated(run_id)
    return name


@pytest.fixture(scope="module")
def shared(browser, tmp_path_factory):
    """A server with two sweeps in one experiment: its address, the experiment, and the names of the runs."""
    from browser.chromium import mlflow_server

    folder = tmp_path_factory.mktemp("mlflow")
    store = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(store)
    experiment_id = client.create_experiment("int8run", artifact_location=Path(folder, "artifacts").as_uri())
    client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")
    settings = {"first": [(s, o) for s in (0, 0.5) for o in ("none", "convrot")], "second": [(1, "none")]}
    names = {}
    for sweep, jobs in settings.items():
        names[sweep] = [log_run(client, experiment_id, sweep, *job) for job in jobs]
        runs = client.search_runs([experiment_id], f"tags.sweep = '{sweep}'")
        metrics = {name for run in runs for name in run.data.metrics}
        # a single image has no grid, and a single run nothing that varies
        keys = KEYS if sweep == "first" else KEYS[:1]
        write_view(
            client,
            experiment_id,
            sweep,
            build_view_state(find_varying_params(run.data.params for run in runs), metrics, keys, sweep),
        )
    with mlflow_server(store, folder / "server.log") as address:
        yield address, experiment_id, names


@pytest.fixture
def opened(browser, shared):
    """A function that opens a link and returns the page and what it complained about."""
    from browser.chromium import MLFLOW_COMPLAINTS, NO_ASSISTANT, watch

    context = browser.new_context(viewport={"width": 1600, "height": 1200})
    context.add_init_script(NO_ASSISTANT)

    def open_link(link):
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        seen = watch(page, shared[0], MLFLOW_COMPLAINTS)
        page.goto(link)
        return page, seen

    yield open_link
    context.close()


def shown_runs(page, count):
    """Names of the runs in the table, once it has that many."""
    page.get_by_text(f"{count} matching runs" if count > 1 else "1 matching run").wait_for()
    page.locator(RUN_LINKS).nth(count - 1).wait_for()
    return sorted(page.locator(RUN_LINKS).all_inner_texts())


def wait_for_images(page, count):
    """Until that many images of runs are drawn, and none is broken."""
    loaded = (
        "[...document.querySelectorAll('img[src*=\"get-artifact\"]')].filter(i => i.naturalWidth > 0).length"
    )
    page.wait_for_function(f"{loaded} === {count}")


def test_the_link_of_a_sweep_opens_its_images(opened, shared):
    address, experiment_id, names = shared

    page, seen = opened(build_view_link(address, experiment_id, "first"))

    assert shown_runs(page, 4) == sorted(names["first"])
    wait_for_images(page, 4 * len(KEYS))
    grid = page.locator(CARDS).first
    assert all(key in grid.inner_text() for key in KEYS)
    assert seen.complaints == [] and seen.outside == []


def test_the_link_of_a_sweep_opens_lines_across_its_settings(opened, shared):
    address, experiment_id, _ = shared

    page, seen = opened(build_view_link(address, experiment_id, "first"))

    parallel = page.locator(".parcoords")
    parallel.scroll_into_view_if_needed()
    parallel.locator("svg .dimension").first.wait_for()
    assert parallel.locator("svg .label").all_text_contents() == [
        "outlier",
        "lora.strength",
        "memory/denoiser_bytes",
        "speed/step_ms_p50",
        "quality/psnr_db",
    ]
    assert parallel.locator("canvas.foreground").evaluate(HAS_PIXELS)
    assert seen.complaints == [] and seen.outside == []


@pytest.mark.parametrize(
    ("heading", "mark", "titles"),
    [
        (
            "Quality against speed and memory",
            ".scatterlayer .point",
            [SPEED_QUALITY, "memory/denoiser_bytes vs. quality/psnr_db"],
        ),
        (
            "Speed, quality, memory",
            ".bars .point",
            ["speed/step_ms_p50", "quality/psnr_db", "memory/denoiser_bytes"],
        ),
        ("Step by step", ".scatterlayer .js-line", ["series/step_ms"]),
    ],
)
def test_the_link_of_a_sweep_opens_its_charts(opened, shared, heading, mark, titles):
    address, experiment_id, _ = shared

    page, seen = opened(build_view_link(address, experiment_id, "first"))

    page.get_by_text(heading).scroll_into_view_if_needed()
    for title in titles:
        has_title = page.locator(CARDS).filter(has=page.get_by_text(title, exact=True))
        card = has_title.filter(has=page.locator(mark)).last
        card.locator(mark).nth(3).wait_for(state="attached")
        # MLflow draws every line twice: smoothed and as measured
        assert card.locator(mark).count() == (8 if "line" in mark else 4)
    assert seen.complaints == [] and seen.outside == []


def test_the_link_of_a_sweep_opens_its_table(opened, shared):
    address, experiment_id, names = shared
    page, seen = opened(build_view_link(address, experiment_id, "first", charts=False))

    assert shown_runs(page, 4) == sorted(names["first"])

    page.get_by_test_id("sort-header-memory/denoiser_bytes").wait_for()
    headers = page.locator('[data-testid^="sort-header-"]').all()
    titles = [
        header.inner_text() for header in sorted(headers, key=lambda header: header.bounding_box()["x"])
    ]

    assert titles[:7] == [
        "Run Name",
        "Created",
        "outlier",
        "lora.strength",
        "quality/psnr_db",
        "speed/step_ms_p50",
        "memory/denoiser_bytes",
    ]
    assert seen.complaints == [] and seen.outside == []


def test_a_single_run_with_a_single_image_is_shown(opened, shared):
    address, experiment_id, names = shared
    page, seen = opened(build_view_link(address, experiment_id, "second"))

    assert shown_runs(page, 1) == names["second"]

    wait_for_images(page, 1)

    assert seen.complaints == [] and seen.outside == []


def test_the_plain_link_shows_all_runs(opened, shared):
    address, experiment_id, names = shared
    page, _ = opened(build_experiment_link(address, experiment_id))

    assert shown_runs(page, 5) == sorted([*names["first"], *names["second"]])
