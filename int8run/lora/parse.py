"""From the tensors of one module in a LoRA file to its adapter.

`int8run.lora.key_parsing` has told which part of an adapter each tensor is (`down`, `up`, `alpha`, `lokr_w1`,
...). Here the parts are brought to dtypes that PyTorch computes in, checked, and built into one of the
`adapters`. The errors are sentences without a subject ("has no lora_B (up); ..."): `int8run.lora.load` puts
file and module in front.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.adapters.base import LoraDelta
from int8run.lora.adapters.change import LoraChange
from int8run.lora.adapters.diff import Diff, Replacement
from int8run.lora.adapters.dora import DoRA
from int8run.lora.adapters.ia3 import IA3
from int8run.lora.adapters.loha import LoHa
from int8run.lora.adapters.lokr import LoKr
from int8run.lora.adapters.lora import LoRA
from int8run.lora.adapters.low_rank import LowRankPair
from int8run.lora.build_oft import OFT_PARTS, build_oft
from int8run.lora.key_parsing import LOHA_PARTS, LOKR_PARTS, NEW_NORM

# part -> tensor, of one module
AdapterTensors = Mapping[str, Tensor]
# rank -> alpha / rank; None: the tensors have no rank
GetScale = Callable[[int | None], float]

# how messages name the parts of a low-rank pair
PART_NAMES = {"down": "lora_A (down)", "up": "lora_B (up)"}
# no pair has a larger share of its inputs as rank
MAX_RANK_SHARE = 1 / 8
# parts that belong to a change without being one
AUXILIARY_PARTS = {"alpha", "dora_scale", "magnitude", "down_scale", "up_scale", "on_input"}


# -- tensors as the file has them ----------------------------------------------------------------------------


def to_computable_dtype(part: str, tensor: Tensor) -> Tensor:
    """The tensor in a dtype that PyTorch computes in: 8-bit floats become bfloat16, without loss.

    Args:
        part: which it is, for messages.
        tensor: of a dtype that `part_dtypes` allows.

    Raises:
        LoraError: for an empty tensor.
    """
    if tensor.numel() == 0:
        raise LoraError(f"has an empty {get_part_name(part)}; the file is broken")
    is_float8 = tensor.is_floating_point() and tensor.element_size() == 1
    return tensor.to(torch.bfloat16) if is_float8 else tensor


def dequantize_factors(tensors: AdapterTensors) -> dict[str, Tensor]:
    """The tensors with int8 factors of a low-rank pair multiplied by their scales (`scale_weight`).

    Raises:
        LoraError: for integers without scales, or packed ones.
    """
    floats = dict(tensors)
    for part in ("down", "up"):
        scale = floats.pop(f"{part}_scale", None)
        if scale is not None:
            (factor,) = require_parts(tensors, part)
            floats[part] = dequantize(part, factor, scale)

    for part, tensor in floats.items():
        if part not in AUXILIARY_PARTS and not tensor.is_floating_point():
            raise LoraError(
                f"has a {get_part_name(part)} of {format_dtype(tensor)} without a scale (scale_weight); "
                "the file was quantized and its scales are gone: take the unquantized one"
            )
    return floats


def dequantize(part: str, factor: Tensor, scale: Tensor) -> Tensor:
    """`scale * factor` in float32, the scale being one number or one for each row.

    Raises:
        LoraError: for packed integers, or a scale of another length.
    """
    name = get_part_name(part)
    if factor.dtype != torch.int8 and not factor.is_floating_point():
        raise LoraError(
            f"has a {name} of {format_dtype(factor)}; only int8 and floats are multiplied by a scale"
        )
    if factor.dim() == 0:
        raise LoraError(f"has a {name} of one number, which has no rows to scale; the file is broken")
    num_rows = factor.shape[0]
    if scale.numel() not in (1, num_rows):
        raise LoraError(
            f"has {scale.numel()} scales for the {num_rows} rows of its {name}; the file is broken"
        )
    return factor.float() * scale.float().reshape(-1, *[1] * (factor.dim() - 1))


def compute_peaks(tensors: AdapterTensors) -> dict[str, float]:
    """The largest magnitude of each tensor.

    Raises:
        LoraError: for NaN or infinity.
    """
    peaks = {part: tensor.abs().max().item() for part, tensor in tensors.items() if part != "on_input"}
    for part, peak in peaks.items():
        if not math.isfinite(peak):
            raise LoraError(
                f"has values that are not finite numbers in its {get_part_name(part)}; the file is broken"
            )
    return peaks


def get_part_name(part: str) -> str:
    """The name of a part for messages."""
    return PART_NAMES.get(part, part)


def format_dtype(tensor: Tensor) -> str:
    """torch.int8 -> int8."""
    return str(tensor.dtype).removeprefix("torch.")


# -- the change of a module ----------------------------------------------------------------------------------


def build_change(
    tensors: AdapterTensors, get_scale: GetScale, settings: Mapping[str, Any] | None = None
) -> LoraChange:
    """The change that the tensors of a module make together.

    Args:
        tensors: floats, see `dequantize_factors`.
        get_scale: rank -> alpha / rank.
        settings: PEFT's, without which its OFT cannot be read; None: there are none.

    Raises:
        LoraError: when parts are missing, belong to several adapter types, or do not fit each other.
    """
    adapter = build_adapter(tensors, get_scale, settings or {})
    if {"diff_b", "b_norm"} <= tensors.keys():
        raise LoraError("has a change of its bias twice, as diff_b and as b_norm; the file is broken")
    biases = [tensors[part].float().flatten() for part in ("diff_b", "b_norm") if part in tensors]
    if adapter is not None and "up_bias" in tensors:
        biases.append(adapter.scale * tensors["up_bias"].float().flatten())

    norms = [tensors[part] for part in ("dora_scale", "magnitude") if part in tensors]
    if len(norms) > 1:
        raise LoraError("has DoRA norms twice, as dora_scale and as magnitude; the file is broken")
    if norms:
        adapter = wrap_in_dora(adapter, norms[0], is_per_row="magnitude" in tensors)
        if "up_bias" in tensors:
            raise LoraError(
                "has DoRA norms and a bias of lora_B; PEFT trains no such LoRA, and no rule says what it does"
            )

    if len({bias.shape for bias in biases}) > 1:
        raise LoraError("has biases of several lengths; the file is broken")
    if not biases:
        return LoraChange(adapter, None)
    return LoraChange(adapter, sum(biases[1:], biases[0]))


def build_adapter(
    tensors: AdapterTensors, get_scale: GetScale, settings: Mapping[str, Any]
) -> LoraDelta | None:
    """The adapter that the tensors belong to, without DoRA's norms; None: only a bias is changed.

    Raises:
        LoraError: when they belong to several adapter types, are incomplete, or do not fit each other.
    """
    builders = [builder for own_parts, builder in ADAPTER_BUILDERS if own_parts & tensors.keys()]
    if tensors.keys() & set(OFT_PARTS):
        builders.append(lambda tensors, _: build_oft(tensors, settings))
    if len(builders) > 1:
        parts = ", ".join(sorted(tensors.keys() - AUXILIARY_PARTS))
        raise LoraError(f"has parts of several adapter types: {parts}; a module can have one")
    return builders[0](tensors, get_scale) if builders else None


def require_parts(tensors: AdapterTensors, *parts: str) -> list[Tensor]:
    """The tensors of these parts.

    Raises:
        LoraError: for the first that is missing.
    """
    for part in parts:
        if part not in tensors:
            raise missing_part_error(part)
    return [tensors[part] for part in parts]


def missing_part_error(part: str) -> LoraError:
    """The error for a part that is missing."""
    return LoraError(f"has no {get_part_name(part)}; the file is incomplete")


# -- one builder for each adapter type -----------------------------------------------------------------------


def build_lora(tensors: AdapterTensors, get_scale: GetScale) -> LoRA:
    """A low-rank pair; with convolution kernels or a core it is a LoCon."""
    if "down" in tensors and "up" not in tensors and is_full_rank(tensors["down"]):
        raise LoraError(
            f"has no lora_B (up) beside its lora_A {list(tensors['down'].shape)}; either the file is "
            "incomplete, or this is a full-rank change (ai-toolkit's network type fullrank), which is not "
            "applied under that name: rename each lora_A.weight to diff"
        )
    down, up = require_parts(tensors, "down", "up")
    mid = tensors.get("mid")
    rank = check_pair_rank(up=up, down=down, mid=mid, up_name="lora_B", down_name="lora_A")
    return LoRA(lora_A=down, lora_B=up, scale=get_scale(rank), mid=mid)


def is_full_rank(down: Tensor) -> bool:
    """Whether a lower half has so many rows that it may be a whole change of a weight."""
    return down.dim() == 2 and down.shape[0] > MAX_RANK_SHARE * down.shape[1]


def build_loha(tensors: AdapterTensors, get_scale: GetScale) -> LoHa:
    """Two low-rank factors, multiplied elementwise."""
    first = build_pair(tensors, up="hada_w1_a", down="hada_w1_b", mid="hada_t1")
    second = build_pair(tensors, up="hada_w2_a", down="hada_w2_b", mid="hada_t2")
    if first.shape != second.shape:
        raise LoraError(
            f"has LoHa factors of {list(first.shape)} and {list(second.shape)}; "
            "they must be equal, the file is broken"
        )
    return LoHa(first, second, scale=get_scale(first.down.shape[0]))


def build_lokr(tensors: AdapterTensors, get_scale: GetScale) -> LoKr:
    """Two factors of a Kronecker product; two whole ones have no rank."""
    w1 = build_kronecker_factor(tensors, "lokr_w1", mid="lokr_t1")
    w2 = build_kronecker_factor(tensors, "lokr_w2", mid="lokr_t2")
    if len(w1.shape) != 2 or len(w2.shape) < 2:
        raise LoraError(
            f"has LoKr factors of {list(w1.shape)} and {list(w2.shape)}; "
            "two matrices are needed, the file is broken"
        )
    return LoKr(w1, w2, scale=get_scale(LoKr(w1, w2).rank))


def build_kronecker_factor(tensors: AdapterTensors, name: str, mid: str) -> Tensor | LowRankPair:
    """One factor of a LoKr: whole (`lokr_w1`), or a low-rank pair (`lokr_w1_a`, `lokr_w1_b`)."""
    halves = {f"{name}_a", f"{name}_b"} & tensors.keys()
    if halves and name in tensors:
        raise LoraError(f"has {name} both whole and as {' and '.join(sorted(halves))}; the file is broken")
    if halves:
        return build_pair(tensors, up=f"{name}_a", down=f"{name}_b", mid=mid)
    if name not in tensors:
        raise missing_part_error(name)
    if mid in tensors:
        raise LoraError(
            f"has {mid}, the core of the pair {name}_a and {name}_b, and {name} whole; the file is broken"
        )
    return tensors[name]


def build_diff(tensors: AdapterTensors, get_scale: GetScale) -> Diff:
    """The change itself."""
    return Diff(tensors["diff"])


def build_norm_diff(tensors: AdapterTensors, get_scale: GetScale) -> Diff:
    """The change of a norm's weight."""
    return Diff(tensors["w_norm"], adapter_type="norm")


def build_new_norm(tensors: AdapterTensors, get_scale: GetScale) -> Replacement:
    """The value of a norm's weight, in place of the model's."""
    return Replacement(tensors[NEW_NORM])


def build_ia3(tensors: AdapterTensors, get_scale: GetScale) -> IA3:
    """A factor for each row or column; convolutions store it with dimensions of 1."""
    weight, on_input = require_parts(tensors, "weight", "on_input")
    if on_input.numel() != 1:
        raise LoraError(
            f"has an on_input of shape {list(on_input.shape)}; it is one yes or no for rows or columns, the "
            "file is broken"
        )
    return IA3(factor=weight.flatten(), on_input=bool(on_input.flatten()[0]))


# parts that only one adapter type has -> its builder
ADAPTER_BUILDERS: tuple[tuple[set[str], Callable[[AdapterTensors, GetScale], LoraDelta]], ...] = (
    ({"down", "up", "mid", "up_bias"}, build_lora),
    (set(LOHA_PARTS), build_loha),
    (set(LOKR_PARTS), build_lokr),
    ({"diff"}, build_diff),
    ({"w_norm"}, build_norm_diff),
    ({NEW_NORM}, build_new_norm),
    ({"weight", "on_input"}, build_ia3),
)


def wrap_in_dora(adapter: LoraDelta | None, norms: Tensor, *, is_per_row: bool) -> DoRA:
    """DoRA around a low-rank adapter.

    Args:
        adapter: the one whose norms these are.
        norms: [out, 1, ...] for rows, [1, in, ...] for columns.
        is_per_row: they are norms of rows whatever their shape, as PEFT's always are.

    Raises:
        LoraError: when there is no such adapter, or the norms do not fit it.
    """
    if not isinstance(adapter, LoRA | LoHa | LoKr):
        raise LoraError("has DoRA norms without a low-rank change; the file is incomplete")
    on_input = not is_per_row and norms.dim() > 1 and norms.shape[0] == 1 and norms.numel() > 1
    if max(norms.shape, default=0) != norms.numel():
        raise LoraError(
            f"has DoRA norms of shape {list(norms.shape)}; they are [out, 1] or [1, in], the file is broken"
        )
    if not on_input and norms.numel() != adapter.out_features:
        raise LoraError(f"has {norms.numel()} DoRA norms for {adapter.out_features} rows; the file is broken")
    return DoRA(adapter, magnitude=norms.flatten(), on_input=on_input)


# -- low-rank pairs ------------------------------------------------------------------------------------------


def build_pair(tensors: AdapterTensors, *, up: str, down: str, mid: str) -> LowRankPair:
    """A low-rank factor of LyCORIS, from the names of its parts."""
    up_tensor, down_tensor = require_parts(tensors, up, down)
    core = tensors.get(mid)
    if core is not None and up_tensor.dim() == 2:
        up_tensor = up_tensor.T  # beside a core LyCORIS stores it the other way round, [rank, out]
    check_pair_rank(up=up_tensor, down=down_tensor, mid=core, up_name=up, down_name=down)
    return LowRankPair(up=up_tensor, down=down_tensor, mid=core)


def check_pair_rank(*, up: Tensor, down: Tensor, mid: Tensor | None, up_name: str, down_name: str) -> int:
    """The rank of a pair `up @ down`, with a Tucker core between the two where there is one.

    Args:
        up: [out, rank], or [out, rank, 1, 1].
        down: [rank, in, *kernel].
        mid: [rank, rank, *kernel].
        up_name: of `up`, for the message.
        down_name: of `down`, for the message.

    Raises:
        LoraError: when they do not fit each other.
    """
    are_matrices = down.dim() >= 2 and up.dim() >= 2 and math.prod(up.shape[2:]) == 1
    if are_matrices and connects(up, down, mid):
        return down.shape[0]

    core = "" if mid is None else f", core {list(mid.shape)}"
    ranks = ""
    if are_matrices and down.shape[0] != up.shape[1]:
        ranks = f"rank {down.shape[0]} and rank {up.shape[1]}: "
    raise LoraError(
        f"has {down_name} {list(down.shape)}, {up_name} {list(up.shape)}{core}; "
        f"{ranks}a pair is [rank, in] and [out, rank], and the file is broken"
    )


def connects(up: Tensor, down: Tensor, mid: Tensor | None) -> bool:
    """Whether the inner sizes of `up @ down` or `up @ mid @ down` agree."""
    if mid is None:
        return down.shape[0] == up.shape[1]
    is_core = mid.dim() >= 2 and mid.shape[:2] == (up.shape[1], down.shape[0])
    return is_core and math.prod(down.shape[2:]) == 1
