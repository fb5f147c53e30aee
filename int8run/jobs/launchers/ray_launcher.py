"""`hydra/launcher=ray_cluster`: workers are actors of a Ray cluster, on this machine or on many.

Ray is imported when a sweep starts, so that int8run works without it.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Timer
from typing import Any, ClassVar

from int8run.errors import ConfigError, check_bool, check_range
from int8run.jobs.base import Outcome, Worker
from int8run.jobs.futures import OutcomesFuture, translate_errors
from int8run.jobs.launchers.ray_checks import check_address, check_int8run_installed, to_worker_error
from int8run.jobs.launchers.ray_resources import (
    check_amount,
    check_resources,
    choose_resources,
    count_workers,
    format_resources,
    refuse_resources,
)

log = logging.getLogger(__name__)
WARN_AFTER_S = 10.0  # that a worker waits for resources
INSTALL_RAY = "hydra/launcher=ray_cluster needs Ray on this machine: pip install 'int8run[ray]'"
TOKEN_HINT = (
    "both sides need the same token: `ray get-auth-token` on the head node prints the cluster's; here it is "
    "read from ~/.ray/auth_token, or from the environment: RAY_AUTH_MODE=token RAY_AUTH_TOKEN=…"
)
ADDRESS = re.compile(r"auto|[^\s/]+:\d+")


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
