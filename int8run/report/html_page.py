"""The report: one HTML file that tells which setting to use, with tables, plots, images and layers.

`write_report` is called at the end of a sweep and by `task=report`. The file needs no network and no other
file: the style, the script, the plots and the images are inside.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from int8run.errors import ConfigError
from int8run.report.blind_pairs import BlindComparison, build_blind_comparison
from int8run.report.columns import format_psnr
from int8run.report.comparison import explain_incomparable_speeds
from int8run.report.heatmap import NUM_COLORS, build_heatmap
from int8run.report.image_gallery import Gallery, build_gallery
from int8run.report.page_plots import build_curve_plots, build_speed_quality_plot
from int8run.report.page_sections import (
    compare_environments,
    compare_settings,
    describe_heatmap_metric,
    list_commands,
    list_facts,
    select_deferred_images,
)
from int8run.report.runs import Run, name_runs
from int8run.report.runs_table import build_runs_table
from int8run.report.strength_curves import build_strength_curves
from int8run.report.templates import load_template, read_asset, write_text_file
from int8run.report.verdict import Recommendation, recommend
from int8run.report.votes import Tally, count_votes, drop_repeated_sessions, read_vote_file
from int8run.report.worst_samples import list_worst_samples
from int8run.tracking.run_record import FINISHED, Record
from int8run.tracking.setting_names import shorten_value
from int8run.utils.paths import check_replaceable

log = logging.getLogger(__name__)
MAX_LEADING_SETTINGS = 4  # before the numbers in the table of runs; more stand behind them


def write_report(
    records: Sequence[Record],
    path: Path,
    title: str,
    vote_paths: Sequence[Path] = (),
    recommendation: Recommendation | None = None,
) -> list[Tally]:
    """Write the page. It holds everything it shows, so it may be moved, sent, and opened from a disk.

    Args:
        records: in the order in which they are to be listed.
        path: of the HTML file; its folder is made where it is missing.
        title: of the page.
        vote_paths: files that the page's blind comparison saved.
        recommendation: of these records, where it was computed already; None: it is here.

    Returns:
        The count of the votes, which is on the page, too.

    Raises:
        ConfigError: without a record.
        FileError: a file of votes cannot be read, or is about other images.
        OSError: something else than a file is there.
    """
    if not records:
        raise ConfigError(
            "there is no run to report on; give a folder that a run or a sweep wrote, or start one with "
            "int8run -m …"
        )
    check_replaceable(path)
    runs = name_runs(records)
    gallery = build_gallery(runs)
    blind = build_blind_comparison(gallery)
    tallies = tally_votes(vote_paths, blind)
    html = render_page(
        runs,
        gallery,
        blind,
        page_folder=path.parent,
        title=title,
        tallies=tallies,
        recommendation=recommendation or recommend(runs),
    )
    write_text_file(path, html)
    return tallies


def tally_votes(paths: Sequence[Path], blind: BlindComparison | None) -> list[Tally]:
    """Count the votes of some files; logs which ones do not count.

    Args:
        paths: of the files.
        blind: of the page; None where it has nothing to compare.

    Raises:
        ConfigError: there are votes, and nothing to vote on.
        FileError: a file cannot be read, or is about other images.
    """
    if not paths:
        return []
    if blind is None:
        raise ConfigError(
            "task.votes: the runs have no two images to compare; name the folder of the runs that were voted "
            "on with task.path="
        )
    files, notes = drop_repeated_sessions([read_vote_file(path, blind) for path in paths])
    for note in notes:
        log.warning("%s", note)
    return count_votes(files, blind)


def render_page(
    runs: Sequence[Run],
    gallery: Gallery,
    blind: BlindComparison | None,
    *,
    page_folder: Path,
    title: str,
    tallies: Sequence[Tally],
    recommendation: Recommendation,
) -> str:
    """The HTML of the page.

    Args:
        runs: at least one.
        gallery: of their images.
        blind: what people may compare; None: nothing.
        page_folder: where the page will be; paths on it are relative to this folder.
        title: of the page.
        tallies: counted votes.
        recommendation: that the runs support.
    """
    heatmap = build_heatmap(runs)
    curves = build_strength_curves(runs)
    template = load_template("page.html.jinja")
    return template.render(
        title=title,
        finished=FINISHED,
        style="\n".join([read_asset("page.css"), read_asset("blind.css")]),
        script="\n".join([read_asset("page.js"), read_asset("blind.js")]),
        runs=runs,
        facts=list_facts(runs),
        recommendation=recommendation,
        worst_samples=list_worst_samples(runs, gallery, page_folder),
        has_incomparable_speeds=bool(explain_incomparable_speeds(runs)),
        table=build_runs_table(runs),
        varied_keys=list(runs[0].varied_settings),
        max_leading_settings=MAX_LEADING_SETTINGS,
        speed_quality_plot=build_speed_quality_plot(runs),
        curves=[build_curve_plots(curve, number) for number, curve in enumerate(curves)],
        gallery=gallery,
        deferred_images=select_deferred_images(gallery),
        blind=blind,
        blind_data=None if blind is None else blind.to_json(title),
        tallies=tallies,
        format_psnr=format_psnr,
        shorten_value=shorten_value,
        heatmap=heatmap,
        heatmap_metric=describe_heatmap_metric(heatmap),
        num_colors=NUM_COLORS,
        settings=compare_settings([run.record for run in runs]),
        environment=compare_environments(runs),
        commands=list_commands(runs, page_folder),
    )
