"""The blocks of diffusers' modular pipelines: those of a class and a workflow, and what they use.

`modular_pipeline` makes a pipeline of them, `source` asks which components they need. No file is opened here.
"""

from collections.abc import Collection, Iterator
from typing import Any

import diffusers
from diffusers import ModularPipeline

from int8run.errors import ConfigError, suggest_similar
from int8run.models.denoiser_components import DENOISER_COMPONENTS

TEXT_ENCODER = "text_encoder"


def build_blocks(cls: type[ModularPipeline], workflow: str | None = None, skip: Collection[str] = ()) -> Any:
    """The blocks of a modular class of diffusers, all or those of a workflow.

    Args:
        cls: of diffusers.
        workflow: name of the only one that is to run; None: all.
        skip: names of outermost blocks that are left out, such as one that rewrites prompts.

    Raises:
        ConfigError: for a workflow or a block that it does not have.
    """
    blocks = getattr(diffusers, str(cls.default_blocks_name))()
    for name in skip:
        if name not in blocks.sub_blocks:
            raise ConfigError(
                f"model.skip_blocks has {name}, which is not a block of {cls.__name__}; "
                f"{suggest_similar(name, list(blocks.sub_blocks))}it has {', '.join(blocks.sub_blocks)}"
            )
        blocks.sub_blocks.pop(name)
    if workflow is None:
        return blocks
    known = list(getattr(blocks, "_workflow_map", None) or ())
    if workflow not in known:
        choice = f"choose from {', '.join(known)}, or null" if known else "leave it out"
        raise ConfigError(f"model.workflow={workflow} is not one of {cls.__name__}; {choice}")
    return blocks.get_workflow(workflow)


def list_used_components(pipeline: str, workflow: str | None, skip: Collection[str]) -> set[str]:
    """The components that the blocks of a modular pipeline use; none of a pipeline that is not modular.

    Args:
        pipeline: name of its class.
        workflow: name of the only one that is run; None: all.
        skip: names of outermost blocks that are left out.
    """
    cls = getattr(diffusers, pipeline, None)
    if not isinstance(cls, type) or not issubclass(cls, ModularPipeline):
        return set()
    return {spec.name for spec in build_blocks(cls, workflow, skip).expected_components}


def is_text_block(block: Any) -> bool:
    """Whether a block runs a text encoder, and no denoiser."""
    runs_encoder = any(spec.name.startswith(TEXT_ENCODER) for spec in block.expected_components)
    return runs_encoder and not has_component(block, DENOISER_COMPONENTS)


def has_component(block: Any, names: Collection[str]) -> bool:
    """Whether a block, or one inside of it, uses one of these components."""
    return any(spec.name in names for spec in block.expected_components)


def iter_nested_blocks(block: Any) -> Iterator[Any]:
    """The blocks inside of a block, at any depth."""
    for inner in getattr(block, "sub_blocks", {}).values():
        yield inner
        yield from iter_nested_blocks(inner)
