"""The names of metrics: that they are those of runs, and what `metrics.objective` refuses."""

import re

import pytest
from support.source_files import FILES, get_name

from int8run.errors import ConfigError
from int8run.lora.int8_layers import MODE_BY_CLASS
from int8run.metrics.base import LESS, MORE, NEITHER
from int8run.metrics.names import METRICS
from int8run.metrics.settings import PERCEPTUAL, MetricsSettings
from int8run.report.columns import METRIC_COLUMNS

LITERAL = re.compile(r'"((?:budget|build|clip|float|lora|memory|quality|quant|speed)/[a-z0-9_]+)"')
DIRECTIONS = {1: MORE, -1: LESS, 0: NEITHER}


def test_every_metric_in_the_code_has_a_name():
    unnamed = {}
    for file in FILES:
        names = set(LITERAL.findall(file.read_text())) - set(METRICS)
        if names:
            unnamed[get_name(file)] = names

    assert unnamed == {}


def test_the_report_ranks_as_a_sweep_does():
    directions = {column.metric: DIRECTIONS[column.direction] for column in METRIC_COLUMNS}

    assert directions == {name: METRICS[name].direction for name in directions}


def test_every_mode_of_loras_counts_its_layers():
    counted = {name for name in METRICS if name.startswith("lora/layers_")}

    assert counted == {f"lora/layers_{mode}" for mode in MODE_BY_CLASS.values()}


def test_what_can_be_asked_for_adds_metrics_that_name_it():
    assert {"ms_ssim", "lpips", "effnet_distance", "clip_score"} <= set(PERCEPTUAL)

    adding = {metric.measure for metric in METRICS.values()} - {None}

    assert adding == set(PERCEPTUAL)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            "quality/psnr",
            r"^metrics\.objective is 'quality/psnr'; did you mean 'quality/psnr_db'\? choose",
        ),
        ("psnr", r"^metrics\.objective is 'psnr'; .*choose from .*quality/psnr_db"),
        ("series/step_ms", r"^metrics\.objective is 'series/step_ms'; .*choose from "),
        (None, r"^metrics\.objective is None; .*choose from "),
        (["quality/ssim"], r"^metrics\.objective is \['quality/ssim'\]; .*choose from "),
        (
            "quality/lpips",
            r"^metrics\.objective=quality/lpips is not measured with these settings; set "
            r"metrics\.perceptual=\[ms_ssim, lpips\]$",
        ),
        (
            "float/clip_score",
            r"^metrics\.objective=float/clip_score is not measured with these settings; set "
            r"metrics\.perceptual=\[ms_ssim, clip_score\]$",
        ),
    ],
)
def test_an_objective_that_no_run_has_is_refused(objective, message):
    with pytest.raises(ConfigError, match=message):
        MetricsSettings(perceptual=["ms_ssim"], objective=objective)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "quality/ms_ssim"},
        {"objective": "lora/overhead_ratio"},
        {"objective": "build/written_bytes"},
        {"objective": "quality/clip_score", "perceptual": ["clip_score"]},
        {"objective": "speed/step_ms_p50", "baseline": "none"},
    ],
)
def test_an_objective_that_a_run_may_have_is_taken(settings):
    assert MetricsSettings(**settings).objective == settings["objective"]
