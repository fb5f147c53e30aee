"""A browser for each module: playwright keeps an event loop running, which tests elsewhere must not meet."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Chromium; without it the tests are skipped."""
    pytest.importorskip("playwright", reason="needs playwright: pip install 'int8run[dev]'")
    from browser.chromium import chromium, installed

    if installed() is None:
        pytest.skip("needs chromium: apt-get install chromium, as .ci/run does")
    with chromium() as started:
        yield started
