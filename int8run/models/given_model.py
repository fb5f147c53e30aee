"""What a program hands over as its model: the denoiser itself, one inside a wrapper, or a whole pipeline."""

from collections.abc import Mapping

from diffusers import DiffusionPipeline
from torch import nn

from int8run.errors import ConfigError
from int8run.models.denoiser_components import DENOISER_COMPONENTS
from int8run.models.dual_denoisers import DualDenoiser
from int8run.models.pipeline_class import CONTROLNET

GivenModel = nn.Module | DiffusionPipeline

# children that are all of a wrapper: of torch.compile, of DataParallel and DistributedDataParallel
WRAPPED_CHILDREN = ("_orig_mod", "module")


def take_denoiser(given: object, what: str) -> nn.Module:
    """The denoiser that was meant; of a pipeline with two of them both as one.

    Args:
        given: a denoiser, compiled or not, or a pipeline.
        what: takes it, for the message: `quantize_` or `a LoraStack`.

    Raises:
        ConfigError: when it is neither, or the pipeline has no denoiser.
    """
    if isinstance(given, DiffusionPipeline):
        return find_pipeline_denoiser(given)
    if isinstance(given, nn.Module):
        return unwrap(given)
    raise ConfigError(
        f"{what} takes a denoiser, such as pipe.transformer or pipe.unet, or its pipeline, "
        f"not a {type(given).__name__}"
    )


def find_pipeline_denoiser(pipe: DiffusionPipeline) -> nn.Module:
    """The denoiser of a pipeline.

    Raises:
        ConfigError: when it has none.
    """
    parts = {name: pipe.components.get(name) for name in DENOISER_COMPONENTS}
    denoisers = {name: unwrap(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    if not denoisers:
        raise ConfigError(
            f"{type(pipe).__name__} has no {' or '.join(DENOISER_COMPONENTS)}; "
            "give the module that removes the noise itself"
        )
    return next(iter(denoisers.values())) if len(denoisers) == 1 else DualDenoiser(denoisers)


def take_text_encoders(given: object) -> dict[str, nn.Module]:
    """The text encoders of a pipeline by component name; none of anything else."""
    return find_text_encoders(given.components) if isinstance(given, DiffusionPipeline) else {}


def unwrap_text_encoders(given: Mapping[str, object]) -> dict[str, nn.Module]:
    """The given text encoders by component name, each without its wrappers.

    A component that is None, as in pipelines without one, is left out.

    Raises:
        ConfigError: for anything that is no module.
    """
    for name, encoder in given.items():
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise ConfigError(
                f"text_encoders has a {type(encoder).__name__} as {name}; it takes modules by component "
                "name, such as {'text_encoder': pipe.text_encoder}"
            )
    return {name: unwrap(encoder) for name, encoder in given.items() if isinstance(encoder, nn.Module)}


def find_text_encoders(components: Mapping[str, object]) -> dict[str, nn.Module]:
    """Return a pipeline's text encoders by component name."""
    return {
        name: component
        for name, component in components.items()
        if name.startswith("text_encoder") and isinstance(component, nn.Module)
    }


def find_controlnets(components: Mapping[str, object]) -> dict[str, nn.Module]:
    """Return a pipeline's ControlNets by component name; several of them are one component."""
    return {
        name: component
        for name, component in components.items()
        if name.startswith(CONTROLNET) and isinstance(component, nn.Module)
    }


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's or a data-parallel wrapper, whose tensors are the same."""
    for child in WRAPPED_CHILDREN:
        inner = model._modules.get(child)
        if inner is not None and len(model._modules) == 1:
            return unwrap(inner)
    return model
