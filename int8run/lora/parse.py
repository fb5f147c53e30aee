"""From the tensors of one module in a LoRA file to its adapter."""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.adapters.base import LoraDelta, LowRankPair
from int8run.lora.adapters.change import LoraChange
from int8run.lora.adapters.diff import Diff
from int8run.lora.adapters.dora import DoRA
from int8run.lora.adapters.ia3 import IA3
from int8run.lora.adapters.loha import LoHa
from int8run.lora.adapters.lokr import LoKr
from int8run.lora.adapters.lora import LoRA

# beyond these a file is told of: a scale that is often a mistake, a value that no training ends at
USUAL_SCALES = (0.05, 4.0)


USUAL_VALUE = 1e3


# how messages name the parts of a low-rank pair
PART_NAMES = {"down": "lora_A (down)", "up": "lora_B (up)"}


AdapterTensors = Mapping[str, Tensor]


def format_dtype(tensor: Tensor) -> str:
    """torch.int8 -> int8."""
    return str(tensor.dtype).removeprefix("torch.")


def build_change(parts: AdapterTensors, scale_of: Callable[[int], float]) -> LoraChange:
    """The change that a module's parts make together. `scale_of`: rank -> alpha / rank.

    Raises:
        LoraError: parts missing, of several kinds, or that do not fit each other.
    """
    kinds = [recipe for marks, recipe in ADAPTER_BUILDERS if marks & parts.keys()]
    if len(kinds) > 1:
        raise LoraError(
            f"has parts of several kinds: {', '.join(sorted(parts.keys() - AUXILIARY_PARTS))}; one kind a module can be applied"
        )
    core = kinds[0](parts, scale_of) if kinds else None
    biases = [parts[part].float().flatten() for part in ("diff_b", "b_norm") if part in parts]
    if core is not None and "up_bias" in parts:
        biases.append(core.scale * parts["up_bias"].float().flatten())
    norms = [parts[part] for part in ("dora_scale", "magnitude") if part in parts]
    if norms:
        core = wrap_in_dora(core, norms[0], per_row="magnitude" in parts)
        if "up_bias" in parts:
            raise LoraError(
                "has DoRA norms and a bias of lora_B; PEFT trains no such LoRA, and no rule says what it does"
            )
    if len({bias.shape for bias in biases}) > 1:
        raise LoraError("has biases of several lengths; the file is broken")
    return LoraChange(core, sum(biases[1:], biases[0]) if biases else None)


def missing_part_error(part: str) -> LoraError:
    """The error for a part that is not there."""
    return LoraError(f"has no {PART_NAMES.get(part, part)}; the file is incomplete")


def require_tensors(parts: AdapterTensors, *names: str) -> list[Tensor]:
    """The named parts.

    Raises:
        LoraError: for the first that is not there.
    """
    for name in names:
        if name not in parts:
            raise missing_part_error(name)
    return [parts[name] for name in names]


def build_lora(parts: AdapterTensors, scale_of: Callable[[int], float]) -> LoRA:
    """A low-rank pair."""
    down, up = require_tensors(parts, "down", "up")
    return LoRA(
        down,
        up,
        scale_of(check_pair_rank(("lora_A", down), ("lora_B", up), parts.get("mid"))),
        parts.get("mid"),
    )


def check_pair_rank(down: tuple[str, Tensor], up: tuple[str, Tensor], mid: Tensor | None) -> int:
    """The rank of a pair `up @ down`, with a Tucker core between them where there is one.

    Raises:
        LoraError: when they are no pair.
    """
    (down_name, a), (up_name, b) = down, up
    fits = a.dim() >= 2 and b.dim() >= 2 and math.prod(b.shape[2:]) == 1
    if fits and mid is None and a.shape[0] == b.shape[1]:
        return a.shape[0]
    if (
        fits
        and mid is not None
        and mid.dim() >= 2
        and mid.shape[:2] == (b.shape[1], a.shape[0])
        and math.prod(a.shape[2:]) == 1
    ):
        return a.shape[0]
    middle = "" if mid is None else f", core {list(mid.shape)}"
    ranks = f"rank {a.shape[0]} and rank {b.shape[1]}: " if fits and a.shape[0] != b.shape[1] else ""
    raise LoraError(
        f"has {down_name} {list(a.shape)}, {up_name} {list(b.shape)}{middle}; "
        f"{ranks}a pair is [rank, in] and [out, rank], and the file is broken"
    )


def build_pair(parts: AdapterTensors, up: str, down: str, mid: str) -> LowRankPair:
    """A low-rank factor of LyCORIS. Beside a core its first half is stored the other way round, [rank, out]."""
    core = parts.get(mid)
    a, b = require_tensors(parts, up, down)
    a = a.T if core is not None and a.dim() == 2 else a
    check_pair_rank((down, b), (up, a), core)
    return LowRankPair(a, b, core)


def build_loha(parts: AdapterTensors, scale_of: Callable[[int], float]) -> LoHa:
    """Two low-rank factors, multiplied elementwise."""
    first, second = (
        build_pair(parts, "hada_w1_a", "hada_w1_b", "hada_t1"),
        build_pair(parts, "hada_w2_a", "hada_w2_b", "hada_t2"),
    )
    if first.shape != second.shape:
        raise LoraError(
            f"has LoHa factors of {list(first.shape)} and {list(second.shape)}; they must be equal, the file is broken"
        )
    return LoHa(first, second, scale_of(first.down.shape[0]))


def build_lokr(parts: AdapterTensors, scale_of: Callable[[int], float]) -> LoKr:
    """Two factors of a Kronecker product. Two full ones have scale 1, whatever the file's alpha says."""
    factors: list[Tensor | LowRankPair] = []
    for name in ("lokr_w1", "lokr_w2"):
        halves = {f"{name}_a", f"{name}_b"} & parts.keys()
        if name in parts and halves:
            raise LoraError(
                f"has {name} both whole and as {' and '.join(sorted(halves))}; the file is broken"
            )
        if not halves and parts.get(name) is None:
            raise missing_part_error(name)
        factors.append(
            build_pair(parts, f"{name}_a", f"{name}_b", name.replace("w", "t")) if halves else parts[name]
        )
    w1, w2 = factors
    if len(w1.shape) != 2 or len(w2.shape) < 2:
        raise LoraError(
            f"has LoKr factors of {list(w1.shape)} and {list(w2.shape)}; two matrices are needed, the file is broken"
        )
    made = LoKr(w1, w2)
    return made if made.rank is None else LoKr(w1, w2, scale_of(made.rank))


def build_diff(parts: AdapterTensors, scale_of: Callable[[int], float]) -> Diff:
    """The change itself."""
    return Diff(parts["diff"])


def build_norm_diff(parts: AdapterTensors, scale_of: Callable[[int], float]) -> Diff:
    """The change of a norm's weight."""
    return Diff(parts["w_norm"], "norm")


def build_ia3(parts: AdapterTensors, scale_of: Callable[[int], float]) -> IA3:
    """A factor per row or column; convolutions store it with dimensions of 1."""
    weight, on_input = require_tensors(parts, "weight", "on_input")
    return IA3(weight.flatten(), bool(on_input.flatten()[0]))


# parts that only one kind has -> its recipe
ADAPTER_BUILDERS: tuple[
    tuple[set[str], Callable[[AdapterTensors, Callable[[int], float]], LoraDelta]], ...
] = (
    ({"down", "up", "mid", "up_bias"}, build_lora),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}, build_loha),
    ({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}, build_lokr),
    ({"diff"}, build_diff),
    ({"w_norm"}, build_norm_diff),
    ({"weight", "on_input"}, build_ia3),
)


def wrap_in_dora(core: LoraDelta | None, norms: Tensor, per_row: bool) -> DoRA:
    """DoRA around a low-rank kind. Row norms are [out, 1, ...], column norms [1, in, ...]; PEFT's (`per_row`) are always of rows."""
    if not isinstance(core, LoRA | LoHa | LoKr):
        raise LoraError("has DoRA norms without a low-rank change; the file is incomplete")
    on_input = not per_row and norms.dim() > 1 and norms.shape[0] == 1 and norms.numel() > 1
    if max(norms.shape, default=0) != norms.numel():
        raise LoraError(
            f"has DoRA norms of shape {list(norms.shape)}; they are [out, 1] or [1, in], the file is broken"
        )
    if not on_input and norms.numel() != core.out_features:
        raise LoraError(f"has {norms.numel()} DoRA norms for {core.out_features} rows; the file is broken")
    return DoRA(core, norms.flatten(), on_input)


# parts that say how a change is meant and are none themselves
AUXILIARY_PARTS = {"alpha", "dora_scale", "magnitude", "down_scale", "up_scale", "on_input"}
