"""Settings of single metrics: `metrics.measures.NAME.KEY=…`."""

import pytest
from support.run_job import make_spec

from int8run.config.help import render_help
from int8run.errors import ConfigError


def test_a_setting_of_a_metric_is_set_beside_its_defaults():
    spec = make_spec(["metrics.perceptual=[kid]", "metrics.measures.kid.subsets=7"])

    kid = spec.metrics.measures["kid"]

    assert (kid.subsets, kid.subset_size) == (7, 1000)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["metrics.perceptual=[flip]", "metrics.measures.flip.pixel=3"],
            r"^no setting called 'metrics\.measures\.flip\.pixel'; .*choose from pixels_per_degree$",
        ),
        (
            ["metrics.perceptual=[flip]", "metrics.measures.flipp.pixels_per_degree=3"],
            r"^metrics\.measures has 'flipp'; did you mean 'flip'\? choose from .*clip_score",
        ),
        (
            ["metrics.measures.flip.pixels_per_degree=3"],
            r"^metrics\.measures\.flip sets a metric that is not measured; add flip to metrics\.perceptual",
        ),
        (["metrics.measures.flip=3"], r"^metrics\.measures\.flip is 3; it takes settings by their names$"),
        (["metrics.measures=3"], r"^metrics\.measures is 3; it takes settings by metric"),
        (
            ["metrics.perceptual=[flip]", "metrics.measures.flip.pixels_per_degree=0"],
            r"^metrics\.measures\.flip\.pixels_per_degree is 0; allowed is ",
        ),
        (
            ["metrics.perceptual=[fid]", "metrics.measures.fid.reference=3"],
            r"^metrics\.measures\.fid\.reference is 3; it takes a folder of images, or null$",
        ),
        (
            ["metrics.perceptual=[flip]", "metrics.measures.flip._target_=int8run.outlier.none.NoOutlier"],
            r"metrics\.measures\.flip\._target_ is 'int8run\.outlier\.none",
        ),
    ],
)
def test_settings_of_metrics_that_cannot_be_are_errors(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_spec(overrides)


def test_help_has_a_page_of_all_metrics_and_their_settings():
    page = render_help("metric")

    assert "  flip " in page and "  fid " in page
    assert "metrics.measures.flip.pixels_per_degree=67.0" in page
    assert max(len(line) for line in page.splitlines()) <= 120
