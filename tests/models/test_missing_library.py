"""The library that a pipeline needs and that is not installed is named, with what installs it."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
from diffusers.models.transformers import transformer_cosmos
from diffusers.utils import is_torchvision_available

from int8run.errors import ConfigError
from int8run.models import denoiser_classes, loader, modular_loader, pipeline_class
from int8run.models.missing_library import (
    check_needed_library,
    find_imported_library,
    find_missing_library,
    is_installed,
    raise_if_library_is_missing,
    raise_missing,
)

COSMOS = Path(str(transformer_cosmos.__file__))
SAID = "\nSomeProcessor requires the Torchvision library but it was not found in your environment."


@pytest.mark.parametrize(
    ("name", "library"),
    [("transforms", "torchvision"), ("nn", "torch"), ("np", "numpy"), ("CosmosPatchEmbed", None)],
)
def test_a_name_is_of_the_library_that_the_source_imports_it_from(name: str, library: str | None) -> None:
    assert find_imported_library(name, COSMOS) == library


@pytest.mark.parametrize(
    ("error", "library"),
    [
        (NameError("no", name="transforms"), "torchvision"),
        (ModuleNotFoundError("no", name="bs4.element"), "bs4"),
        (ImportError(SAID), "torchvision"),
        (ImportError("Please install PyAV"), None),
        (ImportError("A requires the PIL library but it was not found"), "PIL"),
        (ImportError("A requires the Beautiful Soup library but it was not found"), "bs4"),
        (ImportError("A requires the Unheard Of library but it was not found"), None),
        (ImportError("cannot import name 'X' from 'a.b'", name="a.b"), "a"),
        (NameError("no", name="a_mistake"), None),
    ],
)
def test_the_library_is_found_in_the_error(error: ImportError | NameError, library: str | None) -> None:
    assert find_missing_library(error, COSMOS) == library


@pytest.mark.parametrize(
    ("library", "package"),
    [("PIL", "pillow"), ("cv2", "opencv-python"), ("av", "av"), ("jinja2", "jinja2"), ("torch", "torch")],
)
def test_the_command_names_the_package_that_has_the_module(library: str, package: str) -> None:
    with pytest.raises(ConfigError, match=rf"needs the library {library}, .*pip install {package}$"):
        raise_missing("the processor", library)


def raise_in_diffusers(statement: str) -> ImportError:
    """The error of a statement, as if it stood in a source file of diffusers."""
    with pytest.raises(ImportError) as raised:
        exec(compile(statement, str(COSMOS), "exec"))
    return raised.value


def test_a_library_of_another_version_is_not_said_to_be_missing() -> None:
    error = raise_in_diffusers("from transformers.utils import of_another_version")

    with pytest.raises(
        ConfigError,
        match=r"^the pipeline needs another version of the library transformers than .*of_another_version",
    ):
        raise_if_library_is_missing("the pipeline", error)


def test_a_library_that_the_error_does_not_name_gets_no_command() -> None:
    error = raise_in_diffusers("raise ImportError('A requires the Unheard Of library but it was not found')")

    with pytest.raises(ConfigError, match=r"^the pipeline cannot import what it needs: A requires"):
        raise_if_library_is_missing("the pipeline", error)


class Late:
    """A module like diffusers, which imports its parts when they are asked for."""

    def __getattr__(self, name: str) -> object:
        try:
            exec(compile("import a_library_that_nobody_has", str(COSMOS), "exec"))
        except ImportError as error:
            raise RuntimeError(f"failed to import {name}") from error
        return None


@pytest.mark.parametrize(
    ("module", "ask"),
    [
        (pipeline_class, lambda: pipeline_class.is_pipeline("FluxPipeline")),
        (pipeline_class, lambda: pipeline_class.is_modular("FluxPipeline")),
        (
            denoiser_classes,
            lambda: denoiser_classes.find_denoiser_class("diffusers", "Flux"),
        ),
        (loader, lambda: loader.is_component_library("flux")),
        (modular_loader, lambda: modular_loader.find_library("flux")),
    ],
)
def test_the_library_of_a_module_that_is_imported_late_is_named(
    module: ModuleType, ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    late: Any = Late()
    monkeypatch.setattr(module, "diffusers", late)
    monkeypatch.setattr(Late, "pipelines", late, raising=False)

    with pytest.raises(ConfigError, match=r"needs the library a_library_that_nobody_has, "):
        ask()


def test_libraries_that_are_installed_are_found() -> None:
    assert is_installed("torch") and not is_installed("a_library_that_nobody_has")


def test_a_processor_without_its_library_is_one_line() -> None:
    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    from transformers import Qwen3VLVideoProcessor

    with pytest.raises(ImportError) as raised:
        Qwen3VLVideoProcessor()
    with pytest.raises(
        ConfigError, match=r"^the processor needs the library torchvision, which is not installed; pip"
    ):
        raise_if_library_is_missing("the processor", raised.value)


def test_a_mistake_of_our_own_stays_what_it_is() -> None:
    with pytest.raises(NameError) as raised:
        a_mistake  # type: ignore[name-defined]  # noqa: B018, F821

    raise_if_library_is_missing("the pipeline", raised.value)


def test_a_denoiser_without_its_library_is_refused_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(transformer_cosmos, "transforms", raising=False)

    with pytest.raises(
        ConfigError, match=r"CosmosTransformer3DModel needs the library torchvision.*pip install torchvision"
    ):
        check_needed_library(diffusers.CosmosTransformer3DModel)
    check_needed_library(diffusers.FluxTransformer2DModel)
