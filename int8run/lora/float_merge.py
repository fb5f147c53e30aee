"""LoRAs added to float weights and biases, with the originals kept: every strength starts from them.

`LoraStack` makes one `FloatMerge` for each float model, the denoiser and each text encoder. It holds one
`MergedParameter` for each weight and bias that is changed. Making one changes nothing; `attach`,
`set_strengths` and `restore` do. INT8 layers are left to `int8run.lora.apply`.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from int8run.errors import LoraError
from int8run.layers.int8_conv import Int8Layer
from int8run.lora.adapters.diff import Diff
from int8run.lora.apply import (
    IndexedChanges,
    IndexedDeltas,
    add_deltas,
    get_bias_deltas,
    get_weight_deltas,
)
from int8run.lora.merged_parameter import MergedParameter, check_is_float, name_module
from int8run.lora.module_names import find_target, find_target_module
from int8run.lora.size_limits import check_fits


class FloatMerge:
    """LoRAs added to the float weights and biases of one model.

    Weights that are not in memory are deferred to `merge_weight`, which adds to them when they are read.

    Args:
        model: a denoiser or text encoder; its INT8 layers are left alone.
        changes: module -> what the LoRAs of the stack do to it.
        earlier: the one before on the same model, whose originals are taken over; None: there was none.

    Raises:
        LoraError: for a module that has no such weight or bias to add to.
    """

    def __init__(
        self, model: nn.Module, changes: Mapping[str, IndexedChanges], earlier: "FloatMerge | None" = None
    ):
        self._model = weakref.ref(model)
        self.strengths: list[float] | None = None
        self.weights: dict[str, MergedParameter] = {}
        self.biases: dict[str, MergedParameter] = {}
        self.deferred: dict[str, IndexedDeltas] = {}
        self.unreachable: list[str] = []  # modules whose weight is no parameter that could be written to
        self.device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        for name, module_changes in changes.items():
            module, attribute = find_target(model, name)
            if not isinstance(module, Int8Layer):
                self.add_module(name, module, attribute, module_changes, earlier)
        self.check_tied_weights()

    def add_module(
        self,
        name: str,
        module: nn.Module,
        attribute: str,
        changes: IndexedChanges,
        earlier: "FloatMerge | None",
    ) -> None:
        """Keep the originals of one module.

        Args:
            name: what the changes are known by, see `find_target`.
            module: that is changed.
            attribute: of the module: `weight`, or a parameter of another name.
            changes: of the LoRAs.
            earlier: see above.
        """
        weight_deltas, bias_deltas = get_weight_deltas(changes), get_bias_deltas(changes)
        if weight_deltas:
            known = {} if earlier is None else earlier.weights
            self.add_weight(name, module, attribute, weight_deltas, known)
        if bias_deltas:
            known = {} if earlier is None else earlier.biases
            self.add_bias(name, module, [(index, Diff(delta)) for index, delta in bias_deltas], known)

    def add_weight(
        self,
        name: str,
        module: nn.Module,
        attribute: str,
        deltas: IndexedDeltas,
        known: Mapping[str, MergedParameter],
    ) -> None:
        """Keep the original of a weight, or note why that is not possible now.

        Args:
            name: what the changes are known by, see `find_target`.
            module: that has the weight.
            attribute: of the module.
            deltas: of the weight.
            known: the weights of an earlier merge, by name.
        """
        weight: Any = getattr(module, attribute)
        if not isinstance(weight, nn.Parameter):
            self.unreachable.append(name)
        elif weight.is_meta:
            self.deferred[name] = deltas
        else:
            check_is_float(name, weight.dtype)
            original = get_original(known, name, weight)
            self.weights[name] = MergedParameter(module, attribute, deltas, original)

    def add_bias(
        self, name: str, module: nn.Module, deltas: IndexedDeltas, known: Mapping[str, MergedParameter]
    ) -> None:
        """Keep the original of a bias.

        Args:
            name: what the changes are known by, see `find_target`.
            module: that gets the bias.
            deltas: of the bias.
            known: the biases of an earlier merge, by name.

        Raises:
            LoraError: for a class of modules that has no bias.
        """
        if not hasattr(module, "bias"):
            raise LoraError(
                f"{name} gets a change of its bias, and a {type(module).__name__} has no bias; "
                "the LoRA was made for another architecture"
            )
        original = get_original(known, name, module.bias)
        self.biases[name] = MergedParameter(module, "bias", deltas, original)

    def check_tied_weights(self) -> None:
        """Check that no weight is changed under two names: one change would undo the other.

        Raises:
            LoraError: with both names.
        """
        names: dict[int, str] = {}
        for name, weight in self.weights.items():
            first = names.setdefault(id(weight.parameter), name)
            if first != name:
                raise LoraError(
                    f"{first} and {name} share one weight, and the LoRA changes each of them otherwise; "
                    "it was made for a model in which they are two"
                )

    @property
    def parameters(self) -> list[MergedParameter]:
        """Everything that is written."""
        return [*self.weights.values(), *self.biases.values()]

    def get_original(self, name: str) -> Tensor:
        """The weight of a module without any LoRA."""
        original = self.weights[name].original
        assert original is not None
        return original

    def find_original(self, name: str) -> Tensor | None:
        """The weight of a module without any LoRA; None where it is not in memory."""
        if name not in self.weights:
            return None
        return self.weights[name].original

    def attach(self) -> None:
        """Give modules without a bias one of zeros where LoRAs add to it."""
        for bias in self.biases.values():
            bias.create_if_missing(self.device)

    @torch.no_grad()
    def remember(self) -> None:
        """Note what every parameter holds, for `find_outside_changes`."""
        for parameter in self.parameters:
            parameter.remember()

    @torch.no_grad()
    def restore(self) -> None:
        """Leave the model as it was found, to the bit, but for what somebody else changed since."""
        for parameter in self.parameters:
            parameter.restore()
        self.strengths = None

    @torch.no_grad()
    def find_outside_changes(self) -> list[str]:
        """Modules that were replaced, or whose parameters somebody else wrote to, since they were written."""
        model = self._model()
        changed = []
        for name, parameter in [*self.weights.items(), *self.biases.items()]:
            module = None if model is None else find_target_module(model, name)
            if module is not parameter.find_module() or parameter.is_changed_outside():
                changed.append(name)
        return list(dict.fromkeys(changed))

    @torch.no_grad()
    def merge_weight(self, name: str, weight: Tensor) -> Tensor:
        """A weight that was just read, with the LoRAs added at the present strengths."""
        deltas, strengths = self.deferred.get(name, []), self.strengths or []
        if not deltas or not any(strengths):
            return weight
        merged = add_deltas(weight, deltas, strengths, weight)
        with name_module(name):
            check_fits(merged, weight.dtype)
        return merged.to(weight.dtype)

    @torch.no_grad()
    def merge_late_weights(self) -> None:
        """Take over deferred weights that have been read into the model since, at the present strengths."""
        model = self._model()
        if model is None:
            return
        for name, deltas in list(self.deferred.items()):
            module, attribute = find_target(model, name)
            weight: Any = getattr(module, attribute)
            if weight.is_meta:
                continue
            del self.deferred[name]
            self.weights[name] = MergedParameter(module, attribute, deltas)
            if self.strengths is not None:
                with name_module(name):
                    self.weights[name].merge(self.strengths)
        self.check_tied_weights()

    @torch.no_grad()
    def set_strengths(self, strengths: Sequence[float]) -> None:
        """`W = W0 + sum of strength * delta(W0)`, summed in float32 and rounded once."""
        if list(strengths) == self.strengths:
            return
        self.strengths = None  # whatever stops this half-way, the next call writes everything
        for name, parameter in [*self.weights.items(), *self.biases.items()]:
            with name_module(name):
                parameter.merge(strengths)
        self.strengths = list(strengths)


def get_original(known: Mapping[str, MergedParameter], name: str, parameter: object) -> Tensor | None:
    """The original of a parameter that was kept before, where it is the same parameter still."""
    if name not in known or parameter is None or known[name].parameter is not parameter:
        return None
    return known[name].original
