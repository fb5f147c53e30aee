"""Faults of the output folder: its disk is full.

Each one is a function of a sandbox; `run.py` lists them. Only root can mount the small disk.
"""

from checks import check_all_finished, check_states, check_tracked
from mounts import mount_small_disk
from sandbox import Sandbox, check_said, check_that

from int8run.tracking.run_record import FAILED, FINISHED

ENOUGH_KB = 8000


def image_too_large(sandbox: Sandbox) -> None:
    """Images of one job of three do not fit on the disk; there is room for those of the others."""
    three_heights = [
        "-m",
        "sampler.height=16,512,32",
        "sampler.width=512",
        "sampler.steps=1",
        "prompts.prompts=[fox]",
        "metrics.baseline=none",
    ]
    with mount_small_disk(sandbox.sweep, kilobytes=400) as resize:
        text = sandbox.run(*three_heights, exit_code=3)

        check_said(text, "1 of 3 jobs did not finish")
        check_said(text, "job 1 (sampler.height=512) FAILED: the disk is full, and ")
        jobs = check_states(sandbox, {0: FINISHED, 1: FAILED, 2: FINISHED})
        check_said(str(jobs[1].error), "the disk is full")
        report = (sandbox.sweep / "report.html").read_text()
        check_that("the disk is full" in report, "the report does not name the error")
        check_tracked(sandbox, sandbox.database)

        resize(ENOUGH_KB)
        sandbox.run(*three_heights, "resume=true")
        check_all_finished(sandbox, 3)
    sandbox.findings.append("2 finished, 1 FAILED and named; finished by resume=true with more room")


def disk_full_to_the_last_byte(sandbox: Sandbox) -> None:
    """Many small images fill the disk; what comes after finds no room even for its status.json."""
    many_images = ["-m", "prompts.seeds_per_prompt=1,60,2", "sampler.steps=1", "prompts.prompts=[fox]"]
    with mount_small_disk(sandbox.sweep, kilobytes=360) as resize:
        text = sandbox.run(*many_images, exit_code=3)

        check_said(text, "2 of 3 jobs did not finish")
        check_that(text.count("FAILED: the disk is full") >= 2, text)

        resize(ENOUGH_KB)
        sandbox.run(*many_images, "resume=true")
        check_all_finished(sandbox, 3)
    sandbox.findings.append("1 finished, 2 FAILED and named; finished by resume=true with more room")
