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
from math import ceil, prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from encoders import CASES, Call, Case
from hydra import compose, initialize_config_module
from torch import Tensor, nn
from transformers import CLIPTextConfig, Qwen2_5_VLConfig, Qwen3Config, T5Config

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
from int8run.quant.formats import BLOCK, FORMATS, ROW, TENSOR, WeightFormat, choose_format
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
WRITTEN = tuple(name for name, form in FORMATS.items() if not form.is_read_only)
QUICK = ("int8_rowwise", "int8_convrot", "int8_blockwise", "float8_e4m3fn", "nvfp4")
KEYS = ("device", "case", "format", "kernels", "dtype", "wo")  # what tells rows apart
ROUNDS, QUICK_ROUNDS, LOADS = (5, 51), (3, 3), 3
SECONDS = 10.0  # that a comparison of calls may take, as far as the fewest rounds allow
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]


def kernels_of(form: WeightFormat) -> tuple[str, ...]:
    """Of `clip.kernel_backend` what differs: for all but int8, `auto` dequantizes."""
    if form.storage_dtype == "int8":
        return "auto", "dequantize"
    return ("auto", "scaled_mm") if form.granularity in (TENSOR, ROW, "") else ("auto",)


@contextmanager
def register_encoder(case: Case) -> Iterator[None]:
    """int8run's encoders and the case's own."""
    shipped = registry.load_encoders()
    own = {} if case.own is None else {case.own.name: case.own}
    with_own = lambda: {**own, **shipped}  # noqa: E731
    with (
        mock.patch.object(registry, "load_encoders", with_own),
        mock.patch.object(detect, "load_encoders", with_own),
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
        pooled = None if pooled is None else pooled.float().cpu()
        found.append((tokens, None if case.pooled is None else case.pooled(tokens, pooled)))
    return found


def compare_embeddings(
    floats: Sequence[tuple[Tensor, Tensor | None]], ours: Sequence[tuple[Tensor, Tensor | None]]
) -> Row:
    """Cosine: of each prompt the mean over its tokens; then the mean and the least over prompts.

    Error: over all at once.
    """
    row: Row = {}
    for i, name in enumerate(("", "pooled_")):
        pairs = [(a[i], b[i]) for a, b in zip(floats, ours, strict=True) if a[i] is not None]
        if pairs:
            cosines = [compute_embedding_cosine(a, b) for a, b in pairs]
            error = compute_relative_error(
                *(torch.cat([part.flatten() for part in side]) for side in zip(*pairs, strict=True))
            )
            row |= {
                f"{name}cosine": statistics.mean(cosines),
                f"{name}cosine_min": min(cosines),
                f"{name}rel_err": error,
            }
    return row


def count_bytes(model: nn.Module) -> Row:
    """Bytes of a bfloat16 model with quantized layers: of these alone, and of everything.

    And the same in bfloat16.
    """
    layers = [m for m in model.modules() if isinstance(m, Int8Linear | WeightOnlyLinear | BlockInt8Linear)]
    as_bf16 = sum(
        2 * (m.in_features * m.out_features + (m.out_features if m.bias is not None else 0)) for m in layers
    )
    ours, whole = (
        count_module_bytes(nn.ModuleList(layers)),
        count_module_bytes(model),
    )  # a rotation that layers share counts once
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
        if model is not None:
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
    case: Case,
    name: str,
    path: Path,
    floats: Mapping[str, nn.Module],
    device: torch.device,
    rounds: tuple[int, int],
) -> Iterator[Row]:
    """Rows of time.csv for one format: all of its kernels and both float models take turns."""
    usual = {word: tensor.to(device) for word, tensor in case.usual.items()}
    runnable = [
        kernels
        for kernels in kernels_of(FORMATS[name])
        if try_load(case, path, kernels, torch.bfloat16, device) is not None
    ]
    sources = {"float": (case.folder, "auto"), **{kernels: (path, kernels) for kernels in runnable}}
    loads: list[Callable[[], object]] = [
        lambda s=s: load_encoder(case, *s, torch.bfloat16, device) for s in sources.values()
    ]
    to_load = dict(
        zip(sources, time_medians(loads, device, LOADS), strict=True)
    )  # files are in the page cache
    for dtype_name, dtype in DTYPES.items():
        models = {kernels: load_encoder(case, path, kernels, dtype, device) for kernels in runnable}
        calls: list[Callable[[], object]] = [
            lambda m=m: m(**usual) for m in (*floats.values(), *models.values())
        ]
        for call in calls:  # kernels are built and chosen at the first call
            call()
        started = time.perf_counter()
        time_in_turns(calls, device, 1)
        count = max(rounds[0], min(rounds[1], ceil(2 * SECONDS / (time.perf_counter() - started))))
        times = dict(zip((*floats, *models), time_in_turns(calls, device, count), strict=True))
        for kernels in models:
            ratios = {
                f"vs_{base}": statistics.median(
                    theirs / ours for theirs, ours in zip(times[base], times[kernels], strict=True)
                )
                for base in floats
            }
            yield {
                "format": name,
                "kernels": kernels,
                "dtype": dtype_name,
                "rounds": count,
                **{f"{base}_ms": 1000 * statistics.median(times[base]) for base in floats},
                "ms": 1000 * statistics.median(times[kernels]),
                **ratios,
                "steady": all(map(is_steady, times.values())),
                "float_load_s": to_load["float"],
                "load_s": to_load[kernels],
            }


# full-size encoders as their configs were published, for sizes alone
FULL: Mapping[str, tuple[str, str, Any]] = {
    "CLIP-L": (
        "clip_l",
        "CLIPTextModel",
        lambda: CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        ),
    ),
    "CLIP-G": (
        "clip_g",
        "CLIPTextModelWithProjection",
        lambda: CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            projection_dim=1280,
        ),
    ),
    "T5-XXL": (
        "t5",
        "T5EncoderModel",
        lambda: T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_heads=64,
            num_layers=24,
            feed_forward_proj="gated-gelu",
        ),
    ),
    "Qwen3-4B": (
        "qwen3",
        "Qwen3ForCausalLM",
        lambda: Qwen3Config(
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
    ),
    "Qwen2.5-VL-7B": (
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        lambda: Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=152064,
                hidden_size=3584,
                intermediate_size=18944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
            ),
            vision_config=dict(
                hidden_size=1280, intermediate_size=3420, depth=32, num_heads=16, out_hidden_size=3584
            ),
            tie_word_embeddings=False,
        ),
    ),
}


def measure_sizes() -> Iterator[Row]:
    """Rows of sizes.csv: what each format takes of full-size encoders, by shapes alone.

    All other parameters in bfloat16.
    """
    for title, (encoder_name, class_name, config) in FULL.items():
        encoder = registry.get_encoder(encoder_name)
        model = build_skeleton(class_name, config().to_dict(), torch.bfloat16)
        linears = {
            n: (m.out_features, m.in_features) for n, m in model.named_modules() if type(m) is nn.Linear
        }
        whole = sum(2 * p.numel() for p in model.parameters())
        for name in WRITTEN:
            shapes = [shape for n, shape in linears.items() if encoder.find_skip_reason(n, name) is None]
            ours = sum(weight_bytes(choose_format(name, *shape), *shape) for shape in shapes)
            as_bf16 = sum(2 * prod(shape) for shape in shapes)
            yield {
                "device": "",
                "case": title,
                "format": name,
                "layers": len(shapes),
                "bf16_gb": whole / 1e9,
                "quantized_share": as_bf16 / whole,
                "layers_vs_bf16": ours / as_bf16,
                "whole_vs_bf16": (whole - as_bf16 + ours) / whole,
            }


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


def weight_bytes(form: WeightFormat, rows: int, columns: int) -> int:
    """Of codes and scales."""
    scales = form.get_scale_shape(rows, columns)
    each = 1 if form.granularity == BLOCK else 4
    return prod(form.get_qdata_shape(rows, columns)) + (0 if scales is None else each * prod(scales))


def measure_cases(asked: argparse.Namespace) -> None:
    device = torch.device(asked.device)
    found: dict[str, list[Row]] = {part: [] for part in asked.parts if part in ("quality", "time")}
    asked.work.mkdir(parents=True, exist_ok=True)
    for case_name in asked.cases if found else ():
        case = CASES[case_name](asked.work, asked.quick)
        with register_encoder(case):
            print(f"{case.title}: {len(case.prompts)} prompts", flush=True)
            floats = {name: float_model(case, dtype, device) for name, dtype in DTYPES.items()}
            exact = compute_embeddings(case, floats["float32"], device)
            base = {"device": device.type, "case": case.name}
            if "quality" in found:
                found["quality"].append(
                    base
                    | {"format": "bfloat16"}
                    | compare_embeddings(exact, compute_embeddings(case, floats["bfloat16"], device))
                    | {"module_bytes": count_module_bytes(floats["bfloat16"]), "module_vs_bf16": 1.0}
                )
            for name in asked.formats:
                path = write_file(case, name, asked.work)
                if "quality" in found:
                    found["quality"] += [
                        base | row for row in measure_quality(case, name, path, exact, device)
                    ]
                if "time" in found:
                    rounds = QUICK_ROUNDS if asked.quick else ROUNDS
                    found["time"] += [
                        base | row for row in measure_speed(case, name, path, floats, device, rounds)
                    ]
                path.unlink()
                print(f"  {name}", flush=True)
        for part, rows in found.items():  # what was measured so far is not lost
            save_rows(asked.out / f"{part}.csv", rows)
    if "sizes" in asked.parts:
        save_rows(asked.out / "sizes.csv", measure_sizes())
    if "wo" in asked.parts:
        save_rows(asked.out / "wo.csv", with_wo(asked.work, asked.formats, device))
    facts = collect_environment(device, read_library_versions())
    (asked.out / f"environment_{device.type}.json").write_text(json.dumps(facts, indent=2) + "\n")


def save_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a table; rows that are there and were not measured again stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = lambda row: tuple(str(row.get(name, "")) for name in KEYS)  # noqa: E731
    new = [
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    ]
    old = list(csv.DictReader(path.open())) if path.is_file() else []
    kept = {key(row): row for row in [*old, *new]}
    names = dict.fromkeys(name for row in kept.values() for name in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [*(n for n in KEYS if n in names), *(n for n in names if n not in KEYS)]
        )
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
