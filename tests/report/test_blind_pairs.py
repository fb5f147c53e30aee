"""The blind comparison: which images may be compared, and that a report is known again by its images."""

import re
import shlex

import pytest
from report.run_folders import make_metrics, make_noise_image, write_run, write_sample

from int8run.report.blind_pairs import build_blind_comparison
from int8run.report.image_gallery import build_gallery
from int8run.report.runs import name_runs
from int8run.report.templates import read_asset
from int8run.tracking.run_record import find_records


def write_two_runs(folder, second_seed=2):
    """Two runs of two samples; the second sample's images are those of float in run 0."""
    float_image = make_noise_image(0)
    for number, seed in enumerate((1, second_seed)):
        run_folder = folder / str(number)
        owl = float_image if number == 0 else make_noise_image(seed + 10)
        images = [
            write_sample(run_folder, "000_fox_s0", "fox", make_noise_image(seed), float_image),
            write_sample(run_folder, "001_owl_s0", "owl", owl, float_image),
        ]
        write_run(folder, number, [f"outlier={seed}"], metrics=make_metrics(), images=images)


def build(folder):
    return build_blind_comparison(build_gallery(name_runs(find_records(folder))))


def test_float_and_every_run_may_be_compared(tmp_path):
    write_two_runs(tmp_path)

    comparison = build(tmp_path)

    assert [contender.key for contender in comparison.contenders] == ["float", "#0", "#1"]
    fox, owl = comparison.samples
    assert fox.caption == "fox · seed 0"
    assert len({*fox.get_pair("float", "#0"), *fox.get_pair("#0", "#1")}) == 3
    first, second = owl.get_pair("float", "#0")
    assert first == second, "the same pixels are the same image"


def test_two_settings_have_a_pair_without_a_float_image(tmp_path):
    for number in range(2):
        images = [write_sample(tmp_path / str(number), "000_fox_s0", "fox", make_noise_image(number))]
        write_run(tmp_path, number, [f"outlier={number}"], metrics=make_metrics(), images=images)

    comparison = build(tmp_path)

    assert [contender.key for contender in comparison.contenders] == ["#0", "#1"]
    assert comparison.samples[0].get_pair("#0", "#1") is not None
    assert comparison.samples[0].get_pair("float", "#0") is None


def test_images_that_are_all_the_same_are_not_compared(tmp_path):
    image = make_noise_image(1)
    images = [write_sample(tmp_path / "0", "000_fox_s0", "fox", image, image)]
    write_run(tmp_path, 0, metrics=make_metrics(), images=images)

    assert build(tmp_path) is None


@pytest.mark.parametrize(("second_seed", "is_same"), [(2, True), (3, False)])
def test_the_images_make_the_id_of_a_report(tmp_path, second_seed, is_same):
    write_two_runs(tmp_path / "a")
    write_two_runs(tmp_path / "b", second_seed)

    assert (build(tmp_path / "a").report_id == build(tmp_path / "b").report_id) == is_same


def test_the_command_that_counts_votes_can_be_pasted_into_zsh():
    (command,) = re.findall("<code>(int8run .*?)</code>", read_asset("blind.html.jinja"))

    assert shlex.split(command) == ["int8run", "task=report", "task.votes=[a.json,b.json]"]
    assert "'task.votes=[" in command  # zsh takes brackets without quotes for a pattern
