"""The load of the machine while a job runs: a line of system.csv every few seconds."""

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
    """Samples the machine while its `with` block lasts. Nothing that goes wrong here reaches the job.

    Args:
        path: the CSV file; a job that is shorter than `seconds` writes none.
        seconds: between two lines; 0: no samples.
        gpu: index of the GPU to sample, once this process uses it.
    """

    def __init__(self, path: Path, seconds: float, gpu: int = 0):
        self.path = path
        self.seconds = seconds
        self.gpu = gpu
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.sample_all, name="system metrics", daemon=True)

    def __enter__(self) -> "SystemSampler":
        if self.seconds:
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        if self.seconds:
            self.thread.join()

    def sample_all(self) -> None:
        """Write a line every `seconds`, until the block ends or the disk is full."""
        process = psutil.Process()
        psutil.cpu_percent()  # the share since the previous call: the first call has none
        try:
            while not self.ended.wait(self.seconds):
                values = {
                    "time": f"{time.time():.3f}",
                    "cpu_percent": psutil.cpu_percent(),
                    "memory_bytes": psutil.virtual_memory().used,
                    "process_bytes": process.memory_info().rss,
                    **read_gpu_values(self.gpu),
                }
                self.append(values)
        except (OSError, psutil.Error) as error:
            log.warning("No more lines are written to %s: %s", self.path.name, error)

    def append(self, values: dict[str, object]) -> None:
        """Write one line, after the names of the columns where it is the first."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(values)


def read_gpu_values(index: int) -> dict[str, object]:
    """Memory in use on a GPU by all processes, and its utilization.

    Empty without a GPU, and for one that this process does not use yet: reading its memory would open a
    context.
    """
    if not torch.cuda.is_initialized() or index >= torch.cuda.device_count():
        return {}
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError:
        return {}  # the GPU is lost; the job will report it
    return {"gpu_memory_bytes": total - free, **read_gpu_load(index)}


def read_gpu_load(index: int) -> dict[str, object]:
    """Utilization of a GPU in percent.

    Empty without nvidia-ml-py, and where the driver does not report it, as for a MIG slice.
    """
    try:
        from pynvml import NVMLError
    except ImportError:
        return {}
    try:
        return {"gpu_percent": torch.cuda.utilization(index)}
    except (RuntimeError, NVMLError):
        return {}
