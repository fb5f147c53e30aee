"""What the tests of a pipeline's steps share."""

from pathlib import Path

import pytest
from support.tiny_pipeline import save_random_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of random weights on disk."""
    return save_random_pipeline(tmp_path_factory.mktemp("model"))
