"""Checks of a Ray cluster before its first job, and Ray's errors in one line.

Called by `ray_launcher.py`.
"""

import re
import socket
from collections.abc import Mapping

from int8run.errors import ConfigError
from int8run.jobs.base import WorkerDied

CONNECT_S = 10.0
CHECK_TIMEOUT_S = 600.0  # for the first process on a node; a runtime_env may install packages
MAX_REASON_LENGTH = 500
DEATH_REASON = re.compile(
    r"(?:Worker exit detail: |The actor is dead because )(.*?)(?: Some common causes|$)"
)


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
