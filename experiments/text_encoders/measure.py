"""Every written format of every encoder.

Bytes, embeddings against the float encoder's, seconds to load, time of a call.

    python experiments/text_encoders/measure.py --work WORK --out experiments/text_encoders/results
    # small sizes, few formats, some minutes
    python experiments/text_encoders/measure.py --work WORK --out OUT --quick
    python experiments/text_encoders/measure.py --work WORK --out OUT --device cuda

Each format is written with `task=quantize task.component=text_encoder`, the file is loaded by
`load_text_encoder` and `build_text_encoder`, and removed. Only time.csv depends on how busy the machine is.
A part, case or format that is not measured again keeps its rows.
"""

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from encoders import CASES, Call, Case
from format_sizes import WRITTEN, Row, measure_sizes
from hydra import compose, initialize_config_module
from torch import Tensor, nn

from int8run import build_text_encoder, load_text_encoder
from int8run.config.compose import create_run_spec
from int8run.config.job import Job
from int8run.errors import BackendError
from int8run.layers.block_int8_linear import BlockInt8Linear
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.weight_only import WeightOnlyLinear
from int8run.metrics.embeddings import compute_embedding_cosine, compute_relative_error
from int8run.metrics.layers import count_module_bytes
from int8run.models.loader import read_library_versions
from int8run.quant.formats import FORMATS, ROW, TENSOR, WeightFormat
from int8run.report.console import get_console
from int8run.report.run_files import collect_environment
from int8run.tasks.quantize_text_encoder import quantize_text_encoder
from int8run.text_encoders import detect, registry
from int8run.text_encoders.build import build_encoder
from int8run.text_encoders.kernels import Kernels
from int8run.text_encoders.skeleton import build_skeleton
from int8run.text_encoders.weights import EncoderFile
from int8run.utils.timing import is_steady, time_in_turns, time_medians

PARTS = ("quality", "time", "sizes", "wo")
QUICK = ("int8_rowwise", "int8_convrot", "int8_blockwise", "float8_e4m3fn", "nvfp4")
KEYS = ("device", "case", "format", "kernels", "dtype", "wo")  # what tells rows apart
ROUNDS, QUICK_ROUNDS, LOADS = (5, 51), (3, 3), 3
SECONDS = 10.0  # that a comparison of calls may take, as far as the fewest rounds allow
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def kernels_of(form: WeightFormat) -> tuple[str, ...]:
    """Of `clip.kernel_backend` what differs: for all but int8, `auto` dequantizes."""
    if form.storage_dtype == "int8":
        return "auto", "dequantize"
    if form.granularity in (TENSOR, ROW, ""):
        return "auto", "scaled_mm"
    return ("auto",)


@contextmanager
def register_encoder(case: Case) -> Iterator[None]:
    """int8run's encoders and the case's own."""
    shipped = registry.load_encoders()
    encoders = dict(shipped)
    if case.family is not None:
        encoders = {case.family.name: case.family, **shipped}
    load_encoders = mock.Mock(return_value=encoders)
    with (
        mock.patch.object(registry, "load_encoders", load_encoders),
        mock.patch.object(detect, "load_encoders", load_encoders),
    ):
        yield


def write_file(case: Case, name: str, work: Path) -> Path:
    """The command that writes a file, without what it prints."""
    path = work / f"{case.name}_{name}.safetensors"
    words = [
        "task=quantize",
        "task.component=text_encoder",
        f"model.location='{case.folder}'",
        f"save='{path}'",
        f"clip={name}",
    ]
    with initialize_config_module("int8run.conf", version_base="1.3"):
        spec = create_run_spec(compose("config", [*words, "tracker=none", "progress=false"]))
    with get_console().capture():
        quantize_text_encoder(spec, Job({}, {}, [], work), "text_encoder")
    return path


def load_encoder(case: Case, path: Path, kernels: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A file's encoder, as a program would have it."""
    state, metadata = load_text_encoder(path, kernel_backend=kernels)
    config = json.loads((case.folder / "config.json").read_text())
    return build_text_encoder(state, metadata, config["architectures"][0], config, dtype, device, case.rows)


def float_model(case: Case, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The encoder without any quantization."""
    return load_encoder(case, case.folder, "auto", dtype, device)


def call_encoder(model: nn.Module, call: Call, device: torch.device) -> Any:
    """One call."""
    return model(**{name: tensor.to(device) for name, tensor in call.items()})


@torch.inference_mode()
def compute_embeddings(
    case: Case, model: nn.Module, device: torch.device
) -> list[tuple[Tensor, Tensor | None]]:
    """For each prompt those of its tokens [1, T, K], and of the text [1, K] where there is one."""
    found = []
    for call in case.prompts:
        answer = call_encoder(model, call, device)
        tokens = answer.last_hidden_state.float().cpu()
        pooled = getattr(answer, "pooler_output", None)
        if pooled is not None:
            pooled = pooled.float().cpu()
        text = None if case.pool is None else case.pool(tokens, pooled)
        found.append((tokens, text))
    return found


def compare_embeddings(
    floats: Sequence[tuple[Tensor, Tensor | None]], ours: Sequence[tuple[Tensor, Tensor | None]]
) -> Row:
    """Cosine: of each prompt the mean over its tokens; then the mean and the least over prompts.

    Error: over all at once.
    """
    row: Row = {}
    for part, prefix in enumerate(("", "pooled_")):  # of the tokens, then of the text
        exact = [prompt[part] for prompt in floats]
        found = [prompt[part] for prompt in ours]
        pairs = [(a, b) for a, b in zip(exact, found, strict=True) if a is not None]
        if not pairs:
            continue
        cosines = [compute_embedding_cosine(a, b) for a, b in pairs]
        all_exact = torch.cat([a.flatten() for a, _ in pairs])
        all_found = torch.cat([b.flatten() for _, b in pairs])
        row[f"{prefix}cosine"] = statistics.mean(cosines)
        row[f"{prefix}cosine_min"] = min(cosines)
        row[f"{prefix}rel_err"] = compute_relative_error(all_exact, all_found)
    return row


def count_bytes(model: nn.Module) -> Row:
    """Bytes of a bfloat16 model's quantized layers, and of all of it; and both as shares of bfloat16's."""
    layers = [m for m in model.modules() if isinstance(m, Int8Linear | WeightOnlyLinear | BlockInt8Linear)]
    as_bf16 = 0
    for layer in layers:
        as_bf16 += 2 * layer.in_features * layer.out_features
        if layer.bias is not None:
            as_bf16 += 2 * layer.out_features
    ours = count_module_bytes(nn.ModuleList(layers))  # a rotation that layers share counts once
    whole = count_module_bytes(model)
    return {
        "layers": len(layers),
        "layers_bytes": ours,
        "layers_vs_bf16": ours / as_bf16,
        "module_bytes": whole,
        "module_vs_bf16": whole / (whole - ours + as_bf16),
    }


def measure_quality(case: Case, name: str, path: Path, floats: Any, device: torch.device) -> Iterator[Row]:
    """Rows of quality.csv for one format."""
    source = sum(file.stat().st_size for file in case.folder.glob("*.safetensors"))
    about = {"file_bytes": path.stat().st_size, "file_vs_float": path.stat().st_size / source}
    for kernels in kernels_of(FORMATS[name]):
        model = try_load(case, path, kernels, torch.float32, device)
        if model is None:
            continue
        row = compare_embeddings(floats, compute_embeddings(case, model, device))
        bytes_row = count_bytes(load_encoder(case, path, kernels, torch.bfloat16, device))
        yield {"format": name, "kernels": kernels, **row, **bytes_row, **about}


def try_load(
    case: Case, path: Path, kernels: str, dtype: torch.dtype, device: torch.device
) -> nn.Module | None:
    """A model, or None with the reason printed where the kernels cannot run."""
    try:
        return load_encoder(case, path, kernels, dtype, device)
    except BackendError as error:
        print(f"  {case.name} {path.stem} {kernels}: {error}")
        return None


@torch.inference_mode()
def measure_speed(
    case: Case, path: Path, kernels: Sequence[str], floats: Mapping[str, nn.Module], rounds: tuple[int, int]
) -> Iterator[Row]:
    """Rows of time.csv for one file: all of its kernels and both float models take turns.

    Args:
        case: the encoder.
        path: the file.
        kernels: values of `clip.kernel_backend` that can run.
        floats: the float models by dtype, on the device.
        rounds: the fewest and the most.
    """
    device = next(floats["float32"].parameters()).device
    load_s = measure_loading(case, path, kernels, device)
    usual = {word: tensor.to(device) for word, tensor in case.usual.items()}
    for dtype_name, dtype in DTYPES.items():
        models = dict(floats)
        for backend in kernels:
            models[backend] = load_encoder(case, path, backend, dtype, device)
        calls: list[Callable[[], object]] = [partial(model, **usual) for model in models.values()]
        for call in calls:  # kernels are built and chosen at the first call
            call()
        count = choose_rounds(calls, device, rounds)
        times = dict(zip(models, time_in_turns(calls, device, count), strict=True))
        steady = all(is_steady(seconds) for seconds in times.values())
        for backend in kernels:
            row: Row = {"kernels": backend, "dtype": dtype_name, "rounds": count}
            for base in floats:
                row[f"{base}_ms"] = 1000 * statistics.median(times[base])
            row["ms"] = 1000 * statistics.median(times[backend])
            for base in floats:
                ratios = [theirs / ours for theirs, ours in zip(times[base], times[backend], strict=True)]
                row[f"vs_{base}"] = statistics.median(ratios)
            row["steady"] = steady
            row["float_load_s"] = load_s["float"]
            row["load_s"] = load_s[backend]
            yield row


def measure_loading(case: Case, path: Path, kernels: Sequence[str], device: torch.device) -> dict[str, float]:
    """Seconds from file to module: of the float encoder ("float"), and of the file with each of the kernels.

    All in bfloat16; files are in the page cache.
    """
    loads: dict[str, Callable[[], object]] = {"float": partial(float_model, case, torch.bfloat16, device)}
    for backend in kernels:
        loads[backend] = partial(load_encoder, case, path, backend, torch.bfloat16, device)
    return dict(zip(loads, time_medians(list(loads.values()), device, LOADS), strict=True))


def choose_rounds(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: tuple[int, int]
) -> int:
    """As many rounds as fit into twice SECONDS, by the time of one; between the fewest and the most."""
    fewest, most = rounds
    started = time.perf_counter()
    time_in_turns(calls, device, 1)
    fitting = ceil(2 * SECONDS / (time.perf_counter() - started))
    return max(fewest, min(most, fitting))


def with_wo(work: Path, formats: Sequence[str], device: torch.device) -> Iterator[Row]:
    """Rows of wo.csv: the tiny T5 with its `wo` in float, and quantized like the rest.

    The family's rule says which for each format.
    """
    case = CASES["tiny_t5"](work, False)
    exact = compute_embeddings(case, float_model(case, torch.float32, device), device)
    config = json.loads((case.folder / "config.json").read_text())
    encoder = registry.get_encoder("t5")
    (rule,) = (rule for rule in encoder.ignore if rule.pattern.endswith(".wo"))
    without = [other for other in encoder.ignore if other is not rule]
    for name in formats:
        for word, rules in (("float", [*without, replace(rule, formats=())]), ("quantized", without)):
            weights = EncoderFile(case.folder, class_name="T5EncoderModel")
            weights.encoder = replace(encoder, ignore=rules)
            model = build_skeleton("T5EncoderModel", config, torch.float32)
            built = build_encoder(model, weights, FORMATS[name], Kernels("auto", device, case.rows))
            row = compare_embeddings(exact, compute_embeddings(case, built.module.to(device), device))
            yield {"device": device.type, "format": name, "wo": word, **row}


def measure_case(case: Case, asked: argparse.Namespace, found: Mapping[str, list[Row]]) -> None:
    """Measure every format of an encoder.

    Args:
        case: the encoder.
        asked: the command line.
        found: gets the rows, by part: "quality", "time" or both.
    """
    device = torch.device(asked.device)
    about = {"device": device.type, "case": case.name}
    floats = {name: float_model(case, dtype, device) for name, dtype in DTYPES.items()}
    exact = compute_embeddings(case, floats["float32"], device)
    if "quality" in found:
        as_bf16 = compare_embeddings(exact, compute_embeddings(case, floats["bfloat16"], device))
        size = {"module_bytes": count_module_bytes(floats["bfloat16"]), "module_vs_bf16": 1.0}
        found["quality"].append({**about, "format": "bfloat16", **as_bf16, **size})
    for name in asked.formats:
        path = write_file(case, name, asked.work)
        if "quality" in found:
            for row in measure_quality(case, name, path, exact, device):
                found["quality"].append({**about, **row})
        if "time" in found:
            kernels = []
            for backend in kernels_of(FORMATS[name]):
                if try_load(case, path, backend, torch.bfloat16, device) is not None:
                    kernels.append(backend)
            rounds = QUICK_ROUNDS if asked.quick else ROUNDS
            for row in measure_speed(case, path, kernels, floats, rounds):
                found["time"].append({**about, "format": name, **row})
        path.unlink()
        print(f"  {name}", flush=True)


def measure_cases(asked: argparse.Namespace) -> None:
    """Measure what the command line asks for, and write the tables."""
    device = torch.device(asked.device)
    asked.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Row]] = {part: [] for part in asked.parts if part in ("quality", "time")}
    if found:
        for case_name in asked.cases:
            case = CASES[case_name](asked.work, asked.quick)
            print(f"{case.title}: {len(case.prompts)} prompts", flush=True)
            with register_encoder(case):
                measure_case(case, asked, found)
            for part, rows in found.items():  # what was measured so far is not lost
                save_rows(asked.out / f"{part}.csv", rows)
    if "sizes" in asked.parts:
        save_rows(asked.out / "sizes.csv", measure_sizes())
    if "wo" in asked.parts:
        save_rows(asked.out / "wo.csv", with_wo(asked.work, asked.formats, device))
    facts = collect_environment(device, read_library_versions())
    (asked.out / f"environment_{device.type}.json").write_text(json.dumps(facts, indent=2) + "\n")


def round_values(row: Row) -> Row:
    """A row whose floats are texts of six digits."""
    rounded = dict(row)
    for name, value in row.items():
        if isinstance(value, float):
            rounded[name] = f"{value:.6g}"
    return rounded


def save_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a table; rows that are there and were not measured again stay."""
    old: list[Row] = []
    if path.is_file():
        with path.open() as file:
            old = list(csv.DictReader(file))
    new = [round_values(row) for row in rows]
    kept = {}
    columns: dict[str, None] = {}
    for row in [*old, *new]:
        key = tuple(str(row.get(name, "")) for name in KEYS)
        kept[key] = row
    for row in kept.values():
        columns.update(dict.fromkeys(row))
    keys = [name for name in KEYS if name in columns]
    values = [name for name in columns if name not in KEYS]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*keys, *values])
        writer.writeheader()
        writer.writerows(kept.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for random models and written files, up to 2 GB"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=tuple(CASES))
    parser.add_argument("--formats", nargs="+", choices=WRITTEN)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="small sizes, few prompts, formats and rounds")
    arguments = parser.parse_args()
    arguments.work = arguments.work.absolute()
    arguments.formats = arguments.formats or (QUICK if arguments.quick else WRITTEN)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    measure_cases(arguments)
