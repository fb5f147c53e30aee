"""Gives diffusers' modular pipelines the face of its others: components, a call with named arguments.

`modular_loader` makes one where a folder, or `model.pipeline`, names a modular class. A modular pipeline is a
sequence of blocks: what its call takes is what its blocks read, and its guidance is a component of its own,
the guider. No file is opened here.
"""

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Optional

import diffusers
import torch
from diffusers import ComponentsManager, ModularPipeline
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.hooks import apply_group_offloading
from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3ImageReference, MiniMaxH3VideoReference
from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3Reference
from torch import nn

from int8run.errors import ConfigError
from int8run.models.denoiser_components import DENOISER_COMPONENTS
from int8run.models.modular_blocks import build_blocks, has_component, is_text_block, iter_nested_blocks

GUIDER = "guider"
# what a pipeline calls its result, as an image or a video
RESULTS = ("images", "videos")
# the argument of MiniMax-H3 that takes images and videos as objects of its own
REFERENCES = "references"
OUTPUT_TYPE, LATENT = "output_type", "latent"
# what every call is given, whether its blocks read it or not
ALWAYS_GIVEN = ("generator", OUTPUT_TYPE)
# settings by the arguments that they become
SETTINGS = {
    "num_inference_steps": "sampler.steps",
    "guidance_scale": "sampler.guidance",
    "height": "sampler.height",
    "width": "sampler.width",
    "negative_prompt": "prompts.negative_prompt",
}
# modules of diffusers; see `quiet_libraries`
NOISY_LOGGERS = ("diffusers.modular_pipelines.modular_pipeline", "diffusers.guiders.guider_utils")
# a guider's settings of when it acts; their names say nothing without what they belong to
SCHEDULE_SETTINGS = ("start", "stop")


class ModularFace(ModularPipeline):
    """What `generate` and `pipeline` use of a DiffusionPipeline, for a modular one.

    `make_modular_class` makes the class of one pipeline from it, whose call has the arguments of its blocks.
    """

    text_blocks: Mapping[str, Any]
    first_guiders: Mapping[str, BaseGuidance]

    def set_up(self) -> None:
        """Prepare for calls, once every component is there."""
        self.first_guiders = find_guiders(self.components)
        self.text_blocks = {name: block for name, block in self.iter_blocks() if is_text_block(block)}
        for name, block in self.text_blocks.items():
            self._blocks.sub_blocks[name] = TextBlock(name, block)

    def iter_blocks(self) -> Iterator[tuple[str, Any]]:
        """The outermost blocks by name, in order."""
        yield from self._blocks.sub_blocks.items()

    def register_modules(self, **modules: Any) -> None:
        """Replace components; as of a DiffusionPipeline."""
        self.register_components(**modules)

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Set diffusers' own progress bars, however deep their loops are inside of blocks."""
        for block in iter_nested_blocks(self._blocks):
            if hasattr(block, "progress_bar"):
                block.set_progress_bar_config(**settings)

    def encode_prompt(self, block: str, guiders: str, **inputs: Any) -> dict[str, tuple[Any, str | None]]:
        """Run one of the blocks that encode text.

        The prompt cache takes the place of this method; its key are these arguments.

        Args:
            block: its name.
            guiders: what the guiders are set to: it decides whether a negative prompt is encoded.
            inputs: what it reads.

        Returns:
            What it wrote, by name, and which group of inputs each belongs to.
        """
        state = diffusers.modular_pipelines.PipelineState()
        for name, value in inputs.items():
            state.set(name, value)
        self.text_blocks[block](self, state)
        groups = {}
        for group, names in state.kwargs_mapping.items():
            groups.update(dict.fromkeys(names, group))
        changed = [name for name, value in state.values.items() if value is not inputs.get(name)]
        return {name: (state.values[name], groups.get(name)) for name in changed}

    @torch.no_grad()
    def run(self, arguments: Mapping[str, Any]) -> SimpleNamespace:
        """Call the pipeline.

        Args:
            arguments: by name, those of the blocks and of the guiders. Lists of prompts and of generators
                that have one item are passed as that item: some pipelines make one sample at a time.

        Returns:
            With `images` or `frames` of each sample, and `audio` where there is sound; with `images` as a
            tensor of latents where these were asked for.

        Raises:
            ConfigError: for an argument that nothing reads, and where a component that this call needs is not
                in the folder.
        """
        inputs = dict(arguments)
        self.set_guiders(inputs)
        self.check_arguments(inputs)
        for name in ("prompt", "negative_prompt", "generator"):
            inputs[name] = unpack_single(inputs.get(name))
        if inputs.get(REFERENCES) is not None:
            inputs[REFERENCES] = [make_reference(media) for media in inputs[REFERENCES]]
        wants_latents = inputs.get(OUTPUT_TYPE) == LATENT
        if wants_latents:
            del inputs[OUTPUT_TYPE]
        self.check_components(inputs)
        state = self.build_state(inputs)
        for _, block in self.iter_blocks():
            is_denoiser = has_component(block, DENOISER_COMPONENTS)
            block(self, state)
            if wants_latents and is_denoiser:
                return SimpleNamespace(images=state.get("latents"), audio=None)
        return read_results(state)

    def check_arguments(self, inputs: Mapping[str, Any]) -> None:
        """Raise ConfigError for an argument that no block and no guider reads: it would have no effect."""
        reads = {parameter.name for parameter in self._blocks.inputs} | set(ALWAYS_GIVEN)
        for name, value in inputs.items():
            if value is not None and name not in reads:
                setting = SETTINGS.get(name, f"sampler.extra.{name}")
                raise ConfigError(
                    f"{type(self).__name__} takes no {name}; leave it out: {setting}=null, or choose another "
                    "workflow or pipeline"
                )

    def build_state(self, inputs: Mapping[str, Any]) -> Any:
        """What the blocks read when a call begins: what is given, else what they say themselves."""
        state = diffusers.modular_pipelines.PipelineState()
        for parameter in self._blocks.inputs:
            if parameter.name is not None:
                value = inputs.get(parameter.name)
                if value is None:
                    value = parameter.default
                state.set(parameter.name, value, parameter.kwargs_type)
        return state

    def set_guiders(self, arguments: dict[str, Any]) -> None:
        """Give every guider the settings of this call, and take these out of its arguments.

        Args:
            arguments: of the call; is changed.
        """
        reads = {parameter.name for parameter in self._blocks.inputs}
        for name, guider in self.first_guiders.items():
            settings = {}
            for setting, argument in list_guider_arguments(name, guider).items():
                if argument not in reads and argument in arguments:
                    settings[setting] = arguments.pop(argument)
            # settings of an earlier call do not remain
            setattr(self, name, guider.new(**settings))

    def describe_guiders(self) -> str:
        """The settings of all guiders, as text."""
        guiders = find_guiders(self.components)
        return repr({name: sorted(dict(guider.config).items()) for name, guider in guiders.items()})

    def check_components(self, inputs: Mapping[str, Any]) -> None:
        """Raise ConfigError where a call needs a component that is not there."""
        blocks = self._blocks.get_execution_blocks(**inputs)
        missing = [spec.name for spec in blocks.expected_components if getattr(self, spec.name, None) is None]
        if missing:
            raise ConfigError(
                f"{type(self).__name__} needs {' and '.join(missing)} for these inputs, and the checkpoint "
                f"has none; give it with 'model.parts.{missing[0]}=[CLASS, FOLDER]', or leave the input out"
            )

    def enable_model_cpu_offload(self, device: torch.device) -> None:
        """Keep components in memory and move each to the GPU for its turn, as far as there is no room."""
        manager = ComponentsManager()
        for name, module in self.components.items():
            if isinstance(module, nn.Module):
                manager.add(name, module)
        manager.enable_auto_cpu_offload(device=device)

    def enable_group_offload(self, **settings: Any) -> None:
        """Keep components in memory and move their blocks to the GPU one after the other.

        Args:
            settings: of diffusers' `apply_group_offloading`.
        """
        for module in self.components.values():
            if not isinstance(module, nn.Module):
                continue
            own: Any = getattr(module, "enable_group_offload", None)
            if own is not None:
                own(**settings)
            else:
                apply_group_offloading(module=module, **settings)


class TextBlock:
    """Takes the place of a block that encodes text, so that its results can be remembered.

    Args:
        name: of the block.
        block: that it stands for, whose facts it has.
    """

    def __init__(self, name: str, block: Any):
        self.name = name
        self.block = block

    def __getattr__(self, name: str) -> Any:
        # a copy is asked for its methods before it has a block
        if name == "block":
            raise AttributeError(name)
        return getattr(self.block, name)

    def __call__(self, pipe: ModularFace, state: Any) -> tuple[ModularFace, Any]:
        """Encode, through the pipeline's `encode_prompt`."""
        names = [parameter.name for parameter in self.block.inputs if parameter.name is not None]
        inputs = {name: state.get(name) for name in names}
        written = pipe.encode_prompt(block=self.name, guiders=pipe.describe_guiders(), **inputs)
        for name, (value, group) in written.items():
            state.set(name, value, group)
        return pipe, state


def make_modular_class(cls: type[ModularPipeline], blocks: Any, guiders: Mapping[str, BaseGuidance]) -> Any:
    """The class of one modular pipeline, with the name of diffusers' class and the call of its blocks.

    Args:
        cls: of diffusers.
        blocks: that it runs.
        guiders: by component.
    """

    def call(self: ModularFace, **arguments: Any) -> SimpleNamespace:
        return self.run(arguments)

    # what `inspect.signature` reads
    call.__signature__ = build_signature(blocks, guiders)  # type: ignore[attr-defined]
    return type(cls.__name__, (ModularFace, cls), {"__call__": call, "__doc__": cls.__doc__})


def get_call_class(cls: Any, workflow: str | None = None) -> Any:
    """The class whose call has the arguments of a pipeline, before one is made.

    Args:
        cls: of diffusers; one that is not modular is returned as it is.
        workflow: name of the only one that is to run; None: all.

    Raises:
        ConfigError: for an unknown workflow.
    """
    if not issubclass(cls, ModularPipeline) or issubclass(cls, ModularFace):
        return cls
    blocks = build_blocks(cls, workflow)
    return make_modular_class(cls, blocks, make_own_guiders(blocks))


def make_own_guiders(blocks: Any) -> dict[str, BaseGuidance]:
    """The guiders that diffusers makes from its own settings, by component."""
    quiet_libraries()
    own = [spec for spec in blocks.expected_components if spec.default_creation_method == "from_config"]
    return find_guiders({spec.name: copy.deepcopy(spec).create() for spec in own})


def quiet_libraries() -> None:
    """Keep from the log what diffusers raises as an error anyway, and that guiders are new."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def build_signature(blocks: Any, guiders: Mapping[str, BaseGuidance]) -> inspect.Signature:
    """What a call takes: the inputs of its blocks, and the settings of its guiders."""
    defaults: dict[str, Any] = {}
    types: dict[str, Any] = {}
    for parameter in blocks.inputs:
        if parameter.name is not None:
            hint = parameter.type_hint
            is_optional = hint is not None and not parameter.required
            types[parameter.name] = Optional[hint] if is_optional else hint  # noqa: UP045
            needs_value = parameter.required and parameter.default is None
            defaults[parameter.name] = inspect.Parameter.empty if needs_value else parameter.default
    for name, guider in guiders.items():
        for setting, argument in list_guider_arguments(name, guider).items():
            defaults.setdefault(argument, guider.config[setting])
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for name, default in defaults.items():
        kind = types.get(name) or inspect.Parameter.empty
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        )
    return inspect.Signature(parameters)


def list_guider_arguments(component: str, guider: BaseGuidance) -> dict[str, str]:
    """The settings of a guider, and what a call of the pipeline calls each.

    Args:
        component: `guider`: `guidance_scale`, `guidance_start`, …; `guider_2`: `guidance_scale_2`, …;
            `audio_guider`: `audio_guidance_scale`, ….
        guider: that the pipeline has.
    """
    arguments = {}
    for setting in inspect.signature(type(guider).__init__).parameters:
        if setting in guider.config and setting != "enabled":
            name = f"guidance_{setting}" if setting in SCHEDULE_SETTINGS else setting
            arguments[setting] = component.replace(GUIDER, name)
    return arguments


def find_guiders(components: Mapping[str, Any]) -> dict[str, BaseGuidance]:
    """The guiders of a pipeline by component."""
    return {name: part for name, part in components.items() if isinstance(part, BaseGuidance)}


def unpack_single(value: Any) -> Any:
    """The only item of a list; everything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def make_reference(media: Any) -> MiniMaxH3Reference:
    """An image, or the frames of a video, as one of MiniMax-H3's references; a reference as it is."""
    if isinstance(media, MiniMaxH3Reference):
        return media
    if isinstance(media, list):
        return MiniMaxH3VideoReference(frames=media)
    return MiniMaxH3ImageReference(image=media)


def read_results(state: Any) -> SimpleNamespace:
    """The images or videos that the blocks have left."""
    images, videos = (state.get(name) for name in RESULTS)
    if videos is not None:
        return SimpleNamespace(frames=videos, audio=state.get("audio"))
    return SimpleNamespace(images=images, audio=None)


def make_pipeline(
    cls: type[ModularPipeline], blocks: Any, components: Mapping[str, Any], configs: Mapping[str, Any]
) -> ModularFace:
    """A modular pipeline of components that exist.

    Args:
        cls: of diffusers.
        blocks: that it runs.
        components: by name; those that diffusers makes from its own settings may be left out.
        configs: values of the pipeline's settings.
    """
    guiders = make_own_guiders(blocks) | find_guiders(components)
    adapted = make_modular_class(cls, blocks, guiders)
    settings = {spec.name: configs[spec.name] for spec in blocks.expected_configs if spec.name in configs}
    pipe: ModularFace = adapted(blocks=blocks, config_dict=settings)
    pipe.register_components(**components)
    pipe.set_up()
    return pipe
