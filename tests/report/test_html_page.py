"""The HTML report: what it says about hand-made runs, and that the file stands on its own."""

import base64
import csv
import itertools
import json
import math
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from int8run.errors import ConfigError
from int8run.report import heatmap, image_gallery, plots, ranking
from int8run.report.columns import METRIC_COLUMNS, PSNR_DB, SPEED_RATIO, STEP_MS
from int8run.report.curves import build_strength_curves
from int8run.report.html_page import (
    compare_environments,
    compare_settings,
    list_commands,
    list_facts,
    select_deferred_images,
    write_report,
)
from int8run.report.ranking import build_table, find_pareto_front, group_candidates
from int8run.report.run_files import LAYER_COLUMNS, make_difference_image
from int8run.report.runs import format_tags, name_runs, shorten_keys
from int8run.report.verdict import recommend
from int8run.tracking.run_record import find_records, read_record

BYTES, SMALLER, SSIM = "memory/denoiser_bytes", "memory/denoiser_ratio", "quality/ssim"
EPYC = {
    "python": "3.11",
    "device": "cpu",
    "threads": 2,
    "cpu": "EPYC",
    "git": None,
    "versions": {"torch": "2.13.0"},
}
VOID = {"area", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


def measured(step=10.0, ratio=2.0, psnr=50.0, ssim=0.99, size=30e6, **more):
    values = {
        STEP_MS: step,
        "speed/step_ms_p90": None if step is None else 1.1 * step,
        SPEED_RATIO: ratio,
        PSNR_DB: psnr,
        SSIM: ssim,
        BYTES: size,
    }
    return {name: value for name, value in (values | {SMALLER: 2.0} | more).items() if value is not None}


def record(
    folder,
    number=0,
    overrides=(),
    params=None,
    metrics=None,
    images=(),
    layers=(),
    environment=EPYC,
    state="FINISHED",
    **status,
):
    """A job's folder as a job writes it, and its record. `metrics=None`: it did not get so far."""
    place = folder / str(number)
    place.mkdir(parents=True, exist_ok=True)
    said = dict(word.split("=", 1) for word in overrides)
    about = {
        "state": state,
        "error": None,
        "task": "run",
        "name": " ".join(overrides),
        "overrides": list(overrides),
        "choices": {},
        "params": {"model": "tiny"} | said | (params or {}),
        "sweep": "s",
        "number": number,
        "config_hash": "0",
        "build_key": "0",
        "objective": PSNR_DB,
        "started": 1790000000.0 + 60 * number,
        "ended": 1790000050.0 + 60 * number,
        "host": "box",
        "jobs_at_once": 1,
    } | status
    (place / "status.json").write_text(json.dumps(about))
    if metrics is not None:
        text = {
            name: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for name, v in metrics.items()
        }
        (place / "metrics.json").write_text(
            json.dumps({"metrics": text, "series": {}, "images": list(images)})
        )
    if environment:
        (place / "environment.json").write_text(json.dumps(environment))
    if layers:
        with (place / "layers.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, LAYER_COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(layers)
    return read_record(place)


def sweep(folder, metrics, options=("none", "convrot"), key="outlier"):
    """A run per option."""
    return name_runs(
        [
            record(folder, n, [f"{key}={o}"], metrics=m)
            for n, (o, m) in enumerate(zip(options, metrics, strict=True))
        ]
    )


def noise(seed, side=16):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def drawing(place, key, prompt, ours, base=None, seed=0, **values):
    """A drawing's files and its entry in metrics.json."""
    folder = place / "images"
    folder.mkdir(parents=True, exist_ok=True)
    ours.save(folder / f"{key}.png")
    about = {"key": key, "prompt": prompt, "seed": seed, "file": f"images/{key}.png", **values}
    if base is not None:
        base.save(folder / f"{key}_float.png")
        about["float"] = f"images/{key}_float.png"
    return about


class Page(HTMLParser):
    """The elements of a page, their text, and whether every one is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.unbalanced = [], [], []
        self.feed(text)
        self.unbalanced += [element["tag"] for element in self.open]

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open[-1]["tag"] != tag:
            self.unbalanced.append(tag)
            return
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        return [
            e
            for e in self.elements
            if e["tag"] == tag and all(e.get(k.rstrip("_")) == v for k, v in attributes.items())
        ]


def page_of(records, folder, title="a sweep"):
    write_report(records, folder / "report.html", title)
    text = (folder / "report.html").read_text()
    return Page(text), text


def layer(name, output=None, weight=None, why=""):
    fields = {
        "name": name,
        "quantized": "false" if why else "true",
        "why_not": why,
        "outlier": "none",
        "rounding": "absmax",
    }
    return fields | {"backend_used": "vnni", "output_sqnr_db": output or "", "weight_sqnr_db": weight or ""}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two strengths by two methods and a run that failed, with pictures and layers; the page of it."""
    folder = tmp_path_factory.mktemp("small")
    combos = list(itertools.product(("0", "1"), ("none", "convrot")))
    for n, (strength, outlier) in enumerate(combos):
        base, place = noise(int(strength)), folder / str(n)
        pictures = [
            drawing(
                place,
                "000_fox_s0",
                "a fox </script><script>alert(1)</script>",
                noise(10 + n),
                base,
                psnr_db=40.0 + n,
            ),
            drawing(place, "001_owl_s0", "owl", noise(7), base, psnr_db="inf" if n == 0 else 30.25),
        ]
        rows = [
            layer("blocks.0.q", 40.0 + n),
            layer("blocks.0.k", 30.0),
            layer("norm", why="modulation & more"),
        ]
        words = ["lora=stack_a", f"lora.strength={strength}", f"outlier={outlier}"]
        record(folder, n, words, {"seed": "0"}, measured(10 + n, 2 - 0.1 * n, 50.0 + n), pictures, rows)
    words = ["lora=stack_a", "lora.strength=2", "outlier=none"]
    record(folder, 4, words, state="FAILED", error="FileError: <b>ink</b> is not there", environment=None)
    page, text = page_of(find_records(folder), folder, "sweep <i>one</i>")
    return folder, page, text


# -- the file -----------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_network_and_asks_for_none(small):
    _, page, text = small
    assert "http://" not in text and "https://" not in text and "//cdn" not in text
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert (
        policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )
    assert not page.all("link") and not page.all("iframe") and all("src" not in e for e in page.all("script"))
    assert all(e["src"].startswith("data:image/") for e in page.all("img") if "src" in e)
    assert all(e["href"].startswith("#") for e in page.all("a"))


def test_elements_are_closed_ids_are_single_and_links_have_targets(small):
    _, page, _ = small
    assert page.unbalanced == []
    ids = [e["id"] for e in page.elements if e.get("id")]
    assert len(ids) == len(set(ids))
    wanted = {e["href"][1:] for e in page.all("a")} | {e["xlink:href"][1:] for e in page.all("use")}
    wanted |= {m for e in page.elements for m in re.findall(r"url\(#([^)]+)\)", e.get("clip-path") or "")}
    assert wanted <= set(ids)


def test_words_from_files_are_text(small):
    _, page, text = small
    assert "<script>alert" not in text and "<b>ink" not in text and "<i>one" not in text
    assert page.all("h1")[0]["text"] == "sweep <i>one</i>"
    assert len(page.all("script")) == 2
    captions = [e["text"].strip() for e in page.all("th", scope="rowgroup")]
    assert captions == ["a fox </script><script>alert(1)</script> · seed 0", "owl · seed 0"]


def test_a_small_sweep_is_a_small_file(small):
    assert len(small[2]) < 400_000  # 2 MB with pictures of 64 pixels


def test_the_same_records_give_the_same_bytes(small, tmp_path):
    folder, _, text = small
    write_report(find_records(folder), folder / "again.html", "sweep <i>one</i>")
    again = (folder / "again.html").read_text()
    (folder / "again.html").unlink()
    assert again == text


def test_a_report_without_a_run_is_refused(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"there is no run to report on; give a folder that a run or a sweep wrote, or start one",
    ):
        write_report([], tmp_path / "report.html", "nothing")
    assert not (tmp_path / "report.html").exists()


def test_the_folder_is_made_and_nothing_else_is_left(tmp_path):
    write_report([record(tmp_path, metrics=measured())], tmp_path / "a" / "b" / "report.html", "t")
    assert [f.name for f in (tmp_path / "a" / "b").iterdir()] == ["report.html"]


def test_one_run_makes_a_page(tmp_path):
    metrics = measured(5.2, 2.54, 57.9, size=28.7e6)
    page, _ = page_of([record(tmp_path, metrics=metrics, layers=[layer("q", 40.0)])], tmp_path)
    assert page.all("p", class_="verdict")[0]["text"] == (
        "2.54 times the float model's speed, a denoiser 2.00 times smaller, pictures at 57.9 dB PSNR from float's."
    )
    said = [e["text"] for e in page.all("dd")]
    assert (
        "5.20 ms a step, 2.54× the float model's speed" in said
        and "28.7 MB, 2.00× smaller than float" in said
    )
    assert (
        not page.all("section", id="speed-quality")
        and not page.all("section", id="strength")
        and page.unbalanced == []
    )


def test_runs_that_all_failed_make_a_page(tmp_path):
    for n, word in enumerate(("none", "convrot")):
        record(tmp_path, n, [f"outlier={word}"], state="FAILED", error=f"no {word} here", environment=None)
    page, _ = page_of(find_records(tmp_path), tmp_path)
    assert "nothing to compare" in page.all("p", class_="verdict")[0]["text"]
    assert [e["text"] for e in page.all("td", class_="error")] == ["#0: no none here", "#1: no convrot here"]
    assert (
        not page.all("section", id="pictures")
        and not page.all("section", id="layers")
        and page.unbalanced == []
    )


def test_runs_of_other_tasks_are_listed_and_change_no_name(tmp_path):
    record(tmp_path, 0, ["outlier=none"], {"task": "run"}, measured(10, 2, 40))
    record(tmp_path, 1, ["outlier=convrot"], {"task": "run"}, measured(11, 1.9, 45))
    record(tmp_path, 2, ["task=quantize", "outlier=none"], environment=None)
    runs = name_runs(find_records(tmp_path))
    assert [run.label for run in runs] == ["outlier=none", "outlier=convrot", "outlier=none"]
    page, _ = page_of(find_records(tmp_path), tmp_path)
    assert [e["text"] for e in page.all("td", class_="word")] == [
        "none",
        "run",
        "convrot",
        "run",
        "none",
        "quantize",
    ]


# -- what differs -------------------------------------------------------------------------------------------------------


def test_what_the_user_named_tells_runs_apart(tmp_path):
    for n, (word, group) in enumerate((("none", {}), ("convrot", {"outlier.group_size": "256"}))):
        record(
            tmp_path,
            n,
            ["model=tiny", f"+outlier={word}", "tracker=none" if n else "tracker=mlflow"],
            {"outlier": word, **group},
            {},
        )
    records = find_records(tmp_path)
    assert [dict(run.varied_settings) for run in name_runs(records)] == [
        {"outlier": "none"},
        {"outlier": "convrot"},
    ]
    assert dict(compare_settings(records)["differ"])["outlier.group_size"] == ["–", "256"]
    assert ("model", "tiny") in compare_settings(records)["common"]


def test_without_named_differences_all_count(tmp_path):
    for n in range(2):
        record(tmp_path, n, ["model=tiny"], {"backend": "ab"[n]}, {})
    assert [run.name for run in name_runs(find_records(tmp_path))] == ["#0 backend=a", "#1 backend=b"]


def test_numbers_that_are_not_single_give_way_to_places(tmp_path):
    runs = name_runs([record(tmp_path / side, 3, metrics={}) for side in "ab"])
    assert [run.tag for run in runs] == ["#0", "#1"]


@pytest.mark.parametrize(
    ("keys", "short"),
    [
        (["lora.strength", "outlier"], ["strength", "outlier"]),
        (
            ["lora.strength", "lora.adapters.0.strength", "lora.adapters.1.strength"],
            ["lora.strength", "0.strength", "1.strength"],
        ),
        (["a.b", "b"], ["a.b", "b"]),
    ],
)
def test_short_names_are_single(keys, short):
    assert list(shorten_keys(keys).values()) == short


def test_commands_can_be_pasted(tmp_path):
    run = name_runs([record(tmp_path, 5, ["prompts.prompts=[a fox,an owl]", "lora=none"])])
    ((_, command, place),) = list_commands(run, tmp_path)
    assert (command, place) == ("int8run 'prompts.prompts=[a fox,an owl]' lora=none", "5")


def test_environments_say_who_differs(tmp_path):
    other = EPYC | {"versions": {"torch": "2.12.0"}}
    runs = name_runs(
        [record(tmp_path, n, metrics={}, environment=EPYC if n < 3 else other) for n in range(4)]
    )
    found = dict(compare_environments(runs))
    assert found["versions.torch"] == [("2.13.0", "#0–#2"), ("2.12.0", "#3")]
    assert (
        found["python"] == [("3.11", "")] and found["git"] == [("–", "")] and found["host"] == [("box", "")]
    )


def test_the_head_says_what_ran(tmp_path):
    runs = name_runs([record(tmp_path, 0, metrics={}), record(tmp_path, 1, state="KILLED", ended=None)])
    said = dict(list_facts(runs))
    assert said["Runs"] == "2: 1 finished, 1 killed" and said["When"] == "2026-09-21 14:13 – 14:14 UTC"
    assert (said["Machine"], said["Host"], said["Model"]) == ("EPYC, 2 threads", "box", "tiny")


@pytest.mark.parametrize(
    ("tags", "text"), [(["#0"], "#0"), (["#0", "#1"], "#0, #1"), (["#0", "#1", "#2", "#7"], "#0–#2, #7")]
)
def test_tags_are_listed_short(tags, text):
    assert format_tags(tags) == text


# -- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "values", "shown"),
    [
        (PSNR_DB, [math.inf, 57.84, None], ["equal", "57.8", "–"]),
        (SSIM, [1.0, 0.99997, 0.99994, 0.5], ["1.0000", ">0.9999", "0.9999", "0.5000"]),
        (STEP_MS, [4.567, 812.3], ["4.57", "812.30"]),
        (STEP_MS, [412.34, 812.3], ["412", "812"]),
        (BYTES, [28.7e6], ["28.7"]),
        (BYTES, [12.1e9], ["12100"]),
        (SPEED_RATIO, [2.544, 0.5], ["2.54×", "0.50×"]),
        ("quality/latent_rel_err", [0.0, 0.00001, 0.0054], ["0.00", "<0.01", "0.54"]),
    ],
)
def test_numbers_are_shown_honestly(metric, values, shown):
    column = next(c for c in METRIC_COLUMNS if c.metric == metric)
    digits = column.choose_decimals([v for v in values if v is not None])
    assert [column.format(v, digits) for v in values] == shown


def test_the_table_marks_the_best_and_the_front(tmp_path):
    runs = sweep(
        tmp_path, [measured(10, 2.0, 40), measured(11, 1.8, 45), measured(12, 1.7, 44)], ("a", "b", "c")
    )
    columns, rows = build_table(runs)
    best = {c.metric: [row["cells"][i]["best"] for row in rows] for i, c in enumerate(columns)}
    assert (
        best[STEP_MS] == [True, False, False]
        and best[PSNR_DB] == [False, True, False]
        and best[BYTES] == [False] * 3
    )
    assert [row["front"] for row in rows] == [True, True, False]
    assert "quality/lpips" not in best


def test_a_metric_that_was_asked_for_has_a_column(tmp_path):
    run = record(
        tmp_path, metrics=measured() | {"lora/overhead_ratio": 1.25}, objective="lora/overhead_ratio"
    )
    columns, rows = build_table(name_runs([run]))
    assert (columns[-1].heading, rows[0]["cells"][-1]["text"]) == ("lora/overhead_ratio", "1.25")


def test_numbers_of_runs_that_did_not_finish_do_not_count(tmp_path):
    run = name_runs([record(tmp_path, metrics=measured(), state="KILLED")])[0]
    assert run.get_metric(STEP_MS) is None
    assert name_runs([record(tmp_path / "b", metrics={PSNR_DB: math.nan})])[0].get_metric(PSNR_DB) is None


def test_the_table_sorts_by_numbers_and_knows_what_is_missing(small):
    _, page, _ = small
    heads = [e for e in page.all("th") if "aria-sort" in e]
    assert [e["text"].strip() for e in heads[:5]] == ["run", "lora.strength", "outlier", "state", "step\nms"]
    assert len(page.all("button", type="button")) >= len(heads)
    psnr = [
        e["data-value"]
        for e in page.all("td", class_="num")
        if e["text"].endswith(".0") and e["data-value"].startswith("5")
    ]
    assert psnr == ["50.0", "51.0", "52.0"]  # the best of the column has a class of its own
    assert page.all("td", class_="error")[0]["text"] == "FileError: <b>ink</b> is not there"


# -- who is ahead -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "ahead"),
    [
        ([], []),
        ([None], []),
        ([(1, 1)], [0]),
        ([(1, 5), (2, 4), (3, 1), (2, 3)], [0, 1, 2]),
        ([(2, 2), (1, 1)], [0]),
        ([(2, 2), (2, 1)], [0]),  # as fast and worse
        ([(2, 2), (1, 2)], [0]),  # as close and slower
        ([(2, 2), (2, 2)], [0, 1]),  # neither beats the other
        ([(1, math.inf), (2, 60), (0.5, math.inf)], [0, 1]),
        ([None, (-5, 3), (-4, 2)], [1, 2]),  # step times
    ],
)
def test_the_front(points, ahead):
    assert find_pareto_front(points) == ahead


def test_the_front_of_many_is_that_of_its_definition():
    points = [tuple(p) for p in np.random.default_rng(0).integers(0, 8, (60, 2)).tolist()]
    assert [points[i] for i in find_pareto_front(points)] == [
        p for p in points if all(q == p or q[0] < p[0] or q[1] < p[1] for q in points)
    ]


def test_speeds_are_ratios_where_all_have_one(tmp_path):
    assert ranking.choose_speed_metric(sweep(tmp_path / "a", [measured(), measured()])) == SPEED_RATIO
    assert ranking.choose_speed_metric(sweep(tmp_path / "b", [measured(), measured(ratio=None)])) == STEP_MS
    assert ranking.choose_speed_metric(sweep(tmp_path / "c", [{}, {}])) is None


@pytest.mark.parametrize(
    ("metrics", "verdict"),
    [
        (
            [measured(10, 2.0, 40), measured(9, 2.2, 50)],
            "Use #1 outlier=convrot: both the fastest and the closest to float.",
        ),
        (
            [measured(10, 2.0, 40), measured(10.1, 1.98, 50)],
            "Use #1 outlier=convrot: the closest to float, and within 3 % of the fastest.",
        ),
        (
            [measured(10, 2.0, 49.6), measured(20, 1.0, 50)],
            "Use #0 outlier=none: the fastest, and within 0.5 dB of the closest to float.",
        ),
        (
            [measured(10, 2.0, 40), measured(20, 1.0, 50)],
            "Choose: #0 outlier=none is the fastest; #1 outlier=convrot is 10.0 dB closer to float at 50 % less speed.",
        ),
        (
            [measured(10, None, 40), measured(20, None, math.inf)],
            "Choose: #0 outlier=none is the fastest; #1 outlier=convrot is equal to float at 50 % less speed.",
        ),
        (
            [measured(10, 0.9, 50), measured(20, 0.5, 40)],
            "Use #0 outlier=none: both the fastest and the closest to float. INT8 is slower than float here.",
        ),
        (
            [measured(10, 2.0, math.inf), measured(20, 1.0, math.inf)],
            "Use #0 outlier=none: both the fastest and the closest to float.",
        ),
        ([measured(10, None, None), measured(20, None, None)], "#0 outlier=none is the fastest."),
        (
            [measured(None, None, 40), measured(None, None, 50)],
            "#1 outlier=convrot is the closest to float. Which is the fastest, these runs cannot say.",
        ),
        (
            [measured(10, 2.0, None), measured(20, 1.0, 50)],
            "Choose: #0 outlier=none is the fastest; #1 outlier=convrot is the closest to float at 50 % less speed.",
        ),
    ],
)
def test_the_verdict(tmp_path, metrics, verdict):
    assert recommend(sweep(tmp_path, metrics)).verdict == verdict


def test_the_answer_rests_on_facts(tmp_path):
    runs = sweep(
        tmp_path,
        [measured(10, 2, 40), measured(20, 1, 50), measured(15, 1.5, 45), measured(16, 1.4, 44)],
        "abcd",
    )
    said = dict(recommend(runs).facts)
    assert said == {
        "Fastest": "#0 outlier=a: 10.0 ms a step, 2.00× the float model's speed",
        "Closest to float": "#1 outlier=b: PSNR 50.0 dB, SSIM 0.9900",
        "Between them": "#2 outlier=c: 15.0 ms a step, 1.50× the float model's speed, PSNR 45.0 dB",
        "Smallest": "all: 30.0 MB, 2.00× smaller than float",
        "Pareto front": "#0–#2: no other run is faster without being further from float",
    }


def test_missing_metrics_are_said(tmp_path):
    assert "metrics.baseline=none" in recommend(sweep(tmp_path / "a", [measured(psnr=None)] * 2)).warnings[0]
    assert recommend(sweep(tmp_path / "b", [measured(step=None, ratio=None)] * 2)).warnings == [
        "No run measured its speed."
    ]
    assert recommend(sweep(tmp_path / "c", [measured()] * 2)).warnings == []


def test_one_that_finished_among_failures_is_named(tmp_path):
    record(tmp_path, 0, ["outlier=none"], metrics=measured())
    record(tmp_path, 1, ["outlier=auto"], state="FAILED", error="no")
    assert recommend(name_runs(find_records(tmp_path))).verdict.startswith(
        "Only #0 outlier=none was measured: 2.00 times"
    )


def test_speeds_of_shared_and_of_different_machines_are_not_compared(tmp_path):
    for n in range(2):
        record(tmp_path / "shared", n, [f"outlier={n}"], metrics=measured(10 + n, 2, 50 + n), jobs_at_once=4)
        facts = EPYC | ({"gpu": "H200"} if n else {})
        record(
            tmp_path / "others",
            n,
            [f"outlier={n}"],
            metrics=measured(10 + n, 2, 50 + n),
            environment=facts,
            host=f"h{n}",
        )
        record(tmp_path / "twins", n, [f"outlier={n}"], metrics=measured(10 + n, 2, 50 + n), host=f"h{n}")
    shared, others, twins = (
        recommend(name_runs(find_records(tmp_path / name))) for name in ("shared", "others", "twins")
    )
    assert shared.warnings == [
        "Speeds are not comparable: up to 4 jobs shared a machine while they were measured."
    ]
    assert others.warnings == [
        "Speeds are not comparable: the runs come from different machines (EPYC, 2 threads: #0; H200: #1)."
    ]
    assert shared.facts[0][0] == "Fastest as measured" and twins.facts[0][0] == "Fastest"
    assert (
        shared.verdict
        == others.verdict
        == "#1 outlier=1 is the closest to float. Which is the fastest, these runs cannot say."
    )
    assert twins.warnings == [] and twins.verdict.startswith("Use #1")


def test_steps_that_scatter_are_said(tmp_path):
    runs = sweep(tmp_path, [measured(10, 2, 50, **{"speed/step_ms_p90": 21}), measured(10, 2, 50)])
    assert recommend(runs).warnings == [
        "Step times of #0 scatter by more than twice: other work ran there, and their speeds say little."
    ]


def grid_of_strengths(folder, psnr, left_out=()):
    """Runs over strengths and methods; psnr(strength, outlier)."""
    for n, (strength, outlier) in enumerate(itertools.product((0, 0.5, 1), ("none", "convrot"))):
        if n not in left_out:
            words = [f"lora.strength={strength}", f"outlier={outlier}"]
            record(
                folder,
                n,
                words,
                metrics=measured(10 + (outlier != "none"), 2 - (outlier != "none"), psnr(strength, outlier)),
            )
    return name_runs(find_records(folder))


def test_what_is_chosen_for_the_picture_is_no_choice_of_quality(tmp_path):
    # the strength 0 is closest to float in every method, and nobody would choose it for that
    runs = grid_of_strengths(
        tmp_path, lambda strength, outlier: 60 - 10 * strength + 2 * (outlier == "convrot")
    )
    found, over = group_candidates(runs)
    assert over == ["lora.strength"] and [(c.name, len(c.runs), c.get_metric(PSNR_DB)) for c in found] == [
        ("outlier=none", 3, 55),
        ("outlier=convrot", 3, 57),
    ]
    said = recommend(runs)
    assert said.verdict.startswith(
        "Choose: outlier=none is the fastest; outlier=convrot is 2.0 dB closer to float at 50 % less speed."
    )
    assert dict(said.facts)["Medians over"].startswith(
        "lora.strength (3 runs each), which one chooses for the picture"
    )


def test_methods_are_compared_on_what_both_drew(tmp_path):
    runs = grid_of_strengths(
        tmp_path, lambda strength, outlier: 60 - 10 * strength, left_out=[1]
    )  # convrot without strength 0
    assert [[run.varied_settings["lora.strength"] for run in c.runs] for c in group_candidates(runs)[0]] == [
        ["0.5", "1"],
        ["0.5", "1"],
    ]


def test_of_strengths_alone_none_is_recommended(tmp_path):
    runs = sweep(tmp_path, [measured(psnr=58.0), measured(psnr=44.0)], ("0", "1"), key="lora.strength")
    (only,), over = group_candidates(runs)
    assert (only.name, only.get_metric(PSNR_DB), over) == ("INT8", 51.0, ["lora.strength"])
    found = recommend(runs)
    assert (
        "51.0 dB PSNR" in found.verdict and "Use" not in found.verdict and "strength=0" not in found.verdict
    )
    assert (
        "Medians over",
        "lora.strength (2 runs), which one chooses for the picture: at each INT8 is compared with float",
    ) in found.facts


@pytest.mark.parametrize("key", ["sampler.steps", "prompts", "model.location"])
def test_runs_that_drew_other_pictures_are_not_compared(tmp_path, key):
    runs = sweep(tmp_path, [measured(psnr=58.0), measured(psnr=44.0)], ("a", "b"), key=key)
    found = recommend(runs)
    if key == "prompts":  # each INT8 picture is compared with its own float picture
        assert "51.0 dB" in found.verdict
    else:
        assert found.verdict == "These runs drew different pictures; they do not say which setting to use."
        assert found.warnings[0].startswith(f"Quality is not comparable: {key} differ")


def test_the_median_with_equal_pictures_is_a_number(tmp_path):
    runs = grid_of_strengths(
        tmp_path, lambda strength, outlier: math.inf if strength == 0 else 50.0, left_out=[4, 5]
    )
    assert [c.get_metric(PSNR_DB) for c in group_candidates(runs)[0]] == [50.0, 50.0]


# -- curves and plots ---------------------------------------------------------------------------------------------------


def test_curves_have_a_line_per_combination_in_order(tmp_path):
    (found,) = build_strength_curves(grid_of_strengths(tmp_path, lambda strength, outlier: 50.0))
    assert found.key == "lora.strength" and found.excluded == []
    assert {name: [x for x, _ in line] for name, line in found.lines.items()} == {
        "outlier=none": [0, 0.5, 1],
        "outlier=convrot": [0, 0.5, 1],
    }


def test_each_strength_has_curves_over_the_others(tmp_path):
    for n, (a, b) in enumerate(itertools.product("10", "02")):
        record(
            tmp_path,
            n,
            [f"lora.adapters.0.strength={a}", f"lora.adapters.1.strength={b}"],
            metrics=measured(),
        )
    first, second = build_strength_curves(name_runs(find_records(tmp_path)))
    assert (first.key, list(first.lines)) == ("lora.adapters.0.strength", ["1.strength=0", "1.strength=2"])
    assert (second.key, list(second.lines)) == ("lora.adapters.1.strength", ["0.strength=1", "0.strength=0"])
    assert [x for x, _ in first.lines["1.strength=0"]] == [0, 1]


def test_strengths_that_are_no_number_have_no_place_on_a_curve(tmp_path):
    options = ("0", "1", "[[0,1],[0.5,0]]")
    (found,) = build_strength_curves(sweep(tmp_path, [measured()] * 3, options, key="lora.strength"))
    assert found.excluded == ["#2"] and list(found.lines) == ["all runs"]
    assert build_strength_curves(sweep(tmp_path / "b", [measured()] * 2)) == []


def points(*pairs):
    return [plots.Point(x, y, f"#{i} $x$ <b>", f"about {i} <&>", i == 0) for i, (x, y) in enumerate(pairs)]


def test_a_plot_keeps_its_text_and_has_the_colors_of_the_page():
    svg = plots.draw_speed_quality(points((1, 50), (2, 40)), "speed & more", False, "p", 500)
    assert (
        ">#0 $x$ &lt;b&gt;</text>" in svg
        and "speed &amp; more" in svg
        and "<title>about 1 &lt;&amp;&gt;</title>" in svg
    )
    assert not re.search(r"#[0-9a-f]{6}\b(?!-)", re.sub(r"href=\"[^\"]*\"|url\([^)]*\)", "", svg)), (
        "a color that is not the page's"
    )
    assert (
        "var(--series-0)" in svg
        and "var(--ink)" in svg
        and "<metadata" not in svg
        and "<style" not in svg
        and "<?xml" not in svg
    )
    assert svg == plots.draw_speed_quality(points((1, 50), (2, 40)), "speed & more", False, "p", 500)


def test_equal_pictures_have_a_place_in_a_plot():
    svg = plots.draw_speed_quality(points((1, math.inf), (2, 40)), "speed", False, "p", 500)
    assert ">equal</text>" in svg and "inf" not in svg and "nan" not in svg
    everything_equal = plots.draw_speed_quality(
        points((1, math.inf), (2, math.inf)), "speed", False, "p", 500
    )
    assert ">equal</text>" in everything_equal and "nan" not in everything_equal
    assert ">equal</text>" in plots.draw_curves([[(0, math.inf), (1, 50.0)]], "strength", "PSNR", "p", 350)


def path_of_front(svg):
    """The corners of the dashed line, in pixels; y points down."""
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke-dasharray[^>]*var\(--series-0\)', svg)
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path)]


@pytest.mark.parametrize("faster_is_less", [False, True])
def test_the_front_is_a_falling_step_line(faster_is_less):
    made = [
        plots.Point(-x if faster_is_less else x, y, str(x), "", True)
        for x, y in ((13, 40), (11, 50), (12, 45))
    ]
    made = [
        plots.Point(30 + p.x if faster_is_less else p.x, p.y, p.label, p.description, p.is_on_front)
        for p in made
    ]
    corners = path_of_front(plots.draw_speed_quality(made, "speed", faster_is_less, "p", 500))
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    assert xs == sorted(xs) and ys == sorted(ys) and len(set(xs)) == 4 and len(set(ys)) == 4
    # the run that comes next is not as close to float until it is reached
    (_, x1, x2, _), (y1, y2, *_) = sorted(set(xs)), sorted(set(ys))
    assert (x1, y2) in corners and (x2, y1) not in corners
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in itertools.pairwise(corners)), (
        "a slanted line would promise runs that are not there"
    )


def test_labels_stand_clear_of_each_other_and_inside():
    rng = np.random.default_rng(0)
    spots = [(float(x), float(y)) for x, y in rng.uniform((60, 40), (640, 320), (14, 2))] + [
        (300.0, 200.0),
        (302.0, 201.0),
    ]
    frame = (50, 30, 700, 340)
    boxes = plots.place_labels(spots, [(90, 13)] * len(spots), frame)
    for a, b in itertools.combinations(boxes, 2):
        assert plots.compute_overlap(a, b) == 0
    assert all(
        frame[0] <= left and frame[1] <= low and right <= frame[2] and top <= frame[3]
        for left, low, right, top in boxes
    )
    assert plots.place_labels([(690, 335)], [(90, 13)], frame)[0][2] <= 700


def test_a_value_that_all_share_has_an_axis():
    low, high = plots.pad_limits([5.0, 5.0], 0.1)
    assert low < 5 < high and plots.pad_limits([0.0], 0.1)[0] < 0


# -- pictures -----------------------------------------------------------------------------------------------------------


def foxes(folder, ours, bases):
    """Runs that each drew one picture of a fox."""
    for n, (picture, base) in enumerate(zip(ours, bases, strict=True)):
        record(
            folder,
            n,
            [f"outlier={n}"],
            metrics={},
            images=[drawing(folder / str(n), "000_fox_s0", "fox", picture, base)],
        )
    return name_runs(find_records(folder))


def decoded(uri):
    return Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def test_equal_pictures_are_embedded_once(tmp_path):
    runs = foxes(tmp_path, [noise(1), noise(1), noise(0)], [noise(0)] * 3)
    found = image_gallery.build_gallery(runs)
    ((caption, cells),) = found.rows
    assert (
        caption == "fox · seed 0"
        and [cell.same_as for cell in cells] == ["", "#0", ""]
        and [cell.is_first for cell in cells] == [True, False, True]
    )
    assert cells[0].image == cells[1].image and cells[2].image == cells[2].float_image == cells[0].float_image
    assert len(found.uris) == 4  # INT8, float, their difference, and black
    assert select_deferred_images(found).keys() == {cells[0].difference_image, cells[2].difference_image}


def test_pictures_and_differences_are_exact(tmp_path):
    found = image_gallery.build_gallery(foxes(tmp_path, [noise(1)], [noise(2)]))
    ((_, (cell,)),) = found.rows
    for name, expected in (
        (cell.image, noise(1)),
        (cell.float_image, noise(2)),
        (cell.difference_image, make_difference_image(noise(2), noise(1))),
    ):
        assert (
            found.uris[name].startswith("data:image/png;base64,")
            and decoded(found.uris[name]).tobytes() == expected.tobytes()
        )
    assert found.notes == [] and found.has_float_images


def test_large_pictures_are_thumbnails_and_that_is_said(tmp_path):
    large = noise(1, 8).resize((1024, 768))
    found = image_gallery.build_gallery(foxes(tmp_path, [large], [None]))
    ((_, (cell,)),) = found.rows
    assert found.uris[cell.image].startswith("data:image/webp;base64,") and decoded(
        found.uris[cell.image]
    ).size == (512, 384)
    assert "thumbnails" in found.notes[0] and cell.float_image is None and not found.has_float_images


def test_a_page_has_bounds_and_says_what_it_left_out(tmp_path):
    images = [drawing(tmp_path / "0", f"{i:03}_x_s0", f"prompt {i}", noise(i)) for i in range(5)]
    runs = name_runs([record(tmp_path, metrics={}, images=images)])
    one = image_gallery.build_gallery(runs).uris["p0"]
    found = image_gallery.build_gallery(runs, most_bytes=int(2.5 * len(one)))
    assert [caption for caption, _ in found.rows] == ["prompt 0 · seed 0", "prompt 1 · seed 0"] and len(
        found.uris
    ) == 2
    assert found.notes[0].startswith("3 pictures left out: a page holds at most")
    assert len(image_gallery.build_gallery(runs, most_cells=3).rows) == 3
    assert len(image_gallery.build_gallery(runs).rows) == 5


def test_files_that_cannot_be_shown_leave_an_empty_place(tmp_path):
    runs = foxes(tmp_path, [noise(1), noise(2), noise(3)], [None] * 3)
    (tmp_path / "0/images/000_fox_s0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "1/images/000_fox_s0.png").unlink()
    found = image_gallery.build_gallery(runs)
    assert [cell.missing_reason for cell in found.rows[0][1]] == ["no readable file", "no readable file", ""]
    assert found.notes == [
        "2 places without a picture: not drawn, no file that can be read, or the page was full."
    ]


def test_pictures_outside_the_folder_are_not_read(tmp_path):
    noise(1).save(tmp_path / "secret.png")
    (tmp_path / "0").mkdir()
    assert image_gallery.open_image(tmp_path / "0" / ".." / "secret.png", tmp_path / "0") is None
    assert image_gallery.open_image(tmp_path / "secret.png", tmp_path) is not None


def test_rows_are_prompts_and_seeds_whatever_their_place(tmp_path):
    for n, prompts in enumerate((["fox", "owl", "fox"], ["owl", "fox"])):
        record(
            tmp_path,
            n,
            [f"outlier={n}"],
            metrics={},
            images=[{"prompt": p, "seed": 0, "file": f"images/{i}.png"} for i, p in enumerate(prompts)],
        )
    found = image_gallery.build_gallery(name_runs(find_records(tmp_path)))
    assert [caption for caption, _ in found.rows] == [
        "fox · seed 0",
        "owl · seed 0",
        "fox · seed 0 · drawing 2",
    ]
    assert [[cell.missing_reason for cell in cells] for _, cells in found.rows] == [
        ["no readable file"] * 2
    ] * 2 + [["no readable file", "not drawn"]]


def test_videos_are_their_stills(tmp_path):
    stills = {
        "stills": ["images/000_x_s0_first.png", "images/000_x_s0_last.png"],
        "float_stills": ["images/f_first.png", "images/f_last.png"],
    }
    record(
        tmp_path,
        metrics={},
        images=[
            {
                "prompt": "x",
                "seed": 1,
                "file": "images/000_x_s0.webp",
                "float": "images/f.webp",
                "psnr_db": 30.0,
                **stills,
            }
        ],
    )
    (tmp_path / "0/images").mkdir()
    for i, name in enumerate([*stills["stills"], *stills["float_stills"]]):
        noise(i).save(tmp_path / "0" / name)
    found = image_gallery.build_gallery(name_runs([read_record(tmp_path / "0")]))
    assert [caption for caption, _ in found.rows] == ["x · seed 1 · first frame", "x · seed 1 · last frame"]
    assert all(cell.image and cell.float_image for _, (cell,) in found.rows) and "stills" in found.notes[0]


def test_the_wall_of_the_page(small):
    _, page, _ = small
    shots = [e for e in page.all("button") if e.get("class") == "shot"]
    assert len(shots) == 8 and all(e["data-base"] and e["data-difference"] for e in shots)
    later = json.loads(page.all("script", id="later-pictures")[0]["text"])
    held = {e["data-holds"] for e in page.all("img") if "data-holds" in e}
    assert {
        e[f"data-{which}"] for e in shots for which in ("ours", "base", "difference")
    } == held | later.keys()
    assert not held & later.keys() and len(held) == 5  # four foxes and an owl
    words = [" ".join(e["text"].split()) for e in page.all("span", class_="under-words")]
    assert words == [
        "#0 40.0 dB",
        "#1 41.0 dB",
        "#2 42.0 dB",
        "#3 43.0 dB",
        "#0 equal",
        *(f"#{n} 30.2 dB = #0" for n in (1, 2, 3)),
    ]
    assert [e["value"] for e in page.all("input", name="mode")] == [
        "ours",
        "base",
        "slider",
        "flicker",
        "difference",
    ]


def test_without_float_pictures_there_are_no_modes(tmp_path):
    foxes(tmp_path, [noise(1)], [None])
    page, _ = page_of(find_records(tmp_path), tmp_path)
    assert not page.all("input", name="mode") and page.all("input", id="side")


# -- layers -------------------------------------------------------------------------------------------------------------


def with_layers(folder, *rows):
    return name_runs([record(folder, n, [f"outlier={n}"], metrics={}, layers=r) for n, r in enumerate(rows)])


def test_layers_are_rows_and_runs_are_columns(tmp_path):
    first = [layer("a", 20.0), layer("b", 40.0), layer("c", why="norm")]
    second = [layer("a", 30.0), layer("b", "inf"), layer("d", 25.0)]
    found = heatmap.build_heatmap(with_layers(tmp_path, first, second))
    assert {row.name: [tile.text for tile in row.cells] for row in found.rows} == {
        "a": ["20.0", "30.0"],
        "b": ["40.0", "equal"],
        "c": ["float", "–"],
        "d": ["–", "25.0"],
    }
    assert [row.worst_sqnr for row in found.rows] == [20.0, 40.0, math.inf, 25.0] and (
        found.min_sqnr,
        found.max_sqnr,
    ) == (20.0, 40.0)
    assert [[tile.color for tile in row.cells] for row in found.rows] == [
        [0, 5],
        [9, 9],
        [None, None],
        [None, 2],
    ]
    assert (
        found.rows[2].float_reasons == "norm" and "kept float: norm" in found.rows[2].cells[0].description
    )
    assert "vnni" in found.rows[0].cells[0].description


def test_weights_stand_in_for_outputs_and_that_is_said(tmp_path, small):
    runs = with_layers(tmp_path, [layer("a", 20.0, 44.0)], [layer("a", None, 45.0)])
    found = heatmap.build_heatmap(runs)
    assert found.metrics == [heatmap.OUTPUT_SQNR, heatmap.WEIGHT_SQNR] and [
        tile.text for tile in found.rows[0].cells
    ] == ["20.0", "45.0"]
    page, _ = page_of(find_records(tmp_path), tmp_path)
    assert any("of each layer's output; of its weight in #1" in e["text"] for e in page.all("p"))
    assert heatmap.build_heatmap(name_runs([record(tmp_path / "none", metrics={})])) is None


def test_the_worst_layers_are_kept_when_there_are_too_many(tmp_path):
    runs = with_layers(tmp_path, [layer(f"l{i}", float(i)) for i in range(10, 0, -1)])
    found = heatmap.build_heatmap(runs, most_cells=4)
    assert [row.name for row in found.rows] == ["l4", "l3", "l2", "l1"] and found.left_out == 6


def test_the_heat_map_of_the_page(small):
    _, page, _ = small
    rows = [e for e in page.all("tr") if "data-worst" in e]
    assert [e["data-worst"] for e in rows] == ["40.0", "30.0", "inf"] and rows[2]["class"] == "all-float"
    assert "modulation & more" in rows[2]["text"]
    assert [e["text"] for e in page.all("td", class_="h9")] == ["42.0", "43.0"]
