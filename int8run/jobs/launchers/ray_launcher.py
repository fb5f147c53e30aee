"""`hydra/launcher=ray_cluster`: workers are actors of a Ray cluster, on this machine or on many.

Ray is imported when a sweep starts, so that int8run works without it.
"""

import logging
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_high
from threading import Timer
from typing import Any, ClassVar, NoReturn

from int8run.errors import ConfigError, check_bool, check_range
from int8run.jobs.base import Outcome, Worker, WorkerDied
from int8run.jobs.futures import OutcomesFuture, translate_errors

log = logging.getLogger(__name__)
CONNECT_S = 10.0
WARN_AFTER_S = 10.0  # that a worker waits for resources
CHECK_TIMEOUT_S = 600.0  # for the first process on a node; a runtime_env may install packages
MAX_REASON_LENGTH = 500
INSTALL_RAY = "hydra/launcher=ray_cluster needs Ray on this machine: pip install 'int8run[ray]'"
TOKEN_HINT = (
    "both sides need the same token: `ray get-auth-token` on the head node prints the cluster's; here it is "
    "read from ~/.ray/auth_token, or from the environment: RAY_AUTH_MODE=token RAY_AUTH_TOKEN=…"
)
ADDRESS = re.compile(r"auto|[^\s/]+:\d+")
RAYS_OWN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")
DEATH_REASON = re.compile(
    r"(?:Worker exit detail: |The actor is dead because )(.*?)(?: Some common causes|$)"
)


@dataclass
class ClusterState:
    """What `RayCluster.open` found.

    Args:
        is_ours: whether int8run connected to the cluster, and so disconnects from it.
        resources: of each worker, by Ray's names.
        jobs_at_once: how many workers may share a machine.
        has_warned: that a worker waits for resources.
        workers: all that were started.
    """

    is_ours: bool = False
    resources: dict[str, float] = field(default_factory=dict)
    jobs_at_once: int = 1
    has_warned: bool = False
    workers: list["RayWorker"] = field(default_factory=list)


@dataclass(frozen=True)
class RayCluster:
    """Settings of `hydra/launcher=ray_cluster`.

    Args:
        address: host:port of a running cluster, or "auto" for the one that this machine is part of; None:
            one is started here.
        num_cpus: cores of each worker, also its threads; None: a machine's, shared by as many workers as
            its GPUs or `resources` allow.
        num_gpus: GPUs of each worker, 0.5: two share one; None: 1 where the cluster has any, else 0. With
            0, Ray hides GPUs from the jobs.
        resources: further resources of each worker, as `ray start --resources` names them.
        workers: number of workers; None: as many as the cluster has room for.
        include_dashboard: Ray's own web page, for a cluster that is started here.
        runtime_env: what Ray prepares on each machine, see its documentation; int8run must be importable
            there.
    """

    address: str | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    resources: Mapping[str, float] | None = None
    workers: int | None = None
    include_dashboard: bool = False
    runtime_env: Mapping[str, Any] | None = None
    whole_groups: ClassVar[bool] = False
    state: ClusterState = field(default_factory=ClusterState, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.address is not None and not ADDRESS.fullmatch(str(self.address)):
            raise ConfigError(
                f"hydra.launcher.address is {self.address!r}; give host:port of a cluster's head node, auto "
                "for the one that this machine is part of, or null to start one here"
            )
        if self.num_cpus is not None:
            check_range("hydra.launcher.num_cpus", self.num_cpus, 0.01, 4096)
        if self.num_gpus is not None:
            check_range("hydra.launcher.num_gpus", self.num_gpus, 0, 1024)
            check_amount("hydra.launcher.num_gpus", self.num_gpus)
        if self.resources is not None:
            check_resources(self.resources)
        if self.workers is not None:
            check_range("hydra.launcher.workers", self.workers, 1, 10000, whole=True)
        check_bool("hydra.launcher.include_dashboard", self.include_dashboard)

    @property
    def jobs_at_once(self) -> int:
        """How many workers fit on one machine; known once the pool is open."""
        return self.state.jobs_at_once

    def open(self, jobs: int) -> int:
        """Connect to the cluster and plan the workers; see `jobs.base.Pool`."""
        self.connect()
        try:
            return self.plan_workers(jobs)
        except ConfigError:
            self.close()
            raise

    def connect(self) -> None:
        """Connect to the cluster, or start one.

        Raises:
            ConfigError: when Ray is not installed or does not connect.
        """
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ConfigError(INSTALL_RAY) from error
        if ray.is_initialized():  # by a program that uses int8run as a library
            return
        options: dict[str, Any] = {"address": "local", "include_dashboard": self.include_dashboard}
        if self.address is not None:
            options = {"address": self.address}
            check_address(self.address)
        runtime_env = None if self.runtime_env is None else dict(self.runtime_env)
        try:
            ray.init(**options, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.ERROR)
        except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            # check_address has found that something listens there, so a failure to connect is about the
            # token, too
            needs_token = re.search("uthenticat|Failed to connect", reason)
            hint = f"; {TOKEN_HINT}" if needs_token else ""
            raise ConfigError(
                f"hydra.launcher.address is {self.address!r}, and Ray says: {reason}{hint}"
            ) from error
        self.state.is_ours = True

    def plan_workers(self, jobs: int) -> int:
        """Choose the resources of each worker, and return how many workers there is room for.

        Args:
            jobs: how many jobs will run.

        Raises:
            ConfigError: when no machine has these resources, or one of them lacks int8run.
        """
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        machines = [node["Resources"] for node in nodes]
        resources = choose_resources(
            machines, cpus=self.num_cpus, gpus=self.num_gpus, custom=self.resources or {}
        )
        room = []  # how many workers each machine that has room takes
        hosts = {}  # their node id -> host name
        for node in nodes:
            count = count_workers(node["Resources"], resources)
            if count > 0:
                room.append(count)
                hosts[node["NodeID"]] = node["NodeManagerHostname"]
        if not room:
            refuse_resources(machines, resources)
        check_int8run_installed(hosts)
        workers = min(jobs, self.workers or sum(room))
        self.state.resources = resources
        self.state.jobs_at_once = min(workers, max(room))
        return workers

    def start(self) -> Worker:
        """Start an actor; it may have to wait for its resources."""
        worker = RayWorker(self.state.resources, self.warn_waiting)
        self.state.workers.append(worker)
        return worker

    def warn_waiting(self) -> None:
        """Warn, once, that a worker waits for resources."""
        import ray

        if self.state.has_warned or not ray.is_initialized():
            return
        self.state.has_warned = True
        available = ray.available_resources()
        free = {name: available.get(name, 0) for name in self.state.resources}
        log.warning(
            "waiting for resources: a job asks for %s on one machine, and the whole cluster has free %s; "
            "hydra.launcher.workers starts fewer, num_cpus and num_gpus ask for less",
            format_resources(self.state.resources),
            format_resources(free),
        )

    def close(self) -> None:
        """Disconnect from the cluster, unless a program that uses int8run had connected to it."""
        for worker in self.state.workers:
            worker.stop_timer()
        self.state.workers.clear()
        if self.state.is_ours:
            import ray

            ray.shutdown()
            self.state.is_ours = False


class RayWorker:
    """An actor: one process that Ray neither starts again nor gives the same call twice.

    Args:
        resources: that the actor takes, by Ray's names.
        warn_waiting: called when the actor does not get them for a while.
    """

    def __init__(self, resources: Mapping[str, float], warn_waiting: Callable[[], None]) -> None:
        import ray

        custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
        actor_class = ray.remote(CallActor).options(
            num_cpus=resources["CPU"],
            num_gpus=resources["GPU"],
            resources=custom,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        self.actor = actor_class.remote()
        ready = self.actor.__ray_ready__.remote().future()

        def warn_unless_ready() -> None:
            if not ready.done():
                warn_waiting()

        self.timer = Timer(WARN_AFTER_S, warn_unless_ready)
        self.timer.daemon = True
        self.timer.start()

    def submit(self, call: Callable[[], Sequence[Outcome]]) -> OutcomesFuture:
        """Start a call in the actor; see `jobs.base.Worker`."""
        return translate_errors(self.actor.call.remote(call).future(), to_worker_error)

    def stop_timer(self) -> None:
        """Stop the timer and wait for its thread.

        The thread holds a reference into Ray; Ray ends the process when one is dropped during `ray.shutdown`.
        """
        self.timer.cancel()
        self.timer.join()

    def close(self) -> None:
        """Kill the actor."""
        import ray

        self.stop_timer()
        ray.kill(self.actor, no_restart=True)


class CallActor:
    """What lives in a worker's process."""

    def call(self, call: Callable[[], Sequence[Outcome]]) -> Sequence[Outcome]:
        """Run a call."""
        return call()


def check_address(address: str) -> None:
    """Raise ConfigError unless something listens at an address; Ray itself tries for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"hydra.launcher.address is {address!r}, and nothing answers there ({error.strerror or error}); "
            "`ray start --head` prints the address of a cluster that it starts, and null starts one on "
            "this machine"
        ) from error


def to_worker_error(error: BaseException) -> BaseException:
    """Return WorkerDied for one of Ray's errors; an error of the call as it was raised."""
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, RayTaskError):
        cause: object = error.cause
        return cause if isinstance(cause, BaseException) else error
    if isinstance(error, RayError):
        reason = extract_death_reason(str(error))
        return WorkerDied(f"its Ray worker ended ({type(error).__name__}): {reason}")
    return error


def extract_death_reason(text: str) -> str:
    """Return the sentence that says what happened from Ray's page of text about a death."""
    text = " ".join(text.split())
    if "ray.kill" in text:
        return "ended by int8run"
    if "connection error code 2" in text:
        return (
            "the process left no message: killed by a signal, crashed, or stopped by the kernel when memory "
            "ran out"
        )
    reason = DEATH_REASON.search(text)
    if reason is not None:
        text = reason[1]
    return text[:MAX_REASON_LENGTH]


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


def format_resources(resources: Mapping[str, float]) -> str:
    """`num_cpus=2, num_gpus=0.5`: amounts by the names that the settings have."""
    setting_names = {"CPU": "num_cpus", "GPU": "num_gpus"}
    return ", ".join(f"{setting_names.get(name, name)}={amount:g}" for name, amount in resources.items())


def check_int8run_installed(nodes: Mapping[str, str]) -> None:
    """Check that each node can import the version of int8run that runs here.

    Args:
        nodes: node id -> host name.

    Raises:
        ConfigError: naming each machine that cannot, and why.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from int8run import __version__

    # defined here, so that Ray sends its code: the node may have no int8run to import it from
    def find_version() -> str:
        try:
            import int8run
        except ImportError as error:
            return str(error)
        return int8run.__version__

    remote = ray.remote(num_cpus=0, max_retries=0)(find_version)
    hosts = {}
    for node_id, host in nodes.items():
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        hosts[remote.options(scheduling_strategy=strategy).remote()] = host
    answered, unanswered = ray.wait(list(hosts), num_returns=len(hosts), timeout=CHECK_TIMEOUT_S)
    problems = [f"{hosts[task]}: no answer within {CHECK_TIMEOUT_S:g} s" for task in unanswered]
    for task in answered:
        try:
            found = ray.get(task)
        except ray.exceptions.RayError as error:
            found = extract_death_reason(str(error))
        if found != __version__:
            problems.append(f"{hosts[task]}: {found}")
    if problems:
        raise ConfigError(
            f"the jobs need int8run {__version__} on every machine of the cluster, in the Python that Ray "
            "runs there; install it on those that lack it, or let hydra.launcher.runtime_env bring it: "
            + "; ".join(problems)
        )
