"""What a report lists about its runs: facts, settings, environments and commands."""

import json

from report.run_folders import MACHINE, write_run

from int8run.report.page_sections import (
    FactValue,
    compare_environments,
    compare_settings,
    list_commands,
    list_facts,
)
from int8run.report.runs import name_runs
from int8run.tracking.run_record import find_records, read_record


def test_settings_that_differ_are_listed_apart_from_common_ones(tmp_path):
    write_run(tmp_path, 0, ["model=tiny", "outlier=none"], metrics={})
    write_run(tmp_path, 1, ["model=tiny", "outlier=convrot"], {"outlier.group_size": "256"}, metrics={})

    section = compare_settings(find_records(tmp_path))

    assert dict(section.varying)["outlier.group_size"] == ["–", "256"]
    assert ("model", "tiny") in section.common


def test_a_command_can_be_pasted(tmp_path):
    record = write_run(tmp_path, 5, ["prompts.prompts=[a fox,an owl]", "lora=none"])

    (command,) = list_commands(name_runs([record]), tmp_path)

    assert command.text == "int8run 'prompts.prompts=[a fox,an owl]' lora=none"
    assert command.folder == "5"


def test_environments_name_the_runs_that_differ(tmp_path):
    other = MACHINE | {"versions": {"torch": "2.12.0"}}
    records = [write_run(tmp_path, n, metrics={}, environment=MACHINE if n < 3 else other) for n in range(4)]

    found = dict(compare_environments(name_runs(records)))

    assert found["versions.torch"] == [FactValue("2.13.0", "#0–#2"), FactValue("2.12.0", "#3")]
    assert found["python"] == [FactValue("3.11", "")]
    assert found["git"] == [FactValue("–", "")]
    assert found["host"] == [FactValue("box", "")]


def test_the_facts_tell_what_a_pipeline_rounded(tmp_path):
    record = write_run(tmp_path, 0, metrics={"quality/psnr_db": 50.0})
    measured = json.loads((record.folder / "metrics.json").read_text())
    images = [{"key": "a", "prompt": "a", "seed": 0, "file": "images/a.png", "width": 96, "height": 64}]
    rounded = {"sampler.width": {"asked": 100, "generated": 96}}
    (record.folder / "metrics.json").write_text(json.dumps(measured | {"images": images, "rounded": rounded}))

    facts = dict(list_facts(name_runs([read_record(record.folder)])))

    assert facts["Generated"] == "1 image by each run, 96 × 64 pixels"
    assert facts["Rounded"] == "sampler.width=100 to 96"


def test_the_facts_tell_what_ran_when_and_where(tmp_path):
    records = [write_run(tmp_path, 0, metrics={}), write_run(tmp_path, 1, state="KILLED", ended=None)]

    facts = dict(list_facts(name_runs(records)))

    assert facts["Runs"] == "2: 1 finished, 1 killed"
    assert facts["When"] == "2026-09-21 14:13 – 14:14 UTC"
    assert (facts["Machine"], facts["Host"], facts["Model"]) == ("EPYC, 2 threads", "box", "tiny")
