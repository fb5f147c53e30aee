"""Files of other programs, which must be refused by their names."""

import numpy as np
from checkpoints.drafts.changes import (
    apply_change,
    draft_with_marker,
    draft_with_tensor,
    draft_with_tensors,
    put_zeros,
)
from checkpoints.drafts.draft import Mistake
from checkpoints.drafts.floats import draft_plain_float

FOREIGN_MISTAKES: dict[str, Mistake] = {
    # formats of others
    "bitsandbytes": (
        lambda: draft_with_tensor("SCB"),
        (
            "is a bitsandbytes file .it has blocks.0.q.SCB., which diffusers "
            "with bitsandbytes can read and int8run cannot; take the float"
        ),
    ),
    "bitsandbytes 4 bits": (lambda: draft_with_tensor("weight.absmax"), "is a bitsandbytes file"),
    "SDNQ": (lambda: draft_with_tensor("svd_up"), "is a SDNQ file .*, which diffusers with sdnq can read"),
    "compressed-tensors": (
        lambda: apply_change(draft_plain_float(), lambda d: d.put("q.weight_packed", "I32", np.ones((2, 2)))),
        "is a compressed-tensors file",
    ),
    "compressed-tensors, asymmetric": (
        lambda: draft_with_tensor("weight_zero_point"),
        "is a compressed-tensors file",
    ),
    "nunchaku": (
        lambda: put_zeros(draft_plain_float(), "q.qweight", "I8", 2, 2),
        ("is a nunchaku file .it has q.qweight."),
    ),
    "nunchaku's header": (
        lambda: apply_change(
            draft_plain_float(), lambda d: d.metadata.update(quantization_config=('{"method": "svdquant"}'))
        ),
        "is a nunchaku file .the header of",
    ),
    "torchao": (
        lambda: apply_change(
            put_zeros(draft_plain_float(), "q._weight_qdata", "I8", 2, 2),
            lambda d: d.metadata.update(tensor_names="[]"),
        ),
        "is a torchao file",
    ),
    "torchao's header": (
        lambda: apply_change(
            put_zeros(draft_plain_float(), "q._weight_qdata_", "I8", 2, 2),
            lambda d: d.metadata.update(tensor_names="[]"),
        ),
        "is a torchao file .the header of",
    ),
    "modelopt's quantizers": (
        lambda: draft_with_tensor("weight_quantizer._scale"),
        "is a modelopt file .*, which diffusers with nvidia-modelopt",
    ),
    # optimum-quanto's QBytesTensor, and its scales of activations
    "quanto": (
        lambda: draft_with_tensors("weight._data", "weight._scale", "input_scale", "output_scale"),
        "is a quanto file .it has blocks.0.q.weight._data., which diffusers with optimum-quanto can read",
    ),
    "quanto, scale first": (
        lambda: draft_with_tensors("weight._scale", "weight._data"),
        "is a quanto file .it has blocks.0.q.weight._scale.",
    ),
    "gptq": (
        lambda: draft_with_tensors("qweight", "qzeros", "scales", "g_idx"),
        "is a GPTQ file .it has blocks.0.q.qweight., which transformers with GPTQModel",
    ),
    "lightx2v nvfp4": (lambda: draft_with_tensor("weight_global_scale"), "is a lightx2v nvfp4 file"),
    "w4a4": (lambda: draft_with_marker({"format": "convrot_w4a4"}), "is a convrot_w4a4 file"),
    "awq": (lambda: draft_with_tensor("weight_zeros"), "is a awq_w4a16 file"),
    "svdquant": (lambda: draft_with_tensor("proj_down"), "is a svdquant_w4a4 file"),
}
