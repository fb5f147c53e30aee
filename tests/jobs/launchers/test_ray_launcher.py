"""Workers on the machines of a Ray cluster: `hydra/launcher=ray_cluster`."""

import os
import signal
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest

from int8run.errors import ConfigError
from int8run.jobs.base import Outcome, WorkerDied
from int8run.jobs.launchers import ray_launcher
from int8run.jobs.launchers.ray_checks import extract_death_reason
from int8run.jobs.launchers.ray_launcher import RayCluster
from int8run.jobs.launchers.ray_resources import choose_resources, count_workers, format_resources
from int8run.tracking.run_record import find_records

SLOT = {"int8_slot": 1}
# for what happens in a second on a quiet machine; a job of LONG_S is one that does not end by itself
WAIT_S = 300
LONG_S = 3600


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes, one worker's place on each. Its driver is this process."""
    with pytest.MonkeyPatch.context() as patch:
        # before ray is imported, which reads them once
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef0123456789abcdef")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray = pytest.importorskip("ray", reason="needs the extra ray")
        from ray.cluster_utils import Cluster

        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes do not have the tests
        nodes = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "resources": SLOT, "include_dashboard": False},
        )
        nodes.add_node(num_cpus=1, resources=SLOT)
        yield nodes.address
        nodes.shutdown()


@pytest.fixture
def pool(cluster):
    pool = RayCluster(address=cluster, resources=SLOT)
    assert pool.open(9) == 2
    yield pool
    pool.close()


def make_call(seconds=0.0):
    """A call that returns the node and the process that it runs on."""

    def call():
        import ray

        time.sleep(seconds)
        node = ray.get_runtime_context().get_node_id()
        return [Outcome(0, "FINISHED", value=(node, os.getpid()))]

    return call


def get_value(future):
    return future.result(WAIT_S)[0].value


@pytest.mark.ray
@pytest.mark.slow
def test_each_node_runs_one_worker_which_stays(pool):
    workers = [pool.start(), pool.start()]

    (first_node, first_pid), (second_node, _) = (get_value(worker.submit(make_call())) for worker in workers)

    assert first_node != second_node
    assert pool.jobs_at_once == 1
    assert get_value(workers[0].submit(make_call())) == (first_node, first_pid)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_other_one_goes_on(pool):
    workers = [pool.start(), pool.start()]
    (first_node, first_pid), second = (get_value(worker.submit(make_call())) for worker in workers)
    running = workers[0].submit(make_call(LONG_S))
    other = workers[1].submit(make_call(2))
    time.sleep(0.3)

    os.kill(first_pid, signal.SIGKILL)

    message = r"its Ray worker ended \(ActorDiedError\): the process left no message: killed by a signal"
    with pytest.raises(WorkerDied, match=message):
        running.result(WAIT_S)
    workers[0].close()
    workers[0] = pool.start()
    node, pid = get_value(workers[0].submit(make_call()))
    assert node == first_node
    assert pid != first_pid
    assert get_value(other) == second


@pytest.mark.ray
@pytest.mark.slow
def test_errors_of_a_call_and_ends_of_its_process_are_told_apart(pool):
    def raise_config_error():
        raise ConfigError("steps is 0")

    worker, other = pool.start(), pool.start()

    with pytest.raises(ConfigError, match=r"^steps is 0$") as raised:
        worker.submit(raise_config_error).result(WAIT_S)
    assert type(raised.value) is ConfigError
    with pytest.raises(WorkerDied, match=r"its Ray worker ended \(ActorDiedError\)"):
        other.submit(lambda: os._exit(3)).result(WAIT_S)
    running = worker.submit(make_call(LONG_S))
    worker.close()
    with pytest.raises(WorkerDied, match="ended by int8run"):
        running.result(WAIT_S)


@pytest.mark.ray
@pytest.mark.slow
def test_one_warning_for_workers_that_wait_for_resources(pool, caplog, monkeypatch):
    import ray

    monkeypatch.setattr(ray_launcher, "WARN_AFTER_S", LONG_S)
    working = [pool.start(), pool.start()]
    for worker in working:
        get_value(worker.submit(make_call()))
    until(lambda: not ray.available_resources().get("int8_slot"), WAIT_S)

    monkeypatch.setattr(ray_launcher, "WARN_AFTER_S", 0.5)
    late = [pool.start(), pool.start()]
    for worker in late:
        worker.timer.join()

    warnings = [r.getMessage() for r in caplog.records if "waiting" in r.getMessage()]
    assert warnings == [
        "waiting for resources: a job asks for num_cpus=1, num_gpus=0, int8_slot=1 on one machine, and the "
        "whole cluster has free num_cpus=0, num_gpus=0, int8_slot=0; hydra.launcher.workers starts fewer, "
        "num_cpus and num_gpus ask for less"
    ]
    for worker in working + late:
        worker.close()


@pytest.mark.ray
@pytest.mark.slow
def test_no_thread_outlives_the_connection(pool, monkeypatch):
    """One that drops a reference into Ray while Ray shuts down ends the process."""
    monkeypatch.setattr(ray_launcher, "WARN_AFTER_S", LONG_S)
    worker = pool.start()
    get_value(worker.submit(make_call()))
    assert worker.timer.is_alive()

    pool.close()

    assert not worker.timer.is_alive()


@pytest.mark.ray
@pytest.mark.slow
def test_resources_that_no_machine_has_are_an_error(cluster):
    import ray

    message = (
        "a job asks for num_cpus=1, num_gpus=1, and no machine of the cluster has that: "
        "the largest have num_cpus=1, num_gpus=0"
    )
    with pytest.raises(ConfigError, match=message):
        RayCluster(address=cluster, num_cpus=1, num_gpus=1).open(3)
    assert not ray.is_initialized(), "it disconnects from the cluster"


@pytest.mark.ray
@pytest.mark.slow
def test_machines_without_int8run_are_named(cluster, tmp_path):
    # what `import` takes for a missing module
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['int8run'] = None")
    pool = RayCluster(address=cluster, runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}})

    message = r"the jobs need int8run [\d.]+ on every machine .* install it .*: import of int8run halted"
    with pytest.raises(ConfigError, match=message):
        pool.open(2)


@pytest.mark.ray
@pytest.mark.slow
def test_machines_with_another_int8run_are_named(cluster, monkeypatch):
    monkeypatch.setattr("int8run.__version__", "99.0")

    message = r"the jobs need int8run 99.0 on every machine .*: \d+\.\d+.*; .*: \d+\.\d+"
    with pytest.raises(ConfigError, match=message):
        RayCluster(address=cluster).open(2)


@pytest.mark.ray
@pytest.mark.slow
def test_a_program_that_is_connected_already_stays_connected(cluster):
    import ray

    ray.init(address=cluster, log_to_driver=False)
    pool = RayCluster(workers=1)

    assert pool.open(5) == 1
    pool.close()

    assert ray.is_initialized()
    ray.shutdown()


@pytest.fixture
def server(tmp_path):
    """The address of an MLflow server that starts in the meantime."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(
            command, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True
        )
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def is_healthy(server):
    try:
        return urlopen(f"{server}/health", timeout=5).status == 200
    except OSError:
        return False


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
    return found


def read_tracked_runs(server):
    """Number, state and config hash of every run that the server has."""
    import mlflow

    client = mlflow.MlflowClient(server)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return [(int(run.data.tags["number"]), run.info.status, run.data.tags["config_hash"]) for run in runs]


class SweepCommand:
    """A sweep of six jobs with two models on the cluster, as a process."""

    def __init__(self, cluster, server, folder):
        self.cwd = folder
        self.folder = folder / "sweep"
        launcher = ["hydra/launcher=ray_cluster", f"hydra.launcher.address={cluster}"]
        launcher += ["hydra.launcher.resources={int8_slot:1}", f"hydra.sweep.dir={self.folder}"]
        small = ["sampler.steps=1", "prompts.prompts=[fox]", "metrics.layers=false", "metrics.baseline=none"]
        jobs = ["outlier=none,convrot", "seed=0,1,2", f"tracker.uri={server}", "cache.limit_gb=0"]
        self.command = [sys.executable, "-m", "int8run.cli", "-m", *launcher, *small, *jobs]

    def start(self, *overrides):
        return subprocess.Popen(
            [*self.command, *overrides],
            cwd=self.cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def read_records(self):
        return {record.number: record for record in find_records(self.folder)}

    def find_running_after_another(self):
        """The record of a job that runs, once another one is finished."""
        records = self.read_records().values()
        running = [record for record in records if record.state == "RUNNING"]
        is_another_finished = any(record.state == "FINISHED" for record in records)
        return running[0] if running and is_another_finished else None


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_on_two_nodes_with_one_server_and_a_worker_that_is_killed(server, cluster, tmp_path):
    sweep = SweepCommand(cluster, server, tmp_path)
    until(lambda: is_healthy(server), WAIT_S)
    process = sweep.start()
    try:
        killed = until(sweep.find_running_after_another, WAIT_S)
        os.kill(killed.status["pid"], signal.SIGKILL)
        out, err = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == 1, out + err
    assert f"job {killed.number} " in err
    assert "killed by a signal" in err
    records = sweep.read_records()
    states = {number: record.state for number, record in records.items()}
    assert states == {n: "KILLED" if n == killed.number else "FINISHED" for n in range(6)}
    assert len({record.build_key for record in records.values()}) == 2
    runs = read_tracked_runs(server)
    assert len(runs) == 6
    assert {number: state for number, state, _ in runs} == states

    process = sweep.start("resume=true")
    out, err = process.communicate(timeout=WAIT_S)

    assert process.returncode == 0, out + err
    resumed = sweep.read_records()
    assert [resumed[n].state for n in range(6)] == ["FINISHED"] * 6
    assert [n for n in range(6) if resumed[n].started != records[n].started] == [killed.number]
    finished = [config_hash for _, state, config_hash in read_tracked_runs(server) if state == "FINISHED"]
    assert len(finished) == len(set(finished)) == 6


def test_an_address_where_nothing_listens_is_an_error():
    message = (
        r"address is '127.0.0.1:1', and nothing answers there \(Connection refused\); "
        r"`ray start --head` prints"
    )
    with pytest.raises(ConfigError, match=message):
        RayCluster(address="127.0.0.1:1").open(2)


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(ConfigError, match=r"needs Ray on this machine: pip install 'int8run\[ray\]'"):
        RayCluster().open(2)


EIGHT_GPUS = {"CPU": 96.0, "GPU": 8.0}
SMALL, BIG = {"CPU": 4.0}, {"CPU": 64.0}


@pytest.mark.parametrize(
    "machines, cpus, gpus, custom, resources, room",
    [
        ([EIGHT_GPUS], None, None, {}, {"CPU": 12, "GPU": 1}, [8]),  # a GPU each, and what goes with it
        ([EIGHT_GPUS], None, 0.5, {}, {"CPU": 6, "GPU": 0.5}, [16]),
        ([EIGHT_GPUS], 1, 0.4, {}, {"CPU": 1, "GPU": 0.4}, [16]),
        ([EIGHT_GPUS], None, 0, {}, {"CPU": 96, "GPU": 0}, [1]),
        ([EIGHT_GPUS], 50, None, {}, {"CPU": 50, "GPU": 1}, [1]),
        # no job on the small head node
        ([SMALL, BIG, BIG], None, None, {}, {"CPU": 64, "GPU": 0}, [0, 1, 1]),
        ([SMALL, SMALL], 2, None, {}, {"CPU": 2, "GPU": 0}, [2, 2]),
        ([SMALL, {"CPU": 0.0}], None, None, {}, {"CPU": 4, "GPU": 0}, [1, 0]),
        ([SMALL, {**BIG, "slot": 4.0}], None, None, {"slot": 1}, {"CPU": 16, "GPU": 0, "slot": 1}, [0, 4]),
        ([SMALL], None, 1, {}, {"CPU": 1, "GPU": 1}, [0]),
    ],
    ids=[
        "a GPU each",
        "half a GPU each",
        "two on a GPU at most",
        "no GPU",
        "too few cores for two",
        "a small head node",
        "some cores each",
        "a machine without cores",
        "a custom resource",
        "no GPU there",
    ],
)
def test_the_resources_of_a_worker_and_the_room_for_it(machines, cpus, gpus, custom, resources, room):
    assert choose_resources(machines, cpus=cpus, gpus=gpus, custom=custom) == resources
    assert [count_workers(machine, resources) for machine in machines] == room


def test_resources_are_named_as_the_settings_are():
    assert format_resources({"CPU": 2.0, "GPU": 0.5, "slot": 1.0}) == "num_cpus=2, num_gpus=0.5, slot=1"


def test_the_reason_is_found_in_rays_page():
    died = "The actor died.\nThe actor is dead because its node has died. Node Id: ab"
    killed = "Task was killed due to the node running low on memory.\nMemory on the node was 95%"

    assert extract_death_reason(died) == "its node has died. Node Id: ab"
    assert extract_death_reason(killed).startswith("Task was killed due to")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"address": "head"}, "hydra.launcher.address is 'head'; give host:port"),
        ({"address": "ray://head:10001"}, "give host:port of a cluster's head node"),
        ({"num_cpus": 0}, "hydra.launcher.num_cpus is 0"),
        ({"num_gpus": -1}, "hydra.launcher.num_gpus is -1"),
        ({"num_gpus": 1.5}, "num_gpus is 1.5; allowed is a part of one, such as 0.5, or a whole number"),
        ({"workers": 0}, "hydra.launcher.workers is 0"),
        (
            {"resources": {"GPU": 1}},
            "hydra.launcher.resources names GPU; allowed are a cluster's own; num_cpus and num_gpus set",
        ),
        ({"resources": {"slot": 1.5}}, "hydra.launcher.resources.slot is 1.5; allowed is a part of one"),
        ({"include_dashboard": "yes"}, "include_dashboard is 'yes'; choose true or false"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        RayCluster(**settings)
