"""A browser and an MLflow server, for the tests here and for experiments/dashboards/shoot.py.

The browser is the system's chromium, which `.ci/run` installs; playwright drives it, and its own downloads
are never used.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# MLflow's page opens its assistant over the runs when a browser sees it for the first time
NO_ASSISTANT = (
    "try { localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true') } catch {}"
)
# what MLflow 3.17's own page complains about: a server without users has no current one, and charts that draw
# before they know how large they are
MLFLOW_COMPLAINTS = (
    "/mlflow/users/current",
    "<g> attribute",
    "<path> attribute",
    "<rect> attribute",
    "ResizeObserver loop completed",
)


def installed() -> str | None:
    """Where chromium is; None: it is not."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A fresh browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed(), args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Watch:
    """What a page complained about, and what it asked for beyond its home."""

    complaints: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


def watch(page: Page, home: str, known: tuple[str, ...] = ()) -> Watch:
    """Remember the errors of a page and its requests.

    Args:
        home: how addresses begin that it may ask for.
        known: complaints with one of these words are left out.
    """
    seen = Watch()

    def complain(text: str) -> None:
        if not any(word in text for word in known):
            seen.complaints.append(text)

    def ask(url: str) -> None:
        if not url.startswith((home, "data:", "blob:")):
            seen.outside.append(url)

    page.on(
        "console",
        lambda message: (
            complain(f"{message.text} ({message.location['url']})") if message.type == "error" else None
        ),
    )
    page.on("pageerror", lambda error: complain(str(error)))
    page.on("request", lambda request: ask(request.url))
    return seen


@contextmanager
def mlflow_server(store: str, log: Path, timeout_s: float = 300) -> Iterator[str]:
    """MLflow's server for a store: its address. It ends with all its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    # two processes in place of ten, and nobody outside is asked
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--backend-store-uri", store],
            env=os.environ | settings,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + timeout_s
            while not answers(f"{address}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the MLflow server does not answer:\n{log.read_text()}")
                time.sleep(0.2)
            yield address
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def answers(url: str) -> bool:
    """Whether something answers there."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.status == 200
    except (URLError, OSError):
        return False
