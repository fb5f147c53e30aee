"""search.json: what it keeps, and which file is refused."""

import pytest
from search.search_cases import FakeRunner, make_space

from int8run.errors import ConfigError, FileError
from int8run.search.parse_space import parse_space
from int8run.search.store import SearchIdentity, read_trials, write_search
from int8run.search.trials import ALONE, BASE, Prediction, Trial


def make_identity(space=None, settings=None):
    return SearchIdentity(
        command=["task=search"],
        space=(space or make_space()).to_json(),
        settings=settings or {"sampler.steps": "4"},
    )


def test_trials_come_back_as_they_were(tmp_path):
    space = make_space()
    trials = FakeRunner()(
        [Trial(0, BASE, space.base), Trial(1, ALONE, space.list_alone()[3], Prediction(30.0, 1.0, 2.0))]
    )
    trials.append(Trial(2, ALONE, space.list_alone()[1]))
    path = tmp_path / "search.json"

    write_search(path, make_identity(), trials, {"goal": {}})

    read = read_trials(path, make_identity())
    assert read == trials


def test_without_a_file_there_are_no_trials(tmp_path):
    assert read_trials(tmp_path / "search.json", make_identity()) == []


def test_another_space_is_refused_with_what_differs(tmp_path):
    path = tmp_path / "search.json"
    write_search(path, make_identity(), [], {})
    other = parse_space({"outlier": {"set": "outlier", "choices": ["none", "quarot"]}})

    with pytest.raises(ConfigError) as error:
        read_trials(path, make_identity(space=other))

    message = str(error.value)
    assert (
        "holds another search: task.space.outlier is [none, convrot] there and [none, quarot] here" in message
    )
    assert "task.space.bits is [8, 4] there and missing here" in message


def test_other_settings_are_refused_with_what_differs(tmp_path):
    path = tmp_path / "search.json"
    write_search(path, make_identity(), [], {})
    settings = {f"k{n}": "1" for n in range(9)} | {"sampler.steps": "8"}

    with pytest.raises(
        ConfigError, match=r"sampler\.steps is 4 there and 8 here; k0 is missing there .* and 5 more"
    ):
        read_trials(path, make_identity(settings=settings))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": 1}', '{"schema": 1, "trials": [3], "space": {}, "settings": {}}']
)
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "search.json"
    path.write_text(text)

    with pytest.raises(FileError, match=r"search\.json is damaged: .*begin anew in another folder"):
        read_trials(path, make_identity())


def test_a_file_of_another_version_is_named(tmp_path):
    path = tmp_path / "search.json"
    path.write_text('{"schema": 9, "trials": [], "space": {}, "settings": {}}')

    with pytest.raises(FileError, match=r"has schema 9, and this version of int8run reads 1"):
        read_trials(path, make_identity())
