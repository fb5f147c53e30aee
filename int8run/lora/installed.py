"""Who holds a model: what the LoRAs of one stack did to it, and how it is taken back.

Every module that a stack changes refers to the same `InstalledLoras`. So a model knows what is on it as long
as it lives, whatever becomes of the stack: a later stack takes back what one left behind that is gone.
"""

import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from int8run.errors import ConfigError, LoraError
from int8run.lora.apply import Int8LoraLayer
from int8run.lora.float_merge import FloatMerge
from int8run.lora.key_parsing import DENOISER
from int8run.lora.module_names import find_target_module

log = logging.getLogger(__name__)

# attribute of a module that LoRAs change
MARK = "_int8run_loras"


class InstalledLoras:
    """The changes of one stack, on a denoiser and its text encoders.

    Args:
        owner: the stack; None: nobody has to know of it.
        names: of the LoRAs.
    """

    def __init__(self, owner: object | None = None, names: Sequence[str] = ()):
        self._owner = None if owner is None else weakref.ref(owner)
        self.names = tuple(names)
        self.merges: dict[str, FloatMerge] = {}  # by component
        self.layers: dict[str, Int8LoraLayer] = {}  # INT8 layers by name
        self.strengths: list[float] = []
        self.text_strengths: list[float] | None = None
        self.marked: list[weakref.ref[nn.Module]] = []

    @property
    def owner(self) -> object | None:
        """The stack; None where it is gone, and where nobody has to know of it."""
        return None if self._owner is None else self._owner()

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        """A copy of a module, deep or pickled, knows the names of its LoRAs and cannot take them off."""
        return tuple, (self.names,)

    def mark(self, modules: Iterable[nn.Module]) -> None:
        """Let these modules know who changes them."""
        for module in modules:
            module.__dict__[MARK] = self
            self.marked.append(weakref.ref(module))

    def set_strengths(self, strengths: Sequence[float], text_strengths: Sequence[float] | None) -> None:
        """Bring every part to these strengths, one for each LoRA.

        Args:
            strengths: of the denoiser.
            text_strengths: of the text encoders; None: they stay as they are.
        """
        self.strengths = list(strengths)
        if text_strengths is not None:
            self.text_strengths = list(text_strengths)
        for component, merge in self.merges.items():
            if component == DENOISER:
                merge.set_strengths(strengths)
            elif text_strengths is not None:
                merge.set_strengths(text_strengths)
        for layer in self.layers.values():
            layer.set_strengths(strengths)

    def remember(self) -> None:
        """Note what the float weights hold, for `find_outside_changes`."""
        for merge in self.merges.values():
            merge.remember()

    def find_outside_changes(self, parts: Mapping[str, nn.Module]) -> list[str]:
        """Modules that somebody else replaced or wrote to since the LoRAs were put on them.

        Args:
            parts: the models, by component.
        """
        changed = []
        for merge in self.merges.values():
            changed += merge.find_outside_changes()
        for name, layer in self.layers.items():
            if find_target_module(parts[DENOISER], name) is not layer.find_layer():
                changed.append(name)
        return changed

    def check_unchanged_outside(self, parts: Mapping[str, nn.Module]) -> None:
        """Check that what the stack changed is still there, as the stack left it.

        Args:
            parts: the models, by component.

        Raises:
            ConfigError: when another part of the program replaced it, or wrote to it.
        """
        changed = self.find_outside_changes(parts)
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
        for merge in self.merges.values():
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

    def warn_float8_weights(self) -> None:
        """Warn where weights are rounded to 8 bits, in which most of a LoRA is lost."""
        num_weights = num_float8 = 0
        for merge in self.merges.values():
            num_weights += len(merge.weights)
            num_float8 += sum(weight.is_float8 for weight in merge.weights.values())
        if num_float8:
            log.warning(
                "%d of %d weights that the LoRAs change are float8, which rounds away most of a small "
                "change; put LoRAs on a bfloat16 model (before enable_layerwise_casting), or on INT8 layers",
                num_float8,
                num_weights,
            )

    def restore(self) -> None:
        """Leave every module as it was found, to the bit, but for those that somebody else changed since."""
        for merge in self.merges.values():
            merge.restore()
        for layer in self.layers.values():
            if layer.find_layer() is not None:
                layer.restore()
        for module in self.list_marked():
            if module.__dict__.get(MARK) is self:
                del module.__dict__[MARK]

    def put_back(self) -> None:
        """Undo `restore`."""
        for merge in self.merges.values():
            merge.attach()
        for layer in self.layers.values():
            layer.attach()
        self.set_strengths(self.strengths, self.text_strengths)
        modules = self.list_marked()
        self.marked = []
        self.mark(modules)
        self.remember()

    def list_marked(self) -> list[nn.Module]:
        """The modules that were marked and still exist."""
        modules = [reference() for reference in self.marked]
        return [module for module in modules if module is not None]


# -- what is on a model ------------------------------------------------------------------------------------


def find_marks(models: Iterable[nn.Module]) -> list[InstalledLoras | tuple[str, ...]]:
    """What holds these models: stacks, and of copies of models with LoRAs the names of those."""
    found: list[InstalledLoras | tuple[str, ...]] = []
    for model in models:
        for module in model.modules():
            mark = module.__dict__.get(MARK)
            if mark is not None and mark not in found:
                found.append(mark)
    return found


def find_left_behind(models: Iterable[nn.Module]) -> list[InstalledLoras]:
    """What stacks that are gone left on these models."""
    marks = find_marks(models)
    return [mark for mark in marks if isinstance(mark, InstalledLoras) and mark.owner is None]


def check_no_other_owner(models: Iterable[nn.Module], owner: object) -> None:
    """Check that no other stack than this one changes the models: each would undo the other's changes.

    Raises:
        ConfigError: when one does, or a model is a copy of one that has LoRAs.
    """
    for mark in find_marks(models):
        if not isinstance(mark, InstalledLoras):
            raise ConfigError(
                f"this model is a copy of one with LoRAs on it ({format_names([mark])}), and they cannot "
                "be taken off the copy; copy a model before it gets LoRAs, or after clear()"
            )
        if mark.owner not in (None, owner):
            raise ConfigError(
                f"this model has a LoraStack already, with {format_names([mark])}; add the LoRA to that "
                "one, or clear() it first (LoraStack.of(model) returns it)"
            )


def format_names(marks: Iterable[InstalledLoras | tuple[str, ...]]) -> str:
    """The LoRAs of several marks, for messages."""
    names: list[str] = []
    for mark in marks:
        names += mark.names if isinstance(mark, InstalledLoras) else mark
    return ", ".join(repr(name) for name in dict.fromkeys(names))


def format_some(names: Sequence[str]) -> str:
    """The first of several names, and how many more there are."""
    if len(names) == 1:
        return names[0]
    return f"{names[0]} and {len(names) - 1} more"
