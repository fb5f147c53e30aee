"""Backends by name: the same as the command line makes of the files in conf/."""

import pytest
from hydra import compose, initialize_config_module
from support.helpers import CONF, CPU

from int8run.backends.registry import (
    list_backend_names,
    list_usable_backends,
    make_backend,
    read_backend_option,
)
from int8run.config.compose import create_run_spec

NAMES = sorted(file.stem for file in (CONF / "backend").glob("*.yaml"))


def test_the_names_are_the_options() -> None:
    assert sorted(list_backend_names()) == NAMES and {"auto", "reference", "cpu"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_makes_what_the_command_line_makes(name: str) -> None:
    with initialize_config_module("int8run.conf", version_base="1.3"):
        expected = create_run_spec(compose("config", [f"backend={name}"])).backend
    made = make_backend(name)

    assert type(made) is type(expected) and made.name == expected.name == name
    assert repr(made) == repr(expected) and made == expected


def test_settings_are_read_anew_each_time() -> None:
    assert make_backend("auto") is not make_backend("auto")
    assert read_backend_option("auto")["_target_"] and "defaults" in read_backend_option("auto"), (
        "making one leaves the option alone"
    )

    made = make_backend("auto")

    assert {key: backend.name for key, backend in made.candidates.items()} == {
        key: key for key in made.candidates
    }
    assert made.last_resort.name == "reference"


def test_what_runs_here() -> None:
    usable = list_usable_backends(CPU)
    assert usable == sorted(usable) and {"auto", "reference"} <= set(usable) and "triton" not in usable
    for name in NAMES:
        assert (name in usable) == (not make_backend(name).limits.unsupported_reasons(CPU)), name
