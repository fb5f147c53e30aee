"""Worker processes where the system has no shared memory."""

import errno

import pytest

from int8run.errors import BackendError
from int8run.jobs.launchers.joblib_launcher import check_shared_memory


def test_without_shared_memory_worker_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    synchronize = pytest.importorskip("joblib.externals.loky.backend.synchronize")

    def refuse(lock: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(synchronize.Lock, "__init__", refuse)
    with pytest.raises(BackendError, match=r"shared memory.*\(/dev/shm: Read-only file system\); give the"):
        check_shared_memory()


def test_with_shared_memory_they_start() -> None:
    pytest.importorskip("joblib")
    check_shared_memory()
