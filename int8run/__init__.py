"""int8run: INT8 (W8A8) diffusion models, declared in YAML, measured against the float model."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from int8run.api import LoraStack, quantize_
    from int8run.text_encoders.load import build_text_encoder, load_text_encoder

__version__ = "0.1.0"
__all__ = ["LoraStack", "__version__", "build_text_encoder", "load_text_encoder", "quantize_"]


def __getattr__(name: str) -> object:
    """Import a name of the library when it is asked for: the command line must start without torch."""
    if name in ("LoraStack", "quantize_"):
        from int8run import api

        return getattr(api, name)
    if name in ("build_text_encoder", "load_text_encoder"):
        from int8run.text_encoders import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, those that are not imported yet included."""
    return sorted(__all__)
