"""The library that a pipeline needs and that is not installed is named, with what installs it."""

from pathlib import Path

import diffusers
import pytest
from diffusers.models.transformers import transformer_cosmos
from diffusers.utils import is_torchvision_available

from int8run.errors import ConfigError
from int8run.models.missing_library import (
    check_needed_library,
    find_imported_library,
    find_missing_library,
    raise_if_library_is_missing,
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
        (NameError("no", name="a_mistake"), None),
    ],
)
def test_the_library_is_found_in_the_error(error: ImportError | NameError, library: str | None) -> None:
    assert find_missing_library(error, COSMOS) == library


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
