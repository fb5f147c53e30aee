"""Quantized files that are recognised and refused, each by its name and with the program that reads it."""

import json
from typing import Any

from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError

# name -> who reads it
READERS = {
    "bitsandbytes": "diffusers with bitsandbytes",
    "compressed-tensors": "vLLM and the compressed-tensors package",
    "convrot_w4a4": "ComfyUI",
    "asym_w4a8_int8": "ComfyUI",
    "awq_w4a16": "ComfyUI",
    "svdquant_w4a4": "ComfyUI",
    "lightx2v nvfp4": "LightX2V",
    "nunchaku": "nunchaku",
    "SDNQ": "diffusers with sdnq",
    "torchao": "diffusers with torchao",
    "modelopt": "diffusers with nvidia-modelopt",
    "quanto": "diffusers with optimum-quanto",
    "auto-round": "diffusers with auto-round",
    "gguf": "ComfyUI-GGUF, or diffusers with gguf",
}
# the last word of a key -> whose it is
FORMAT_BY_SUFFIX = {
    "SCB": "bitsandbytes",
    "weight_format": "bitsandbytes",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "qweight": "nunchaku",
    "wscales": "nunchaku",
    "_weight_qdata": "torchao",
    "weight_packed": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "weight_global_scale": "lightx2v nvfp4",
    "weight_s_rel": "asym_w4a8_int8",
    "weight_s_channel": "asym_w4a8_int8",
    "weight_zeros": "awq_w4a16",
    "weight_zero": "awq_w4a16",
    "weight_proj_down": "svdquant_w4a4",
    "proj_down": "svdquant_w4a4",
    "smooth_factor": "svdquant_w4a4",
    "zero_point": "SDNQ",
    "svd_up": "SDNQ",
    "svd_down": "SDNQ",
    "scale_2": "SDNQ",
    "_scale": "modelopt",
    "_double_scale": "modelopt",  # of its quantizers, which diffusers keeps
}
# `quant_method` in a config.json beside the file; `fp8` and `bfl` are told by their tensors and read
FORMAT_BY_METHOD = {
    "sdnq": "SDNQ",
    "sdnq_training": "SDNQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "torchao": "torchao",
    "nunchaku_lite": "nunchaku",
    "nunchaku": "nunchaku",
    "modelopt": "modelopt",
    "quanto": "quanto",
    "auto-round": "auto-round",
    "gguf": "gguf",
}
MODELOPT = "modelopt"
MODELOPT_CONFIG = "hf_quant_config.json"  # what it leaves beside the weights of transformers' models
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
PACKED_COPY = "weight_packed"  # beside an int8 weight: the INT8-Toolkit's transposed copy of it


def check_supported(files: TensorFiles, prefix: str) -> None:
    """Raise FileError for a file of a program whose numbers are not read here."""
    keys = [key for key in files if key.startswith(prefix)]
    for key in keys:
        layer, _, suffix = key.rpartition(".")
        name = FORMAT_BY_SUFFIX.get(suffix)
        if name is not None and not (
            suffix == PACKED_COPY and f"{layer}.weight" in files and files[f"{layer}.weight"].dtype == "I8"
        ):
            raise make_unsupported_error(files, name, f"it has {key}")
    for file, metadata in files.metadata_by_file.items():
        if "tensor_names" in metadata and any("_weight_qdata" in key for key in keys):
            raise make_unsupported_error(files, "torchao", f"the header of {file.name} lists tensor_names")
        if "svdquant" in metadata.get("quantization_config", ""):
            raise make_unsupported_error(
                files, "nunchaku", f"the header of {file.name} has its quantization_config"
            )
    # a config beside a float file describes another
    if any(key.endswith(".weight") and files[key].dtype not in FLOAT_DTYPES for key in keys):
        method = read_quant_method(files)
        if method in FORMAT_BY_METHOD and not (
            FORMAT_BY_METHOD[method] == MODELOPT and is_readable_modelopt(files, keys)
        ):
            raise make_unsupported_error(
                files, FORMAT_BY_METHOD[method], f"the config beside it says quant_method {method}"
            )


def is_readable_modelopt(files: TensorFiles, keys: list[str]) -> bool:
    """Whether ModelOpt's weights are all float, nvfp4 or fp8 with scales."""
    scale_of = {"U8": "weight_scale_2", "F8_E4M3": "weight_scale"}
    weights = [key for key in keys if key.endswith(".weight") and files[key].dtype not in FLOAT_DTYPES]
    return all(
        f"{key.removesuffix('weight')}{scale_of.get(files[key].dtype, '?')}" in files for key in weights
    )


def is_modelopt(files: TensorFiles) -> bool:
    """Whether the folder of the file says that ModelOpt made it."""
    producer = read_sibling_json(files, MODELOPT_CONFIG).get("producer")
    return read_quant_method(files) == MODELOPT or (
        isinstance(producer, dict) and producer.get("name") == MODELOPT
    )


def read_quant_method(files: TensorFiles) -> str:
    """What the config.json in the folder of the file says; empty without one."""
    for name in ("config.json", "quantization_config.json"):
        found = read_sibling_json(files, name)
        settings = found.get("quantization_config", found)
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        if isinstance(method, str):
            return method
    return ""


def read_sibling_json(files: TensorFiles, name: str) -> dict[str, Any]:
    """A JSON object in the folder of the file; empty where there is none, or something else: then the tensors have to tell."""
    try:
        found = json.loads(files.files[0].with_name(name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def make_unsupported_error(files: TensorFiles, name: str, evidence: str) -> FileError:
    """The error for a format that is known and not read."""
    return FileError(
        f"{files.path} is a {name} file ({evidence}), which {READERS[name]} can read and int8run cannot; take the float checkpoint, "
        "an INT8 or an fp8 one"
    )
