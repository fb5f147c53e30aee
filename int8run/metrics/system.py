"""What the machine does while a job runs: a line of a CSV file every few seconds."""

import csv
import logging
import threading
import time
from pathlib import Path
from types import TracebackType

import psutil
import torch

log = logging.getLogger(__name__)
COLUMNS = ("time", "cpu_percent", "memory_bytes", "process_bytes", "gpu_memory_bytes", "gpu_percent")


class SystemSampler:
    """Samples the machine while its `with` lasts. Nothing that goes wrong here reaches the job.

    Args:
        path: the CSV file; a job that is shorter than `seconds` leaves none.
        seconds: between two lines; 0: none.
        gpu: which one to look at, once this process uses it.
    """

    def __init__(self, path: Path, seconds: float, gpu: int = 0):
        self.path, self.seconds, self.gpu = path, seconds, gpu
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.sample_all, name="system metrics", daemon=True)

    def __enter__(self) -> "SystemSampler":
        if self.seconds:
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        if self.seconds:
            self.thread.join()

    def sample_all(self) -> None:
        """A line every `seconds`, until it is over or the disk is full."""
        process = psutil.Process()
        psutil.cpu_percent()  # the share since the last call; the first call knows of none
        try:
            while not self.over.wait(self.seconds):
                values = {
                    "time": f"{time.time():.3f}",
                    "cpu_percent": psutil.cpu_percent(),
                    "memory_bytes": psutil.virtual_memory().used,
                    "process_bytes": process.memory_info().rss,
                    **read_gpu_values(self.gpu),
                }
                self.append(values)
        except (OSError, psutil.Error) as error:
            log.warning("%s gets no more lines: %s", self.path.name, error)

    def append(self, values: dict[str, object]) -> None:
        """One line; the first one brings the names of the columns."""
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(values)


def read_gpu_values(index: int) -> dict[str, object]:
    """Memory in use on a GPU by everybody, and how busy it is; empty on a machine without, or where NVIDIA's library does not tell.

    A GPU that this process does not use yet is left alone: a look at its memory would open a context there.
    """
    if not torch.cuda.is_initialized() or index >= torch.cuda.device_count():
        return {}
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError:  # the GPU is lost; the job will say so
        return {}
    return {"gpu_memory_bytes": total - free, **read_gpu_load(index)}


def read_gpu_load(index: int) -> dict[str, object]:
    """How busy a GPU is; empty without nvidia-ml-py, or where the driver does not tell, as for a part of a GPU."""
    try:
        from pynvml import NVMLError
    except ImportError:
        return {}
    try:
        return {"gpu_percent": torch.cuda.utilization(index)}
    except (RuntimeError, NVMLError):
        return {}
