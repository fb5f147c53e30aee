"""The identity of a sweep, and the numbers of its jobs."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from int8run.jobs import plan
from int8run.jobs.manifest import make_sweep_id


@pytest.mark.parametrize(
    ("folder", "beginning"),
    [
        ("multirun/2026-11-21/22-30-00", "2026-11-21_22-30-00"),
        ("sweeps/strengths", "strengths"),
        ("sweeps/lr=1,x=[2]", "lr-1-x-2"),
        ('sweeps/it\'s "mine"', "it-s-mine"),
        ("sweeps/狐", "sweep"),
        ("sweeps/a b%c?d#e", "a-b-c-d-e"),
        (f"sweeps/{'x' * 250}", "x" * 100),
    ],
)
def test_the_id_of_a_sweep_is_a_name_that_everything_takes(folder, beginning):
    sweep = make_sweep_id(Path(folder))

    assert re.fullmatch(re.escape(beginning) + "-[0-9a-f]{4}", sweep)


def test_two_sweeps_of_one_folder_have_different_ids():
    assert len({make_sweep_id(Path("a")) for _ in range(20)}) > 10


def test_free_numbers_of_many_jobs_are_found_without_counting_again_and_again(monkeypatch):
    asked = []
    get_job_folder = plan.get_job_folder

    def ask(config):
        asked.append(config.hydra.job.num)
        return get_job_folder(config)

    monkeypatch.setattr(plan, "get_job_folder", ask)
    used = {Path("sweep", str(number)) for number in range(100)}
    hydra = {"job": {"num": 0}, "sweep": {"dir": "sweep", "subdir": "${hydra.job.num}"}}

    found, next_number = [], 0
    for number in range(120):
        config = OmegaConf.create({"hydra": hydra})
        config.hydra.job.num = number
        next_number = plan.choose_free_number(config, used, next_number)
        found.append(config.hydra.job.num)
        used.add(get_job_folder(config))

    assert found == list(range(100, 220))
    assert len(asked) <= 2 * 120 + 100
