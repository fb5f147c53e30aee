"""The weights of a denoiser in a file, by the names of its parameters: read one at a time, so that the float model is never in memory."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.checkpoints.detect import is_scaled_fp8_marker, read_layers
from int8run.checkpoints.layer import FLOAT, CheckpointLayer
from int8run.checkpoints.provenance import read_provenance
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError
from int8run.layers.int8_linear import QuantizedLayer
from int8run.models.detect_family import detect_denoiser
from int8run.models.family import load_families
from int8run.models.state_dict_adapter import Shape, TensorPart, find_prefix, find_targets, to_model
from int8run.quant.weight import QuantizedWeight

log = logging.getLogger(__name__)


class FileWeights:
    """A checkpoint of one denoiser, whatever its names and number formats are.

    Args:
        path: a `.safetensors` file or a folder of them.
        model: the denoiser that the weights are for; only shapes and names of its parameters are looked at.
        partial: the file need not hold every parameter, as a file of INT8 layers alone.

    Raises:
        FileError: when the file is damaged, contradicts itself, or is for another model.
    """

    def __init__(self, path: Path, model: nn.Module, partial: bool = False):
        self.files = TensorFiles.open(path)
        prefix = find_prefix(self.files)
        self.layers = {
            name.removeprefix(prefix): layer for name, layer in read_layers(self.files, prefix).items()
        }
        beside = {key for layer in self.layers.values() for key in layer.sibling_keys}
        plain = {
            key: info.shape
            for key, info in self.files.items()
            if key not in beside and not is_scaled_fp8_marker(key)
        }
        shapes = {key.removeprefix(prefix): shape for key, shape in plain.items() if key.startswith(prefix)}
        self.prefix, held = prefix, {name: tuple(t.shape) for name, t in model.state_dict().items()}
        for name, layer in self.layers.items():
            if len(layer.shape) == 2:
                meant = find_targets([name + WEIGHT], type(model).__name__)[name + WEIGHT]
                known = held.get(meant[0]) if len(meant) == 1 else None
                shapes[name + WEIGHT] = (
                    known if known is not None and layer.fits_shape(known) else (layer.rows, layer.columns)
                )
        self.shapes = shapes
        self.class_name = type(model).__name__
        try:
            self.layout = to_model(shapes, held, self.class_name)
        except FileError as error:
            raise FileError(f"{path}: {error}{self.describe_other_model()}") from error
        self.report_unused([key for key in plain if not key.startswith(prefix)], held, partial)

    def describe_other_model(self) -> str:
        """What the names in the file say that it is, where that is another model."""
        try:
            found = detect_denoiser(self.shapes, load_families().values(), self.shapes)
        except ConfigError:
            return ""
        if found is None or found[1] == self.class_name:
            return ""
        named = (
            f"its names are those of a {found[1]} ({found[0].name}), and model.base has a {self.class_name}"
        )
        return f"; {named}: set model.base to what belongs to the file"

    def report_unused(self, others: Sequence[str], held: Mapping[str, Shape], partial: bool) -> None:
        """Say what of the file is not used, and what is not used as it is.

        Args:
            others: keys of other components.
            held: what the model has.

        Raises:
            FileError: when the model's parameters are not all there.
        """
        if missing := [] if partial else self.layout.missing:
            raise FileError(
                f"{self.path} does not hold {len(missing)} of the {len(held)} tensors of {self.class_name} (first: {missing[0]}); "
                f"it is for another model, or incomplete{self.describe_other_model()}"
            )
        again = Counter(
            layer.label
            for layer in self.layers.values()
            if layer.storage_dtype != FLOAT and not layer.is_exact
        )
        if again:
            listed = ", ".join(f"{n} × {label}" for label, n in again.most_common())
            log.info(
                "%s: read as the numbers that they stand for, and rounded anew where they become INT8: %s",
                self.path,
                listed,
            )
        if others:
            said = "%s: %d tensors of other components are not used (first: %s); these come from model.base"
            log.warning(said, self.path, len(others), others[0])
        if unused := self.layout.unused:
            said = "%s: %d tensors have no place in %s and are not used (first: %s)"
            log.warning(said, self.path, len(unused), self.class_name, unused[0])

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.files.path

    def read_tensor(self, name: str) -> Tensor:
        """A parameter, on the CPU, in the file's own float dtype; a quantized weight as the float32 numbers that it stands for."""
        tensors = [self.read_part(part) for part in self.layout.parts[name]]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def read_part(self, part: TensorPart) -> Tensor:
        """The rows of one tensor in the file."""
        layer = self.layers.get(part.key.removesuffix(WEIGHT)) if part.key.endswith(WEIGHT) else None
        whole = replace(part, rows=None)
        if layer is None or layer.storage_dtype == FLOAT:
            return whole.extract(self.files.read(self.prefix + part.key, part.rows))
        rows, columns = self.shapes[part.key] if layer.is_padded else (layer.rows, layer.columns)
        return whole.extract(layer.read_weight(self.files, part.rows, (rows, columns)))

    def find_int8_layers(self) -> dict[str, CheckpointLayer]:
        """Linears whose integers can be taken as they are, by module name, and what the file says of each (of its first part)."""
        found = {}
        for name, parts in self.layout.parts.items():
            layers = (
                [self.layers.get(part.key.removesuffix(WEIGHT)) for part in parts]
                if name.endswith(WEIGHT)
                else []
            )
            if (
                layers
                and layers[0] is not None
                and all(layer is not None and layer.is_exact for layer in layers)
            ):
                found[name.removesuffix(WEIGHT)] = layers[0]
        return found

    def find_inexact_layers(self) -> set[str]:
        """Linears whose numbers are quantized in a way that cannot be taken as it is."""
        taken, found = self.find_int8_layers(), set()
        for name, parts in self.layout.parts.items():
            layers = (
                [self.layers.get(part.key.removesuffix(WEIGHT)) for part in parts]
                if name.endswith(WEIGHT)
                else []
            )
            if (
                any(layer is not None and layer.storage_dtype != FLOAT for layer in layers)
                and name.removesuffix(WEIGHT) not in taken
            ):
                found.add(name.removesuffix(WEIGHT))
        return found

    def read_int8_layer(self, name: str) -> QuantizedLayer:
        """One of `int8_layers`, without its bias.

        Raises:
            FileError: when its parts were treated differently.
        """
        layers: list[QuantizedLayer] = []
        for part in self.layout.parts[name + WEIGHT]:
            layer = self.layers[part.key.removesuffix(WEIGHT)].read_int8_layer(self.files, part.rows)
            whole = replace(part, rows=None)
            layers.append(
                QuantizedLayer(
                    QuantizedWeight(whole.extract(layer.weight.qdata), whole.extract(layer.weight.scale)),
                    layer.transform,
                    None,
                )
            )
        if len(layers) == 1:
            return layers[0]
        first = layers[0].transform
        if not all(layer.transform.has_same_input_transform(first) for layer in layers[1:]):
            raise FileError(
                f"{self.path}: the parts of {name} were treated differently ({', '.join(layer.transform.label for layer in layers)})"
            )
        weight = QuantizedWeight(
            torch.cat([la.weight.qdata for la in layers]), torch.cat([la.weight.scale for la in layers])
        )
        return QuantizedLayer(weight, first, None)


class DenoiserWeights:
    """The weights of all denoisers of a pipeline, by the names that a layer has in `DualDenoiser`.

    Args:
        parts: a checkpoint for each prefix of layer names; `""` for a single denoiser.
    """

    def __init__(self, parts: Mapping[str, FileWeights]):
        self.parts = dict(parts)

    def locate(self, name: str) -> tuple[FileWeights, str]:
        """The checkpoint that a name belongs to, and the name there."""
        if "" in self.parts:
            return self.parts[""], name
        expert, _, inner = name.partition(".")
        return self.parts[f"{expert}."], inner

    def read_tensor(self, name: str) -> Tensor:
        """See `FileWeights`."""
        file, inner = self.locate(name)
        return file.read_tensor(inner)

    def read_int8_layer(self, name: str) -> QuantizedLayer:
        """See `FileWeights`."""
        file, inner = self.locate(name)
        return file.read_int8_layer(inner)

    def find_int8_layers(self) -> dict[str, CheckpointLayer]:
        """See `FileWeights`."""
        return {
            prefix + name: layer
            for prefix, file in self.parts.items()
            for name, layer in file.find_int8_layers().items()
        }

    def find_inexact_layers(self) -> set[str]:
        """See `FileWeights`."""
        return {prefix + name for prefix, file in self.parts.items() for name in file.find_inexact_layers()}

    @property
    def paths(self) -> list[Path]:
        """Every file."""
        return [path for file in self.parts.values() for path in file.files.files]

    def read_provenance(self) -> dict[str, Any]:
        """How int8run made the (first) file; empty when another program did."""
        file = next(iter(self.parts.values()))
        return read_provenance(file.path, file.files.metadata)

    def fill_parameters(self, model: nn.Module, names: Iterable[str], device: torch.device) -> None:
        """Put parameters of the files into the model, in the model's dtype."""
        for name in names:
            parent, _, child = name.rpartition(".")
            module = model.get_submodule(parent)
            old = getattr(module, child)
            value = self.read_tensor(name)
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise FileError(
                    f"{self.locate(name)[0].path}: {name} holds NaN or infinity; the file is damaged"
                )
            value = value.to(device, old.dtype if old.is_floating_point() else value.dtype)
            if child in module._parameters:
                module._parameters[child] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[child] = value
