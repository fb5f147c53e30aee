"""Processes of one machine: `hydra/launcher=joblib`."""

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

from int8run.config.compose import int8run_options
from int8run.errors import ConfigError
from int8run.jobs.base import Outcome, Pool, WorkerDied
from int8run.jobs.futures import describe_exit_code
from int8run.jobs.launchers import joblib_launcher
from int8run.jobs.launchers.joblib_launcher import Processes, ProcessWorker
from int8run.jobs.launchers.ray_launcher import RayCluster
from int8run.jobs.launchers.slurm_launcher import Slurm

# for what happens in a second on a quiet machine; a job of LONG_S is one that does not end by itself
WAIT_S = 300
LONG_S = 3600


@pytest.fixture(scope="module", autouse=True)
def functions_by_value():
    """The workers can import this file only where they happen to run in the folder above the tests."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def answer(value=None, number=0):
    return [Outcome(number, "FINISHED", value=value)]


def pid_after(seconds):
    def call():
        time.sleep(seconds)
        return answer(os.getpid())

    return call


def dies(how=signal.SIGKILL):
    def call():
        os.kill(os.getpid(), how)
        time.sleep(LONG_S)

    return call


def value(future):
    return future.result(WAIT_S)[0].value


def gone(pid, timeout=WAIT_S):
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
    first, second = (value(w.submit(pid_after(0))) for w in workers)
    assert len({first, second, os.getpid()}) == 3
    assert value(workers[0].submit(pid_after(0))) == first


def test_a_death_takes_no_other_worker_and_a_new_one_takes_its_place(pool, workers):
    other = workers[1].submit(pid_after(1.0))
    with pytest.raises(
        WorkerDied, match=r"killed by signal 9 \(SIGKILL\); the kernel does that when memory runs out"
    ):
        workers[0].submit(dies()).result(WAIT_S)
    with pytest.raises(WorkerDied, match="signal 9"):  # a dead one says so again
        workers[0].submit(pid_after(0)).result(WAIT_S)
    workers[0].close()
    workers[0] = pool.start()
    assert value(workers[0].submit(pid_after(0))) != value(other)


def test_how_a_process_ended(workers):
    with pytest.raises(WorkerDied, match=r"killed by signal 11 \(SIGSEGV\)$"):
        workers[0].submit(dies(signal.SIGSEGV)).result(WAIT_S)
    with pytest.raises(WorkerDied, match="ended by itself with exit code 3"):
        workers[1].submit(lambda: os._exit(3)).result(WAIT_S)
    assert "(unknown)" in str(describe_exit_code(-99))


def test_an_error_of_the_call_comes_out_as_it_is_and_the_process_stays(workers):
    pid = value(workers[0].submit(pid_after(0)))

    def bad():
        raise ConfigError("steps is 0")

    with pytest.raises(ConfigError, match="steps is 0"):
        workers[0].submit(bad).result(WAIT_S)
    assert value(workers[0].submit(pid_after(0))) == pid


def test_closing_ends_a_worker_in_the_middle_of_a_job(workers):
    pid = value(workers[0].submit(pid_after(0)))
    running = workers[0].submit(pid_after(LONG_S))
    time.sleep(0.2)

    workers[0].close()

    assert gone(pid)
    with pytest.raises(WorkerDied, match="ended by int8run"):
        running.result(WAIT_S)


def test_closing_a_worker_twice_does_not_free_its_successors_place(pool, workers):
    workers[0].close()
    new = pool.start()
    workers[0].close()
    assert pool.workers == {0: new, 1: workers[1]}
    pid = value(new.submit(pid_after(0)))
    pool.close()  # ends those too that nobody holds
    assert gone(pid)


def test_a_sweep_that_is_over_leaves_no_complaint():
    """Python counts the semaphores that its processes did not remove, and says so when it ends."""
    done = subprocess.run([sys.executable, "-c", SEMAPHORE], capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stderr) == (0, "") and gone(int(done.stdout), 0)


def test_an_idle_process_that_does_not_leave_is_killed(pool, workers, monkeypatch):
    monkeypatch.setattr(joblib_launcher, "EXIT_TIMEOUT_S", 0.5)
    pid = value(workers[0].submit(lambda: answer(atexit.register(time.sleep, LONG_S) and os.getpid())))

    pool.close()

    assert gone(pid, 0)


def test_ctrl_c_does_not_reach_the_jobs(workers):
    pid = value(workers[0].submit(pid_after(0)))
    running = workers[0].submit(pid_after(0.5))
    time.sleep(0.2)
    os.kill(pid, signal.SIGINT)
    assert value(running) == pid


PARENT = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts the tests in the background has it ignored
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


SEMAPHORE = """
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


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(how):
    # in a session of its own, and the signal goes to all of it, as a terminal's Ctrl-C does
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pid = int(parent.stdout.readline())
    try:
        os.killpg(parent.pid, how) if how == signal.SIGINT else parent.kill()
        assert gone(pid) and gone(parent.pid)
        assert parent.stderr.read().strip().endswith("KeyboardInterrupt" if how == signal.SIGINT else "")
    finally:
        for process in (pid, parent.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        parent.communicate()


def test_a_worker_gets_its_threads_and_its_gpu_before_torch_is_imported():
    pool = Processes(gpus=[3, "GPU-8f2a"], threads=3)
    assert (pool.jobs_at_once, pool.open(9)) == (2, 2)

    def look():
        already = "torch" in sys.modules
        import torch

        names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "OMP_NUM_THREADS")
        return answer([already, torch.get_num_threads(), *(os.environ[name] for name in names)])

    first, second = pool.start(), pool.start()
    try:
        answers = [first.submit(look), second.submit(look)]
        wait(answers)
        assert value(answers[0]) == [False, 3, "3", "PCI_BUS_ID", "3"]
        assert value(answers[1])[2] == "GPU-8f2a"
        first.close()  # its GPU is free for the next
        first = pool.start()
        assert value(first.submit(lambda: answer(os.environ["CUDA_VISIBLE_DEVICES"]))) == "3"
    finally:
        first.close()
        second.close()


def test_a_process_that_grows_is_kept():
    """loky takes 300 MB more for a leak and starts anew; here it is a model that the next job reuses."""
    worker = ProcessWorker({})

    def grow():
        sys.kept = b"x" * (400 << 20)
        time.sleep(1.1)  # loky looks once a second
        return answer(os.getpid())

    try:
        assert (
            value(worker.submit(pid_after(0)))
            == value(worker.submit(grow))
            == value(worker.submit(pid_after(0)))
        )
        assert value(worker.submit(lambda: answer(len(sys.kept) >> 20))) == 400
    finally:
        worker.close()


def test_defaults(monkeypatch):
    import joblib

    monkeypatch.setattr(joblib, "cpu_count", lambda only_physical_cores: 8)
    assert Processes().open(10) == Processes().jobs_at_once == 2
    assert Processes().open(1) == 1
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    assert [Processes().make_environment(0)[name] for name in names] == ["4", "4", "4"]
    assert Processes(n_jobs=16).make_environment(0)["OMP_NUM_THREADS"] == "1"
    assert Processes(gpus=[0, 1, 2]).open(10) == 3


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
    "option, pool, overrides",
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
def test_every_setting_stands_in_the_yaml_with_its_meaning_and_needs_no_plus(option, pool, overrides):
    names = [f.name for f in fields(pool) if f.init]
    path = Path(__file__).parents[3] / "conf" / "hydra" / "launcher" / f"{option}.yaml"
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and [line.partition(":")[0] for line in lines[2:]] == names == list(
        overrides
    )
    assert all(" # " in line for line in lines[2:])
    words = [f"hydra.launcher.{name}={str(value).replace(chr(39), '')}" for name, value in overrides.items()]
    with int8run_options(), initialize_config_module("int8run.conf", version_base="1.3"):
        plain = compose("config", [f"hydra/launcher={option}"], return_hydra_config=True).hydra.launcher
        config = compose(
            "config", [f"hydra/launcher={option}", *words], return_hydra_config=True
        ).hydra.launcher
    given = OmegaConf.to_container(config)
    assert given.pop("_target_") == f"hydra_plugins.int8run.{pool.__name__}" and given == overrides
    pool(**given)
    defaults = {f.name: f.default for f in fields(pool) if f.init and f.name != "folder"}
    assert {name: plain[name] for name in defaults} == defaults, (
        "a program that makes a pool gets what the command line gets"
    )


def test_pools_are_what_the_dispatcher_takes():
    pools: list[Pool] = [Processes(), RayCluster(), Slurm()]
    assert [p.whole_groups for p in pools] == [False, False, True]
