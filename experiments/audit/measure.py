"""Auditing a large quantized file beside its float source: time and memory, in turn with a plain copy.

    python experiments/streaming/make_flux.py CHECKPOINT
    python experiments/audit/measure.py CHECKPOINT WORK [--rounds 3]

Writes two INT8 files of the checkpoint into WORK: one by `task=quantize outlier=convrot`, which an audit
reproduces to the bit, and one with the same integers but for a few moved by 1 in every row, which it does
not: there noise and rank of every layer are measured. Each round copies the source and audits both, in an
order that turns; the files are taken out of the page cache before. `int8run` is a process of its own,
measured whole, imports included.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.writer import StreamWriter, TensorEntry
from int8run.utils.hardware import get_device_name

COPY, EXACT, MOVED = "copy", "reproduced", "not reproduced"
BLOCK = 16 * 2**20
MOVED_COLUMNS = 64  # one integer of so many is moved
INT8RUN = (sys.executable, "-m", "int8run.cli")


def evict_files(files: list[Path]) -> None:
    """Take files out of the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def time_copy(files: list[Path], out: Path) -> dict[str, float]:
    """Seconds of a plain copy that is on the disk at the end."""
    buffer = bytearray(BLOCK)
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as source, (out / file.name).open("wb", buffering=0) as target:
            while count := source.readinto(buffer):
                target.write(memoryview(buffer)[:count])
            os.fsync(target.fileno())
    seconds = time.perf_counter() - started
    for file in files:
        (out / file.name).unlink()
    return {"seconds": seconds, "read": sum(file.stat().st_size for file in files)}


def run_command(words: list[str]) -> None:
    """Run `int8run`; it must end with exit code 0."""
    done = subprocess.run([*INT8RUN, *words, "tracker=none", "progress=false"], stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"int8run {' '.join(words)} ended with {done.returncode}")


def move_integers(source: Path, target: Path) -> None:
    """The same INT8 file with one of 64 integers of each row moved by 1, as another rounding would."""
    with TensorFiles.open(source) as files, safe_open(source, "pt") as tensors:
        entries = [TensorEntry(info.key, info.dtype, info.shape) for info in files.values()]
        with StreamWriter(target, entries, {"format": "pt"}) as writer:
            for key in files:
                tensor = tensors.get_tensor(key)
                if tensor.dtype == torch.int8:
                    tensor[:, ::MOVED_COLUMNS] = (tensor[:, ::MOVED_COLUMNS] - 1).clamp(min=-127)
                writer.write(key, tensor)
            writer.finish()


def time_audit(file: Path, source: Path, work: Path) -> dict[str, float]:
    """Seconds, peak memory and grade of `int8run task=audit`."""
    folder = work / f"{file.stem}-audit"
    started = time.perf_counter()
    run_command(["task=audit", f"task.path={file}", f"task.base={source}", f"hydra.run.dir={folder}"])
    seconds = time.perf_counter() - started
    found = json.loads((folder / "audit.json").read_text())
    return {
        "seconds": seconds,
        "read": found["measured"]["read_bytes"],
        "peak": found["measured"]["peak_bytes"],
        "grade": found["grade"],
        "reproduced": sum(row["layers"] for row in found["recipes"]),
        "layers": sum(layer["storage_dtype"] == "int8" for layer in found["layers"]),
    }


def measure(source: Path, work: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """All rounds, by what was done."""
    shards = sorted(source.glob("*.safetensors"))
    exact, moved = work / "exact.safetensors", work / "moved.safetensors"
    run_command(
        [
            "task=quantize",
            f"model.location={source}",
            "outlier=convrot",
            f"save={exact}",
            f"hydra.run.dir={work / 'quantize'}",
        ]
    )
    found: dict[str, list[dict[str, float]]] = {COPY: [], EXACT: [], MOVED: []}
    for number in range(rounds):
        order = list(found)
        for name in order[number % 3 :] + order[: number % 3]:
            evict_files(shards)
            if name == COPY:
                result = time_copy(shards, work)
            elif name == EXACT:
                evict_files([exact])
                result = time_audit(exact, source, work)
            else:
                # made anew each time, so that the disk holds one of the two beside the source and its copy
                move_integers(exact, moved)
                evict_files([moved, *shards])
                result = time_audit(moved, source, work)
                moved.unlink()
            found[name].append(result)
            print(f"round {number + 1} {name}: {json.dumps(result)}", flush=True)
    return found


def format_row(name: str, results: list[dict[str, float]], copies: list[dict[str, float]]) -> str:
    """One line of the table: medians over rounds."""
    seconds = [result["seconds"] for result in results]
    ratios = [own / copied["seconds"] for copied, own in zip(copies, seconds, strict=True)]
    first = results[0]
    peak, found = "–", "–"  # a copy has neither
    if name != COPY:
        peak = f"{max(result['peak'] for result in results) / 1e6:.0f}"
        found = f"{first['grade']}, {first['reproduced']} of {first['layers']}"
    cells = (
        name,
        f"{statistics.median(seconds):.1f}",
        f"{first['read'] / 1e9:.1f}",
        f"{statistics.median(ratios):.2f} [{min(ratios):.2f}–{max(ratios):.2f}]",
        peak,
        found,
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path, help="a folder that does not exist: it is removed")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.work.exists():
        sys.exit(f"{arguments.work} exists; name a folder that does not")
    arguments.work.mkdir(parents=True)
    try:
        found = measure(arguments.source, arguments.work, arguments.rounds)
    finally:
        shutil.rmtree(arguments.work)
    print(f"{get_device_name(torch.device('cpu'))}, torch {torch.__version__}")
    print("| | s | GB read | times the copy of its round | peak RSS, MB | grade, reproduced |")
    print("|---|---|---|---|---|---|")
    for name, results in found.items():
        print(format_row(name, results, found[COPY]))


if __name__ == "__main__":
    main()
