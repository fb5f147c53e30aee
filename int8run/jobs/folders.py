"""Output folders: each belongs to one run or one sweep, taken before anything is written into it.

Called by `cli` for a single run and by the launcher of `jobs.hydra_plugins` for a sweep. Two commands that
start in the same second get two folders. A folder that a setting names is taken alone: while a job runs in it
another one is refused, and what an earlier job left there is moved aside. Imports nothing heavy.
"""

import logging
import os
import socket
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from int8run.errors import WRITE_ELSEWHERE, ConfigError, FileError
from int8run.jobs.manifest import MANIFEST_FILE
from int8run.tracking.run_record import EARLIER_ATTEMPTS, RUNNING, STATUS, Record, find_records
from int8run.utils.paths import check_path

log = logging.getLogger(__name__)
# held as long as the command runs; the system releases it when the process ends, however it ends
LOCK_FILE = "int8run.lock"
# what a job that ended before it began may leave: hydra's notes and the log
FIRST_FILES = frozenset({LOCK_FILE, ".hydra", "int8run.log"})
RUN_SETTING, SWEEP_SETTING = "hydra.run.dir", "hydra.sweep.dir"
# of a folder whose name is the time: two commands that start in the same second differ by a number
TIME = "${now:"


def resolve_run_folder(config: DictConfig) -> tuple[Path, str]:
    """The absolute path of a single run's folder, and `hydra.run.dir` before it is resolved.

    Args:
        config: composed, hydra's part included.
    """
    setting = read_unresolved(config.hydra.run, "dir")
    hydra_config = HydraConfig.instance()
    before = hydra_config.cfg
    hydra_config.set_config(config)  # for references such as ${hydra:job.name}
    try:
        return Path(str(config.hydra.run.dir)).absolute(), setting
    finally:
        hydra_config.cfg = before


def read_unresolved(config: DictConfig, key: str) -> str:
    """A setting as it is written, references unresolved."""
    settings = OmegaConf.to_container(config, resolve=False)
    assert isinstance(settings, dict)
    return str(settings[key])


@contextmanager
def claim_run_folder(
    folder: Path, setting: str, say: Callable[[str], None], *, goes_on: bool = False
) -> Iterator[Path]:
    """Take the output folder of a single run, for as long as the context is open.

    Args:
        folder: absolute path.
        setting: `hydra.run.dir` before it is resolved.
        say: is given a line about what was moved aside.
        goes_on: whether the search that is there is resumed.

    Yields:
        The folder; unless a search goes on, it holds nothing but the lock.

    Raises:
        ConfigError: when another job runs there, or it holds files that are not those of one run.
    """
    claim = FolderClaim(folder, RUN_SETTING, say)
    if goes_on:
        claim.take_named()
    elif TIME in setting:
        claim.take_new()
    else:
        claim.take_named()
        claim.make_empty()
    try:
        yield claim.folder
    finally:
        claim.release()


@contextmanager
def claim_sweep_folder(
    folder: Path, setting: str, say: Callable[[str], None], *, goes_on: bool
) -> Iterator[Path]:
    """Take the folder of a sweep, for as long as the context is open.

    Args:
        folder: absolute path.
        setting: `hydra.sweep.dir` before it is resolved.
        say: is given a line about what was moved aside.
        goes_on: whether the sweep that is there is resumed.

    Yields:
        The folder; unless the sweep goes on, no earlier sweep is there.

    Raises:
        ConfigError: when another sweep runs there, or it is the folder of a run.
    """
    claim = FolderClaim(folder, SWEEP_SETTING, say)
    if TIME in setting and not goes_on:
        claim.take_new()
    else:
        claim.take_named()
        if not goes_on:
            claim.make_empty()
    try:
        yield claim.folder
    finally:
        claim.release()


class FolderClaim:
    """A folder that belongs to this process until it is released.

    Args:
        folder: absolute path; `take_new` may choose another name.
        key: the setting that names it.
        say: is given a line about what was moved aside.
    """

    def __init__(self, folder: Path, key: str, say: Callable[[str], None]):
        check_path(folder)
        self.folder = folder
        self.key = key
        self.say = say
        self.lock: FileLock | None = None
        self.advice = f"choose a new or empty folder: {key}=FOLDER"
        self.kind = "run" if key == RUN_SETTING else "sweep"
        # by which an earlier run or sweep in the folder is known
        self.own_file = STATUS if key == RUN_SETTING else MANIFEST_FILE

    def take_new(self) -> None:
        """Make a folder that was not there, and take it; where the name is taken, a number follows it."""
        wanted = self.folder
        make_folder(wanted.parent)
        for number in count(1):
            if number > 1:
                self.folder = wanted.with_name(f"{wanted.name}-{number}")
            try:
                self.folder.mkdir()  # only one process succeeds
            except FileExistsError:
                continue
            self.take_lock()
            return

    def take_named(self) -> None:
        """Take a folder by its name; it is made where it is missing."""
        check_parents(self.folder)
        make_folder(self.folder)
        self.take_lock()

    def take_lock(self) -> None:
        """Lock the folder, and write into the lock who has it.

        Raises:
            ConfigError: when another process has it.
        """
        path = self.folder / LOCK_FILE
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"{read_owner(path)} is writing to {self.folder}; wait for it, or choose another folder: "
                f"{self.key}=FOLDER"
            ) from None
        self.lock = lock
        path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")

    def release(self) -> None:
        """Remove the lock; a process that waits for it looks for the file again."""
        if self.lock is not None:
            (self.folder / LOCK_FILE).unlink(missing_ok=True)
            self.unlock()

    def unlock(self) -> None:
        """Give the lock up, wherever its file is now."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def make_empty(self) -> None:
        """Move what an earlier run or sweep left aside, whole.

        Raises:
            ConfigError: for files that no single run or sweep has left, and when a job runs there.
        """
        try:
            if self.must_be_emptied():
                self.check_earlier_jobs()
                self.replace_folder()
        except BaseException:
            self.release()
            raise

    def replace_folder(self) -> None:
        """Move the folder aside, and take a new one by its name.

        Raises:
            ConfigError: when another process takes that name in between.
        """
        aside = move_aside(self.folder, self.folder)
        # the lock has moved with its folder
        (aside / LOCK_FILE).unlink(missing_ok=True)
        self.unlock()
        self.say(f"{self.folder} held an earlier {self.kind}, which is now {aside}")
        self.folder.mkdir(exist_ok=True)
        self.take_lock()
        if self.own_file in self.list_files():
            raise ConfigError(f"another process writes to {self.folder}; {self.advice}")

    def list_files(self) -> set[str]:
        """The names of what is in the folder, without the lock."""
        return {path.name for path in self.folder.iterdir()} - {LOCK_FILE}

    def must_be_emptied(self) -> bool:
        """Whether an earlier run or sweep is there; files of a user's beside a sweep's folders may stay.

        Raises:
            ConfigError: for files that no such run or sweep has left.
        """
        names = self.list_files()
        if self.own_file in names:
            return True
        foreign = self.find_foreign_files(names)
        if foreign:
            raise ConfigError(
                f"{self.folder} holds files of something else than an earlier {self.kind}, such as "
                f"{min(foreign)}; {self.advice}"
            )
        return self.kind == "run" and bool(names)

    def find_foreign_files(self, names: Set[str]) -> Set[str]:
        """Find those files of the folder that are not of an earlier job of this kind, nor a user's own."""
        if self.kind == "run":
            return names - FIRST_FILES
        return names & {STATUS}  # of a single run: a sweep's jobs write it below the sweep's folder

    def check_earlier_jobs(self) -> None:
        """Raise ConfigError when a job runs in the folder, or when it cannot be moved whole."""
        records = find_records(self.folder)
        check_none_runs(records, self.advice)
        if self.kind == "run" and any(record.folder != self.folder for record in records):
            raise ConfigError(f"{self.folder} holds further runs in folders of its own; {self.advice}")
        if Path.cwd().is_relative_to(self.folder):
            raise ConfigError(
                f"{self.folder} holds an earlier {self.kind}, and is the working folder; {self.advice}"
            )


def read_owner(lock: Path) -> str:
    """Say who has a lock, as far as its file tells."""
    owner = lock.read_text(encoding="utf-8").split() if lock.is_file() else []
    if len(owner) < 2:  # the process has not written it yet
        return "another process"
    process, host = owner[:2]
    return f"process {process} on {host}"


def make_folder(folder: Path) -> None:
    """Make a folder and those around it, where they are missing.

    Raises:
        FileError: on a file system in which no program makes folders, such as `/proc`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise FileError(
            f"{folder} cannot be made, as its file system takes no new folders; {WRITE_ELSEWHERE}"
        ) from error


def check_parents(folder: Path) -> None:
    """Raise ConfigError for a folder inside that of another run or sweep."""
    for parent in folder.parents:
        if (parent / STATUS).exists() or (parent / MANIFEST_FILE).exists():
            raise ConfigError(
                f"{folder} is inside {parent}, the folder of another run or sweep; choose one outside of it"
            )


def check_none_runs(records: Sequence[Record], advice: str) -> None:
    """Raise ConfigError where a job runs, or seems to run on another machine."""
    for record in records:
        if record.state == RUNNING:
            process, host = record.status["pid"], record.status["host"]
            raise ConfigError(
                f"{record.folder} belongs to a job that runs in process {process} on {host}, "
                f"or was killed there; {advice}"
            )


def move_aside(folder: Path, place: Path) -> Path:
    """Rename a folder to the first of `<place>.1`, `<place>.2` … that is free, and return the new path."""
    for number in count(1):
        path = place.with_name(f"{place.name}.{number}")
        if not path.exists():
            return folder.rename(path)
    raise AssertionError("count never ends")


# -- the jobs of a sweep -------------------------------------------------------------------------------------


def check_job_folders(sweep_folder: Path, folders: Sequence[Path]) -> None:
    """Check that each job of a sweep has a folder of its own, below that of the sweep.

    Args:
        sweep_folder: of the sweep.
        folders: of its jobs.

    Raises:
        ConfigError: when two jobs would share one, or one is inside another.
    """
    root = Path(os.path.normpath(sweep_folder))
    taken: set[Path] = set()
    for folder in folders:
        check_path(folder)
        path = Path(os.path.normpath(folder))
        if path == root or not path.is_relative_to(root):
            raise ConfigError(
                f"hydra.sweep.subdir puts a job into {path}, which is not a folder below {root}; "
                "its default is ${hydra.job.num}"
            )
        if path in taken:
            refuse_shared_folder(path)
        taken.add(path)
    check_not_nested(taken)


def check_not_nested(folders: Collection[Path]) -> None:
    """Raise ConfigError where a job's folder is inside that of another."""
    for folder in folders:
        for parent in folder.parents:
            if parent in folders:
                raise ConfigError(
                    f"hydra.sweep.subdir puts one job into {folder} and another one into {parent}; "
                    "let no job's folder be inside that of another"
                )


def refuse_shared_folder(folder: Path) -> NoReturn:
    """Raise ConfigError for a folder that several jobs of a sweep would have."""
    raise ConfigError(
        f"hydra.sweep.subdir puts several jobs into {folder}, and a folder belongs to one job; "
        "let it depend on the job's number, as its default does: ${hydra.job.num}"
    )


def clear_job_folder(sweep_folder: Path, folder: Path) -> None:
    """Move what an earlier attempt of a job left to `earlier_attempts` in the sweep's folder.

    Nothing that looks for the runs of a sweep finds them there.

    Args:
        sweep_folder: of the sweep that goes on, whose lock this process holds.
        folder: of the job; it may be missing.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    place = sweep_folder / EARLIER_ATTEMPTS / folder.relative_to(sweep_folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = move_aside(folder, place)
    log.info("what an earlier attempt left in %s is now %s", folder, aside)
