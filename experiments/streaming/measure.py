"""Quantizing a checkpoint from file to file beside a plain copy of it: time, memory and disk, in turn.

    python experiments/streaming/make_flux.py CHECKPOINT
    python experiments/streaming/measure.py CHECKPOINT OUT [--rounds 3]

Each round copies the files (16 MB at a time, then fsync) and quantizes them with each method, in an order
that turns from round to round. Before each, the source is taken out of the system's page cache. `int8run`
is a process of its own: its resident memory is sampled every 20 ms, everything included: Python, torch, the
program. Times are of the whole process, imports included. What was written is checked against the
definition on some rows of every INT8 layer and removed.
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

from int8run.kernels.quantize_rowwise.reference import quantize_rowwise
from int8run.utils.hardware import get_device_name

METHODS = ("none", "convrot")
COPY = "copy"
BLOCK = 16 * 2**20
CHECKED_ROWS = 4
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
    return {
        "seconds": time.perf_counter() - started,
        "written": sum((out / file.name).stat().st_size for file in files),
    }


def read_memory(pid: int) -> tuple[int, int]:
    """Resident bytes of a process, and those of them that are no file's."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    kilobytes = {"VmRSS": 0, "RssAnon": 0}
    for line in lines:
        name, _, rest = line.partition(":")
        if name in kilobytes:
            kilobytes[name] = int(rest.split()[0])
    return 1024 * kilobytes["VmRSS"], 1024 * kilobytes["RssAnon"]


def watch_process(command: list[str]) -> dict[str, float]:
    """Seconds and peak memory of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = anonymous = 0
    while process.poll() is None:
        resident, own = read_memory(process.pid)
        peak, anonymous = max(peak, resident), max(anonymous, own)
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - started, "peak_rss": peak, "peak_anonymous": anonymous}


def time_quantize(source: Path, out: Path, method: str) -> dict[str, float]:
    """Seconds, peak memory and size of `int8run task=quantize`."""
    target = out / f"{method}.safetensors"
    command = [
        *INT8RUN,
        "task=quantize",
        f"model.location={source}",
        f"save={target}",
        f"outlier={method}",
        "tracker=none",
        "progress=false",
        f"hydra.run.dir={out / method}",
    ]
    watched = watch_process(command)
    metrics = json.loads((out / method / "metrics.json").read_text())["metrics"]
    return {
        **watched,
        "quantize_seconds": metrics["build/quantize_s"],
        "written": target.stat().st_size,
        "sqnr_mean": metrics["quant/weight_sqnr_db_mean"],
        "sqnr_min": metrics["quant/weight_sqnr_db_min"],
    }


def check_outputs(source: Path, target: Path) -> int:
    """Compare some rows of the attention outputs with the definition.

    The number of layers that were compared.
    """
    index = json.loads((source / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    compared = 0
    with safe_open(target, "pt") as made:
        for key, file in index.items():
            if not key.endswith("attn.to_out.0.weight"):
                continue
            native = f"double_blocks.{key.split('.')[1]}.img_attn.proj.weight"
            with safe_open(source / file, "pt") as original:
                q, scale = quantize_rowwise(original.get_slice(key)[-CHECKED_ROWS:])
            assert torch.equal(made.get_slice(native)[-CHECKED_ROWS:], q), native
            assert torch.equal(made.get_slice(f"{native}_scale")[-CHECKED_ROWS:], scale), native
            compared += 1
    return compared


def measure_methods(source: Path, out: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """All rounds, by method."""
    files = sorted(source.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (COPY, *METHODS)}
    for number in range(rounds):
        order = [COPY, *METHODS]
        for name in order[number % 3 :] + order[: number % 3]:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            evict_files(files)
            result = time_copy(files, out) if name == COPY else time_quantize(source, out, name)
            if name == "none":
                print(
                    f"{check_outputs(source, out / 'none.safetensors')} layers agree with the definition",
                    flush=True,
                )
            found[name].append({"read": size, **result})
            print(f"round {number + 1} {name}: {json.dumps(found[name][-1])}", flush=True)
    shutil.rmtree(out)
    return found


def format_row(name: str, results: list[dict[str, float]], copies: list[dict[str, float]]) -> str:
    """A method's line of the table: medians over rounds."""
    seconds = [result["seconds"] for result in results]
    ratios = [copied["seconds"] / own for copied, own in zip(copies, seconds, strict=True)]
    median_seconds = statistics.median(seconds)
    first = results[0]
    rss = sqnr = "–"  # a copy has neither
    if name != COPY:
        rss = f"{max(result['peak_rss'] for result in results) / 1e6:.0f}"
        sqnr = f"{first['sqnr_mean']:.1f} / {first['sqnr_min']:.1f}"
    cells = (
        name,
        f"{median_seconds:.1f}",
        f"{first['read'] / median_seconds / 1e6:.0f}",
        f"{statistics.median(ratios):.2f}× [{min(ratios):.2f}–{max(ratios):.2f}]",
        rss,
        f"{first['written'] / 1e9:.2f}",
        sqnr,
    )
    return f"| {' | '.join(cells)} |"


def format_table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Medians in Markdown."""
    head = [
        "| | s | MB/s read | over the copy, per round | peak RSS, MB | written, GB | SQNR, mean / min dB |",
        "|---|---|---|---|---|---|---|",
    ]
    return head + [format_row(name, results, found[COPY]) for name, results in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, help="a folder that does not exist: it is removed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also keep every number here")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out} exists; name a folder that does not")
    found = measure_methods(arguments.source, arguments.out, arguments.rounds)
    print(f"{get_device_name(torch.device('cpu'))}, torch {torch.__version__}")
    print("\n".join(format_table(found)))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
