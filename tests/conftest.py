"""Fixtures for all tests."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# --import-mode=importlib leaves sys.path alone; at the end, so that no folder here hides a package
sys.path.append(str(Path(__file__).parent))


def pytest_collection_finish() -> None:
    """Millions of objects of the libraries and of the collected tests stay to the end: `gc.collect` need not look at them every time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """The libraries' own clean-up at exit finds everything as it would be."""
    gc.unfreeze()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN or the largest integer, so that an operator that forgets part of its output fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and (torch.empty_like(torch.zeros(3, dtype=torch.int8)) == 127).all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small layers wait for a second thread longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
