"""Processes of one machine (`hydra/launcher=joblib`), and what all launchers have in common."""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from dataclasses import fields
from pathlib import Path

import cloudpickle
import psutil
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from support.tiers import slow_except

from int8run.config.compose import int8run_options
from int8run.errors import BackendError, ConfigError
from int8run.jobs.base import Outcome, Pool, WorkerDied
from int8run.jobs.futures import describe_exit_code
from int8run.jobs.launchers import joblib_launcher
from int8run.jobs.launchers.joblib_launcher import Processes, ProcessWorker
from int8run.jobs.launchers.ray_launcher import RayCluster
from int8run.jobs.launchers.slurm_launcher import Slurm
from int8run.jobs.launchers.visible_gpus import DEVICE_VARIABLES
from int8run.utils import hardware

# for what happens in a second on a quiet machine; a job of LONG_S is one that does not end by itself
WAIT_S = 300
LONG_S = 3600


@pytest.fixture(scope="module", autouse=True)
def functions_by_value():
    """The workers can import this file only where they happen to run in the folder above the tests."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def make_outcomes(value=None):
    return [Outcome(0, "FINISHED", value=value)]


def make_pid_call(seconds=0.0):
    def call():
        time.sleep(seconds)
        return make_outcomes(os.getpid())

    return call


def make_dying_call(signal_number=signal.SIGKILL):
    def call():
        os.kill(os.getpid(), signal_number)
        time.sleep(LONG_S)

    return call


def get_value(future):
    return future.result(WAIT_S)[0].value


def is_gone(pid, timeout=WAIT_S):
    try:
        psutil.Process(pid).wait(timeout)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


@pytest.fixture
def pool():
    pool = Processes(n_jobs=2, threads=1)
    assert pool.open(5) == 2
    yield pool
    pool.close()


@pytest.fixture
def workers(pool):
    workers = [pool.start(), pool.start()]
    yield workers
    for worker in workers:
        worker.close()


def test_each_worker_is_a_process_that_stays(workers):
    first, second = (get_value(worker.submit(make_pid_call())) for worker in workers)

    assert len({first, second, os.getpid()}) == 3
    assert get_value(workers[0].submit(make_pid_call())) == first


def test_a_death_takes_no_other_worker_and_a_new_one_takes_its_place(pool, workers):
    running = workers[1].submit(make_pid_call(seconds=1.0))

    message = r"killed by signal 9 \(SIGKILL\); the kernel does that when memory runs out"
    with pytest.raises(WorkerDied, match=message):
        workers[0].submit(make_dying_call()).result(WAIT_S)
    with pytest.raises(WorkerDied, match="signal 9"):  # a later call says the same
        workers[0].submit(make_pid_call()).result(WAIT_S)
    workers[0].close()
    workers[0] = pool.start()

    assert get_value(workers[0].submit(make_pid_call())) != get_value(running)


def test_the_message_says_how_a_process_ended(workers):
    with pytest.raises(WorkerDied, match=r"killed by signal 11 \(SIGSEGV\)$"):
        workers[0].submit(make_dying_call(signal.SIGSEGV)).result(WAIT_S)
    with pytest.raises(WorkerDied, match="ended by itself with exit code 3"):
        workers[1].submit(lambda: os._exit(3)).result(WAIT_S)
    assert "(unknown)" in describe_exit_code(-99)


def test_an_error_of_the_call_comes_out_as_it_is_and_the_process_stays(workers):
    pid = get_value(workers[0].submit(make_pid_call()))

    def raise_config_error():
        raise ConfigError("steps is 0")

    with pytest.raises(ConfigError, match="steps is 0"):
        workers[0].submit(raise_config_error).result(WAIT_S)
    assert get_value(workers[0].submit(make_pid_call())) == pid


def test_closing_ends_a_worker_in_the_middle_of_a_job(workers):
    pid = get_value(workers[0].submit(make_pid_call()))
    running = workers[0].submit(make_pid_call(seconds=LONG_S))
    time.sleep(0.2)

    workers[0].close()

    assert is_gone(pid)
    with pytest.raises(WorkerDied, match="ended by int8run"):
        running.result(WAIT_S)


def test_closing_a_worker_twice_does_not_free_its_successors_slot(pool, workers):
    workers[0].close()
    successor = pool.start()
    workers[0].close()

    assert pool.workers == {0: successor, 1: workers[1]}


def test_closing_the_pool_ends_workers_that_nobody_closed(pool):
    pid = get_value(pool.start().submit(make_pid_call()))

    pool.close()

    assert is_gone(pid)


PARENT_SCRIPT = """
import os, signal, time
# a shell that starts the tests in the background lets them ignore it
signal.signal(signal.SIGINT, signal.default_int_handler)
from int8run.jobs.launchers.joblib_launcher import Processes

def call():
    print(os.getpid(), flush=True)
    time.sleep(3600)

pool = Processes(n_jobs=1)
pool.open(1)
worker = pool.start()
try:
    worker.submit(call).result()
finally:
    worker.close()
    pool.close()
"""

SEMAPHORE_SCRIPT = """
import multiprocessing, os, sys
from int8run.jobs.launchers.joblib_launcher import Processes

def call():
    sys.kept = multiprocessing.RLock()  # as tqdm does
    return os.getpid()

pool = Processes(n_jobs=1)
pool.open(1)
worker = pool.start()
print(worker.submit(call).result())
worker.close()
pool.close()
"""


def test_a_sweep_that_is_over_leaves_no_complaint():
    """Python counts the semaphores that its processes did not remove, and says so when it ends."""
    command = [sys.executable, "-c", SEMAPHORE_SCRIPT]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert is_gone(int(ended.stdout), timeout=0)


def test_an_idle_process_that_does_not_leave_is_killed(pool, workers, monkeypatch):
    monkeypatch.setattr(joblib_launcher, "EXIT_TIMEOUT_S", 0.5)

    def delay_exit():
        atexit.register(time.sleep, LONG_S)
        return make_outcomes(os.getpid())

    pid = get_value(workers[0].submit(delay_exit))

    pool.close()

    assert is_gone(pid, timeout=0)


def test_ctrl_c_does_not_reach_the_jobs(workers):
    pid = get_value(workers[0].submit(make_pid_call()))
    running = workers[0].submit(make_pid_call(seconds=0.5))
    time.sleep(0.2)

    os.kill(pid, signal.SIGINT)

    assert get_value(running) == pid


@pytest.mark.parametrize("signal_number", slow_except([signal.SIGINT], [signal.SIGINT, signal.SIGKILL]))
def test_no_worker_outlives_its_parent(signal_number):
    # in a session of its own: SIGINT goes to all of it, as a terminal's Ctrl-C does
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT_SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pid = int(parent.stdout.readline())
    try:
        if signal_number == signal.SIGINT:
            os.killpg(parent.pid, signal.SIGINT)
        else:
            parent.kill()

        assert is_gone(pid)
        assert is_gone(parent.pid)
        last_words = "KeyboardInterrupt" if signal_number == signal.SIGINT else ""
        assert parent.stderr.read().strip().endswith(last_words)
    finally:
        for process in (pid, parent.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        parent.communicate()


def test_a_worker_gets_its_threads_and_its_gpu_before_torch_is_imported():
    pool = Processes(gpus=[3, "GPU-8f2a"], threads=3)
    assert (pool.jobs_at_once, pool.open(9)) == (2, 2)

    def read_environment():
        is_imported = "torch" in sys.modules
        import torch

        names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "OMP_NUM_THREADS")
        return make_outcomes([is_imported, torch.get_num_threads(), *(os.environ[name] for name in names)])

    first, second = pool.start(), pool.start()
    try:
        futures = [first.submit(read_environment), second.submit(read_environment)]
        wait(futures)
        assert get_value(futures[0]) == [False, 3, "3", "PCI_BUS_ID", "3"]
        assert get_value(futures[1])[2] == "GPU-8f2a"

        first.close()  # its GPU is free for the next
        first = pool.start()
        gpu = first.submit(lambda: make_outcomes(os.environ["CUDA_VISIBLE_DEVICES"]))
        assert get_value(gpu) == "3"
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize(
    ("n_jobs", "gpus"), [(None, ["0", "1", "2"]), (2, ["0", "1"]), (5, ["0", "1", "2", "0", "1"])]
)
def test_jobs_are_spread_over_all_gpus_of_a_machine(n_jobs, gpus, monkeypatch):
    monkeypatch.setattr(hardware, "has_device", lambda kind: kind == "cuda")
    monkeypatch.setattr(hardware, "count_devices", lambda kind: 3)
    for name in DEVICE_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    pool = Processes(n_jobs=n_jobs, gpus="all")

    assert pool.jobs_at_once == len(gpus)
    environments = [pool.make_environment(slot) for slot in range(len(gpus))]
    for name in ("CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        assert [environment[name] for environment in environments] == gpus


@pytest.mark.parametrize(
    ("kind", "variables", "gpus"),
    [
        ("cuda", {"CUDA_VISIBLE_DEVICES": "2, GPU-8f2a,5"}, ["2", "GPU-8f2a"]),  # torch sees no third
        ("cuda", {"HIP_VISIBLE_DEVICES": "4,6", "CUDA_VISIBLE_DEVICES": "0,1"}, ["4", "6"]),
        ("xpu", {"ZE_AFFINITY_MASK": "1,3", "CUDA_VISIBLE_DEVICES": "7,8"}, ["1", "3"]),
    ],
)
def test_all_gpus_are_those_that_this_process_may_use(kind, variables, gpus, monkeypatch):
    monkeypatch.setattr(hardware, "has_device", lambda asked: asked == kind)
    monkeypatch.setattr(hardware, "count_devices", lambda kind: 2)
    for name in DEVICE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    pool = Processes(gpus="all")

    for slot, gpu in enumerate(gpus):
        environment = pool.make_environment(slot)
        assert {environment[name] for name in variables} == {gpu}
    assert pool.jobs_at_once == 2


def test_all_gpus_of_a_machine_without_one_is_an_error(monkeypatch):
    monkeypatch.setattr(hardware, "has_device", lambda kind: False)
    with pytest.raises(
        BackendError, match=r"^hydra.launcher.gpus=all finds no GPU here; leave it out to run"
    ):
        Processes(gpus="all").open(3)


@pytest.mark.slow
def test_a_process_that_grows_is_kept():
    """loky takes 300 MB more for a leak and starts anew; here it is a model that the next job reuses."""
    worker = ProcessWorker({})

    def grow():
        sys.kept = b"x" * (400 << 20)
        time.sleep(1.1)  # loky looks once a second
        return make_outcomes(os.getpid())

    try:
        pids = [get_value(worker.submit(call)) for call in (make_pid_call(), grow, make_pid_call())]
        kept_mb = get_value(worker.submit(lambda: make_outcomes(len(sys.kept) >> 20)))
    finally:
        worker.close()

    assert len(set(pids)) == 1
    assert kept_mb == 400


def test_by_default_there_are_two_workers_that_share_the_cores(monkeypatch):
    import joblib

    monkeypatch.setattr(joblib, "cpu_count", lambda only_physical_cores: 8)

    assert Processes().jobs_at_once == 2
    assert Processes().open(10) == 2
    assert Processes().open(1) == 1
    assert Processes(gpus=[0, 1, 2]).open(10) == 3
    environment = Processes().make_environment(0)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    assert [environment[name] for name in names] == ["4", "4", "4"]
    assert Processes(n_jobs=16).make_environment(0)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n_jobs": 0}, "hydra.launcher.n_jobs is 0; allowed is a whole number from 1"),
        ({"threads": 1.5}, "hydra.launcher.threads is 1.5"),
        ({"gpus": []}, r"hydra.launcher.gpus is \[\]; name GPUs"),
        ({"gpus": 2}, "gpus is 2; name GPUs as nvidia-smi numbers them"),
        ({"gpus": [0, -1]}, "gpus is"),
        ({"gpus": [True]}, "gpus is"),
        (
            {"gpus": [0, 1], "n_jobs": 4},
            r"n_jobs is 4, and gpus=\[0, 1\] has places for 2; leave n_jobs out, or name a GPU once for",
        ),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        Processes(**settings)


@pytest.mark.parametrize(
    "option, pool_class, settings",
    [
        ("joblib", Processes, {"n_jobs": 2, "gpus": [0, 1], "threads": 4}),
        (
            "ray_cluster",
            RayCluster,
            {
                "address": "10.0.0.1:6379",
                "num_cpus": 2,
                "num_gpus": 0.5,
                "resources": {"slot": 1},
                "workers": 3,
                "include_dashboard": True,
                "runtime_env": {"env_vars": {"A": "b"}},
            },
        ),
        (
            "slurm",
            Slurm,
            {
                "partition": "gpu",
                "time_min": 5,
                "gpus": 2,
                "cpus": 8,
                "mem_gb": 32,
                "workers": 4,
                "extra": {"account": "a"},
                "folder": "/shared",
            },
        ),
    ],
)
def test_every_setting_is_in_the_yaml_with_its_meaning_and_needs_no_plus(option, pool_class, settings):
    names = [field.name for field in fields(pool_class) if field.init]
    path = Path(__file__).parents[3] / "conf" / "hydra" / "launcher" / f"{option}.yaml"

    title, target, *lines = path.read_text().splitlines()

    assert title.startswith("# ")
    assert target == f"_target_: hydra_plugins.int8run.{pool_class.__name__}"
    assert [line.partition(":")[0] for line in lines] == names == list(settings)
    assert all(" # " in line for line in lines)
    overrides = []
    for name, value in settings.items():
        overrides.append(f"hydra.launcher.{name}={value}".replace("'", ""))
    composed = compose_launcher(option, *overrides)
    assert composed.pop("_target_") == f"hydra_plugins.int8run.{pool_class.__name__}"
    assert composed == settings
    pool_class(**composed)


@pytest.mark.parametrize(
    "option, pool_class", [("joblib", Processes), ("ray_cluster", RayCluster), ("slurm", Slurm)]
)
def test_a_program_that_makes_a_pool_gets_what_the_command_line_gets(option, pool_class):
    composed = compose_launcher(option)

    for field in fields(pool_class):
        if field.init and field.name != "folder":
            assert composed[field.name] == field.default, field.name


def compose_launcher(option, *overrides):
    with int8run_options(), initialize_config_module("int8run.conf", version_base="1.3"):
        config = compose("config", [f"hydra/launcher={option}", *overrides], return_hydra_config=True)
    return OmegaConf.to_container(config.hydra.launcher)


def test_only_the_pool_of_a_batch_system_takes_whole_groups():
    pools: list[Pool] = [Processes(), RayCluster(), Slurm()]

    assert [pool.whole_groups for pool in pools] == [False, False, True]
