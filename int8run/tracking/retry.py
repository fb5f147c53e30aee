"""Calls to a store that may be busy, broken or away: short waits, and its libraries' errors in one line.

Used by the MLflow tracker. Knows nothing of runs and records.
"""

import logging
import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from int8run.errors import ConfigError, TrackingError
from int8run.tracking.secrets import mask_secrets

T = TypeVar("T")

# A database that is locked; two writers that made the same row at once.
BUSY_CODES = {"TEMPORARILY_UNAVAILABLE", "BAD_REQUEST"}
UNAVAILABLE_CODES = {"TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED"}
RETRY_PAUSES_S = (0.1, 0.5, 2.0)
PING_PAUSES_S = (0.0, 1.0, 2.0)  # before each try: a server that is being restarted is back by then
PING_TIMEOUT_S = 5.0
MAX_REASON_LENGTH = 300


def with_retries(call: Callable[..., T], *args: Any) -> T:
    """Call a function, and call it again a few times while the store is busy.

    Args:
        call: may be called several times without harm.
        args: its arguments.
    """
    from mlflow.exceptions import MlflowException

    for pause in RETRY_PAUSES_S:
        try:
            return call(*args)
        except MlflowException as error:
            if error.error_code not in BUSY_CODES:
                raise
            # Two writers that meet again and again wait for different times.
            time.sleep(pause * random.uniform(0.5, 1.5))
    return call(*args)


def ping(address: str) -> None:
    """Check that a server answers at all, before mlflow asks it: mlflow would go on asking for minutes.

    Raises:
        OSError: when no server answers.
    """
    import requests

    for pause in PING_PAUSES_S:
        time.sleep(pause)
        try:
            # Any response is an answer, "not found" and "unauthorized" too.
            requests.get(f"{address.rstrip('/')}/health", timeout=PING_TIMEOUT_S, stream=True).close()
            return
        except requests.exceptions.SSLError:
            return  # mlflow has settings for certificates
        except requests.exceptions.Timeout as error:
            raise TimeoutError(f"no answer in {PING_TIMEOUT_S:g} s") from error
        except requests.exceptions.ConnectionError as error:
            last_error = error
    raise last_error


@contextmanager
def translate_errors(store: str, *, checks_settings: bool) -> Iterator[None]:
    """Turn an error of the store into one line.

    Args:
        store: its address, without a password.
        checks_settings: whether the settings are still being checked: what cannot work with them is then an
            error of the user. Later, it must not end a run.

    Raises:
        TrackingError: the store does not answer, or does not accept what it is given.
        ConfigError: while settings are checked, what can never work with them.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    with quiet_retries():
        try:
            yield
        except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError) as error:
            if is_unreachable(error, store):
                raise TrackingError(f"tracker.uri={store} does not answer: {explain_error(error)}") from error
            line = f"tracker.uri={store} cannot be used: {explain_error(error)}"
            if checks_settings:
                raise ConfigError(f"{line}; tracker=none runs without") from error
            raise TrackingError(line) from error
        except ConfigError as error:
            if checks_settings:
                raise
            raise TrackingError(str(error)) from error


@contextmanager
def quiet_retries() -> Iterator[None]:
    """Keep urllib3 from logging a warning for every try."""
    logger = logging.getLogger("urllib3.connectionpool")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def is_unreachable(error: BaseException, store: str) -> bool:
    """Whether the same call may work at another time."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    if "database is locked" in str(error):
        return True
    if store.startswith("sqlite:"):
        return False
    if isinstance(error, MlflowException):
        # Other stores than servers report internal errors for wrong addresses, too.
        codes = UNAVAILABLE_CODES if store.startswith("http") else {"TEMPORARILY_UNAVAILABLE"}
        return error.error_code in codes
    return isinstance(error, OSError | OperationalError)


def explain_error(error: BaseException) -> str:
    """What went wrong, in one line without passwords and without the names of libraries."""
    text = mask_secrets(" ".join(str(error).split()))
    is_of_connection = "Max retries" in text or "Connection" in text
    system_error = re.search(r"\[Errno -?\d+\] ([^'\")\]:]+)", text)
    if system_error and is_of_connection:
        return system_error[1].strip().lower()
    if "timed out" in text.lower():
        return "it takes too long"
    # what SQLAlchemy adds: its own class, the statement, a link
    text = re.sub(r"^\(\S+Error\) | \[SQL: .*|\(Background on this error at: \S+\)", "", text).strip()
    if not text:
        return type(error).__name__
    if len(text) > MAX_REASON_LENGTH:
        return text[:MAX_REASON_LENGTH] + "…"
    return text
