"""LoRAs on a model: applied together, each with a strength of its own, removed without a trace.

`LoraStack` is public: a program can use it on the denoiser of a diffusers pipeline. A run goes the same way
in steps of its own (`int8run.pipeline.build`): match, install, then attach to the INT8 layers.
"""

import logging
from collections.abc import Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from torch import Tensor, nn

from int8run.errors import ConfigError, check_choice
from int8run.layers.int8_conv import Int8Layer
from int8run.lora.apply import DynamicLayer, Int8LoraLayer
from int8run.lora.change_size import ChangeSizes
from int8run.lora.config import MODES
from int8run.lora.entries import Entry, check_strengths, describe_entry, warn_duplicates
from int8run.lora.find import find_lora, get_default_name
from int8run.lora.float_merge import FloatMerge
from int8run.lora.installed import (
    InstalledLoras,
    check_no_other_owner,
    find_left_behind,
    find_marks,
    format_names,
    format_some,
)
from int8run.lora.int8_layers import Int8LayerMaker, compute_clipped_share, count_modes
from int8run.lora.joined_norms import read_joined_norms
from int8run.lora.key_parsing import DENOISER
from int8run.lora.load import read_lora
from int8run.lora.match import Matches, MatchRequest, match_loras
from int8run.lora.modes import ModeChoice, ModeChooser, Overhead
from int8run.lora.module_names import find_target
from int8run.lora.weight_reader import WeightReader
from int8run.models.given_model import GivenModel, take_denoiser, take_text_encoders, unwrap_text_encoders
from int8run.quant.rounding import Rounding
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)

# what a program sets for a folder of LoRAs, for messages; on the command line it is lora_dir
FOLDER_SETTING = "LoraStack(…, folder=FOLDER)"


class LoraStack:
    """Any number of LoRAs on one denoiser and its text encoders.

        stack = LoraStack(pipe.transformer).add("style.safetensors", 0.8)
        stack.set_strength("style", 0.4)

    Float layers get the sum of all changes added to their weights, INT8 layers get it by `mode` (see
    `LoraSettings`). Whatever the mode, every strength starts from the untouched model, so that 0 is the model
    itself.

    A model has one stack at a time. Its LoRAs stay on it until `clear`, or until another stack takes the
    place of one that the program does not hold any more.

    Args:
        denoiser: with or without INT8 layers in it, compiled or not; or its pipeline.
        text_encoders: by component name (`text_encoder`, `text_encoder_2`, …), where the parts of LoRAs for
            text encoders are to be applied; None: those of the pipeline, if one was given.
        mode: `auto`, `dynamic`, `bake`, `stochastic`.
        strict: keys that do not match the model are an error.
        seed: of the stochastic rounding.
        folder: where names without a folder are looked for, besides the shipped LoRAs.
    """

    def __init__(
        self,
        denoiser: GivenModel,
        text_encoders: Mapping[str, nn.Module] | None = None,
        mode: str = "auto",
        *,
        strict: bool = True,
        seed: int = 0,
        folder: Path | None = None,
    ):
        check_choice("lora.mode", mode, MODES)
        self.denoiser = take_denoiser(denoiser, "a LoraStack")
        if text_encoders is None:
            text_encoders = take_text_encoders(denoiser)
        self.parts = {DENOISER: self.denoiser, **unwrap_text_encoders(text_encoders)}
        self.mode, self.strict, self.seed, self.folder = mode, strict, seed, folder
        self.entries: list[Entry] = []
        self.matches = Matches({}, ())
        self.installed = InstalledLoras()
        self.sizes = ChangeSizes()
        self.choices: dict[str, ModeChoice] = {}  # how each INT8 layer gets its LoRAs, by name

    @staticmethod
    def of(denoiser: GivenModel) -> "LoraStack | None":
        """The stack that changes a model or a part of it; None: there is none, or it is gone.

        Args:
            denoiser: or its pipeline.
        """
        for mark in find_marks([take_denoiser(denoiser, "LoraStack.of")]):
            if isinstance(mark, InstalledLoras) and isinstance(mark.owner, LoraStack):
                return mark.owner
        return None

    def __repr__(self) -> str:
        """The LoRAs with their strengths: `<LoraStack on FluxTransformer2DModel: 'ink' 0.8, 'gloss' 0.4>`."""
        loras = [entry.format_strengths() for entry in self.entries]
        return f"<LoraStack on {type(self.denoiser).__name__}: {', '.join(loras) or 'no LoRAs'}>"

    def __reduce__(self) -> NoReturn:
        """A copy would undo what the stack does.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a LoraStack cannot be copied or saved, as it belongs to its model; copy the model after "
            "clear(), and put a new stack on the copy"
        )

    # -- the public part -----------------------------------------------------------------------------------

    def add(
        self,
        source: str | Path,
        strength: float = 1.0,
        name: str | None = None,
        text_strength: float | None = None,
        weight_name: str | None = None,
    ) -> "LoraStack":
        """Apply one more LoRA to the model. Returns the stack.

        Args:
            source: a `.safetensors` file, a folder that PEFT wrote, a shipped name, a name in `folder`, or a
                hub id with `weight_name`.
            strength: from -20 to 20.
            name: for `set_strength`; None: the file's name without its suffix, or the folder's.
            text_strength: of its part for text encoders; None: `strength`.
            weight_name: the file in a hub repository.

        Raises:
            ConfigError: when the name is taken already, a strength is out of range, or another stack changes
                the model.
            LoraError: when the file cannot be read or does not fit. Whatever the error, model and stack are
                as they were.
        """
        path = find_lora(str(source), weight_name, self.folder, folder_setting=FOLDER_SETTING)
        name = name or get_default_name(str(source), weight_name)
        if name in self.names:
            raise ConfigError(
                f"the stack has a LoRA called {name!r} already; "
                f"set_strength({name!r}, …) changes its strength, or give another name="
            )
        check_strengths(name, strength, text_strength)
        if text_strength is None:
            text_strength = strength
        entry = Entry(name, read_lora(path), strength=strength, text_strength=text_strength)
        self.replace_entries([*self.entries, entry])
        return self

    def remove(self, name: str) -> None:
        """Take one LoRA off the model; the others stay as they are.

        Args:
            name: of the LoRA, see `names`.

        Raises:
            ConfigError: when the stack has no such LoRA.
        """
        entry = self.find_entry(name)
        self.replace_entries([other for other in self.entries if other is not entry])

    def clear(self) -> None:
        """Remove all LoRAs; the model is as it was found, to the bit, and free for another stack.

        What a stack that is gone left on the model is removed, too.

        Raises:
            ConfigError: when this stack has no LoRA, and another one has.
        """
        if not self.entries:  # else others share a part with this stack and not its changes
            check_no_other_owner(self.parts.values(), self)
        changed = self.installed.find_outside_changes(self.parts)
        if changed:
            log.warning(
                "%s: replaced or written to by another part of the program since the LoRAs were put on; what "
                "it put there is left as it is",
                format_some(changed),
            )
        for installed in (self.installed, *find_left_behind(self.parts.values())):
            installed.restore()
        self.entries, self.matches = [], Matches({}, ())
        self.installed, self.sizes = InstalledLoras(), ChangeSizes()

    def set_strength(self, name: str, strength: float, text_strength: float | None = None) -> None:
        """Change the strength of one LoRA; in dynamic mode that writes a few numbers per layer.

        Args:
            name: of the LoRA, see `names`.
            strength: from -20 to 20.
            text_strength: of its part for text encoders; None: `strength`.

        Raises:
            ConfigError: when the stack has no such LoRA, a strength is out of range, or layers that the stack
                changed are not there any more.
        """
        entry = self.find_entry(name)
        check_strengths(name, strength, text_strength)
        self.installed.check_unchanged_outside(self.parts)
        before = entry.strength, entry.text_strength
        if text_strength is None:
            text_strength = strength
        entry.strength, entry.text_strength = strength, text_strength
        try:
            self.apply()
        except BaseException:  # an interrupt, too
            entry.strength, entry.text_strength = before
            self.apply()
            raise
        self.installed.remember()

    @property
    def merges(self) -> Mapping[str, FloatMerge]:
        """The float models that are changed, by component."""
        return self.installed.merges

    @property
    def layers(self) -> Mapping[str, Int8LoraLayer]:
        """The INT8 layers that are changed, by name."""
        return self.installed.layers

    @property
    def names(self) -> list[str]:
        """Names of the LoRAs, in order."""
        return [entry.name for entry in self.entries]

    # -- from one set of LoRAs to another -----------------------------------------------------------------

    def replace_entries(self, entries: Sequence[Entry]) -> None:
        """Make these the LoRAs of the stack; whatever goes wrong, model and stack are as they were.

        Raises:
            ConfigError: when another stack changes the model, or layers are not there any more.
            LoraError: when a LoRA does not fit.
        """
        self.installed.check_unchanged_outside(self.parts)
        check_no_other_owner(self.parts.values(), self)
        left_behind = find_left_behind(self.parts.values())
        matches = self.match_entries(entries)
        before = self.entries, self.matches, self.installed, self.sizes
        taken_off = [self.installed, *left_behind]
        try:
            for installed in taken_off:
                installed.restore()
            self.install(entries, matches)
            self.installed.check_weights_in_memory()
            self.attach(self.denoiser)
            self.apply()
        except BaseException:  # an interrupt, too
            self.installed.restore()
            self.entries, self.matches, self.installed, self.sizes = before
            for installed in taken_off:
                installed.put_back()
            raise
        for component, modules in matches.by_component.items():
            self.installed.mark(find_target(self.parts[component], name)[0] for name in modules)
        self.installed.remember()
        self.installed.warn_float8_weights()
        if left_behind:
            log.warning(
                "taken off the model: %s, of a LoraStack that is gone; keep the stack in a variable, and add "
                "to it, to have all of them",
                format_names(left_behind),
            )

    def find_entry(self, name: str) -> Entry:
        """The LoRA of that name.

        Raises:
            ConfigError: when there is none.
        """
        if name not in self.names:
            raise ConfigError(
                f"the stack has no LoRA called {name!r}; it has {', '.join(self.names) or 'none'}"
            )
        return self.entries[self.names.index(name)]

    # -- the steps of a run, in their order ------------------------------------------------------------------

    def match_entries(self, entries: Sequence[Entry]) -> Matches:
        """Find the modules that these LoRAs change; the model is not touched.

        Raises:
            LoraError: when one does not fit.
        """
        warn_duplicates(entries)
        requests = [MatchRequest(entry.file, entry.components) for entry in entries]
        return match_loras(self.parts, requests, strict=self.strict)

    def install(self, entries: Sequence[Entry], matches: Matches, except_for: Container[str] = ()) -> None:
        """Make these the LoRAs of the stack, at strength 0, and prepare the float weights.

        Args:
            entries: the LoRAs, in order.
            matches: what `match_entries` found for them.
            except_for: components whose weights somebody else changes.

        Raises:
            LoraError: when a module has no weight or bias that could be changed.
        """
        earlier = self.installed.merges
        self.installed = InstalledLoras(self, [entry.name for entry in entries])
        self.entries, self.matches, self.sizes = list(entries), matches, ChangeSizes()
        for component, changes in matches.by_component.items():
            if changes and component not in except_for:
                merge = FloatMerge(self.parts[component], changes, earlier.get(component))
                self.installed.merges[component] = merge
        for component, merge in self.installed.merges.items():
            read_joined_norms(matches.by_component[component], merge.find_original)
            merge.attach()

    def attach(
        self,
        int8: nn.Module,
        *,
        float_weights: bool = False,
        rounding: Rounding | None = None,
        scheduled: bool = False,
        overhead: Overhead | None = None,
        max_overhead: float = 0.0,
    ) -> None:
        """Prepare the INT8 layers: choose for each of them how it gets its LoRAs.

        Args:
            int8: the denoiser with the INT8 layers.
            float_weights: whether the float denoiser holds the weights that they were made from.
            rounding: of baked weights.
            scheduled: strengths will change from step to step, which only dynamic layers can follow.
            overhead: what a branch costs, for mode=auto; None: any cost is accepted.
            max_overhead: share of a layer's time that a branch may cost.

        Raises:
            LoraError: when a layer cannot have the mode that was asked for.
        """
        chooser = ModeChooser(
            mode=self.mode,
            has_float_weights=float_weights,
            is_scheduled=scheduled,
            overhead=overhead,
            max_overhead=max_overhead,
        )
        maker = Int8LayerMaker(chooser, self.entries, rounding, self.seed)
        read_joined_norms(self.matches.denoiser, partial(self.find_int8_weight, int8))
        layers: dict[str, Int8LoraLayer] = {}
        for name, changes in self.matches.denoiser.items():
            layer, _ = find_target(int8, name)
            if not isinstance(layer, Int8Layer):
                continue  # its float weight has the LoRAs added
            read_weight = WeightReader(name, layer, self.merges[DENOISER] if float_weights else None)
            if float_weights:  # reading integers back only for a log line would take long
                self.sizes.record(layer, changes, read_weight)
            layers[name] = maker.make(name, layer, changes, read_weight)
        self.installed.layers, self.choices = layers, maker.choices
        for lora_layer in layers.values():
            lora_layer.attach()
        for reason, count in maker.reasons.items():
            log.info("LoRAs on %s by lora.mode=%s", count_noun(count, "layer"), reason)

    def find_int8_weight(self, int8: nn.Module, name: str) -> Tensor | None:
        """The weight of a module without any LoRA, read back from integers where it is INT8.

        Args:
            int8: the denoiser with the INT8 layers, without LoRAs.
            name: of the module.

        Returns:
            None where it is not in memory.
        """
        layer, _ = find_target(int8, name)
        if isinstance(layer, Int8Layer):
            return WeightReader(name, layer, None)()
        if DENOISER not in self.merges:
            return None
        return self.merges[DENOISER].find_original(name)

    def merge_weight(self, name: str, weight: Tensor) -> Tensor:
        """A weight of the denoiser that was just read, with the LoRAs added at the present strengths."""
        if DENOISER not in self.merges:
            return weight
        return self.merges[DENOISER].merge_weight(name, weight)

    def merge_late_weights(self) -> None:
        """Add the LoRAs to weights of the denoiser that were read into it after `install`."""
        if DENOISER in self.merges:
            self.merges[DENOISER].merge_late_weights()

    def apply(self) -> None:
        """Bring the model to the strengths of the entries."""
        strengths = [entry.strength for entry in self.entries]
        self.set_strengths(strengths, [entry.text_strength for entry in self.entries])

    def set_strengths(
        self, strengths: Sequence[float], text_strengths: Sequence[float] | None = None
    ) -> None:
        """Bring every part to these strengths, one for each LoRA.

        Nothing is rebuilt but the weights of layers that are not dynamic.

        Args:
            strengths: of the denoiser.
            text_strengths: of the text encoders; None: they stay as they are.
        """
        self.installed.set_strengths(strengths, text_strengths)

    # -- what a run reports ----------------------------------------------------------------------------------

    @property
    def dynamic_layers(self) -> list[DynamicLayer]:
        """The layers with a branch."""
        return [layer for layer in self.layers.values() if isinstance(layer, DynamicLayer)]

    @property
    def layers_by_mode(self) -> dict[str, int]:
        """How many INT8 layers get their LoRAs by each mode."""
        return count_modes(self.layers)

    @property
    def clipped_share(self) -> float:
        """Of the weights with stochastic rounding, the share that the old scales would have clipped."""
        return compute_clipped_share(self.layers)

    def report(self) -> list[str]:
        """A line for each LoRA: what is in the file, and what it changes."""
        lines = []
        for index, entry in enumerate(self.entries):
            num_modules = self.matches.count_modules(index)
            lines.append(describe_entry(entry, num_modules, self.matches.count_unmatched(index)))
        return lines
