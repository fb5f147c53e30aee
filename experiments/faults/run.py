"""What goes wrong on purpose, with the real command on the tiny model.

    python experiments/faults/run.py [--only NAME ...] [--keep FOLDER]

Prints a line for every fault and ends with 1 when one of them lost, doubled or hid anything. The full disk
is a tmpfs, which only root can mount.
"""

import argparse
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run

from int8run.jobs.manifest import read_manifest
from int8run.tracking import mlflow_payload
from int8run.tracking.process_identity import is_process_gone
from int8run.tracking.run_record import FAILED, FINISHED, KILLED, RUNNING, Record, find_records, read_record

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from support.servers import MlflowServer, free_port

SMALL = ["sampler.steps=2", "prompts.prompts=[fox]"]
TEN = ["-m", "lora=stack_a", "lora.strength=0,0.25,0.5,0.75,1", "outlier=none,convrot", *SMALL]
THREE = ["-m", "seed=0,1,2", *SMALL]
AWAY_S = 20.0  # how long the server is away
PATIENCE_S = 900.0  # for one command, on a machine that is busy
EXPERIMENT = "int8run"


class LostError(Exception):
    """Something is missing, doubled or not said."""


@dataclass
class Place:
    """A folder in which one fault happens."""

    folder: Path
    said: list[str] = field(default_factory=list)  # what was counted, for the table
    variables: dict[str, str] = field(default_factory=dict)  # of the environment
    before: list[str] = field(default_factory=list)  # a command that runs the command, such as `unshare`

    @property
    def sweep(self) -> Path:
        """The sweep's folder."""
        return self.folder / "sweep"

    def start(
        self, *words: str, uri: str | None = None, own_session: bool = False
    ) -> subprocess.Popen[bytes]:
        """A command; what it prints goes to log.txt."""
        environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
        environment |= {
            "COLUMNS": "400",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **({"MLFLOW_TRACKING_URI": uri} if uri else {}),
            **self.variables,
        }
        where = ["hydra.sweep.dir=sweep"] if "-m" in words else []
        with (self.folder / "log.txt").open("wb") as log:
            command = [
                *self.before,
                sys.executable,
                "-m",
                "int8run.cli",
                *words,
                *where,
                "cache.folder=cache",
            ]
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=own_session,
            )

    def run(self, *words: str, uri: str | None = None, code: int = 0) -> str:
        """A command from start to end.

        Returns:
            what it printed.
        """
        return self.ended(self.start(*words, uri=uri), code)

    def ended(self, process: "subprocess.Popen[bytes]", code: int) -> str:
        """Wait for a command; it must end with a code and without a traceback."""
        found = process.wait(PATIENCE_S)
        text = self.log()
        check_that(found == code, f"exit code {found} in place of {code}: {text[-1500:]}")
        check_that("Traceback" not in text, f"a traceback: {text[-3000:]}")
        return text

    def log(self) -> str:
        """What the last command printed so far."""
        return (self.folder / "log.txt").read_text(errors="replace")

    def records(self) -> list[Record]:
        """The jobs that there are."""
        return find_records(self.sweep) if self.sweep.is_dir() else []

    def wait_for(self, process: "subprocess.Popen[bytes]", finished: int) -> Record:
        """Until so many jobs are finished and one more runs, in MLflow, too; that one."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            states = Counter(r.state for r in self.records())
            running = [r for r in self.records() if r.state == RUNNING and r.run_id]
            if states[FINISHED] >= finished and running:
                return running[0]
            check_that(process.poll() is None, f"the command ended before: {self.log()[-1500:]}")
            time.sleep(0.02)
        raise LostError(f"no job came up: {self.log()[-1500:]}")


def check_that(fine: bool, message: str) -> None:
    """Raise LostError unless something is as it must be."""
    if not fine:
        raise LostError(message)


def check_states(place: Place, wanted: Mapping[int, str]) -> list[Record]:
    """The folders hold these jobs, by number, and no others."""
    records = find_records(place.sweep)
    found = {r.number: r.state for r in records}
    check_that(
        len(records) == len(wanted) and found == dict(wanted),
        f"jobs in the folder: {[(r.number, r.state) for r in records]}",
    )
    return records


def runs_in(store: str, sweep: str) -> list[Run]:
    """The runs of a sweep in MLflow."""
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return (
        list(client.search_runs([experiment.experiment_id], f"tags.sweep = '{sweep}'")) if experiment else []
    )


def check_tracked(place: Place, store: str, killed: int = 0) -> None:
    """MLflow has each job of the folder once, whole, and so many others, all KILLED."""
    sweep = read_manifest(place.sweep)
    assert sweep is not None
    client, runs, records = MlflowClient(store), runs_in(store, sweep.id), find_records(place.sweep)
    by_id = {run.info.run_id: run for run in runs}
    check_that(len({r.config_hash for r in records}) == len(records), "two folders hold the same job")
    check_that(
        {str(r.run_id) for r in records} <= set(by_id) and all(r.uploaded for r in records),
        "a job of the folder is not in MLflow",
    )
    others = [run.info.status for run in runs if run.info.run_id not in {r.run_id for r in records}]
    check_that(others == [KILLED] * killed, f"other runs in MLflow: {others}")
    for record in records:
        check_whole(client, by_id[str(record.run_id)], record)
    place.said.append(
        f"MLflow: {len(records)} whole, each once" + (f", and {killed} KILLED" if killed else "")
    )


def check_whole(client: MlflowClient, run: Run, record: Record) -> None:
    """A run has everything that the folder has."""
    name, run_id = f"{record.name}: ", run.info.run_id
    check_that(
        run.info.status == record.state, f"{name}{run.info.status} in MLflow, {record.state} in the folder"
    )
    check_that(
        mlflow_payload.build_params(record).items() <= run.data.params.items(), f"{name}settings are missing"
    )
    lacking = {mlflow_payload.sanitize_name(key) for key in [*record.metrics, *record.series]} - set(
        run.data.metrics
    )
    check_that(not lacking, f"{name}metrics are missing: {lacking}")
    for key, values in record.series.items():
        check_that(
            len(client.get_metric_history(run_id, key)) == len(values),
            f"{name}{key} has not {len(values)} values",
        )
    here = sorted(path.name for path in (record.folder / "images").glob("*"))
    there = sorted(Path(file.path).name for file in client.list_artifacts(run_id, "samples")) if here else []
    check_that(here == there, f"{name}pictures here {here}, there {there}")
    shown = len(client.list_artifacts(run_id, "images")) if record.images else 0
    check_that(
        shown == 2 * len(mlflow_payload.find_image_files(record)), f"{name}{shown} files in the picture grid"
    )
    tops = {Path(file.path).name for file in client.list_artifacts(run_id)}
    check_that(
        {path.name for path, folder in mlflow_payload.list_artifacts(record) if folder is None} <= tops,
        f"{name}files are missing: {tops}",
    )
    if record.state != FINISHED:
        check_that(
            record.error in run.data.tags["error"],
            f"{name}MLflow says {run.data.tags['error']!r}, the folder {record.error!r}",
        )


def get_database(place: Place) -> str:
    """The SQLite store in a folder."""
    return f"sqlite:///{place.folder / 'mlflow.db'}"


def processes_in(place: Place) -> list[psutil.Process]:
    """Processes that still work in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(place.folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def killed_in_the_fourth_job(place: Place) -> None:
    """kill -9 in the middle of job 4 of 10; then the same with resume=true."""
    sweep = place.start(*TEN)
    victim = place.wait_for(sweep, finished=3)
    sweep.kill()
    sweep.wait()
    before = {r.number: r.started for r in find_records(place.sweep)}
    check_that(read_record(victim.folder).state == KILLED, "the job had ended when it was killed: try again")
    (open_run,) = (
        run for run in runs_in(get_database(place), str(victim.sweep)) if run.info.status == RUNNING
    )
    text = place.run(*TEN, "resume=true")
    check_that(
        "3 of 10 jobs are finished already" in text, f"it does not say what it leaves out: {text[-1500:]}"
    )
    records = check_states(place, dict.fromkeys(range(10), FINISHED))
    again = [r.number for r in records if r.number in before and r.started != before[r.number]]
    check_that(again == [victim.number], f"these ran twice: {again}")
    check_tracked(place, get_database(place), killed=1)
    dead = MlflowClient(get_database(place)).get_run(open_run.info.run_id)
    check_that(
        dead.info.status == KILLED and "without an error message" in dead.data.tags["error"],
        f"the dead run is {dead.info.status}",
    )
    place.said.insert(0, f"3 finished before, job {victim.number} killed, 7 after")


def server_is_started_again(place: Place) -> None:
    """The MLflow server is killed in the middle of a sweep, and comes back after 20 s."""
    with MlflowServer(place.folder) as server:

        def stop() -> None:
            server.__exit__()
            time.sleep(AWAY_S)
            server.__enter__()

        server_away(place, server, stop)


def server_hangs(place: Place) -> None:
    """The MLflow server takes connections and says nothing for 20 s."""
    with MlflowServer(place.folder) as server:

        def stop() -> None:
            os.killpg(server.process.pid, signal.SIGSTOP)
            time.sleep(AWAY_S)
            os.killpg(server.process.pid, signal.SIGCONT)

        server_away(place, server, stop)


def server_away(place: Place, server: MlflowServer, stop: Callable[[], None]) -> None:
    """A sweep during which the server is away for a while."""
    sweep = place.start(*TEN, uri=server.address)
    place.wait_for(sweep, finished=3)
    stop()
    meanwhile = Counter(r.state for r in place.records())[FINISHED]
    text = place.ended(sweep, 0)
    check_states(place, dict.fromkeys(range(10), FINISHED))
    check_tracked(place, server.address)
    logs = "".join((r.folder / "int8run.log").read_text() for r in find_records(place.sweep))
    place.said.append(
        f"{meanwhile - 3} jobs ended meanwhile, {logs.count('upload it later')} of the uploads failed at "
        "first"
    )
    check_that("viewStateShareKey" in text, "no link to the dashboard at the end")


def server_never_comes(place: Place) -> None:
    """No server at the start nor later; `task=report sync=` when there is one."""
    text = place.run(*THREE, uri=f"http://127.0.0.1:{free_port()}")
    records = check_states(place, dict.fromkeys(range(3), FINISHED))
    check_that(not any(r.run_id for r in records) and (place.sweep / "report.html").is_file(), "no report")
    lines = [line for line in text.splitlines() if "does not answer" in line]
    check_that(
        1 <= len(lines) <= 1 + len(records),
        f"it says {len(lines)} times that nobody answers:\n" + "\n".join(lines),
    )
    check_that("task=report sync=" in text, "it does not say how to upload later")
    with MlflowServer(place.folder) as server:
        for uploaded in (3, 0):  # the second time nothing is left to do
            text = place.run("task=report", "sync=sweep", uri=server.address)
            check_that(f"{uploaded} of 3 runs uploaded" in text, text[-1500:])
        check_tracked(place, server.address)
    place.said.append(f"said {len(lines)} times in a sweep of 3")


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A disk of its own at a folder; the yielded function makes it larger."""
    check_that(os.getuid() == 0, "only root can mount a small disk; --only names the faults that go without")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True)

    def grow(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}k", folder], check=True)

    try:
        yield grow
    finally:
        subprocess.run(["umount", folder], check=True)


def picture_too_large(place: Place) -> None:
    """Images of one job of three do not fit on the disk; there is room for those of the others."""
    sizes = [
        "-m",
        "sampler.height=16,512,32",
        "sampler.width=512",
        "sampler.steps=1",
        "prompts.prompts=[fox]",
        "metrics.baseline=none",
    ]
    with small_disk(place.sweep, 400) as grow:
        text = place.run(*sizes, code=3)
        check_that("1 of 3 jobs did not finish" in text, text[-1500:])
        check_that("job 1 (sampler.height=512) FAILED: the disk is full, and " in text, text)
        records = check_states(place, {0: FINISHED, 1: FAILED, 2: FINISHED})
        check_that("the disk is full" in str(records[1].error), str(records[1].error))
        check_that(
            "the disk is full" in (place.sweep / "report.html").read_text(),
            "the report does not name the error",
        )
        check_tracked(place, get_database(place))
        grow(8000)
        place.run(*sizes, "resume=true")
        check_states(place, dict.fromkeys(range(3), FINISHED))
        place.said.append("2 finished, 1 FAILED and named; finished by resume=true with more room")


def disk_full_to_the_last_byte(place: Place) -> None:
    """Many small images fill the disk; what comes after finds no room even for its status.json."""
    many = ["-m", "prompts.seeds_per_prompt=1,60,2", "sampler.steps=1", "prompts.prompts=[fox]"]
    with small_disk(place.sweep, 360) as grow:
        text = place.run(*many, code=3)
        check_that(
            "2 of 3 jobs did not finish" in text and len(re.findall(r"FAILED: the disk is full", text)) >= 2,
            text,
        )
        grow(8000)
        place.run(*many, "resume=true")
        check_states(place, dict.fromkeys(range(3), FINISHED))
        place.said.append("1 finished, 2 FAILED and named; finished by resume=true with more room")


def interrupted(place: Place) -> None:
    """Ctrl-C in the third of ten jobs; then resume=true."""
    stop_and_resume(place)


def interrupted_in_processes(place: Place) -> None:
    """Ctrl-C while two processes work; then resume=true."""
    stop_and_resume(place, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def terminated(place: Place) -> None:
    """SIGTERM to the sweep's own process alone, as batch systems and `kill` send it."""
    sweep = place.start(*TEN)
    place.wait_for(sweep, finished=2)
    sweep.send_signal(signal.SIGTERM)
    check_stopped_and_resume(place, sweep, 143, "ended by SIGTERM")


def stop_and_resume(place: Place, *words: str) -> None:
    """As a terminal does: the signal reaches every process of the sweep."""
    sweep = place.start(*TEN, *words, own_session=True)
    place.wait_for(sweep, finished=2)
    os.killpg(sweep.pid, signal.SIGINT)
    check_stopped_and_resume(place, sweep, 130, "interrupted", *words)


def check_stopped_and_resume(
    place: Place, sweep: "subprocess.Popen[bytes]", code: int, reason: str, *words: str
) -> None:
    """A sweep that got a signal ends in order, and goes on later."""
    text = place.ended(sweep, code)
    check_that(f"int8run: {reason}; the same command with resume=true goes on" in text, text[-1500:])
    time.sleep(2)
    left = processes_in(place)
    check_that(not left, f"processes are left: {left}")
    states = Counter(r.state for r in find_records(place.sweep))
    check_that(
        states[KILLED] >= 1 and states[FINISHED] >= 2 and set(states) <= {KILLED, FINISHED}, str(states)
    )
    place.run(*TEN, *words, "resume=true")
    check_states(place, dict.fromkeys(range(10), FINISHED))
    check_tracked(place, get_database(place), killed=states[KILLED])


def worker_killed(place: Place) -> None:
    """kill -9 to one of two worker processes."""
    sweep = place.start(*TEN, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    victim = place.wait_for(sweep, finished=2)
    psutil.Process(victim.status["pid"]).kill()
    text = place.ended(sweep, 1)
    check_that(
        f"job {victim.number} ({victim.name}) KILLED: its process was killed by signal 9 (SIGKILL)" in text,
        text[-1500:],
    )
    check_that("1 of 10 jobs did not finish" in text, text[-1500:])
    check_states(place, {n: KILLED if n == victim.number else FINISHED for n in range(10)})
    check_tracked(place, get_database(place))
    check_that(
        is_process_gone(*(victim.status[key] for key in ("host", "pid", "process_started"))),
        "the worker lives",
    )


# -- the first build of the kernels ------------------------------------------------------------------

QUANTIZE = ["task=quantize", "save=out.safetensors"]
BY_TORCH = "weights are quantized by torch"  # what is said where there is no kernel


def write_slow_compiler(place: Place) -> None:
    """A g++ that writes half of its output and does not come to an end, first on the PATH."""
    compiler = place.folder / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "g++ 12" && exit\nfor last; do :; done\n'
        f'echo half > "$last"\ntouch {place.folder}/begun\nexec sleep 1000\n'
    )
    compiler.chmod(0o755)
    place.variables["PATH"] = f"{compiler.parent}:{os.environ['PATH']}"


def list_built_files(place: Place) -> Counter[str]:
    """How many files of each suffix are in the folder of built kernels."""
    folder = place.folder / "home" / ".cache" / "int8run"
    return Counter(path.suffix for path in folder.glob("rows-*"))


def kernel_build_is_killed(place: Place) -> None:
    """kill -9 while the kernels are compiled; the next command builds them anew."""
    place.variables["HOME"] = str(place.folder / "home")
    path = os.environ["PATH"]
    write_slow_compiler(place)
    command = place.start(*QUANTIZE, own_session=True)
    end = time.monotonic() + PATIENCE_S
    while not (place.folder / "begun").exists() and time.monotonic() < end:
        check_that(command.poll() is None, f"it ended before: {place.log()[-1500:]}")
        time.sleep(0.02)
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    left = list_built_files(place)
    check_that(left == {".unfinished": 1}, f"the killed build left {left}")
    place.variables["PATH"] = path
    text = place.run(*QUANTIZE)
    check_that(BY_TORCH not in text, text[-1500:])
    built = list_built_files(place)
    check_that(built[".so"] == built[".blake2b"] == 1, f"the second build left {built}")
    place.said.append("half a file was left and not used; the next command built its own")


def two_first_builds(place: Place) -> None:
    """Two commands that find no kernels start at once."""
    place.variables["HOME"] = str(place.folder / "home")
    commands = [place.start("task=quantize", f"save={name}.safetensors") for name in ("a", "b")]
    for command in commands:
        place.ended(command, 0)
    check_that(list_built_files(place) == {".so": 1, ".blake2b": 1}, f"left: {list_built_files(place)}")
    a, b = ((place.folder / f"{name}.safetensors").read_bytes() for name in ("a", "b"))
    check_that(a[-1000:] == b[-1000:] and len(a) == len(b), "their files differ")
    place.said.append("both ended with 0, one library, equal files")


# -- homes -------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small disk at a folder, with options of mount."""
    check_that(os.getuid() == 0, "only root can mount a disk; --only names the faults that go without")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=50m,{options}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def home_is_read_only(place: Place) -> None:
    """Nothing can be written below HOME: a run and a quantization do without what is kept there."""
    home = place.folder / "home"
    place.variables |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    with mounted(home, "ro"):
        check_homeless(place, "Read-only file system")


def home_is_absent(place: Place) -> None:
    """HOME names a folder that is not there and cannot be made."""
    place.variables |= {"HOME": "/proc/nobody", "XDG_CACHE_HOME": "/proc/nobody/.cache"}
    check_homeless(place, "cannot write the built library to /proc/nobody/.cache/int8run")


def home_without_execution(place: Place) -> None:
    """HOME is on a disk from which nothing may be executed, so that a built kernel cannot be loaded."""
    home = place.folder / "home"
    place.variables["HOME"] = str(home)
    with mounted(home, "noexec"):
        check_homeless(place, "cannot be loaded")


def check_homeless(place: Place, reason: str) -> None:
    """A quantization and a run end with 0, and say what they do without."""
    text = place.run(*QUANTIZE)
    check_that(BY_TORCH in text and reason in text, f"it does not say why: {text[-1500:]}")
    place.run("seed=0", *SMALL, "hydra.run.dir=run")
    check_that((place.folder / "run" / "metrics.json").is_file(), "the run left no metrics")
    place.said.append("quantized by torch, said why; the run finished")


# -- the system --------------------------------------------------------------------------------------


def database_is_locked(place: Place) -> None:
    """Another program keeps mlflow.db for itself during the whole sweep."""
    place.run("seed=9", *SMALL, "hydra.run.dir=run")
    with closing(sqlite3.connect(place.folder / "mlflow.db")) as other:
        other.execute("begin immediate")
        began = time.monotonic()
        text = place.run(*THREE)
        seconds = time.monotonic() - began
    check_states(place, dict.fromkeys(range(3), FINISHED))
    check_that("database is locked" in text and "task=report sync=" in text, text[-1500:])
    text = place.run("task=report", "sync=sweep")
    check_that("3 of 3 runs uploaded" in text, text[-1500:])
    check_tracked(place, get_database(place))
    place.said.append(f"3 finished in {seconds:.0f} s, said; uploaded when it was free")


def no_shared_memory(place: Place) -> None:
    """/dev/shm takes nothing, as in some containers; two worker processes."""
    check_that(os.getuid() == 0, "only root can mount over /dev/shm")
    script = 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"'
    place.before = ["unshare", "--mount", "sh", "-c", script, "sh"]
    text = place.run(*THREE, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", code=4)
    check_that("joblib needs shared memory" in text, text[-1500:])
    place.run(*THREE)
    check_states(place, dict.fromkeys(range(3), FINISHED))
    place.said.append("joblib is refused with exit code 4; without it 3 finished")


FAULTS: Sequence[Callable[[Place], None]] = (
    killed_in_the_fourth_job,
    server_is_started_again,
    server_hangs,
    server_never_comes,
    picture_too_large,
    disk_full_to_the_last_byte,
    interrupted,
    interrupted_in_processes,
    worker_killed,
    terminated,
    kernel_build_is_killed,
    two_first_builds,
    home_is_read_only,
    home_is_absent,
    home_without_execution,
    database_is_locked,
    no_shared_memory,
)


def main() -> int:
    """Exit code 1 when a fault lost, doubled or hid anything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=[f.__name__ for f in FAULTS], help="these faults alone")
    parser.add_argument(
        "--keep", type=Path, help="a new folder for what the commands leave; else a temporary one"
    )
    arguments = parser.parse_args()
    failed = 0
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's `&` ignores it, and every program that is started from here would
    with tempfile.TemporaryDirectory() as temporary:
        for fault in FAULTS:
            if arguments.only and fault.__name__ not in arguments.only:
                continue
            place = Place((arguments.keep or Path(temporary)).absolute() / fault.__name__)
            place.folder.mkdir(parents=True)
            began = time.monotonic()
            try:
                fault(place)
                line = f"PASS  {'; '.join(place.said)}"
            except LostError as error:
                failed += 1
                line = f"FAIL  {error}"
            print(f"{fault.__name__:<28} {time.monotonic() - began:4.0f} s  {line}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
