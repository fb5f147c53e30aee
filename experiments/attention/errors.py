"""What INT8 attention loses: by outlier method, and by which of its operands is rounded.

    python experiments/attention/errors.py

The layers of the tiny model's denoiser at one step of real prompts, Gaussian numbers at FLUX's size, and the
same with outliers planted in the keys. In dB of the output against attention in float64.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from torch import Tensor
from torch.overrides import TorchFunctionMode

from int8run.config.compose import create_run_spec
from int8run.generate.capture import capture_step
from int8run.generate.prompts import build_samples
from int8run.kernels.int8_attention import reference
from int8run.pipeline.build import build_model
from int8run.report.console import Progress

Operands = tuple[Tensor, Tensor, Tensor]
# q and k before rounding: the rotation's group, and whether keys are centered
TREATMENTS = {
    "none": (0, False),
    "keys centered": (0, True),
    "rotated by 16": (16, False),
    "rotated by 64": (64, False),
    "rotated by 128": (128, False),
    "rotated by 64, centered": (64, True),
}


class AttentionCalls(TorchFunctionMode):
    """Keeps the operands of every attention that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[Operands] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass a call on; of an attention remember q, k and v."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self.operands.append((named["query"].clone(), named["key"].clone(), named["value"].clone()))
        return func(*args, **kwargs)


@torch.no_grad()
def capture_tiny_layers(prompts: list[str]) -> dict[str, Operands]:
    """q, k and v of every attention of the shipped model at the first step."""
    overrides = ["backend=reference", f"sampler.batch={len(prompts)}", "tracker=none", "progress=false"]
    with initialize_config_module("int8run.conf", version_base="1.3"):
        spec = create_run_spec(compose("config", overrides))
    samples = build_samples(prompts, 1, 0)
    built = build_model(spec, samples, [], Progress(enabled=False))
    denoiser = built.denoisers["float"]
    (call,) = capture_step(built.pipe, built.component, denoiser, samples, spec.sampling)
    with AttentionCalls() as calls:
        denoiser(**call)
    return {f"tiny, layer {i}": operands for i, operands in enumerate(calls.operands)}


def make_gaussian_cases(queries: int, keys: int, width: int = 128) -> dict[str, Operands]:
    """Gaussian numbers, flat and peaked scores, and two kinds of outliers in keys."""
    q, k, v = (torch.randn(1, 1, n, width) for n in (queries, keys, keys))
    shifted, wide = k.clone(), k.clone()
    shifted[..., 7] += 20  # the same in all keys
    wide[..., 7] *= 20  # other ones in every key
    return {
        "Gaussian": (q, k, v),
        "scores twice as wide": (2 * q, k, v),
        "a channel of k + 20": (q, shifted, v),
        "a channel of k × 20": (q * torch.ones(width).index_fill(0, torch.tensor(7), 0.05), wide, v),
    }


def compute_sqnr_db(actual: Tensor, expected: Tensor) -> float:
    """Signal over error, in dB."""
    error = (actual.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / error))


def attend_in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention that all others are compared with."""
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double())


def attend_in_bfloat16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention of rounded operands."""
    return F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())


# -- one operand rounded at a time -------------------------------------------------------------------


def round_scores_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """INT8 queries and keys, all else in float."""
    scores = reference.compute_scores(q, k, scale=None, rotation=0, center_keys=False)
    return scores.softmax(-1) @ v


def round_probabilities_only(
    q: Tensor, k: Tensor, v: Tensor, *, key_block: int = reference.KEY_BLOCK, divide_by_codes: bool = False
) -> Tensor:
    """Probabilities in bytes, all else in float."""
    scores = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).float()
    maximum = scores.amax(-1, keepdim=True)
    mean = v.mean(-2, keepdim=True)
    weighted_sum, sum_of_weights = torch.zeros(()), torch.zeros(())
    for start in range(0, k.shape[2], key_block):
        block = slice(start, start + key_block)
        probabilities, block_maximum = reference.compute_probabilities(scores[..., block])
        weight = reference.exponentiate_differences(block_maximum, maximum)
        codes = probabilities.round()
        weighted_sum = weighted_sum + weight * (codes @ (v - mean)[:, :, block])
        counted = codes if divide_by_codes else probabilities
        sum_of_weights = sum_of_weights + weight * counted.sum(-1, keepdim=True)
    return weighted_sum / sum_of_weights + mean


def round_values_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """INT8 values about their mean, all else in float."""
    values = reference.quantize_values(v)
    rounded = values.q.double() * values.scale + values.mean
    return attend_in_float64(q, k, rounded)


def keep_products_with_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """INT8 queries and keys, rotated; probabilities and values in bfloat16."""
    scores = reference.compute_scores(q, k, scale=None, rotation=64, center_keys=False)
    probabilities = (scores - scores.amax(-1, keepdim=True)).exp()
    products = probabilities.bfloat16().float() @ v.bfloat16().float()
    return products / probabilities.sum(-1, keepdim=True)


PARTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "only q and k in INT8": round_scores_only,
    "only probabilities in bytes, blocks of 256": round_probabilities_only,
    "the same, blocks of 64": lambda q, k, v: round_probabilities_only(q, k, v, key_block=64),
    "the same, one block": lambda q, k, v: round_probabilities_only(q, k, v, key_block=k.shape[2]),
    "blocks of 256, divided by the sum of codes": lambda q, k, v: round_probabilities_only(
        q, k, v, divide_by_codes=True
    ),
    "only v in INT8": round_values_only,
    "q and k in INT8, rotated by 64, all else bfloat16": keep_products_with_values,
    "all in bfloat16": attend_in_bfloat16,
}


def attend_treated(name: str, operands: Operands) -> Tensor | None:
    """INT8 attention by one of TREATMENTS; None where the rotation does not fit the width."""
    rotation, center_keys = TREATMENTS[name]
    if rotation and operands[0].shape[-1] % rotation:
        return None
    return reference.int8_attention(*operands, rotation=rotation, center_keys=center_keys)


def print_row(name: str, cells: list[str]) -> None:
    """A line of the table."""
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def print_errors(cases: dict[str, Operands]) -> None:
    """Print a row for each treatment and each part, a column for each case."""
    expected = {name: attend_in_float64(*operands) for name, operands in cases.items()}
    print_row("INT8 attention, dB", list(cases))
    print("|---" * (len(cases) + 1) + "|")
    for treatment in TREATMENTS:
        cells = []
        for name, operands in cases.items():
            output = attend_treated(treatment, operands)
            cells.append("–" if output is None else f"{compute_sqnr_db(output, expected[name]):.1f}")
        print_row(treatment, cells)
    for part, attend in PARTS.items():
        outputs = [(attend(*operands), expected[name]) for name, operands in cases.items()]
        print_row(f"*{part}*", [f"{compute_sqnr_db(*each):.1f}" for each in outputs])


@torch.no_grad()
def measure_errors(prompts: list[str], queries: int, keys: int) -> None:
    """Print the table."""
    torch.manual_seed(0)
    print_errors(capture_tiny_layers(prompts) | make_gaussian_cases(queries, keys))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=["red apple", "blue car"])
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--keys", type=int, default=4608)
    measure_errors(**vars(parser.parse_args()))
