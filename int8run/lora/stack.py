"""LoRAs on a model: put on together, moved by a strength each, taken off without a trace."""

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from int8run.errors import ConfigError, LoraError, check_choice, check_range
from int8run.layers.int8_linear import Int8Linear
from int8run.lora.adapters.base import RuntimeBranch
from int8run.lora.apply import (
    BakedLayer,
    DynamicLayer,
    FloatMerge,
    IndexedChanges,
    Int8LoraLayer,
    StochasticLayer,
    make_branches,
    sum_ranks,
)
from int8run.lora.config import MODES, STRENGTH_LIMIT
from int8run.lora.find import find_lora
from int8run.lora.key_parsing import DENOISER
from int8run.lora.load import LoraFile, read_lora
from int8run.lora.match import Matches, MatchRequest, match_loras
from int8run.quant.rounding import AbsMax, Rounding

log = logging.getLogger(__name__)
# attribute of a denoiser that tells which stack has it in hand
HOLDER = "_int8run_loras"
# share of a weight that a LoRA usually stays well below
MOST_SHARE = 0.5
# time of a layer with a branch of this rank over its time without; by the layer's name
Overhead = Callable[[str, Int8Linear, int], float]


@dataclass
class Entry:
    """One LoRA of the stack and how strong it is."""

    name: str
    file: LoraFile
    strength: float = 0.0
    text_strength: float = 0.0
    components: Sequence[str] | None = None


class LoraStack:
    """Any number of LoRAs on one denoiser and its text encoders.

        stack = LoraStack(pipe.transformer).add("style.safetensors", 0.8)
        stack.set_strength("style", 0.4)

    Layers that are float get the sum of all changes added to their weights; INT8 layers get it by `mode` (see `LoraSettings`). Whatever
    the mode, every strength starts from the untouched model, so that 0 is the model itself.

    Args:
        denoiser: with or without INT8 layers in it.
        text_encoders: by component name (`text_encoder`, `text_encoder_2`, …), where a LoRA's part for them is to be applied.
        mode: `auto`, `dynamic`, `bake`, `stochastic`.
        strict: keys without a place are an error.
        seed: of the random rounding.
        folder: where names without a folder are looked for, besides the shipped LoRAs.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        text_encoders: Mapping[str, nn.Module] | None = None,
        mode: str = "auto",
        strict: bool = True,
        seed: int = 0,
        folder: Path | None = None,
    ):
        check_choice("lora.mode", mode, MODES)
        if not isinstance(denoiser, nn.Module):
            raise ConfigError(
                f"a LoraStack is put on a denoiser, such as pipe.transformer or pipe.unet, not on a {type(denoiser).__name__}"
            )
        self.denoiser, self.parts = denoiser, {DENOISER: denoiser, **(text_encoders or {})}
        self.mode, self.strict, self.seed, self.folder = mode, strict, seed, folder
        self.entries: list[Entry] = []
        self.matches = Matches({}, ())
        self.merges: dict[str, FloatMerge] = {}
        self.layers: dict[str, Int8LoraLayer] = {}
        self.sizes: dict[int, list[Size]] = {}  # of each LoRA, by INT8 layer

    # -- for a program of one's own ----------------------------------------------------------------------------------------

    def add(
        self,
        source: str | Path,
        strength: float = 1.0,
        name: str | None = None,
        text_strength: float | None = None,
        weight_name: str | None = None,
    ) -> "LoraStack":
        """Put one more LoRA on the model. Returns the stack.

        Args:
            source: a `.safetensors` file, a shipped name, a name in `folder`, or a hub id with `weight_name`.
            name: for `set_strength`; None: the file's name without its suffix.

        Raises:
            LoraError: when the file cannot be read or does not fit; the model is as it was.
        """
        path = find_lora(str(source), weight_name, self.folder)
        name = name or path.stem
        if name in self.names:
            raise ConfigError(
                f"the stack has a LoRA called {name!r} already; set_strength({name!r}, …) moves it, or give another name="
            )
        check_strength(name, strength, text_strength)
        entry = Entry(name, read_lora(path), strength, strength if text_strength is None else text_strength)
        before, found = self.entries, self.matches
        matches = self.match_entries([*before, entry])
        self.uninstall()
        self.install([*before, entry], matches)
        try:
            self.attach(self.denoiser)
        except LoraError:
            self.uninstall()
            self.install(before, found)
            self.attach(self.denoiser)
            self.apply()
            raise
        self.apply()
        return self

    def clear(self) -> None:
        """Take all LoRAs off; the model is as it was found, and free for another stack."""
        self.uninstall()
        self.entries, self.matches = [], Matches({}, ())
        self.denoiser.__dict__.pop(HOLDER, None)

    def set_strength(self, name: str, strength: float, text_strength: float | None = None) -> None:
        """Move one LoRA; in dynamic mode that writes a few numbers per layer."""
        if name not in self.names:
            raise ConfigError(
                f"the stack has no LoRA called {name!r}; it has {', '.join(self.names) or 'none'}"
            )
        check_strength(name, strength, text_strength)
        entry = self.entries[self.names.index(name)]
        entry.strength, entry.text_strength = strength, strength if text_strength is None else text_strength
        self.apply()

    @property
    def names(self) -> list[str]:
        """Names of the LoRAs, in order."""
        return [entry.name for entry in self.entries]

    # -- steps of a run ----------------------------------------------------------------------------------------------------

    def match_entries(self, entries: Sequence[Entry]) -> Matches:
        """Where these LoRAs land; the model is not touched.

        Raises:
            LoraError: when one does not fit.
        """
        warn_duplicates(entries)
        return match_loras(self.parts, [MatchRequest(e.file, e.components) for e in entries], self.strict)

    def install(self, entries: Sequence[Entry], matches: Matches, leave: Container[str] = ()) -> None:
        """Take these LoRAs in hand, at strength 0.

        Args:
            leave: components whose weights are somebody else's to change.

        Raises:
            ConfigError: when another stack has the model in hand: each would undo the other's changes.
        """
        # a number, for a copy of the model must not copy the stack with it
        if entries and self.denoiser.__dict__.setdefault(HOLDER, id(self)) != id(self):
            raise ConfigError("this model has a LoraStack already; add the LoRA to that one")
        self.entries, self.matches = list(entries), matches
        changed = {
            component: found
            for component, found in matches.by_component.items()
            if found and component not in leave
        }
        self.merges = {
            component: FloatMerge(self.parts[component], found) for component, found in changed.items()
        }

    def attach(
        self,
        int8: nn.Module,
        float_weights: bool = False,
        rounding: Rounding | None = None,
        scheduled: bool = False,
        overhead: Overhead | None = None,
        max_overhead: float = 0.0,
    ) -> None:
        """Choose for every INT8 layer how it gets its LoRAs.

        Args:
            int8: the denoiser with the INT8 layers.
            float_weights: whether the float denoiser holds the weights that they were made from.
            rounding: of baked weights.
            scheduled: strengths will change from step to step, which only dynamic layers can follow.
            overhead, max_overhead: what a branch costs, and may cost, with mode=auto; None: any cost will do.

        Raises:
            LoraError: when a layer cannot have the mode that was asked for.
        """
        plain = AbsMax() if rounding is None or rounding.needs_calibration else rounding
        whys: Counter[str] = Counter()
        for name, changes in self.matches.denoiser.items():
            layer = int8.get_submodule(name)
            if not isinstance(layer, Int8Linear):
                continue  # it carries the merge
            weight = self.make_weight_reader(name, layer, float_weights)
            for index, change in changes:
                if (
                    change.weight_delta is not None and float_weights
                ):  # reading integers back for a number to show would take long
                    self.sizes.setdefault(index, []).append(
                        Size.of(change.weight_delta.compute_delta(weight()), weight(), layer)
                    )
            mode, why, forms = self.choose_mode(
                name, layer, changes, weight, float_weights, scheduled, overhead, max_overhead
            )
            if why:
                whys[f"{mode}: {why}"] += 1
            if mode == "dynamic":
                self.layers[name] = DynamicLayer(layer, changes, forms)
            elif mode == "bake":
                if rounding is not None and rounding.needs_calibration:
                    whys[
                        f"bake: rounded by {plain.name}, for {rounding.name} needs what only a build sees"
                    ] += 1
                self.layers[name] = BakedLayer(layer, changes, weight(), plain)
            else:
                identity = [self.entries[index].file.identity for index, _ in changes]
                self.layers[name] = StochasticLayer(
                    layer, changes, weight, (self.seed, name, "lora", *identity)
                )
        for why, count in whys.items():
            log.info("LoRAs on %d layers by lora.mode=%s", count, why)

    def choose_mode(
        self,
        name: str,
        layer: Int8Linear,
        changes: IndexedChanges,
        weight: Callable[[], Tensor],
        float_weights: bool,
        scheduled: bool,
        overhead: Overhead | None,
        max_overhead: float,
    ) -> tuple[str, str, list[tuple[int, RuntimeBranch]]]:
        """The mode of one layer, why it is not dynamic, and its dynamic form.

        Raises:
            LoraError: when the mode that was asked for cannot be.
        """
        written = "bake" if float_weights else "stochastic"
        if self.mode == "bake" and not float_weights:
            raise LoraError(
                f"lora.mode=bake needs the float weight of {name}, and there is none beside a checkpoint or a model quantized before; "
                "set lora.mode=dynamic, stochastic or auto"
            )
        if self.mode in ("bake", "stochastic"):
            return self.mode, "", []
        forms = make_branches(changes, weight)
        if isinstance(forms, str):
            if self.mode == "dynamic" or scheduled:
                need = (
                    "lora.mode=dynamic"
                    if self.mode == "dynamic"
                    else "a schedule of strengths needs lora.mode=dynamic, which"
                )
                raise LoraError(
                    f"{name}: {need} cannot be: {forms}; set lora.mode=auto and one strength for all steps"
                )
            return written, forms, []
        rank = sum_ranks(forms)
        if self.mode == "auto" and not scheduled and rank:
            if rank >= min(layer.in_features, layer.out_features):
                return written, f"a branch of rank {rank} would be more work than the layer", []
            if overhead is not None and overhead(name, layer, rank) > 1 + max_overhead:
                return (
                    written,
                    f"a branch of rank {rank} would take more than lora.max_overhead={max_overhead:g} of a layer's time",
                    [],
                )
        return "dynamic", "", forms

    def make_weight_reader(self, name: str, layer: Int8Linear, float_weights: bool) -> Callable[[], Tensor]:
        """The weight that an INT8 layer stands for, computed when it is asked for."""
        if float_weights:
            return lambda: self.merges[DENOISER].get_original(name)
        known: list[Tensor] = []

        def read() -> Tensor:
            if not known:
                known.append(layer.transform.restore_weight(layer.read_quantized_weight().dequantize()))
            return known[0]

        return read

    def merge_weight(self, name: str, weight: Tensor) -> Tensor:
        """A weight of the denoiser that was just read, with the LoRAs at the strengths of now added."""
        return self.merges[DENOISER].merge_weight(name, weight) if DENOISER in self.merges else weight

    def apply(self) -> None:
        """Bring the model to the entries' strengths."""
        self.set_strengths([e.strength for e in self.entries], [e.text_strength for e in self.entries])

    def set_strengths(
        self, strengths: Sequence[float], text_strengths: Sequence[float] | None = None
    ) -> None:
        """Bring every part to these strengths, one per LoRA; nothing is rebuilt but the weights of layers that are not dynamic.

        Args:
            text_strengths: of the text encoders; None: as they are.
        """
        for component, merge in self.merges.items():
            if component == DENOISER:
                merge.set_strengths(strengths)
            elif text_strengths is not None:
                merge.set_strengths(text_strengths)
        for layer in self.layers.values():
            layer.set_strengths(strengths)

    def uninstall(self) -> None:
        """Leave the model as it was found."""
        off = [0.0] * len(self.entries)
        self.set_strengths(off, off)
        for layer in self.dynamic_layers:
            layer.attach(False)
        self.layers, self.merges, self.sizes = {}, {}, {}

    @property
    def dynamic_layers(self) -> list[DynamicLayer]:
        """The layers with a branch."""
        return [layer for layer in self.layers.values() if isinstance(layer, DynamicLayer)]

    @property
    def layers_by_mode(self) -> dict[str, int]:
        """How many INT8 layers get their LoRAs by each mode."""
        kinds = {DynamicLayer: "dynamic", BakedLayer: "bake", StochasticLayer: "stochastic"}
        return dict(Counter(kinds[type(layer)] for layer in self.layers.values()))

    @property
    def clipped_share(self) -> float:
        """Of the weights that were rounded at random, the share that the old scales would have clipped."""
        written = [layer for layer in self.layers.values() if isinstance(layer, StochasticLayer)]
        numbers = [layer.layer.in_features * layer.layer.out_features for layer in written]
        return (
            sum(n * w.clipped_share for n, w in zip(numbers, written, strict=True)) / sum(numbers)
            if numbers
            else 0.0
        )

    def changes_text_encoder(self, index: int) -> bool:
        """Whether a LoRA changes a text encoder."""
        texts = [modules for component, modules in self.matches.by_component.items() if component != DENOISER]
        return any(i == index for modules in texts for entries in modules.values() for i, _ in entries)

    def report(self) -> list[str]:
        """A line for each LoRA: what is in the file, and where it landed."""
        return [self.describe(index) for index in range(len(self.entries))]

    def describe(self, index: int) -> str:
        """What is in one LoRA's file, and where it landed."""
        entry = self.entries[index]
        landed = {
            c: sum(i == index for found in modules.values() for i, _ in found)
            for c, modules in self.matches.by_component.items()
        }
        where = ", ".join(f"{component} {count}" for component, count in landed.items() if count)
        lost = sum(i == index for i, _, _ in self.matches.unmatched)
        missing = f"; {lost} not applied" if lost else ""
        notes = "".join(f"; {note}" for note in entry.file.notes)
        return f"LoRA {entry.name!r} ({entry.file.path.name}): {summary(entry.file)}; modules changed: {where}{missing}{notes}"

    def compute_median_steps(self, index: int) -> float | None:
        """Size of a LoRA at strength 1: the median over INT8 layers of its change's rms, in steps of the layer's grid."""
        found = self.sizes.get(index)
        return statistics.median(size.steps for size in found) if found else None

    def format_size(self, index: int) -> str | None:
        """Size of a LoRA at strength 1, for people; None where no INT8 layer has it."""
        if index not in self.sizes:
            return None
        shares = [size.share for size in self.sizes[index]]
        name, typical, most = self.entries[index].name, statistics.median(shares), max(shares)
        large = (
            "; that is a lot: usual are a few percent, and beyond 50 % pictures often break"
            if most > MOST_SHARE
            else ""
        )
        return (
            f"LoRA {name!r} at strength 1 changes its INT8 layers by {typical:.1%} of their weights' size (median; at most {most:.1%}), "
            f"{self.compute_median_steps(index):.2f} times what one integer stands for{large}"
        )


class Size(NamedTuple):
    """How large a change of an INT8 layer is."""

    steps: float  # rms in steps of the layer's grid
    share: float  # norm over the weight's norm

    @classmethod
    def of(cls, delta: Tensor, weight: Tensor, layer: Int8Linear) -> "Size":
        """Of a change at strength 1 and the weight that it changes, both [N, K]."""
        rms = layer.transform.transform_weight(delta.float()).square().mean().sqrt()
        return cls((rms / layer.scale.mean()).item(), (delta.norm() / weight.float().norm()).item())


def summary(file: LoraFile) -> str:
    """Kinds, ranks and scales in a file: `40 × LoRA, rank 8, alpha/rank 1`."""
    kinds = ", ".join(f"{n} × {kind}" for kind, n in file.adapter_types.most_common())
    ranks, scales = (
        ""
        if not found
        else f", {name} {min(found):g}"
        if len(found) == 1
        else f", {name} {min(found):g} to {max(found):g}"
        for name, found in (("rank", file.ranks), ("alpha/rank", file.scales))
    )
    return kinds + ranks + scales


def check_strength(name: str, strength: float, text_strength: float | None) -> None:
    """Refuse a strength outside of the range."""
    check_range(f"strength of LoRA {name!r}", strength, -STRENGTH_LIMIT, STRENGTH_LIMIT)
    if text_strength is not None:
        check_range(f"text_strength of LoRA {name!r}", text_strength, -STRENGTH_LIMIT, STRENGTH_LIMIT)


def warn_duplicates(entries: Sequence[Entry]) -> None:
    """Say which two LoRAs are the same file."""
    first: dict[str, str] = {}
    for entry in entries if len(entries) > 1 else ():  # a hash reads the whole file
        twin = first.setdefault(entry.file.identity, entry.name)
        if twin != entry.name:
            log.warning(
                "LoRA %r holds the same weights as %r; together they act like one with both strengths added",
                entry.name,
                twin,
            )
