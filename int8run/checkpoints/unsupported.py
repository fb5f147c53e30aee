"""Quantized files that are recognized and refused, each by its name and with the program that reads it.

`detect.py` calls `check_supported` before it reads a file. A file is recognized by the names of its tensors,
by the metadata of its header, or by the config beside it.
"""

from typing import Any

from int8run.checkpoints.header import FLOATS, FP8
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError
from int8run.utils.untrusted_json import parse_untrusted_json

# name -> who reads it
READERS = {
    "bitsandbytes": "diffusers with bitsandbytes",
    "compressed-tensors": "vLLM and the compressed-tensors package",
    "convrot_w4a4": "ComfyUI",
    "awq_w4a16": "ComfyUI",
    "svdquant_w4a4": "ComfyUI",
    "lightx2v nvfp4": "LightX2V",
    "nunchaku": "nunchaku",
    "SDNQ": "diffusers with sdnq",
    "torchao": "diffusers with torchao",
    "modelopt": "diffusers with nvidia-modelopt",
    "quanto": "diffusers with optimum-quanto",
    "auto-round": "diffusers with auto-round",
    "GPTQ": "transformers with GPTQModel",
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
    "weight_zeros": "awq_w4a16",
    "weight_zero": "awq_w4a16",
    "weight_proj_down": "svdquant_w4a4",
    "proj_down": "svdquant_w4a4",
    "smooth_factor": "svdquant_w4a4",
    "zero_point": "SDNQ",
    "svd_up": "SDNQ",
    "svd_down": "SDNQ",
    "scale_2": "SDNQ",
    "qzeros": "GPTQ",
    "g_idx": "GPTQ",
    "_scale": "modelopt",
    "_double_scale": "modelopt",  # of its quantizers, which diffusers keeps
    "_data": "quanto",
    "_shift": "quanto",
}
# the last word of a key that several programs use -> what stands beside it, and whose it is then
SIBLINGS_BY_SUFFIX = {
    "_scale": {"_data": "quanto"},
    "qweight": {"qzeros": "GPTQ", "g_idx": "GPTQ"},
}
# `quant_method` in a config.json beside the file -> whose it is; `fp8` and `bfl` are read, by their tensors
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
    "gptq": "GPTQ",
    "awq": "GPTQ",
}
MODELOPT, SDNQ = "modelopt", "SDNQ"
MODELOPT_CONFIG = "hf_quant_config.json"  # stands beside the weights of transformers' models
# dtype of ModelOpt's weights that could be read -> the scale that such a weight has
MODELOPT_SCALES = {"U8": "weight_scale_2", "F8_E4M3": "weight_scale"}
SDNQ_DTYPES = ("I8", *FP8)  # of weights that could be read
PACKED_COPY = "weight_packed"  # beside an int8 weight: the INT8-Toolkit's transposed copy of it


def check_supported(files: TensorFiles, prefix: str) -> None:
    """Raise FileError for a file of a program whose numbers are not read here."""
    keys = [key for key in files if key.startswith(prefix)]
    check_keys(files, keys)
    check_metadata(files, keys)
    check_config(files, keys)


def check_keys(files: TensorFiles, keys: list[str]) -> None:
    """Raise FileError for a tensor whose name only another program uses."""
    for key in keys:
        layer, _, suffix = key.rpartition(".")
        if suffix not in FORMAT_BY_SUFFIX:
            continue
        if suffix == PACKED_COPY and is_int8_layer(files, layer):  # the INT8-Toolkit's
            continue
        raise make_unsupported_error(files, name_format(files, layer, suffix), f"it has {key}")


def is_int8_layer(files: TensorFiles, name: str) -> bool:
    """Whether a layer has an int8 weight."""
    key = f"{name}.weight"
    return key in files and files[key].dtype == "I8"


def name_format(files: TensorFiles, layer: str, suffix: str) -> str:
    """Whose a tensor is, where several programs use its name.

    Args:
        files: the checkpoint.
        layer: the key without its last word.
        suffix: that word, one of FORMAT_BY_SUFFIX.
    """
    beside = SIBLINGS_BY_SUFFIX.get(suffix, {})
    for sibling, name in beside.items():
        if f"{layer}.{sibling}" in files:
            return name
    return FORMAT_BY_SUFFIX[suffix]


def check_metadata(files: TensorFiles, keys: list[str]) -> None:
    """Raise FileError for a header whose metadata another program writes."""
    has_torchao_names = any("_weight_qdata" in key for key in keys)
    for file, metadata in files.metadata_by_file.items():
        if "tensor_names" in metadata and has_torchao_names:
            raise make_unsupported_error(files, "torchao", f"the header of {file.name} lists tensor_names")
        if "svdquant" in metadata.get("quantization_config", ""):
            raise make_unsupported_error(
                files, "nunchaku", f"the header of {file.name} has its quantization_config"
            )


def check_config(files: TensorFiles, keys: list[str]) -> None:
    """Raise FileError when the config beside a quantized file names another program's method."""
    quantized = list_quantized_keys(files, keys)
    if not quantized:  # a config beside a float file describes another file
        return
    method = read_quant_method(files)
    if method not in FORMAT_BY_METHOD:
        return
    name = FORMAT_BY_METHOD[method]
    if name == MODELOPT and all(is_readable_modelopt(files, key) for key in quantized):
        return
    if name == SDNQ and all(is_readable_sdnq(files, key) for key in quantized):
        return
    raise make_unsupported_error(files, name, f"the config beside it says quant_method {method}")


def list_quantized_keys(files: TensorFiles, keys: list[str]) -> list[str]:
    """The keys of weights that are not float, among these."""
    return [key for key in keys if key.endswith(".weight") and files[key].dtype not in FLOATS]


def is_readable_modelopt(files: TensorFiles, key: str) -> bool:
    """Whether a quantized weight of ModelOpt is nvfp4 or fp8, with its scale."""
    scale_name = MODELOPT_SCALES.get(files[key].dtype)
    return scale_name is not None and f"{key.removesuffix('weight')}{scale_name}" in files


def is_readable_sdnq(files: TensorFiles, key: str) -> bool:
    """Whether a quantized weight of SDNQ is an INT8 matrix whose scale is as it writes them."""
    info = files[key]
    is_int8_matrix = info.dtype == "I8" and len(info.shape) == 2
    return is_int8_matrix and has_sdnq_scale(files, key.removesuffix(".weight"))


def has_sdnq_scale(files: TensorFiles, name: str) -> bool:
    """Whether a layer has a quantized weight with a scale by SDNQ: named `scale`, with as many dimensions.

    Wan-INT8 takes scales of that name, too, with one dimension, or three beside a matrix.
    """
    scale_key, key = f"{name}.scale", f"{name}.weight"
    if scale_key not in files or key not in files or files[key].dtype not in SDNQ_DTYPES:
        return False
    if f"{name}.comfy_quant" in files or f"{name}.weight_scale" in files:
        return False
    num_dims = len(files[scale_key].shape)
    return num_dims in (0, len(files[key].shape))


def is_modelopt(files: TensorFiles) -> bool:
    """Whether the folder of the file says that ModelOpt made it."""
    if read_quant_method(files) == MODELOPT:
        return True
    producer = read_sibling_json(files, MODELOPT_CONFIG).get("producer")
    return isinstance(producer, dict) and producer.get("name") == MODELOPT


def read_quant_method(files: TensorFiles) -> str:
    """The `quant_method` in the config of the file's folder; empty without one."""
    return str(read_quant_config(files).get("quant_method", ""))


def read_quant_config(files: TensorFiles) -> dict[str, Any]:
    """How the folder of the file says that it was quantized; empty where it names no `quant_method`."""
    for name in ("config.json", "quantization_config.json"):
        config = read_sibling_json(files, name)
        settings = config.get("quantization_config", config)
        if isinstance(settings, dict) and isinstance(settings.get("quant_method"), str):
            return settings
    return {}


def read_sibling_json(files: TensorFiles, name: str) -> dict[str, Any]:
    """A JSON object in the folder of the file; empty where there is none: then the tensors decide alone."""
    try:
        found = parse_untrusted_json(files.files[0].with_name(name).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def make_unsupported_error(files: TensorFiles, name: str, evidence: str) -> FileError:
    """The error for a format that is known and not read.

    Args:
        files: the checkpoint.
        name: of the format, one of READERS.
        evidence: what it was recognized by.
    """
    return FileError(
        f"{files.path} is a {name} file ({evidence}), which {READERS[name]} can read and int8run cannot; "
        "take the float checkpoint, an INT8 or an fp8 one"
    )
