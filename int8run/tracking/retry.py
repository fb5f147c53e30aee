"""Asking a store that may be busy, broken or away: short waits, and one line in place of its libraries' own words."""

import logging
import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from int8run.errors import ConfigError, TrackingError
from int8run.tracking.run_record import remove_login

T = TypeVar("T")
BUSY_CODES = {
    "TEMPORARILY_UNAVAILABLE",
    "BAD_REQUEST",
}  # a database that is locked; two writers made the same row at once
UNAVAILABLE_CODES = {"TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED"}
RETRY_PAUSES_S = (0.1, 0.5, 2.0)
PING_PAUSES_S = (
    0.0,
    1.0,
    2.0,
)  # pauses before looking for a server: one that is started again is back by then
PING_TIMEOUT_S = 5.0
MAX_REASON_LENGTH = 300


def with_retries(call: Callable[..., T], *args: Any) -> T:
    """Call, and call again a few times while the store is busy. Whatever is called must bear to be repeated."""
    from mlflow.exceptions import MlflowException

    for pause in RETRY_PAUSES_S:
        try:
            return call(*args)
        except MlflowException as error:
            if error.error_code not in BUSY_CODES:
                raise
            time.sleep(pause * random.uniform(0.5, 1.5))
    return call(*args)


def ping(address: str) -> None:
    """Look whether a server answers at all, before mlflow asks it: it would go on asking for minutes.

    Raises:
        OSError: when nobody does.
    """
    import requests

    for pause in PING_PAUSES_S:
        time.sleep(pause)
        try:
            # anything that it says is an answer, "not found" and "who are you" too
            requests.get(f"{address.rstrip('/')}/health", timeout=PING_TIMEOUT_S, stream=True).close()
            return
        except requests.exceptions.SSLError:
            return  # mlflow has settings for certificates
        except requests.exceptions.Timeout as error:
            raise TimeoutError(f"no answer in {PING_TIMEOUT_S:g} s") from error
        except requests.exceptions.ConnectionError as error:
            last = error
    raise last


@contextmanager
def translate_errors(store: str, user: bool) -> Iterator[None]:
    """Turn what goes wrong at the store into one line.

    Args:
        store: its address as people may see it.
        user: whether the settings are still being looked at: what cannot work with them is an error of the user then. Later a run must
            not be lost by it.

    Raises:
        TrackingError: the store does not answer, or does not take what it is given.
        ConfigError: with `user`, what these settings can never do.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    repeats = logging.getLogger("urllib3.connectionpool")  # a warning for every attempt
    level = repeats.level
    repeats.setLevel(logging.ERROR)
    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError) as error:
        silent = is_unreachable(error, store)
        line = (
            f"tracker.uri={store} {'does not answer' if silent else 'cannot be used'}: {explain_error(error)}"
        )
        if silent or not user:
            raise TrackingError(line) from error
        raise ConfigError(f"{line}; tracker=none runs without") from error
    except ConfigError as error:
        if user:
            raise
        raise TrackingError(str(error)) from error
    finally:
        repeats.setLevel(level)


def is_unreachable(error: BaseException, store: str) -> bool:
    """Whether another moment may be better."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    if "database is locked" in str(error):
        return True
    if store.startswith("sqlite:"):
        return False
    if isinstance(error, MlflowException):
        return error.error_code in UNAVAILABLE_CODES and (
            store.startswith("http") or error.error_code == "TEMPORARILY_UNAVAILABLE"
        )
    return isinstance(error, OSError | OperationalError)


def explain_error(error: BaseException) -> str:
    """What went wrong, without the names of the libraries that it went through."""
    text = remove_login(" ".join(str(error).split()))
    system = re.search(r"\[Errno -?\d+\] ([^'\")\]:]+)", text)
    if system and ("Max retries" in text or "Connection" in text):
        return system[1].strip().lower()
    if "timed out" in text.lower():
        return "it takes too long"
    text = (
        re.sub(r"^\(\S+Error\) | \[SQL: .*|\(Background on this error at: \S+\)", "", text).strip()
        or type(error).__name__
    )
    return text if len(text) <= MAX_REASON_LENGTH else text[:MAX_REASON_LENGTH] + "…"
