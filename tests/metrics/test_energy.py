"""Energy by the counters of the hardware, from folders and modules that answer as the kernel and NVML do."""

import math
from types import SimpleNamespace

import pytest
import torch

from int8run.generate.generate import Generation
from int8run.metrics.energy import compute_energy, open_energy_meter

CPU = torch.device("cpu")
RANGE_UJ = 1_000_000


def write_zone(powercap, zone, name, energy=0):
    folder = powercap / zone
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")


def set_energy(powercap, zone, energy):
    (powercap / zone / "energy_uj").write_text(f"{energy}\n")


@pytest.fixture
def powercap(tmp_path):
    """Two packages with a core zone and memory, the whole machine, and a second counter of a package."""
    write_zone(tmp_path, "intel-rapl:0", "package-0", 100)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 100)
    write_zone(tmp_path, "intel-rapl:0:1", "dram", 100)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 100)
    write_zone(tmp_path, "intel-rapl:2", "psys", 100)
    write_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 100)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def test_packages_and_memory_are_added_and_nothing_is_counted_twice(powercap):
    meter = open_energy_meter(CPU, powercap)
    meter.start()
    for zone in powercap.glob("intel-rapl*:*"):
        set_energy(powercap, zone.name, 500_100)

    assert meter.describe() == "package-0, dram, package-1"
    assert meter.stop() == pytest.approx(1.5)


def test_a_counter_that_begins_again_goes_on(powercap):
    meter = open_energy_meter(CPU, powercap)
    set_energy(powercap, "intel-rapl:0", 900_000)
    meter.start()

    for energy in (100_000, 800_000, 100_000):
        set_energy(powercap, "intel-rapl:0", energy)
        meter.update()

    assert meter.stop() == pytest.approx(0.2 + 0.7 + 0.3)


def test_each_batch_begins_at_zero(powercap):
    meter = open_energy_meter(CPU, powercap)
    meter.start()
    set_energy(powercap, "intel-rapl:0", 300_100)
    first = meter.stop()
    set_energy(powercap, "intel-rapl:0", 500_100)
    meter.start()

    assert first == pytest.approx(0.3)
    assert meter.stop() == 0


def test_a_machine_without_counters_says_so_in_one_line(tmp_path, caplog):
    caplog.set_level("INFO")

    assert not open_energy_meter(CPU, tmp_path / "none").counters
    (record,) = caplog.records
    assert "energy is not measured" in record.message and "virtual machines have none" in record.message


def test_a_counter_that_may_not_be_read_says_what_to_do(powercap, caplog, monkeypatch):
    caplog.set_level("INFO")
    path_class = type(powercap)
    read_text = path_class.read_text

    def refuse(path, *args, **options):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(path, *args, **options)

    monkeypatch.setattr(path_class, "read_text", refuse)

    assert not open_energy_meter(CPU, powercap).counters
    assert "sudo chmod a+r" in caplog.text


def test_a_counter_that_is_lost_ends_the_measurement_alone(powercap, caplog):
    meter = open_energy_meter(CPU, powercap)
    meter.start()
    (powercap / "intel-rapl:0" / "energy_uj").unlink()

    meter.update()
    meter.update()

    assert math.isnan(meter.stop())
    assert caplog.text.count("energy is not measured from here on") == 1


class Nvml:
    """Answers as the module pynvml; 500 mJ more at each question."""

    class NVMLError(Exception):
        pass

    def __init__(self, error=None):
        self.error, self.millijoules = error, 0

    def nvmlInit(self):  # noqa: N802 - the name of pynvml
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        assert handle == "GPU-abc"
        if self.error is not None:
            raise self.error
        self.millijoules += 500
        return self.millijoules


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="abc"))
    return torch.device("cuda", 0)


def test_a_gpu_is_counted_by_its_uuid_in_millijoules(gpu):
    meter = open_energy_meter(gpu, nvml=Nvml())
    meter.start()

    meter.update()

    assert meter.stop() == pytest.approx(1.0)


def test_batches_after_a_lost_counter_do_not_look_as_if_they_cost_nothing(powercap):
    meter = open_energy_meter(CPU, powercap)
    generation = Generation(frames=[[], []])
    meter.start()
    set_energy(powercap, "intel-rapl:0", 300_100)
    generation.joules += meter.stop()
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    meter.start()
    generation.joules += meter.stop()

    assert compute_energy(generation, None) == {}


def test_a_gpu_that_does_not_say_it_is_one_line(gpu, caplog):
    caplog.set_level("INFO")

    assert not open_energy_meter(gpu, nvml=Nvml(Nvml.NVMLError("Not Supported"))).counters
    assert "NVML does not say it of GPU-abc: Not Supported" in caplog.text


def test_other_devices_have_none():
    assert not open_energy_meter(torch.device("mps")).counters


def test_the_energy_of_an_image_is_that_of_all_batches_over_their_number():
    int8 = Generation(frames=[[], [], [], []], joules=8.0)

    metrics = compute_energy(int8, Generation(frames=[[], []], joules=6.0))

    assert metrics == {"energy/joules_per_image": 2.0, "float/joules_per_image": 3.0}
    assert compute_energy(Generation(frames=[[]]), None) == {}, "not measured is no zero"
    assert compute_energy(int8, Generation(joules=3.0)) == {"energy/joules_per_image": 2.0}
