"""What the user says about how a file is quantized: `model.quant_format` and `model.sdnq`, or `clip=`.

Most files say themselves how they are quantized. `detect.read_layers` takes a `DeclaredFormat` for what a
file leaves open, and every function that opens a checkpoint hands it on. Nothing here reads a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
# ComfyUI's name for all INT8 layers with a scale for the layer or for each row comes first
TENSORWISE = ("int8_tensorwise", "int8_rowwise", "int8_convrot")


@dataclass(frozen=True)
class DeclaredFormat:
    """How a file is quantized, as far as the user says.

    It decides what the file leaves open and nothing else.

    Args:
        quant_format: a format name, or `auto`: the file must say everything. `int8_convrot` says that INT8
            rows are rotated, where no INT8 layer of the file has a marker; the names of nvfp4 and mxfp8 say
            whose they are, where neither markers nor shapes show it; those of casts, such as
            `float8_e4m3fn_cast`, say that fp8 weights without a scale are casts, where their numbers deny it.
        sdnq: how SDNQ made INT8 weights without a config beside them: `none`, `hadamard`,
            `hadamard_<size>`, the path of a config.json, or its fields; None: nothing is said.
    """

    quant_format: str = AUTO
    sdnq: str | Mapping[str, Any] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is said, so that the file must say everything."""
        return self.quant_format == AUTO and self.sdnq is None

    @property
    def accepted_formats(self) -> tuple[str, ...]:
        """The format names of layers that are what `quant_format` says."""
        if self.quant_format == TENSORWISE[0]:
            return TENSORWISE
        return (self.quant_format,)


UNDECLARED = DeclaredFormat()
