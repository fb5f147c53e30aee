"""Who holds a model: what the LoRAs of one stack did to it, and how it is taken back.

Every module that a stack changes refers to the same `InstalledLoras`. So a model knows what is on it as long
as it lives, whatever becomes of the stack: a later stack takes back what one left behind that is gone.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from int8run.lora.apply import Int8LoraLayer
from int8run.lora.float_merge import FloatMerge
from int8run.lora.key_parsing import DENOISER
from int8run.lora.module_names import find_target_module

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
        """The stack; None where it is gone."""
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
        changed = [name for merge in self.merges.values() for name in merge.find_outside_changes()]
        changed += [
            name
            for name, layer in self.layers.items()
            if find_target_module(parts[DENOISER], name) is not layer.find_layer()
        ]
        return changed

    def restore(self) -> None:
        """Leave every module as it was found, to the bit, but for those that somebody else changed since."""
        for merge in self.merges.values():
            merge.restore()
        for layer in self.layers.values():
            if layer.find_layer() is not None:
                layer.restore()
        for reference in self.marked:
            module = reference()
            if module is not None and module.__dict__.get(MARK) is self:
                del module.__dict__[MARK]

    def put_back(self) -> None:
        """Undo `restore`."""
        for merge in self.merges.values():
            merge.attach()
        for layer in self.layers.values():
            layer.attach()
        self.set_strengths(self.strengths, self.text_strengths)
        modules = [reference() for reference in self.marked]
        self.marked = []
        self.mark(module for module in modules if module is not None)
        self.remember()


def find_marks(models: Iterable[nn.Module]) -> list[InstalledLoras | tuple[str, ...]]:
    """What holds these models: stacks, and of copies of models with LoRAs the names of those."""
    found: list[InstalledLoras | tuple[str, ...]] = []
    for model in models:
        for module in model.modules():
            mark = module.__dict__.get(MARK)
            if mark is not None and mark not in found:
                found.append(mark)
    return found


def format_names(marks: Iterable[InstalledLoras | tuple[str, ...]]) -> str:
    """The LoRAs of several marks, for messages."""
    names = [name for mark in marks for name in (mark.names if isinstance(mark, InstalledLoras) else mark)]
    return ", ".join(repr(name) for name in dict.fromkeys(names))
