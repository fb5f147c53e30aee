"""A real MLflow server, and a door in front of it that can be shut."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

START_S = 300
REQUESTS = (b"GET ", b"POST ", b"PUT ", b"PATCH ", b"DELETE ", b"HEAD ")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class MlflowServer:
    """`mlflow server` for as long as its `with` lasts: two processes, half a gigabyte, about ten seconds to
    start.

    Args:
        folder: working folder of the server; by default its database and artifacts are there, too.
        store: another database to serve.
    """

    def __init__(self, folder: Path, store: str | None = None):
        self.folder, self.port = folder.absolute(), free_port()
        self.store = store or f"sqlite:///{self.folder / 'mlflow.db'}"
        self.address = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "MlflowServer":
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
            "--backend-store-uri",
            self.store,
            "--artifacts-destination",
            (self.folder / "served").as_uri(),
        ]
        environment = {
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with (self.folder / "server.log").open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            with (
                suppress(urllib.error.URLError, OSError),
                urllib.request.urlopen(f"{self.address}/health", timeout=60),
            ):
                return
            time.sleep(0.2)
        raise AssertionError(f"no answer in {START_S} s: {(self.folder / 'server.log').read_text()}")

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(
                self.process.pid, signal.SIGKILL
            )  # the server and its workers, which are a group of their own
        self.process.wait()


class Door:
    """A port that leads to another one of this machine while it is open. Shut, it refuses everybody, at once,
    as a server that is down.

    Args:
        port: where it leads.
    """

    def __init__(self, port: int):
        self.inside = port
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.lock = threading.Lock()
        self.listener: socket.socket | None = None
        self.passing: set[socket.socket] = set()
        self.left: int | None = None  # requests that may still pass
        self.passed = 0

    def __enter__(self) -> "Door":
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.shut()

    def open(self, requests: int | None = None) -> None:
        """Let everything through, or so many requests."""
        self.shut()
        self.left, self.passed = requests, 0
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self.welcome, args=(self.listener,), daemon=True).start()

    def shut(self) -> None:
        """Refuse whoever comes, and cut off whoever is inside."""
        with self.lock:
            listener, self.listener = self.listener, None
            inside, self.passing = self.passing, set()
        for one in [*([listener] if listener else []), *inside]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def welcome(self, listener: socket.socket) -> None:
        """Take connections until it is shut."""
        while True:
            try:
                outer, _ = listener.accept()
                inner = socket.create_connection(("127.0.0.1", self.inside))
            except OSError:
                return
            for one in (outer, inner):
                one.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
                )  # or small packets wait for each other
            with self.lock:
                self.passing |= {outer, inner}
            threading.Thread(target=self.carry, args=(outer, inner, True), daemon=True).start()
            threading.Thread(target=self.carry, args=(inner, outer, False), daemon=True).start()

    def carry(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        """Bytes of one direction.

        A request starts with its method, and the client waits for the answer before the next one.
        """
        with suppress(OSError):
            while data := source.recv(65536):
                if counts and data.startswith(REQUESTS):
                    if self.left == self.passed:
                        self.shut()
                        return
                    self.passed += 1
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
