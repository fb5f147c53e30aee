"""Settings of a model's text encoders: what `clip=` may say, and the components that it is about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from int8run.backends.float import Float
from int8run.backends.registry import list_backend_names
from int8run.errors import ConfigError, check_choice
from int8run.quant.formats import FORMATS

KEEP, AUTO = "keep", "auto"
# kernels besides the INT8 backends: float products with weights that are dequantized at every call; fp8
# products
DEQUANTIZE, SCALED_MM = "dequantize", "scaled_mm"


@dataclass(frozen=True)
class TextEncoders:
    """Which text encoders are quantized, and how their layers run.

    Args:
        format: `keep`: the model's own encoders, as they are; `auto`: what `path` holds; else one of FORMATS.
            Without a path the model's own encoders are quantized to it; with one it is the format that the
            file must have.
        path: a quantized encoder: a file or a folder; for several a mapping from their components
            (`text_encoder_2`) to one each. The others stay as they are.
        kernel_backend: `auto`, an INT8 backend, `dequantize` (float products for every format) or `scaled_mm`
            (fp8 products).
        components: the encoders to quantize; None: all.

    Raises:
        ConfigError: for settings that contradict each other.
    """

    format: str = KEEP
    path: str | Mapping[str, str] | None = None
    kernel_backend: str = "auto"
    components: Sequence[str] | None = None
    name: ClassVar[str] = "clip"

    def __post_init__(self) -> None:
        check_choice("clip.format", self.format, (KEEP, AUTO, *FORMATS))
        check_choice("clip.kernel_backend", self.kernel_backend, list_kernel_backends())
        if self.format == KEEP and self.path is not None:
            raise ConfigError(
                f"clip=keep leaves the text encoders as they are, and clip.path={self.path} names another; "
                "set clip=auto"
            )
        self.check_components()
        self.check_path()
        self.check_writable()

    def check_components(self) -> None:
        """Raise ConfigError unless `components`, where it is given, is a list with at least one."""
        if self.components is not None and (isinstance(self.components, str) or not self.components):
            raise ConfigError(
                f"clip.components is {self.components!r}; "
                "it takes a list, such as [text_encoder_2]; null: all"
            )

    def check_path(self) -> None:
        """Raise ConfigError unless `path`, where it is given, is a file or a mapping, and stands alone."""
        if self.path is None:
            return
        if not isinstance(self.path, str | Mapping):
            raise ConfigError(
                f"clip.path is {self.path!r}; "
                "of several files it takes {text_encoder: FILE, text_encoder_2: FILE}"
            )
        if isinstance(self.path, Mapping) and not self.path:
            raise ConfigError(
                "clip.path is {}; it takes a file, or a mapping from components to one each; null: none"
            )
        if self.components is not None:
            raise ConfigError(
                "clip.components says which of the model's own encoders are quantized, "
                "and clip.path names files; set one"
            )

    def check_writable(self) -> None:
        """Raise ConfigError when encoders are to be quantized to a format that is only read."""
        is_written = self.path is None and self.format in FORMATS
        if is_written and FORMATS[self.format].is_read_only:
            writable = ", ".join(name for name, form in FORMATS.items() if not form.is_read_only)
            raise ConfigError(
                f"clip={self.format} is a format that is read and not written; choose from {writable}, "
                "or set clip.path"
            )

    @property
    def is_quantized(self) -> bool:
        """Whether any encoder differs from the float model's."""
        return self.format != KEEP and (self.path is not None or self.format != AUTO)


def list_kernel_backends() -> tuple[str, ...]:
    """What `clip.kernel_backend` may be. Float products are called `dequantize` here: weights stay packed."""
    names = [name for name in sorted(list_backend_names()) if name != Float.name]
    return (*names, DEQUANTIZE, SCALED_MM)
