"""What is wrong with the layers of a file, said once for all layers that share it, with their numbers.

`file_audit` calls `list_layer_findings`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from int8run.audit.grades import Finding, load_grades
from int8run.audit.layer_audit import LayerAudit


def list_layer_findings(layers: Sequence[LayerAudit]) -> list[Finding]:
    """One finding for each thing that is wrong with some layers.

    Args:
        layers: of the file, judged.
    """
    quantized = [layer for layer in layers if layer.is_quantized]
    by_code: dict[str, list[LayerAudit]] = {}
    for layer in quantized:
        for code in layer.codes:
            by_code.setdefault(code, []).append(layer)
    findings = []
    for code, found in by_code.items():
        describe = DESCRIPTIONS.get(code)
        detail = "" if describe is None else describe(found)
        findings.append(
            Finding(
                code=choose_code(code, found, quantized),
                names=tuple(layer.name for layer in found),
                detail=detail,
                out_of=len(quantized),
            )
        )
    return [*findings, *list_rule_findings(layers)]


def choose_code(code: str, found: Sequence[LayerAudit], quantized: Sequence[LayerAudit]) -> str:
    """The code of a finding: where most layers are not the base's, the base is another model.

    Args:
        code: of the layers.
        found: the layers.
        quantized: all that could have it.
    """
    if code == "other_weight" and is_most(found, quantized):
        return "other_model"
    return code


def is_other_model(compared: Sequence[LayerAudit]) -> bool:
    """Whether most of the layers that were compared are not the base's.

    Args:
        compared: quantized layers, judged.
    """
    others = [layer for layer in compared if "other_weight" in layer.codes]
    return is_most(others, compared)


def is_most(found: Sequence[LayerAudit], layers: Sequence[LayerAudit]) -> bool:
    """Whether so many layers are not the base's that the base is another model."""
    return len(found) > load_grades().limits.max_other_share * len(layers)


def list_rule_findings(layers: Sequence[LayerAudit]) -> list[Finding]:
    """Layers that are float or quantized otherwise than the family's rules have it.

    Args:
        layers: of the file; with rules where a family is known.
    """
    known = [layer for layer in layers if layer.rule]
    findings = []
    left_float = [layer for layer in known if not layer.is_quantized and layer.rule == QUANTIZED]
    if left_float:
        findings.append(
            Finding("left_float", get_names(left_float), describe_places(left_float), len(layers))
        )
    against = [layer for layer in known if layer.is_quantized and layer.rule != QUANTIZED]
    if against:
        reasons = Counter(layer.rule.split(" (")[0] for layer in against)
        findings.append(
            Finding("quantized_against_rules", get_names(against), join_counts(reasons), len(layers))
        )
    return findings


QUANTIZED = "quantized"  # of `LayerAudit.rule`: the family's rules quantize the layer


def get_names(layers: Sequence[LayerAudit]) -> tuple[str, ...]:
    """The names of layers."""
    return tuple(layer.name for layer in layers)


def describe_places(layers: Sequence[LayerAudit]) -> str:
    """Where in their blocks some layers are: names without the numbers of blocks, counted."""
    return join_counts(Counter(shorten_name(layer.name) for layer in layers))


def shorten_name(name: str) -> str:
    """A layer's name with a star for the number of its block."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def join_counts(counts: Mapping[str, int]) -> str:
    """Texts and how often each is, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return "; ".join(f"{count} × {text}" for text, count in ordered)


def describe_rotations(layers: Sequence[LayerAudit]) -> str:
    """What markers say and what the numbers are."""
    pairs = Counter(
        f"the marker says {layer.declared_rotation}, the numbers are {layer.found_rotation}"
        for layer in layers
    )
    return join_counts(pairs)


def describe_suggestions(layers: Sequence[LayerAudit]) -> str:
    """What markers say and what the tails of the numbers look like."""
    pairs = Counter(
        f"the marker says {layer.declared_rotation}, the numbers look {layer.found_rotation}"
        for layer in layers
    )
    return join_counts(pairs)


def describe_scales(layers: Sequence[LayerAudit]) -> str:
    """By which factor scales are off."""
    texts: Counter[str] = Counter()
    for layer in layers:
        assert layer.gain is not None
        if 0 < layer.wrong_rows < layer.shape[0]:
            texts[f"{layer.wrong_rows} of {layer.shape[0]} rows have a factor of their own"] += 1
        else:
            texts[f"{layer.gain:.2f} times what they should be"] += 1
    return join_counts(texts)


def describe_low_rank(layers: Sequence[LayerAudit]) -> str:
    """Ranks, and how much of the difference they hold."""
    ranks = [layer.rank or 0 for layer in layers]
    shares = [layer.low_rank_share or 0 for layer in layers]
    return (
        f"rank {format_range(ranks, '{:d}')} stands out of the noise of rounding and holds "
        f"{format_range([100 * share for share in shares], '{:.0f}')} % of the difference"
    )


def describe_correlation(layers: Sequence[LayerAudit]) -> str:
    """How unlike the base numbers are."""
    found = [max(0.0, layer.correlation or 0) for layer in layers]
    return f"correlation with the base {format_range(found, '{:.2f}')}, of a rounded weight 1.00"


def describe_excess(layers: Sequence[LayerAudit]) -> str:
    """How much more noise there is than rounding makes."""
    found = [layer.excess_db or 0 for layer in layers]
    return f"{format_range(found, '{:.0f}')} dB more difference than the nearest numbers would have"


def describe_sqnr(layers: Sequence[LayerAudit]) -> str:
    """How exact layers are."""
    found = [layer.sqnr_db or 0 for layer in layers]
    return f"SQNR {format_range(found, '{:.1f}')} dB"


def describe_saturation(layers: Sequence[LayerAudit]) -> str:
    """How many numbers are at the end of the range."""
    found = [100 * (layer.cut_off_share or 0) for layer in layers]
    return f"{format_range(found, '{:.1f}')} % of a layer's numbers, beside the largest one of each scale"


def describe_unused(layers: Sequence[LayerAudit]) -> str:
    """How many scales are too large."""
    found = [100 * (layer.unused_share or 0) for layer in layers]
    return f"{format_range(found, '{:.0f}')} % of a layer's scales"


def format_range(values: Sequence[float], pattern: str) -> str:
    """The smallest and the largest of some numbers, once where they look alike.

    Args:
        values: at least one.
        pattern: of `str.format`, for each.
    """
    low, high = pattern.format(min(values)), pattern.format(max(values))
    return low if low == high else f"{low} to {high}"


# code -> how its layers are described
DESCRIPTIONS: Mapping[str, Callable[[Sequence[LayerAudit]], str]] = {
    "other_weight": describe_correlation,
    "wrong_rotation": describe_rotations,
    "looks_otherwise_rotated": describe_suggestions,
    "wrong_scale": describe_scales,
    "low_rank_change": describe_low_rank,
    "changed_weight": describe_excess,
    "low_sqnr": describe_sqnr,
    "saturated": describe_saturation,
    "unused_range": describe_unused,
}
