"""Passwords of a command are in none of the files that it leaves: ours, hydra's, the log and the report."""

import pytest
import yaml

# a setting with an address that a run does not use, so that nothing waits for it
URI = "sync=http://me:s3cret@127.0.0.1:9"
TOKEN = "+sampler.extra.hf_token=s3cret"
# a job that starts, leaves its record, and ends at once
EMPTY = ["tracker=none", "prompts=file", "prompts.path=empty.txt"]


@pytest.fixture(autouse=True)
def no_prompts(command):
    (command.folder / "empty.txt").write_text("# nothing\n")


def find_password(folder):
    return [path.name for path in folder.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]


def test_a_run_keeps_no_password(command):
    outcome = command(URI, TOKEN, *EMPTY)
    (overrides,) = command.folder.rglob("overrides.yaml")

    assert "empty.txt holds no prompt" in outcome.message
    assert yaml.safe_load(overrides.read_text())[:2] == [
        "sync=http://127.0.0.1:9",
        "+sampler.extra.hf_token=***",
    ]
    config = yaml.safe_load(overrides.with_name("config.yaml").read_text())
    assert (config["sync"], config["sampler"]["extra"]) == ("http://127.0.0.1:9", {"hf_token": "***"})
    assert config["prompts"]["path"] == "empty.txt", "what is no password stays"
    assert "s3cret" not in outcome.out + outcome.err and find_password(command.folder) == []


@pytest.mark.slow
def test_a_sweep_keeps_no_password_and_goes_on(command):
    words = ["-m", URI, TOKEN, *EMPTY, "seed=0,1"]
    first = command(*words)
    folders = [path.parent for path in command.folder.rglob("multirun.yaml")]
    again = command(*words, "resume=true")

    assert "2 of 2 jobs did not finish" in first.message and "2 of 2 jobs did not finish" in again.message
    assert [path.parent for path in command.folder.rglob("multirun.yaml")] == folders, "it found its folder"
    shown = first.out + first.err + again.out + again.err
    assert "s3cret" not in shown and find_password(command.folder) == []


@pytest.mark.slow
def test_a_tracker_that_is_away_shows_no_password(command):
    words = ["tracker=mlflow", "tracker.uri=http://me:s3cret@127.0.0.1:9"]
    outcome = command(*EMPTY, *words)

    (overrides,) = command.folder.rglob("overrides.yaml")
    assert "tracker.uri=http://127.0.0.1:9" in yaml.safe_load(overrides.read_text())
    assert "s3cret" not in outcome.out + outcome.err and find_password(command.folder) == []


@pytest.mark.parametrize("value", ["http://me:s3cret@h", "s3cret"])
def test_an_error_shows_no_password(command, value):
    outcome = command(f"+nope.hf_token={value}", "tracker.ur=http://me:s3cret@h")
    assert outcome.code == 2 and "s3cret" not in outcome.message
