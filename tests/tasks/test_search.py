"""`task=search` as a command: what is refused before anything runs, and whole small searches."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from support.cli_process import Command
from support.run_job import make_spec

from int8run.errors import ConfigError
from int8run.search import proposals
from int8run.search.parse_space import parse_space
from int8run.tasks.search_overrides import SearchOverrides

pytest.importorskip("optuna")

SMALL = [
    "sampler.height=16",
    "sampler.width=16",
    "sampler.steps=2",
    "calibration.prompts=[a,b]",
    "prompts.prompts=[c]",
    "metrics.layers=false",
    "backend=reference",
    "tracker=none",
    "progress=false",
]
NO_SPACE = [f"task.space.{name}=null" for name in ("rounding", "bits", "kept", "cache", "few_step", "steps")]
SEARCH = ["task=search", "quality_db=20", "task.n_trials=4", *NO_SPACE, *SMALL]


def read_search(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("searches/*/*/search.json")
    return json.loads(file.read_text())


def read_pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


# -- before anything runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [],
            "task=search looks for the cheapest recipe of a quality; give the least PSNR",
        ),
        (["quality_db=-1"], "quality_db is -1; allowed is a number from 0 to 200"),
        (["quality_db=nan"], "quality_db is nan; allowed is a number from 0 to 200"),
        (["quality_db=35", "task.minimise=foo"], "task.minimise is 'foo'; choose from bytes, seconds"),
        (
            ["quality_db=35", "task.n_trials=0"],
            "task.n_trials is 0; allowed is a whole number from 1 to 100000",
        ),
        (["quality_db=35", "task.batch=0"], "task.batch is 0; allowed is a whole number from 1 to 1024"),
        (["quality_db=35", "task.judge_by=x"], "task.judge_by is 'x'; choose from calibration, run"),
        (["quality_db=35", "task.confirm=3"], "task.confirm is 3; choose true or false"),
        (["quality_db=35", *NO_SPACE, "task.space.outlier=null"], "task.space is empty"),
        (
            ["quality_db=35", "task.space.x={set: seed, choices: [1, 2]}"],
            "task.space.x sets seed, which is no part of",
        ),
        (
            ["quality_db=35", "model_type.mixed_precision=auto"],
            "leave them out: choices of task.space.kept have both",
        ),
        (["quality_db=35", "metrics.baseline=none"], "metrics.baseline=none has none; choose run or cached"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_there_is_a_folder(
    command: Command, overrides: list[str], message: str
) -> None:
    outcome = command("task=search", *overrides)

    assert outcome.code == 2
    assert message in outcome.message
    assert command.made() == []


def test_a_search_is_no_job_of_a_sweep(command: Command) -> None:
    outcome = command("-m", "task=search", "quality_db=30,35")

    assert outcome.code == 2
    assert (
        "task=search makes runs of its own and is no job of a sweep; leave -m and values" in outcome.message
    )


def test_without_optuna_it_says_what_to_install(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)

    outcome = command("task=search", "quality_db=35")

    assert outcome.code == 2
    assert outcome.message == proposals.INSTALL


def test_a_setting_that_does_not_exist_is_refused_before_anything_runs(command: Command, model: str) -> None:
    outcome = command(*SEARCH, model, "task.space.x={set: sampler.stepps, choices: [1, 2]}")

    assert outcome.code == 2
    assert outcome.message.startswith("task.space.x=1: ")
    assert "stepps" in outcome.message
    assert not list(command.folder.rglob("metrics.json"))


def test_an_option_that_does_not_exist_is_refused_before_anything_runs(command: Command, model: str) -> None:
    outcome = command(*SEARCH, model, "task.space.outlier.choices=[none,quarrot]")

    assert outcome.code == 2
    assert outcome.message.startswith("task.space.outlier=quarrot: ")
    assert "quarot" in outcome.message


def test_a_value_out_of_range_is_refused_before_anything_runs(command: Command, model: str) -> None:
    outcome = command(*SEARCH, model, "task.space.x={set: sampler.steps, choices: [2, 0]}")

    assert outcome.code == 2
    assert outcome.message.startswith("task.space.x=0: sampler.steps is 0")


def test_a_table_with_inputs_is_not_replaced_by_texts(command: Command, model: str) -> None:
    (command.folder / "t.csv").write_text("prompt,seed\na,1\n")

    words = [word for word in SEARCH if not word.startswith("prompts")]
    outcome = command(*words, model, "prompts=file", "prompts.path=t.csv")

    assert outcome.code == 2
    assert "let the trials be judged by its rows: task.judge_by=run" in outcome.message


def test_every_choice_that_ships_is_one_of_the_tiny_model() -> None:
    shipped = make_spec(["task=search", "quality_db=35"])
    space = parse_space(shipped.task.space).resolve_shares({"sampler.steps": 16}.get)
    overrides = SearchOverrides(shipped, [], "calibration")
    refused = []
    for name, ingredient in space.ingredients.items():
        for context in space.list_contexts(ingredient):
            for point in ingredient.list_points(2):
                try:
                    make_spec(overrides.make_trial(space.list_settings({**context, name: point})))
                except ConfigError:
                    refused.append((name, point))

    assert refused == [("few_step", "turbo"), ("few_step", "hyper")]
    assert space.ingredients["few_step"].is_optional


# -- whole searches ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_leaves_a_recipe_that_is_reproduced(command: Command, model: str) -> None:
    outcome = command(*SEARCH, model, "task.space.size={choices: {whole: {}, half: {sampler.steps: 1}}}")

    assert outcome.code == 0, outcome.err
    found = read_search(command.folder)
    (folder,) = command.folder.glob("searches/*/*")
    assert found["is_met"]
    assert [trial["state"] for trial in found["trials"]] == ["FINISHED"] * len(found["trials"])
    winner = found["trials"][found["winner"]]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["found"]["trial"] == winner["number"]
    assert not [
        word for word in recipe["recipe"] if word.startswith(("task", "prompts", "metrics", "tracker"))
    ]
    assert "<svg" in (folder / "search.html").read_text()
    assert (folder / "report.html").exists()
    assert "cheapest: trial " in outcome.out

    again = command(
        f"recipe={folder / 'recipe.yaml'}", *SMALL[4:], "calibration.prompts=[a,b]", "hydra.run.dir=again"
    )

    assert again.code == 0, again.err
    # of the same recipe and prompts; whichever recipe was the fastest here
    confirmed = folder / "trials" / str(len(found["trials"]))
    (image,) = json.loads((command.folder / "again" / "metrics.json").read_text())["images"]
    assert read_pixels(confirmed / image["file"]) == read_pixels(command.folder / "again" / image["file"])


@pytest.mark.slow
def test_a_quality_that_nothing_meets_gives_the_nearest_and_exit_code_2(command: Command, model: str) -> None:
    outcome = command(*SEARCH, model, "quality_db=190", "task.confirm=false")

    assert outcome.code == 2
    assert "quality_db=190 is met by none of 2 recipes; the nearest is trial " in outcome.message
    assert list(command.folder.glob("searches/*/*/recipe.yaml"))
    found = read_search(command.folder)
    assert not found["is_met"]
    assert found["winner"] in (0, 1)


@pytest.mark.slow
def test_the_same_runs_serve_another_quality(command: Command, model: str) -> None:
    assert command(*SEARCH, model, "quality_db=190", "task.confirm=false").code == 2
    written = {path: path.stat().st_mtime_ns for path in command.folder.rglob("metrics.json")}

    outcome = command(*SEARCH, model, "quality_db=10", "task.confirm=false", "resume=true")

    assert outcome.code == 0, outcome.err
    assert {path: path.stat().st_mtime_ns for path in command.folder.rglob("metrics.json")} == written
    assert read_search(command.folder)["is_met"]


@pytest.mark.slow
def test_more_trials_do_not_take_the_confirmation_for_one_of_theirs(command: Command, model: str) -> None:
    words = [*SEARCH, model, "quality_db=10", "task.space.x={set: sampler.steps, choices: [2, 3, 4]}"]
    assert command(*words, "task.n_trials=2").code == 0

    outcome = command(*words, "task.n_trials=4", "resume=true")

    assert outcome.code == 0, outcome.err
    trials = read_search(command.folder)["trials"]
    assert [trial["state"] for trial in trials] == ["FINISHED"] * 4
    prompts = []
    for number in range(5):
        (results,) = command.folder.glob(f"searches/*/*/trials/{number}/metrics.json")
        prompts.append([image["prompt"] for image in json.loads(results.read_text())["images"]])
    assert prompts == [*4 * [["a", "b"]], ["c"]]


@pytest.mark.slow
def test_a_folder_with_a_search_of_another_space_is_refused(command: Command, model: str) -> None:
    named = "hydra.run.dir=found"
    assert command(*SEARCH, model, named, "task.confirm=false").code == 0

    outcome = command(*SEARCH, model, named, "resume=true", "task.space.outlier.choices=[none,quarot]")

    assert outcome.code == 2
    assert (
        "holds another search: task.space.outlier is [none, convrot] there and [none, quarot] here"
        in outcome.message
    )


@pytest.mark.slow
def test_a_trial_that_fails_is_named_and_ends_nothing(command: Command, model: str) -> None:
    # a file that is not there is found by the job that reads it
    space = (
        "task.space.x={choices: {none: {}, missing: {clip.path: missing.safetensors, clip: int8_rowwise}}}"
    )

    outcome = command(*SEARCH, model, space, "task.confirm=false")

    assert outcome.code == 0, outcome.err
    found = read_search(command.folder)
    failed = [trial for trial in found["trials"] if trial["state"] == "FAILED"]
    assert [trial["params"]["x"] for trial in failed] == ["missing"]
    assert "missing.safetensors" in failed[0]["error"]
    assert found["failed"] == 1
    assert "1 trial failed" in outcome.out + outcome.err


@pytest.mark.slow
def test_a_base_that_cannot_run_ends_the_search(command: Command) -> None:
    outcome = command(*SEARCH, "model.location=missing/model")

    assert outcome.code != 0
    assert not list(command.folder.rglob("recipe.yaml"))


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on(command: Command, model: str) -> None:
    words = [
        *SEARCH,
        model,
        "task.confirm=false",
        "task.space.x={set: sampler.steps, choices: [2, 3, 4]}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "int8run", *words],
        cwd=command.folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(command.folder.rglob("trials/0/metrics.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in command.folder.rglob("metrics.json")}

    outcome = command(*words, "resume=true")

    assert outcome.code == 0, outcome.err
    found = read_search(command.folder)
    assert len(found["trials"]) == 4
    assert {trial["state"] for trial in found["trials"]} == {"FINISHED"}
    finished = list(before)
    assert finished and all(path.stat().st_mtime_ns == before[path] for path in finished)
