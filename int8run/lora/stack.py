"""LoRAs on a model: applied together, each with a strength of its own, removed without a trace.

`LoraStack` is public: a program can use it on the denoiser of a diffusers pipeline. A run goes the same way
in steps of its own (`int8run.pipeline.build`): match, install, then attach to the INT8 layers.
"""

import logging
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from torch import Tensor, nn

from int8run.errors import ConfigError, LoraError, check_choice
from int8run.layers.int8_linear import Int8Linear
from int8run.lora.apply import BakedLayer, DynamicLayer, IndexedChanges, Int8LoraLayer, StochasticLayer
from int8run.lora.change_size import ChangeSize, compute_median_steps, format_sizes, measure_change
from int8run.lora.config import MODES, check_strength
from int8run.lora.find import find_lora, get_default_name
from int8run.lora.float_merge import FloatMerge, name_module
from int8run.lora.installed import InstalledLoras, find_marks, format_names
from int8run.lora.joined_norms import read_joined_norms
from int8run.lora.key_parsing import DENOISER
from int8run.lora.load import LoraFile, read_lora
from int8run.lora.match import Matches, MatchRequest, match_loras
from int8run.lora.modes import ModeChoice, ModeChooser, Overhead
from int8run.lora.module_names import find_target
from int8run.lora.weight_reader import WeightReader
from int8run.models.given_model import GivenModel, check_text_encoders, take_denoiser, take_text_encoders
from int8run.quant.rounding import AbsMax, Rounding
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)


@dataclass
class Entry:
    """One LoRA of the stack and how strong it is.

    Args:
        name: for people and for `set_strength`.
        file: what it holds.
        strength: in the denoiser.
        text_strength: in the text encoders.
        components: the parts of the file that are applied; None: all.
    """

    name: str
    file: LoraFile
    strength: float = 0.0
    text_strength: float = 0.0
    components: Sequence[str] | None = None


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
        strict: bool = True,
        seed: int = 0,
        folder: Path | None = None,
    ):
        check_choice("lora.mode", mode, MODES)
        self.denoiser = take_denoiser(denoiser, "a LoraStack")
        if text_encoders is None:
            text_encoders = take_text_encoders(denoiser)
        self.parts = {DENOISER: self.denoiser, **check_text_encoders(text_encoders)}
        self.mode, self.strict, self.seed, self.folder = mode, strict, seed, folder
        self.entries: list[Entry] = []
        self.matches = Matches({}, ())
        self.installed = InstalledLoras()
        self.sizes: dict[int, list[ChangeSize]] = {}  # of each LoRA, one for each INT8 layer

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
        path = find_lora(str(source), weight_name, self.folder)
        name = name or get_default_name(str(source), path)
        if name in self.names:
            raise ConfigError(
                f"the stack has a LoRA called {name!r} already; "
                f"set_strength({name!r}, …) changes its strength, or give another name="
            )
        check_strengths(name, strength, text_strength)
        entry = Entry(
            name,
            read_lora(path),
            strength=strength,
            text_strength=strength if text_strength is None else text_strength,
        )
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
            self.check_no_other_stack()
        changed = self.installed.find_outside_changes(self.parts)
        if changed:
            log.warning(
                "%s: replaced or written to by another part of the program since the LoRAs were put on; what "
                "it put there is left as it is",
                format_some(changed),
            )
        for installed in (self.installed, *self.find_left_behind()):
            installed.restore()
        self.entries, self.matches = [], Matches({}, ())
        self.installed, self.sizes = InstalledLoras(), {}

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
        self.check_unchanged_outside()
        before = entry.strength, entry.text_strength
        entry.strength = strength
        entry.text_strength = strength if text_strength is None else text_strength
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
        self.check_unchanged_outside()
        self.check_no_other_stack()
        left_behind = self.find_left_behind()
        matches = self.match_entries(entries)
        before = self.entries, self.matches, self.installed, self.sizes
        taken_off = [self.installed, *left_behind]
        try:
            for installed in taken_off:
                installed.restore()
            self.install(entries, matches)
            self.check_weights_in_memory()
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
        self.warn_float8_weights()
        if left_behind:
            log.warning(
                "taken off the model: %s, of a LoraStack that is gone; keep the stack in a variable, and add "
                "to it, to have all of them",
                format_names(left_behind),
            )

    def warn_float8_weights(self) -> None:
        """Warn where weights are rounded to 8 bits, in which most of a LoRA is lost."""
        weights = [weight for merge in self.merges.values() for weight in merge.weights.values()]
        num_float8 = sum(weight.is_float8 for weight in weights)
        if num_float8:
            log.warning(
                "%d of %d weights that the LoRAs change are float8, which rounds away most of a small "
                "change; put LoRAs on a bfloat16 model (before enable_layerwise_casting), or on INT8 layers",
                num_float8,
                len(weights),
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

    def find_left_behind(self) -> list[InstalledLoras]:
        """What stacks that are gone left on the model."""
        marks = find_marks(self.parts.values())
        return [mark for mark in marks if isinstance(mark, InstalledLoras) and mark.owner is None]

    def check_no_other_stack(self) -> None:
        """Check that no other stack changes the model: each would undo the other's changes.

        Raises:
            ConfigError: when one does, or the model is a copy of one that has LoRAs.
        """
        for mark in find_marks(self.parts.values()):
            if not isinstance(mark, InstalledLoras):
                raise ConfigError(
                    f"this model is a copy of one with LoRAs on it ({format_names([mark])}), and they cannot "
                    "be taken off the copy; copy a model before it gets LoRAs, or after clear()"
                )
            if mark.owner not in (None, self):
                raise ConfigError(
                    f"this model has a LoraStack already, with {format_names([mark])}; add the LoRA to that "
                    "one, or clear() it first (LoraStack.of(model) returns it)"
                )

    def check_unchanged_outside(self) -> None:
        """Check that what the stack changed is still there, as the stack left it.

        Raises:
            ConfigError: when another part of the program replaced it, or wrote to it.
        """
        changed = self.installed.find_outside_changes(self.parts)
        if changed:
            raise ConfigError(
                f"{format_some(changed)}: replaced or written to by another part of the program since the "
                "LoRAs were put on; call clear(), then add them again"
            )

    def check_weights_in_memory(self) -> None:
        """Check that every float weight that a LoRA changes can be written to now.

        Raises:
            LoraError: when it cannot.
        """
        for merge in self.installed.merges.values():
            if merge.deferred:
                raise LoraError(
                    f"{format_some(list(merge.deferred))}: the weight is not in memory, but on the meta "
                    "device; put LoRAs on before enable_sequential_cpu_offload, or use another offloading"
                )
            if merge.unreachable:
                raise LoraError(
                    f"{format_some(merge.unreachable)}: the weight is no parameter of its module, so no LoRA "
                    "can be added to it; put LoRAs on before the model is changed by other programs"
                )

    # -- the steps of a run, in their order ------------------------------------------------------------------

    def match_entries(self, entries: Sequence[Entry]) -> Matches:
        """Find the modules that these LoRAs change; the model is not touched.

        Raises:
            LoraError: when one does not fit.
        """
        warn_duplicates(entries)
        requests = [MatchRequest(entry.file, entry.components) for entry in entries]
        return match_loras(self.parts, requests, self.strict)

    def install(self, entries: Sequence[Entry], matches: Matches, leave: Container[str] = ()) -> None:
        """Make these the LoRAs of the stack, at strength 0, and prepare the float weights.

        Args:
            entries: the LoRAs, in order.
            matches: what `match_entries` found for them.
            leave: components whose weights somebody else changes.

        Raises:
            LoraError: when a module has no weight or bias that could be changed.
        """
        earlier = self.installed.merges
        self.installed = InstalledLoras(self, [entry.name for entry in entries])
        self.entries, self.matches, self.sizes = list(entries), matches, {}
        for component, changes in matches.by_component.items():
            if changes and component not in leave:
                merge = FloatMerge(self.parts[component], changes, earlier.get(component))
                self.installed.merges[component] = merge
        for component, merge in self.installed.merges.items():
            read_joined_norms(matches.by_component[component], merge.find_original)
            merge.attach()

    def attach(
        self,
        int8: nn.Module,
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
        read_joined_norms(self.matches.denoiser, partial(self.find_int8_weight, int8))
        reasons: Counter[str] = Counter()
        layers: dict[str, Int8LoraLayer] = {}
        for name, changes in self.matches.denoiser.items():
            layer, _ = find_target(int8, name)
            if not isinstance(layer, Int8Linear):
                continue  # its float weight has the LoRAs added
            read_weight = WeightReader(name, layer, self.merges[DENOISER] if float_weights else None)
            if float_weights:  # reading integers back only for a log line would take long
                self.record_sizes(layer, changes, read_weight)
            choice = chooser.choose(name, layer, changes, read_weight)
            reasons.update(list_mode_reasons(choice, rounding))
            layers[name] = self.make_layer(name, layer, changes, choice, read_weight, rounding)
        self.installed.layers = layers
        for lora_layer in layers.values():
            lora_layer.attach()
        for reason, count in reasons.items():
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
        if isinstance(layer, Int8Linear):
            return WeightReader(name, layer, None)()
        return self.merges[DENOISER].find_original(name) if DENOISER in self.merges else None

    def make_layer(
        self,
        name: str,
        layer: Int8Linear,
        changes: IndexedChanges,
        choice: ModeChoice,
        read_weight: Callable[[], Tensor],
        rounding: Rounding | None,
    ) -> Int8LoraLayer:
        """Prepare one INT8 layer for its LoRAs, by the mode that was chosen for it; it is not changed yet.

        Args:
            name: of the layer.
            layer: the one to be changed.
            changes: of the layer.
            choice: of the mode.
            read_weight: the weight without any LoRA.
            rounding: of baked weights; one that needs calibration is replaced by absmax.
        """
        if choice.mode == "dynamic":
            with name_module(name):
                return DynamicLayer(layer, changes, choice.branches)
        if choice.mode == "bake":
            if rounding is None or rounding.needs_calibration:
                rounding = AbsMax()
            return BakedLayer(layer, changes, read_weight(), rounding)
        files = [self.entries[index].file.identity for index, _ in changes]
        return StochasticLayer(layer, changes, read_weight, seed=(self.seed, name, "lora", *files))

    def merge_weight(self, name: str, weight: Tensor) -> Tensor:
        """A weight of the denoiser that was just read, with the LoRAs added at the present strengths."""
        if DENOISER not in self.merges:
            return weight
        return self.merges[DENOISER].merge_weight(name, weight)

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
        modes = {DynamicLayer: "dynamic", BakedLayer: "bake", StochasticLayer: "stochastic"}
        return dict(Counter(modes[type(layer)] for layer in self.layers.values()))

    @property
    def clipped_share(self) -> float:
        """Of the weights with stochastic rounding, the share that the old scales would have clipped."""
        num_weights, num_clipped = 0, 0.0
        for layer in self.layers.values():
            if isinstance(layer, StochasticLayer):
                size = layer.layer.in_features * layer.layer.out_features
                num_weights += size
                num_clipped += size * layer.clipped_share
        return num_clipped / num_weights if num_weights else 0.0

    def changes_text_encoder(self, index: int) -> bool:
        """Whether a LoRA changes a text encoder."""
        counts = self.count_modules(index)
        return any(count for component, count in counts.items() if component != DENOISER)

    def count_modules(self, index: int) -> dict[str, int]:
        """How many modules of each component a LoRA changes."""
        counts = {}
        for component, modules in self.matches.by_component.items():
            indices = [i for changes in modules.values() for i, _ in changes]
            counts[component] = indices.count(index)
        return counts

    def report(self) -> list[str]:
        """A line for each LoRA: what is in the file, and what it changes."""
        return [self.describe(index) for index in range(len(self.entries))]

    def describe(self, index: int) -> str:
        """What is in the file of one LoRA, and what it changes."""
        entry = self.entries[index]
        counts = ", ".join(f"{component} {n}" for component, n in self.count_modules(index).items() if n)
        line = f"LoRA {entry.name!r} ({entry.file.path.name}): {format_contents(entry.file)}"
        line += f"; modules changed: {counts}"
        n_unmatched = sum(i == index for i, _, _ in self.matches.unmatched)
        if n_unmatched:
            line += f"; {n_unmatched} not applied"
        return "; ".join([line, *entry.file.notes])

    def record_sizes(
        self, layer: Int8Linear, changes: IndexedChanges, read_weight: Callable[[], Tensor]
    ) -> None:
        """Measure the changes of one INT8 layer's weight."""
        for index, change in changes:
            if change.weight_delta is not None:
                weight = read_weight()
                size = measure_change(change.weight_delta.compute_delta(weight), weight, layer)
                self.sizes.setdefault(index, []).append(size)

    def compute_median_steps(self, index: int) -> float | None:
        """The typical size of a LoRA's changes in steps of the layers' grids; None: no INT8 layer has it."""
        return compute_median_steps(self.sizes[index]) if index in self.sizes else None

    def format_size(self, index: int) -> str | None:
        """The size of a LoRA at strength 1, for people; None where no INT8 layer has it."""
        return format_sizes(self.entries[index].name, self.sizes[index]) if index in self.sizes else None


def list_mode_reasons(choice: ModeChoice, rounding: Rounding | None) -> list[str]:
    """Why a layer does not get its LoRAs as was asked for, each with the mode that it gets.

    Args:
        choice: the mode.
        rounding: of baked weights, as asked for.
    """
    reasons = []
    if choice.reason:
        reasons.append(f"{choice.mode}: {choice.reason}")
    if choice.mode == "bake" and rounding is not None and rounding.needs_calibration:
        reasons.append(f"bake: rounded by {AbsMax().name}, because {rounding.name} needs calibration")
    return reasons


def format_contents(file: LoraFile) -> str:
    """Adapter types, ranks and scales in a file: `40 × LoRA, rank 8, alpha/rank 1`."""
    parts = [f"{n} × {adapter_type}" for adapter_type, n in file.adapter_types.most_common()]
    for name, counts in (("rank", file.ranks), ("alpha/rank", file.scales)):
        if len(counts) == 1:
            parts.append(f"{name} {min(counts):g}")
        elif counts:
            parts.append(f"{name} {min(counts):g} to {max(counts):g}")
    return ", ".join(parts)


def format_some(names: Sequence[str]) -> str:
    """The first of several names, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def check_strengths(name: str, strength: float, text_strength: float | None) -> None:
    """Check that both strengths of a LoRA are in range."""
    check_strength(f"strength of LoRA {name!r}", strength)
    if text_strength is not None:
        check_strength(f"text_strength of LoRA {name!r}", text_strength)


def warn_duplicates(entries: Sequence[Entry]) -> None:
    """Warn where two LoRAs are the same file."""
    if len(entries) < 2:
        return  # a hash reads the whole file
    first_names: dict[str, str] = {}
    for entry in entries:
        first_name = first_names.setdefault(entry.file.identity, entry.name)
        if first_name != entry.name:
            log.warning(
                "LoRA %r holds the same weights as %r; together they act like one with both strengths added",
                entry.name,
                first_name,
            )
