"""`hydra/launcher=ray_cluster`: workers are actors of a Ray cluster, on this machine or on many."""

import logging
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_high
from threading import Timer
from typing import Any, ClassVar

from int8run.errors import ConfigError, check_bool, check_range
from int8run.jobs.base import Outcome, Worker, WorkerDied
from int8run.jobs.futures import OutcomesFuture, translate_errors

log = logging.getLogger(__name__)
CONNECT_S = 10.0
WARN_AFTER_S = 10.0  # that a worker waits for resources
CHECK_TIMEOUT_S = 600.0  # for the first process on a node; a runtime_env may install packages
INSTALL_RAY = "hydra/launcher=ray_cluster needs Ray on this machine: pip install 'int8run[ray]'"
TOKEN_HINT = (
    "both sides need the same token: `ray get-auth-token` on the head node prints the cluster's; here it stands in ~/.ray/auth_token, "
    "or in the environment: RAY_AUTH_MODE=token RAY_AUTH_TOKEN=…"
)


@dataclass
class ClusterState:
    """What `open` found."""

    started: bool = False  # by us, so that it is ours to end
    share: dict[str, float] = field(default_factory=dict)  # of each worker
    jobs_at_once: int = 1
    told: bool = False  # that a worker waits
    workers: list["RayWorker"] = field(default_factory=list)


@dataclass(frozen=True)
class RayCluster:
    """Settings of `hydra/launcher=ray_cluster`.

    Args:
        address: host:port of a running cluster, or "auto" for the one that this machine is part of; None: one is started here.
        num_cpus: cores of each worker, also its threads; None: a machine's, shared by as many workers as its GPUs or `resources` allow.
        num_gpus: GPUs of each worker, 0.5: two share one; None: 1 where the cluster has any, else 0. With 0 Ray hides them from the jobs.
        resources: further resources of each worker, as `ray start --resources` names them.
        workers: how many; None: as many as the cluster has room for.
        include_dashboard: Ray's own web page, for a cluster that is started here.
        runtime_env: what Ray prepares on each machine, see its documentation; int8run must be importable there.
    """

    address: str | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    resources: Mapping[str, float] | None = None
    workers: int | None = None
    include_dashboard: bool = False
    runtime_env: Mapping[str, Any] | None = None
    whole_groups: ClassVar[bool] = False
    joined: ClusterState = field(default_factory=ClusterState, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.address is not None and not re.fullmatch(r"auto|[^\s/]+:\d+", str(self.address)):
            raise ConfigError(
                f"hydra.launcher.address is {self.address!r}; give host:port of a cluster's head node, auto for the one that this machine "
                "is part of, or null to start one here"
            )
        if self.num_cpus is not None:
            check_range("hydra.launcher.num_cpus", self.num_cpus, 0.01, 4096)
        if self.num_gpus is not None:
            check_range("hydra.launcher.num_gpus", self.num_gpus, 0, 1024)
            check_amount("hydra.launcher.num_gpus", self.num_gpus)
        for name, amount in (self.resources or {}).items():
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ConfigError(
                    f"hydra.launcher.resources names {name}; allowed are a cluster's own; num_cpus and num_gpus set cores and GPUs"
                )
            check_range(f"hydra.launcher.resources.{name}", amount, 0, 1e6)
            check_amount(f"hydra.launcher.resources.{name}", amount)
        if self.workers is not None:
            check_range("hydra.launcher.workers", self.workers, 1, 10000, whole=True)
        check_bool("hydra.launcher.include_dashboard", self.include_dashboard)

    @property
    def jobs_at_once(self) -> int:
        return self.joined.jobs_at_once

    def open(self, jobs: int) -> int:
        self.join()
        try:
            return self.make_room(jobs)
        except ConfigError:
            self.close()
            raise

    def join(self) -> None:
        """Connect to the cluster, or start one."""
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ConfigError(INSTALL_RAY) from error
        if ray.is_initialized():  # by a program that uses int8run as a library
            return
        where: dict[str, Any] = {"address": "local", "include_dashboard": self.include_dashboard}
        if self.address is not None:
            where = {"address": self.address}
            check_address(self.address)
        runtime_env = None if self.runtime_env is None else dict(self.runtime_env)
        try:
            ray.init(**where, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.ERROR)
        except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
            words = " ".join(str(error).split())
            hint = (
                f"; {TOKEN_HINT}" if re.search("uthenticat|Failed to connect", words) else ""
            )  # something does answer there
            raise ConfigError(
                f"hydra.launcher.address is {self.address!r}, and Ray says: {words}{hint}"
            ) from error
        self.joined.started = True

    def make_room(self, jobs: int) -> int:
        """Work out the share of each worker and how many there is room for."""
        import ray

        machines = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        have = {name: node["Resources"] for name, node in machines.items()}
        share = choose_resources(list(have.values()), self.num_cpus, self.num_gpus, self.resources or {})
        room = {name: count for name, resources in have.items() if (count := count_workers(resources, share))}
        if not room:
            largest = {name: max(resources.get(name, 0) for resources in have.values()) for name in share}
            raise ConfigError(
                f"a job asks for {format_resources(share)}, and no machine of the cluster has that: the largest have {format_resources(largest)}; ask for "
                "less with hydra.launcher.num_cpus, num_gpus and resources, or join another cluster with hydra.launcher.address"
            )
        check_int8run_installed({name: machines[name]["NodeManagerHostname"] for name in room})
        workers = min(jobs, self.workers or sum(room.values()))
        self.joined.share, self.joined.jobs_at_once = share, min(workers, max(room.values()))
        return workers

    def start(self) -> Worker:
        worker = RayWorker(self.joined.share, self.say_waiting)
        self.joined.workers.append(worker)
        return worker

    def say_waiting(self) -> None:
        """Once, that a worker does not get its share."""
        import ray

        if self.joined.told or not ray.is_initialized():
            return
        self.joined.told = True
        free, share = ray.available_resources(), self.joined.share
        log.warning(
            "waiting for resources: a job asks for %s on one machine, and the whole cluster has free %s; "
            "hydra.launcher.workers starts fewer, num_cpus and num_gpus ask for less",
            format_resources(share),
            format_resources({name: free.get(name, 0) for name in share}),
        )

    def close(self) -> None:
        for worker in self.joined.workers:
            worker.stop_timer()
        self.joined.workers.clear()
        if self.joined.started:
            import ray

            ray.shutdown()
            self.joined.started = False


class RayWorker:
    """An actor: one process that Ray neither starts again nor gives the same call twice."""

    def __init__(self, share: Mapping[str, float], waits: Callable[[], None]) -> None:
        import ray

        own = {name: amount for name, amount in share.items() if name not in ("CPU", "GPU")}
        self.actor = (
            ray.remote(CallActor)
            .options(
                num_cpus=share["CPU"],
                num_gpus=share["GPU"],
                resources=own,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy="SPREAD",
            )
            .remote()
        )
        ready = self.actor.__ray_ready__.remote().future()
        self.timer = Timer(WARN_AFTER_S, lambda: None if ready.done() else waits())
        self.timer.daemon = True
        self.timer.start()

    def submit(self, call: Callable[[], Sequence[Outcome]]) -> OutcomesFuture:
        return translate_errors(self.actor.call.remote(call).future(), to_worker_error)

    def stop_timer(self) -> None:
        """Wait for the timer's thread, which holds a reference into Ray: to drop one during `ray.shutdown` ends the process."""
        self.timer.cancel()
        self.timer.join()

    def close(self) -> None:
        import ray

        self.stop_timer()
        ray.kill(self.actor, no_restart=True)


class CallActor:
    """What lives in a worker's process."""

    def call(self, call: Callable[[], Sequence[Outcome]]) -> Sequence[Outcome]:
        return call()


def check_address(address: str) -> None:
    """Raise ConfigError unless something listens there; Ray itself tries for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"hydra.launcher.address is {address!r}, and nothing answers there ({error.strerror or error}); "
            "`ray start --head` prints the address of a cluster that it starts, and null starts one on this machine"
        ) from error


def to_worker_error(error: BaseException) -> BaseException:
    """WorkerDied for Ray's errors; an error of the call as it was raised."""
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, BaseException) else error
    if isinstance(error, RayError):
        return WorkerDied(
            f"its Ray worker ended ({type(error).__name__}): {extract_death_reason(str(error))}"
        )
    return error


def extract_death_reason(text: str) -> str:
    """The sentence of Ray's page about a death that tells what happened."""
    text = " ".join(text.split())
    if "ray.kill" in text:
        return "ended by int8run"
    if "connection error code 2" in text:
        return "the process went without a word: killed by a signal, crashed, or stopped by the kernel when memory ran out"
    told = re.search(
        r"(?:Worker exit detail: |The actor is dead because )(.*?)(?: Some common causes|$)", text
    )
    return (told[1] if told else text)[:500]


def check_amount(name: str, amount: float) -> None:
    """Ray gives parts of one GPU, or whole ones."""
    if amount > 1 and amount != int(amount):
        raise ConfigError(f"{name} is {amount:g}; allowed is a part of one, such as 0.5, or a whole number")


def choose_resources(
    machines: Sequence[Mapping[str, float]], cpus: float | None, gpus: float | None, own: Mapping[str, float]
) -> dict[str, float]:
    """What each worker asks for; see RayCluster for the defaults."""
    if gpus is None:
        gpus = float(any(have.get("GPU", 0) for have in machines))
    share = {"GPU": float(gpus), **{name: float(amount) for name, amount in own.items()}}
    if cpus is None:
        # a typical machine's, not the smallest one's: many clusters have a small head node
        shares = [
            have["CPU"] // count
            for have in machines
            if have.get("CPU") and (count := count_workers(have, share))
        ]
        cpus = max(1.0, median_high(shares)) if shares else 1.0
    return {"CPU": float(cpus), **share}


def count_workers(have: Mapping[str, float], share: Mapping[str, float]) -> int:
    """How many workers a machine has room for; one when they ask for nothing."""
    counts = [
        # two parts of 0.4 fit into one GPU, and five into two of them do not
        int(have.get(name, 0)) * int(1 / amount + 1e-6)
        if name == "GPU" and amount < 1
        else int(have.get(name, 0) / amount + 1e-6)
        for name, amount in share.items()
        if amount > 0
    ]
    return min(counts, default=1)


def format_resources(share: Mapping[str, float]) -> str:
    """`num_cpus=2, num_gpus=0.5`, the names that the settings have."""
    names = {"CPU": "num_cpus", "GPU": "num_gpus"}
    return ", ".join(f"{names.get(name, name)}={amount:g}" for name, amount in share.items())


def check_int8run_installed(machines: Mapping[str, str]) -> None:
    """Raise ConfigError unless each node (id -> host name) can import the int8run that runs here."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from int8run import __version__

    def look() -> str:  # in a function, which Ray sends as code: the node may have no int8run to find it in
        try:
            import int8run
        except ImportError as error:
            return str(error)
        return int8run.__version__

    remote = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): host
        for node, host in machines.items()
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=CHECK_TIMEOUT_S)
    problems = [f"{asked[answer]}: no answer within {CHECK_TIMEOUT_S:g} s" for answer in silent]
    for answer in answered:
        try:
            found = ray.get(answer)
        except ray.exceptions.RayError as error:
            found = extract_death_reason(str(error))
        if found != __version__:
            problems.append(f"{asked[answer]}: {found}")
    if problems:
        raise ConfigError(
            f"the jobs need int8run {__version__} on every machine of the cluster, in the Python that Ray runs there; "
            f"install it on those that lack it, or let hydra.launcher.runtime_env bring it: {'; '.join(problems)}"
        )
