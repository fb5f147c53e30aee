"""Files that must be refused for what a marker or the header says."""

from checkpoints.drafts.changes import (
    draft_with_header,
    draft_with_marker,
    draft_with_tensor,
    merge_layers,
    put_zeros,
)
from checkpoints.drafts.draft import LAYER, CheckpointDraft, Mistake, N
from checkpoints.drafts.floats import draft_plain_float
from checkpoints.drafts.fp8 import draft_fp8
from checkpoints.drafts.int8 import ROW, TENSOR, draft_int8, draft_rowwise
from checkpoints.drafts.transformed import draft_convrot

GROUP = {"format": "int8_tensorwise", "convrot": True}


def make_int8run_marker(**change: object) -> dict[str, object]:
    return {
        "format": "int8run_transformed",
        "outlier": "quarot",
        "settings": {},
        "rotation": "sylvester",
        "group_size": 16,
        "centered": False,
        "factor": False,
        **change,
    }


def draft_int8run_without_group_size() -> CheckpointDraft:
    marker = make_int8run_marker()
    del marker["group_size"]
    return draft_with_marker(marker)


MARKER_MISTAKES: dict[str, Mistake] = {
    # markers
    "marker of floats": (
        lambda: draft_with_tensor("comfy_quant"),
        r"comfy_quant is F32 \[64\]; a marker is a short row of bytes, U8",
    ),
    "marker of two axes": (
        lambda: put_zeros(draft_rowwise(), f"{LAYER}.comfy_quant", "U8", 2, 8),
        r"comfy_quant is U8 \[2, 8\]; a marker is",
    ),
    "long marker": (
        lambda: put_zeros(draft_rowwise(), f"{LAYER}.comfy_quant", "U8", 70000),
        r"comfy_quant is U8 \[70000\]; a marker is a short row",
    ),
    "empty marker": (
        lambda: draft_with_marker(""),
        r"the marker blocks.0.q.comfy_quant is not JSON \(.*\): b''",
    ),
    "no json": (
        lambda: draft_with_marker("{format"),
        r"the marker blocks.0.q.comfy_quant is not JSON \(.*\): b'\{format'",
    ),
    "a list": (lambda: draft_with_marker([1]), r"the marker blocks.0.q.comfy_quant is not a JSON object"),
    "a deep list": (lambda: draft_with_marker("[" * 60000), r"the marker blocks.0.q.comfy_quant is nested"),
    "says nothing": (
        lambda: draft_with_marker({}),
        (r"the marker blocks.0.q.comfy_quant names no format: \{\}"),
    ),
    "format of no one": (
        lambda: draft_with_marker({"format": "int9"}),
        r"names the format 'int9'; int8run reads int8_tensorwise, int8_axiswise",
    ),
    "format that is no text": (lambda: draft_with_marker({"format": 8}), r"has an invalid format: "),
    "flag that is no flag": (
        lambda: draft_with_marker({**TENSOR, "convrot": "yes"}),
        (r"has an invalid convrot: "),
    ),
    "per_row that is no flag": (
        lambda: draft_with_marker({**TENSOR, "per_row": 1}),
        (r"has an invalid per_row: "),
    ),
    "block that is no number": (
        lambda: draft_with_marker({**TENSOR, "group_size": "128"}),
        r"has an invalid group_size: ",
    ),
    "block of nothing": (
        lambda: draft_with_marker({**TENSOR, "group_size": 0}),
        (r"has an invalid group_size: "),
    ),
    "fp8 label on int8": (
        lambda: draft_with_marker({"format": "float8_e4m3fn"}),
        (
            r"names the format 'float8_e4m3fn', and blocks.0.q.weight "
            r"is I8 with a scale in F32; they contradict each other"
        ),
    ),
    "int8 label on fp8": (
        lambda: draft_with_marker(TENSOR, draft_fp8((), "tensor")),
        (
            r"names the format 'int8_tensorwise', and blocks.0.q.weight "
            r"is F8_E4M3 with a scale in F32; they contradict"
        ),
    ),
    "no format on fp8": (
        lambda: draft_with_marker({"convrot": False}, draft_fp8((), "tensor")),
        r"names the format ''; int8run reads",
    ),
    "label on a float": (
        lambda: draft_with_marker(TENSOR, draft_plain_float()),
        r"blocks.0.q.weight is F32 and has blocks.0.q.comfy_quant, which such a weight cannot have",
    ),
    "label on a float in the header": (
        lambda: draft_with_header({LAYER: TENSOR}, draft_plain_float()),
        r"is F32 and has an entry in the header \(int8_tensorwise\)",
    ),
    "experts": (
        lambda: draft_with_marker({**TENSOR, "num_experts": 8}),
        "describes a bank of experts; int8run reads layers with a matrix each",
    ),
    "block against the shape": (
        lambda: draft_with_marker(
            {"format": "int8_blockwise", "group_size": 8}, draft_int8((3, 16), "grid", block=(4, 4))
        ),
        r"names blocks of 8, and blocks.0.q.weight_scale \[3, 16\] has blocks of 4; they contradict",
    ),
    "one marker missing": (
        lambda: merge_layers(draft_rowwise(), draft_int8((N, 1), "row")),
        "blocks.1.q has no comfy_quant marker and other INT8 layers have one",
    ),
    # rotations
    "group that does not divide": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 256}),
        "blocks.0.q is rotated in groups of 256, which do not divide its 64 inputs",
    ),
    "group by default that does not divide": (
        lambda: draft_with_marker(GROUP),
        "rotated in groups of 256, which do not divide its 64 inputs",
    ),
    "group of 48": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 48}),
        "names groups of 48; rotated are groups of a power of 2 from 2 to 4096",
    ),
    "group of 1": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 1}),
        ("names groups of 1; rotated"),
    ),
    "group of 8192": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 8192}),
        ("names groups of 8192; rotated"),
    ),
    "group of text": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": "16"}),
        ("names groups of '16'; rotated"),
    ),
    "group of true": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": True}),
        ("names groups of True; rotated"),
    ),
    "two groups": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 16, "quarot_groupsize": 64}),
        "names two sizes of rotated groups, 16 and 64",
    ),
    "fp8 rotated": (
        lambda: draft_with_marker({"format": "float8_e4m3fn", "convrot": True}, draft_fp8((), "tensor")),
        "says that an fp8 weight is rotated",
    ),
    # the header
    "header of no json": (lambda: draft_with_header("{"), "_quantization_metadata in its header is not JSON"),
    "header of a list": (
        lambda: draft_with_header("[]"),
        ("_quantization_metadata in its header is not a JSON object"),
    ),
    "header of lists": (
        lambda: draft_with_header([LAYER]),
        "_quantization_metadata in its header has no `layers` with an object each",
    ),
    "header of texts": (
        lambda: draft_with_header({LAYER: "int8"}),
        "_quantization_metadata in its header has no `layers` with an object each",
    ),
    "header for another file": (
        lambda: draft_with_header({"blocks.9.q": ROW}),
        "describes blocks.9.q, which the file does not have; it was written for another file",
    ),
    "header without the prefix": (
        lambda: draft_with_header({LAYER: ROW}, draft_rowwise().add_prefix("model.diffusion_model.")),
        (
            "describes blocks.0.q, which the file does not have; the file has "
            "model.diffusion_model.blocks.0.q.weight, so the prefix was lost"
        ),
    ),
    "header against the marker": (
        lambda: draft_with_header({LAYER: {**ROW, "convrot": False}}, draft_convrot(16)),
        "has convrot=False, the layer's marker True; they contradict each other",
    ),
    "header's group against the marker's": (
        lambda: draft_with_header({LAYER: {**GROUP, "convrot_groupsize": 64}}, draft_convrot(16)),
        "has convrot_groupsize=64, the layer's marker 16; they contradict",
    ),
    "header against our marker": (
        lambda: draft_with_header({LAYER: ROW}, draft_with_marker(make_int8run_marker())),
        "says 'int8_tensorwise', the layer's marker 'int8run_transformed'; they contradict",
    ),
    # our own format
    "ours without settings": (
        lambda: draft_with_marker(make_int8run_marker(settings=None)),
        "says int8run_transformed and lacks what such a marker holds",
    ),
    "ours with a setting of text": (
        lambda: draft_with_marker(make_int8run_marker(settings={"alpha": "x"})),
        "says int8run_transformed and lacks what such a marker holds",
    ),
    "ours with a setting that is true": (
        lambda: draft_with_marker(make_int8run_marker(settings={"alpha": True})),
        "lacks what such a marker holds",
    ),
    "ours with a setting that is infinite": (
        lambda: draft_with_marker(make_int8run_marker(settings={"alpha": float("inf")})),
        "lacks what such a marker holds",
    ),
    "ours without a method": (
        lambda: draft_with_marker(make_int8run_marker(outlier=None)),
        ("lacks what such a marker holds"),
    ),
    "ours with a random rotation": (
        lambda: draft_with_marker(make_int8run_marker(rotation="random")),
        ("lacks what such a marker holds"),
    ),
    "ours with half a rotation": (
        draft_int8run_without_group_size,
        "lacks what such a marker holds",
    ),
    "ours with a factor that is no flag": (
        lambda: draft_with_marker(make_int8run_marker(factor=1)),
        "lacks what such a marker holds",
    ),
    "ours with a size of none": (
        lambda: draft_with_marker(make_int8run_marker(group_size=None)),
        "has an invalid group_size|names groups of None",
    ),
    "ours regular of 32": (
        lambda: draft_with_marker(make_int8run_marker(rotation="regular", group_size=32)),
        "names groups of 32; a regular matrix needs a power of 4",
    ),
    "ours, its factor lost": (
        lambda: draft_with_marker(make_int8run_marker(factor=True)),
        "and the tensors of blocks.0.q contradict each other in their factors",
    ),
    "ours, a factor too many": (
        lambda: draft_with_tensor("pre_quant_scale", draft=draft_with_marker(make_int8run_marker())),
        "and the tensors of blocks.0.q contradict each other in their factors",
    ),
    "ours, with a sigma": (
        lambda: draft_with_tensor("hadanorm_sigma", draft=draft_with_marker(make_int8run_marker())),
        "and the tensors of blocks.0.q contradict each other in their factors",
    ),
}
