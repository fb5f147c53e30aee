"""Jobs of a Slurm cluster: `hydra/launcher=slurm`, with stand-ins for Slurm's programs.

experiments/launchers tries the same on a real Slurm of one machine.
"""

import contextlib
import logging
import os
import shutil
import signal
import stat
import sys
import time
import types

import psutil
import pytest

from int8run.errors import ConfigError
from int8run.jobs.base import Outcome, WorkerDied
from int8run.jobs.launchers import slurm_queue, slurm_watcher
from int8run.jobs.launchers.slurm_launcher import SLURM_PROGRAMS, Slurm

# for what happens in a second on a quiet machine; a job of LONG_S is one that does not end by itself
WAIT_S = 300
LONG_S = 3600
STAND_IN = """#!{python} -SE
import os, re, shlex, signal, subprocess, sys
from pathlib import Path

name, here = Path(sys.argv[0]).name, Path(sys.argv[0]).parent
if (here / "down").exists() and name != "sbatch":
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
if name == "sbatch":
    if (here / "refuse").exists():
        sys.exit("sbatch: error: " + (here / "refuse").read_text())
    job = str(len(list(here.glob("*.pid"))) + 1)
    # as Slurm does: submitit moves its script right after sbatch has returned
    script = here / f"{{job}}.sh"
    script.write_text(Path(sys.argv[1]).read_text())
    lines = dict(re.findall(r"#SBATCH --(output|error)=(.*)", script.read_text()))
    out, err = (open(shlex.split(lines[key].replace("%j", job))[0], "a") for key in ("output", "error"))
    command = f"bash {{shlex.quote(str(script))}}; echo $? > {{here}}/{{job}}.exit"
    env = {{**os.environ, "SLURM_JOB_ID": job}}
    options = {{"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, "start_new_session": True}}
    process = subprocess.Popen(["bash", "-c", command], env=env, **options)
    (here / f"{{job}}.pid").write_text(str(process.pid))
    print("Submitted batch job", job)
elif name == "squeue":
    for pid in here.glob("*.pid"):
        if not pid.with_suffix(".exit").exists() and not pid.with_suffix(".state").exists():
            state = "PENDING|Resources" if (here / "busy").exists() else "RUNNING|None"
            print(f"{{pid.stem}}|{{state}}")
elif name == "scancel":
    (here / f"{{sys.argv[1]}}.state").write_text("CANCELLED")
    os.killpg(int((here / f"{{sys.argv[1]}}.pid").read_text()), signal.SIGTERM)
elif name == "scontrol":
    job = sys.argv[-1]
    code = (here / f"{{job}}.exit").read_text().strip() if (here / f"{{job}}.exit").exists() else "0"
    told = here / f"{{job}}.state"
    state = told.read_text() if told.exists() else "FAILED" if int(code) else "COMPLETED"
    print(f"JobId={{job}} JobName=int8run JobState={{state}} ExitCode={{code}}:0")
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with Slurm's programs, which is where they keep their state."""
    pytest.importorskip("submitit", reason="needs the extra slurm")
    import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in SLURM_PROGRAMS:
        (folder / name).write_text(STAND_IN.format(python=sys.executable))
        (folder / name).chmod(stat.S_IRWXU)
    (folder / "bash").symlink_to(shutil.which("bash"))
    monkeypatch.setenv("PATH", str(folder))
    intervals = {
        "RESULT_POLL_S": 0.05,
        "QUEUE_POLL_S": 0.2,
        "RESULT_GRACE_S": 0.2,
        "WARN_AFTER_S": 0.5,
    }
    for name, seconds in intervals.items():
        monkeypatch.setattr(slurm_watcher, name, seconds)
    yield folder
    for pid in folder.glob("*.pid"):
        if not pid.with_suffix(".exit").exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def pool(cluster, tmp_path):
    pool = Slurm(gpus=0, cpus=3, folder=str(tmp_path / "a folder"))
    assert pool.open(7) == 7
    yield pool
    pool.close()


def make_call(seconds=0.0):
    """A call with two outcomes, each with the number and the threads of the Slurm job."""

    def call():
        time.sleep(seconds)
        value = (os.environ["SLURM_JOB_ID"], os.environ["OMP_NUM_THREADS"])
        return [Outcome(n, "FINISHED", value=value) for n in range(2)]

    return call


def until(condition):
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_results_and_errors_come_back_as_they_were(pool):
    def raise_config_error():
        raise ConfigError("steps is 0")

    workers = [pool.start(), pool.start()]
    futures = [workers[0].submit(make_call()), workers[1].submit(raise_config_error)]

    assert futures[0].result(WAIT_S) == [Outcome(n, "FINISHED", value=("1", "3")) for n in range(2)]
    with pytest.raises(ConfigError, match="steps is 0"):
        futures[1].result(WAIT_S)
    # the next call is a Slurm job of its own
    assert workers[0].submit(make_call()).result(WAIT_S)[0].value == ("3", "3")


def test_the_message_about_a_death_has_slurms_state(pool, cluster, monkeypatch):
    def kill_itself():
        os.kill(os.getpid(), signal.SIGKILL)

    workers = [pool.start() for _ in range(3)]
    monkeypatch.setattr(slurm_watcher, "RESULT_GRACE_S", LONG_S)  # there is nothing to wait for
    killed = workers[0].submit(kill_itself)
    late, cancelled = (worker.submit(make_call(LONG_S)) for worker in workers[1:])
    (cluster / "2.state").write_text("TIMEOUT")
    (cluster / "3.state").write_text("CANCELLED")

    signalled = r"its process was killed by signal 9 \(SIGKILL\)"
    for future, message in (
        (killed, rf"^Slurm job 1 ended without a result: FAILED: {signalled}; .*_log.err$"),
        (late, "Slurm job 2 ended without a result: TIMEOUT; hydra.launcher.time_min allows more; its log"),
        (cancelled, "Slurm job 3 ended without a result: CANCELLED; its log"),
    ):
        with pytest.raises(WorkerDied, match=message):
            future.result(WAIT_S)


@pytest.mark.slow
def test_a_controller_that_does_not_answer_is_not_a_death(pool, cluster):
    future = pool.start().submit(make_call(1.5))

    (cluster / "down").touch()

    assert len(future.result(WAIT_S)) == 2


@pytest.mark.slow
def test_a_result_that_is_seen_late_is_not_a_death(pool, cluster, monkeypatch):
    monkeypatch.setattr(slurm_watcher, "RESULT_GRACE_S", LONG_S)
    future = pool.start().submit(make_call(2.0))

    (cluster / "1.state").write_text("COMPLETED")  # gone from the queue, its file not there yet

    assert len(future.result(WAIT_S)) == 2


def test_a_job_that_completes_without_a_result_is_dead_after_a_while(pool, cluster):
    future = pool.start().submit(make_call(LONG_S))

    (cluster / "1.state").write_text("COMPLETED")

    with pytest.raises(WorkerDied, match="Slurm job 1 ended without a result: COMPLETED; its log"):
        future.result(WAIT_S)


def test_closing_a_worker_cancels_its_job(pool, cluster, tmp_path):
    pid_file = tmp_path / "begun"

    def write_pid():
        pid_file.write_text(str(os.getpid()))
        time.sleep(LONG_S)

    worker, other = pool.start(), pool.start()
    closed_future, other_future = worker.submit(write_pid), other.submit(make_call(LONG_S))
    until(pid_file.exists)

    worker.close()

    # submitit alone would wait for the second, stronger signal
    until(lambda: not psutil.pid_exists(int(pid_file.read_text())))
    with pytest.raises(WorkerDied, match="its Slurm job was ended by int8run"):
        closed_future.result(WAIT_S)
    assert (cluster / "1.state").read_text() == "CANCELLED"
    assert not other_future.done()


def test_closing_the_pool_cancels_the_jobs_that_run(pool, cluster):
    closed, running = pool.start(), pool.start()
    closed_future, running_future = closed.submit(make_call(LONG_S)), running.submit(make_call(LONG_S))
    closed.close()
    closed.close()

    pool.close()

    assert (cluster / "2.state").read_text() == "CANCELLED"
    assert closed_future.done()
    assert running_future.done()


@pytest.mark.slow
def test_one_warning_says_why_a_job_waits(pool, cluster, caplog):
    (cluster / "busy").touch()

    def wait_while_busy():
        while (cluster / "busy").exists():
            time.sleep(0.05)
        return []

    def messages():
        return [r.getMessage() for r in caplog.records if r.name.startswith("int8run.jobs.launchers.slurm_")]

    with caplog.at_level(logging.INFO):
        future = pool.start().submit(wait_while_busy)
        until(lambda: len(messages()) == 2)
        time.sleep(1)  # the queue is looked at several times
        (cluster / "busy").unlink()
        future.result(WAIT_S)

    assert messages()[0].startswith("Slurm job 1 submitted; its log: ")
    assert messages()[1:] == ["Slurm job 1 waits: Resources"]


def test_a_first_job_that_slurm_does_not_take_is_a_wrong_setting(pool, cluster):
    (cluster / "refuse").write_text("Invalid generic resource (gres) specification")

    message = r"Slurm does not take the job: sbatch: error: Invalid .*; hydra.launcher.gpus=0 asks for no GPU"
    with pytest.raises(ConfigError, match=message):
        pool.start().submit(make_call())


def test_a_later_job_that_slurm_does_not_take_fails_alone(pool, cluster):
    worker = pool.start()
    worker.submit(make_call()).result(WAIT_S)
    (cluster / "refuse").write_text("Job violates accounting/QOS policy")

    message = "Slurm did not take the job: sbatch: error: Job violates accounting/QOS policy"
    with pytest.raises(WorkerDied, match=message):
        worker.submit(make_call()).result(WAIT_S)


def test_a_machine_without_our_code_is_named_in_the_error(pool, monkeypatch):
    module = types.ModuleType("only_here")
    exec("def call(): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)

    message = r"Slurm job 1 could not begin: ModuleNotFoundError: No module named 'only_here'; its log: .*err"
    with pytest.raises(WorkerDied, match=message):
        pool.start().submit(module.call).result(WAIT_S)


def test_an_error_of_the_watcher_is_raised_where_results_are_awaited(pool, monkeypatch):
    monkeypatch.setattr(slurm_watcher, "read_queue", lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        pool.start().submit(make_call(LONG_S)).result(WAIT_S)


def test_accounting_is_asked_when_the_controller_has_forgotten(cluster, monkeypatch):
    asked = []

    def run_program(program, *arguments):
        asked.append(program)
        return {"sacct": "OUT_OF_MEMORY|0:125\n"}.get(program)

    monkeypatch.setattr(slurm_queue, "run_program", run_program)
    job = types.SimpleNamespace(job_id="7", paths=types.SimpleNamespace(stderr="7_log.err"))

    (cluster / "sacct").symlink_to("/bin/true")
    end = slurm_queue.read_job_end("7")

    assert end == slurm_queue.JobEnd("OUT_OF_MEMORY", exit_code=0)
    assert slurm_queue.describe_job_end(job, end) == (
        "Slurm job 7 ended without a result: OUT_OF_MEMORY; hydra.launcher.mem_gb asks for more; "
        "its log: 7_log.err"
    )

    (cluster / "sacct").unlink()
    end = slurm_queue.read_job_end("7")

    assert end is None
    message = slurm_queue.describe_job_end(job, end)
    assert message == "Slurm job 7 ended without a result: gone from the queue; its log: 7_log.err"
    assert asked == ["scontrol", "sacct", "scontrol"]


def make_script(pool, folder):
    from submitit.slurm.slurm import _make_sbatch_string

    script = _make_sbatch_string(command="run", folder=folder, **pool.make_parameters())
    return script.splitlines()


def test_settings_become_options_of_sbatch(cluster, tmp_path):
    pool = Slurm(
        partition="gpu",
        time_min=90,
        gpus=2,
        mem_gb=1.5,
        extra={"account": "vision", "exclusive": True},
        folder=str(tmp_path),
    )

    script = make_script(pool, tmp_path)

    options = [
        "partition=gpu",
        "time=90",
        "gpus-per-node=2",
        "cpus-per-task=4",
        "mem=1536M",
        "nodes=1",
        "ntasks-per-node=1",
        "no-requeue",
        "account=vision",
        "exclusive",
    ]
    assert {f"#SBATCH --{option}" for option in options} <= set(script)
    assert {"export OMP_NUM_THREADS=4", "run"} <= set(script)


def test_settings_that_are_left_out_are_left_to_the_cluster(cluster, tmp_path):
    script = make_script(Slurm(gpus=0), tmp_path)

    assert not any("gpus" in line or "mem" in line for line in script)


@pytest.mark.parametrize(("workers", "jobs", "most"), [(None, 30, 30), (4, 30, 4), (4, 2, 2)])
def test_workers_limits_the_slurm_jobs_at_once(cluster, tmp_path, workers, jobs, most):
    pool = Slurm(workers=workers, folder=str(tmp_path))

    assert pool.open(jobs) == most

    pool.close()


def test_a_slurm_job_has_a_machine_of_its_own_and_a_whole_group():
    assert Slurm().whole_groups
    assert Slurm().jobs_at_once == 1


def test_without_slurm_the_error_says_where_to_start_int8run(cluster):
    (cluster / "squeue").unlink()

    message = (
        r"finds no squeue here; start int8run on a machine that submits .* or choose hydra/launcher=joblib"
    )
    with pytest.raises(ConfigError, match=message):
        Slurm().open(2)


def test_without_submitit_the_error_says_what_to_install(cluster, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)

    message = r"needs submitit on this machine: pip install 'int8run\[slurm\]'"
    with pytest.raises(ConfigError, match=message):
        Slurm().open(2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"partition": "a b"}, "hydra.launcher.partition is 'a b'; give a partition's name"),
        ({"time_min": 0}, "hydra.launcher.time_min is 0"),
        ({"gpus": 0.5}, "hydra.launcher.gpus is 0.5; allowed is a whole number"),
        ({"cpus": 0}, "hydra.launcher.cpus is 0"),
        ({"mem_gb": 0}, "hydra.launcher.mem_gb is 0"),
        ({"workers": 0}, "hydra.launcher.workers is 0"),
        (
            {"extra": {"acount": "a"}},
            "extra names 'acount'; did you mean 'account'.*allowed of sbatch's options are account, begin",
        ),
        ({"extra": {"wrap": "rm -r /"}}, "extra names 'wrap'"),
        ({"extra": {"output": "/home/me/.bashrc"}}, "extra names 'output'"),
        (
            {"extra": {"account": "a\nrm -r /"}},
            r"hydra.launcher.extra.account is 'a\\nrm -r /'; allowed is a text of one line",
        ),
        ({"extra": {"account": ["a"]}}, "hydra.launcher.extra.account is"),
        ({"folder": "a\nb"}, "hydra.launcher.folder is"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        Slurm(**settings)
