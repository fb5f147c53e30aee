"""Cores, GPUs and other resources of a Ray cluster: what each worker asks for, and how many have room.

Called by `ray_launcher.py`. It knows machines as amounts by name, and nothing of Ray itself.
"""

from collections.abc import Mapping, Sequence
from statistics import median_high
from typing import NoReturn

from int8run.errors import ConfigError, check_range

RAYS_OWN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")


def check_resources(resources: Mapping[str, float]) -> None:
    """Raise ConfigError unless these are amounts of resources that only a cluster can have named."""
    for name, amount in resources.items():
        if name in RAYS_OWN_RESOURCES:
            raise ConfigError(
                f"hydra.launcher.resources names {name}; allowed are a cluster's own; num_cpus and "
                "num_gpus set cores and GPUs"
            )
        check_range(f"hydra.launcher.resources.{name}", amount, 0, 1e6)
        check_amount(f"hydra.launcher.resources.{name}", amount)


def check_amount(name: str, amount: float) -> None:
    """Raise ConfigError for an amount that Ray does not give: it takes a part of one GPU, or whole ones."""
    if amount > 1 and amount != int(amount):
        raise ConfigError(f"{name} is {amount:g}; allowed is a part of one, such as 0.5, or a whole number")


def choose_resources(
    machines: Sequence[Mapping[str, float]],
    *,
    cpus: float | None,
    gpus: float | None,
    custom: Mapping[str, float],
) -> dict[str, float]:
    """Choose what each worker asks for.

    Args:
        machines: resources of each machine, by Ray's names.
        cpus: cores of a worker; None: see RayCluster.
        gpus: GPUs of a worker; None: see RayCluster.
        custom: the cluster's own resources of a worker.
    """
    if gpus is None:
        has_gpus = any(machine.get("GPU", 0) for machine in machines)
        gpus = 1.0 if has_gpus else 0.0
    resources = {"GPU": float(gpus)}
    for name, amount in custom.items():
        resources[name] = float(amount)
    if cpus is None:
        cpus = share_cores(machines, resources)
    return {"CPU": float(cpus), **resources}


def share_cores(machines: Sequence[Mapping[str, float]], resources: Mapping[str, float]) -> float:
    """Share the cores of a typical machine among the workers that it has room for.

    A typical machine is the median, not the smallest one: many clusters have a small head node.
    """
    shares = []
    for machine in machines:
        count = count_workers(machine, resources)
        if machine.get("CPU") and count > 0:
            shares.append(machine["CPU"] // count)
    if not shares:
        return 1.0
    return max(1.0, median_high(shares))


def count_workers(machine: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """Count how many workers a machine has room for; one when they ask for nothing.

    Args:
        machine: its resources, by Ray's names.
        resources: of each worker.
    """
    counts = []
    for name, amount in resources.items():
        if amount <= 0:
            continue
        there = machine.get(name, 0)
        if name == "GPU" and amount < 1:
            # a worker's part is of one GPU: two parts of 0.4 fit into one, and not five into two
            counts.append(int(there) * int(1 / amount + 1e-6))
        else:
            counts.append(int(there / amount + 1e-6))
    return min(counts, default=1)


def refuse_resources(machines: Sequence[Mapping[str, float]], resources: Mapping[str, float]) -> NoReturn:
    """Raise ConfigError for resources that no machine has; see `choose_resources`."""
    largest = {}
    for name in resources:
        largest[name] = max(machine.get(name, 0) for machine in machines)
    raise ConfigError(
        f"a job asks for {format_resources(resources)}, and no machine of the cluster has that: the "
        f"largest have {format_resources(largest)}; ask for less with hydra.launcher.num_cpus, "
        "num_gpus and resources, or join another cluster with hydra.launcher.address"
    )


def format_resources(resources: Mapping[str, float]) -> str:
    """`num_cpus=2, num_gpus=0.5`: amounts by the names that the settings have."""
    setting_names = {"CPU": "num_cpus", "GPU": "num_gpus"}
    return ", ".join(f"{setting_names.get(name, name)}={amount:g}" for name, amount in resources.items())
