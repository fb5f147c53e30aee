"""Energy that generating takes, by counters of the hardware: RAPL of Intel and AMD CPUs, NVML of NVIDIA GPUs.

`tasks.run_generation` starts and stops an `EnergyMeter` around each batch. The counters know no process: what
else runs on the machine is in the number. Of a model on a GPU that GPU counts, of one on a CPU all packages
and, where they have a counter of their own, the memory modules.
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from int8run.generate.generate import Generation

log = logging.getLogger(__name__)
POWERCAP = Path("/sys/class/powercap")
# a package, and a zone inside one; `intel-rapl-mmio:0` is a second counter of the same package
RAPL_ZONE = re.compile(r"intel-rapl:\d+(?P<inner>:\d+)?")
MICRO, MILLI = 1e-6, 1e-3


class NoEnergyError(Exception):
    """No counter can be read; the message says why."""


@dataclass
class EnergyCounter:
    """One counter of the hardware, which only grows, but for its overflow.

    Args:
        name: of what it counts.
        read_raw: reads it.
        unit_joules: joules of one count.
        overflow: after how many counts it begins at zero again; None: it does not.
    """

    name: str
    read_raw: Callable[[], int]
    unit_joules: float
    overflow: int | None = None
    last: int = 0

    def reset(self) -> None:
        """Count from now on."""
        self.last = self.read_raw()

    def read_joules(self) -> float:
        """Joules since it was read last; it must be read at least once before it overflows twice."""
        now = self.read_raw()
        counts = now - self.last
        if counts < 0 and self.overflow is not None:
            counts += self.overflow
        self.last = now
        return max(0, counts) * self.unit_joules


@dataclass
class EnergyMeter:
    """Adds up some counters while a model generates.

    A counter that cannot be read any more, of a GPU that is lost, ends the measurement and not the run.

    Args:
        counters: that together are what is measured; without one there is nothing to measure.
    """

    counters: Sequence[EnergyCounter]
    joules: float = field(default=0.0, init=False)
    is_broken: bool = field(default=False, init=False)

    def start(self) -> None:
        """Begin at zero."""
        self.update()  # which counts up to now
        self.joules = 0.0

    def update(self) -> None:
        """Read the counters; call it every step, so that none overflows unseen."""
        if self.is_broken:
            return
        try:
            self.joules += sum(counter.read_joules() for counter in self.counters)
        except NoEnergyError as error:
            log.warning("energy is not measured from here on: %s", error)
            self.is_broken = True

    def stop(self) -> float:
        """Joules since `start`; NaN where they could not be measured to the end, 0 without a counter.

        NaN stays in a sum over batches: one that was not measured must not look as if it had cost nothing.
        """
        self.update()
        return math.nan if self.is_broken else self.joules

    def describe(self) -> str:
        """What is counted, such as `package-0, dram`."""
        return ", ".join(counter.name for counter in self.counters)


def open_energy_meter(
    device: torch.device, powercap: Path = POWERCAP, nvml: Any | None = None
) -> EnergyMeter:
    """The meter for a device; one without counters, with a line in the log, where none can be read.

    Args:
        device: that the model is on.
        powercap: folder of the kernel's counters.
        nvml: the module `pynvml`; None: the installed one.
    """
    try:
        counters = open_nvml_counters(device, nvml) if device.type == "cuda" else open_rapl(device, powercap)
    except NoEnergyError as error:
        log.info("energy is not measured: %s", error)
        return EnergyMeter([])
    return EnergyMeter(counters)


# -- CPUs ----------------------------------------------------------------------------------------------------


def open_rapl(device: torch.device, powercap: Path) -> list[EnergyCounter]:
    """The counters of all CPU packages, and of their memory where that is counted apart.

    Raises:
        NoEnergyError: there are none, or they may not be read.
    """
    if device.type != "cpu":
        raise NoEnergyError(f"{device.type} has no energy counter that int8run reads")
    counters = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        match = RAPL_ZONE.fullmatch(zone.name)
        if match is None:
            continue
        name = read_text(zone / "name")
        # a core or a GPU inside a package is in its number; `psys` is the whole machine, packages included
        is_counted = name == "dram" if match["inner"] else name.startswith("package")
        if is_counted:
            counters.append(open_rapl_counter(zone, name))
    if not counters:
        raise NoEnergyError(f"{powercap} has no RAPL counter of a CPU package; virtual machines have none")
    return counters


def open_rapl_counter(zone: Path, name: str) -> EnergyCounter:
    """The counter of one zone.

    Raises:
        NoEnergyError: it may not be read.
    """
    file = zone / "energy_uj"
    counter = EnergyCounter(
        name=name,
        read_raw=lambda: int(read_text(file)),
        unit_joules=MICRO,
        overflow=int(read_text(zone / "max_energy_range_uj")),
    )
    counter.reset()
    return counter


def read_text(path: Path) -> str:
    """The content of one of the kernel's files.

    Raises:
        NoEnergyError: it may not be read.
    """
    try:
        return path.read_text().strip()
    except PermissionError as error:
        raise NoEnergyError(
            f"{path} may not be read; on most systems root alone may: sudo chmod a+r {path}"
        ) from error
    except OSError as error:
        raise NoEnergyError(f"{path} cannot be read: {error.strerror or error}") from error


# -- NVIDIA GPUs ---------------------------------------------------------------------------------------------


def open_nvml_counters(device: torch.device, nvml: Any | None) -> list[EnergyCounter]:
    """The counter of one GPU.

    Args:
        device: the GPU.
        nvml: the module `pynvml`; None: the installed one.

    Raises:
        NoEnergyError: the module is missing, or the GPU does not say it.
    """
    library = import_nvml() if nvml is None else nvml
    index = device.index or 0
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"

    handle: Any = None

    def read_millijoules() -> int:
        nonlocal handle
        try:
            if handle is None:  # once: this is read before every step
                library.nvmlInit()
                handle = library.nvmlDeviceGetHandleByUUID(uuid)
            return int(library.nvmlDeviceGetTotalEnergyConsumption(handle))
        except library.NVMLError as error:
            raise NoEnergyError(f"NVML does not say it of {uuid}: {error}") from error

    counter = EnergyCounter(name=f"GPU {index}", read_raw=read_millijoules, unit_joules=MILLI)
    counter.reset()
    return [counter]


def import_nvml() -> Any:
    """The module `pynvml`.

    Raises:
        NoEnergyError: it is not installed.
    """
    try:
        import pynvml
    except ImportError as error:
        raise NoEnergyError("nvidia-ml-py is not installed: pip install nvidia-ml-py") from error
    return pynvml


def compute_energy(candidate: Generation, baseline: Generation | None) -> dict[str, float]:
    """Joules for one image or video of each model.

    Args:
        candidate: of the INT8 model.
        baseline: of the float model in the same run; None: there is none.

    Returns:
        `energy/joules_per_image` and `float/joules_per_image`; what was not measured has no entry.
    """
    metrics = {}
    for prefix, generation in (("energy", candidate), ("float", baseline)):
        if generation is not None and generation.joules > 0 and generation.frames:
            metrics[f"{prefix}/joules_per_image"] = generation.joules / len(generation.frames)
    return metrics
