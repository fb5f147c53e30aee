"""The weights of a denoiser in a file, by the names of its parameters.

Tensors are read one at a time, so that the float model is never in memory as a whole. load.py opens the
weights of a model, prequantized.py those of files with INT8 layers.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.checkpoints.declared_format import UNDECLARED, DeclaredFormat
from int8run.checkpoints.detect import is_scaled_fp8_marker, read_denoiser_layers
from int8run.checkpoints.layer import FLOAT, CheckpointLayer, have_one_layout
from int8run.checkpoints.part_dtypes import BUFFER, PARAMETER, check_part_dtype
from int8run.checkpoints.provenance import read_provenance
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError, LoraError
from int8run.layers.int8_linear import QuantizedLayer
from int8run.lora.key_groups import group_keys
from int8run.models.detect_family import detect_denoiser
from int8run.models.family import load_families
from int8run.models.state_dict_adapter import find_prefix, find_targets, to_model
from int8run.models.tensor_part import Shape, TensorPart
from int8run.quant.grouped_weight import GroupedWeight, LayerWeight, join_rows
from int8run.quant.weight import QuantizedWeight
from int8run.text_encoders.detect import find_encoders
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)


def is_lora_file(path: Path, keys: Iterable[str]) -> bool:
    """Whether the names in a file are those of a LoRA."""
    try:
        return any(module.is_lora for module in group_keys(path, keys).modules)
    except LoraError:  # several adapters
        return True


class FileWeights:
    """A checkpoint of one denoiser, whatever its names and number formats are.

    Args:
        path: a `.safetensors` file or a folder of them.
        model: the denoiser that the weights are for; only shapes and names of its parameters are used.
        is_partial: whether the file may lack parameters, as a file of INT8 layers alone.
        declared: what the user says of the file; it decides what the file leaves open.
        reports_unused: whether the log says what of the file is not used.

    Raises:
        ConfigError: when no layer has the format that is asked for.
        FileError: when the file is damaged, contradicts itself, or is for another model.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        *,
        is_partial: bool = False,
        declared: DeclaredFormat = UNDECLARED,
        reports_unused: bool = True,
    ):
        self.path = path
        self.class_name = type(model).__name__
        self.files = TensorFiles.open(path)
        self.prefix = find_prefix(self.files)
        layers = read_denoiser_layers(self.files, self.prefix, declared)
        self.layers = {name.removeprefix(self.prefix): layer for name, layer in layers.items()}
        model_shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.shapes = self.read_shapes(model_shapes)
        try:
            self.layout = to_model(self.shapes, model_shapes, self.class_name)
        except FileError as error:
            raise FileError(f"{path}: {error}{self.describe_other_model()}") from error
        self.check_dtypes(model.state_dict())
        if not is_partial:
            self.check_complete(len(model_shapes))
        if reports_unused:
            self.report_unused()

    # -- what is in the file -----------------------------------------------------------------------

    def list_plain_keys(self) -> list[str]:
        """The keys in the file that are not siblings of a quantized weight, such as its scales."""
        siblings = {key for layer in self.layers.values() for key in layer.sibling_keys}
        return [key for key in self.files if key not in siblings and not is_scaled_fp8_marker(key)]

    def read_shapes(self, model_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """The shape of every tensor of the denoiser, without the prefix.

        Args:
            model_shapes: of the model's parameters. A padded weight has the shape that it has there.
        """
        shapes: dict[str, Shape] = {}
        for key in self.list_plain_keys():
            if key.startswith(self.prefix):
                shapes[key.removeprefix(self.prefix)] = self.files[key].shape
        for name, layer in self.layers.items():
            if len(layer.shape) != 2:
                continue
            key = name + WEIGHT
            targets = find_targets([key], self.class_name)[key]
            expected = model_shapes.get(targets[0]) if len(targets) == 1 else None
            if expected is not None and layer.fits_shape(expected):
                shapes[key] = expected
            else:
                shapes[key] = (layer.rows, layer.columns)
        return shapes

    def check_dtypes(self, model_tensors: Mapping[str, Tensor]) -> None:
        """Check that what is not quantized has numbers of the kind that the model has there.

        Args:
            model_tensors: parameters and buffers of the model.

        Raises:
            FileError: for a dtype that such a tensor cannot have.
        """
        for name, parts in self.layout.parts.items():
            part_name = PARAMETER if model_tensors[name].is_floating_point() else BUFFER
            for part in parts:
                if self.find_quantized_layer(part) is None:
                    check_part_dtype(self.files[self.prefix + part.key], part_name)

    def check_complete(self, num_parameters: int) -> None:
        """Check that the file holds all parameters of the model.

        Args:
            num_parameters: that the model has.

        Raises:
            FileError: when it does not.
        """
        missing = self.layout.missing
        if missing:
            raise FileError(
                f"{self.path} does not hold {len(missing)} of the {num_parameters} tensors of "
                f"{self.class_name} (first: {missing[0]}); it is for another model, or incomplete"
                f"{self.describe_other_model()}"
            )

    def describe_other_model(self) -> str:
        """What the names in the file say that it is, where that is something else; else empty."""
        if is_lora_file(self.path, self.files):
            return f". It is a LoRA: lora=file lora.adapters.0.path={self.path}"
        if find_encoders({key: self.files[key].shape for key in self.files}):
            return f". It is a text encoder: clip=auto clip.path={self.path}"
        try:
            found = detect_denoiser(self.shapes, load_families().values(), self.shapes)
        except ConfigError:
            return ""
        if found is None:
            return ""
        family, class_name = found
        if class_name == self.class_name:
            return ""
        return (
            f"; its names are those of a {class_name} ({family.name}), and model.base has a {self.class_name}"
            ": set model.base to what belongs to the file"
        )

    def report_unused(self) -> None:
        """Log which tensors of the file are not used, and which numbers are not used as they are."""
        inexact = Counter(
            layer.label
            for layer in self.layers.values()
            if layer.storage_dtype != FLOAT and not layer.is_usable_as_is
        )
        if inexact:
            counts = ", ".join(f"{count} × {label}" for label, count in inexact.most_common())
            log.info("%s: dequantized, and quantized again where layers become INT8: %s", self.path, counts)
        other_keys = [key for key in self.list_plain_keys() if not key.startswith(self.prefix)]
        if other_keys:
            log.warning(
                "%s: %s of other components not used (first: %s); these come from model.base",
                self.path,
                count_noun(len(other_keys), "tensor"),
                other_keys[0],
            )
        unused = self.layout.unused
        if unused:
            log.warning(
                "%s: %s no place in %s, not used (first: %s)",
                self.path,
                count_noun(len(unused), "tensor", "have"),
                self.class_name,
                unused[0],
            )

    # -- reading -----------------------------------------------------------------------------------

    def read_tensor(self, name: str) -> Tensor:
        """Read a parameter.

        Returns:
            The tensor on the CPU, in the file's own float dtype; a quantized weight dequantized, in float32.
        """
        tensors = [self.read_part(part) for part in self.layout.parts[name]]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def read_part(self, part: TensorPart) -> Tensor:
        """Read rows of one tensor in the file."""
        layer = self.find_quantized_layer(part)
        read_rows = replace(part, rows=None)  # the rows are selected while they are read
        if layer is None:
            return read_rows.extract(self.files.read(self.prefix + part.key, part.rows))
        rows, columns = layer.rows, layer.columns
        if layer.is_padded:
            rows, columns = self.shapes[part.key]
        return read_rows.extract(layer.read_weight(self.files, part.rows, (rows, columns)))

    def find_quantized_layer(self, part: TensorPart) -> CheckpointLayer | None:
        """The layer whose weight a part is of; None for a float weight, a bias or the like."""
        if not part.key.endswith(WEIGHT):
            return None
        layer = self.layers.get(part.key.removesuffix(WEIGHT))
        if layer is None or layer.storage_dtype == FLOAT:
            return None
        return layer

    def list_weights(self) -> dict[str, list[CheckpointLayer | None]]:
        """What makes up each weight of the model, by module name: layers of the file, None for floats."""
        weights = {}
        for name, parts in self.layout.parts.items():
            if name.endswith(WEIGHT):
                layers = [self.find_quantized_layer(part) for part in parts]
                weights[name.removesuffix(WEIGHT)] = layers
        return weights

    def find_int8_layers(self) -> dict[str, CheckpointLayer]:
        """Linears whose integers can be used as they are, by module name, with (the first part of) each."""
        found = {}
        for name, layers in self.list_weights().items():
            exact = [layer for layer in layers if layer is not None and layer.is_usable_as_is]
            if exact and len(exact) == len(layers) and self.are_joinable(exact):
                found[name] = exact[0]
        return found

    def are_joinable(self, layers: Sequence[CheckpointLayer]) -> bool:
        """Whether the numbers of layers can be one weight: all int8, or codes of one kind."""
        return have_one_layout(self.files, layers)

    def find_inexact_layers(self) -> set[str]:
        """Linears whose numbers are quantized in a way that INT8 layers cannot use as it is."""
        exact = self.find_int8_layers()
        found = set()
        for name, layers in self.list_weights().items():
            is_quantized = any(layer is not None for layer in layers)
            if is_quantized and name not in exact:
                found.add(name)
        return found

    def read_int8_layer(self, name: str) -> QuantizedLayer:
        """Read a layer that `find_int8_layers` names, without its bias.

        Raises:
            FileError: when its parts were transformed differently.
        """
        parts = [self.read_int8_part(part) for part in self.layout.parts[name + WEIGHT]]
        if len(parts) == 1:
            return parts[0]
        transform = parts[0].transform
        # the same for the input is the same for the weight: both have factor and rotation; QuIP, which
        # transforms the rows too, is never exact and does not come here
        if not all(part.transform.has_same_input_transform(transform) for part in parts[1:]):
            labels = ", ".join(part.transform.label for part in parts)
            raise FileError(f"{self.path}: the parts of {name} were transformed differently ({labels})")
        return QuantizedLayer(join_weights([part.weight for part in parts]), transform, bias=None)

    def read_int8_part(self, part: TensorPart) -> QuantizedLayer:
        """Read rows of one INT8 layer in the file."""
        layer = self.layers[part.key.removesuffix(WEIGHT)].read_int8_layer(self.files, part.rows)
        read_rows = replace(part, rows=None)
        if isinstance(layer.weight, GroupedWeight):
            codes = layer.weight.map_rows(read_rows.extract)
            return QuantizedLayer(codes, layer.transform, bias=None)
        weight = QuantizedWeight(read_rows.extract(layer.weight.qdata), read_rows.extract(layer.weight.scale))
        return QuantizedLayer(weight, layer.transform, bias=None)


def join_weights(weights: Sequence[LayerWeight]) -> LayerWeight:
    """Weights below each other: all int8, or all codes of one kind."""
    codes = [weight for weight in weights if isinstance(weight, GroupedWeight)]
    if codes:
        assert len(codes) == len(weights), "int8 and codes are no one weight"
        return join_rows(codes)
    integers = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    return QuantizedWeight(
        torch.cat([weight.qdata for weight in integers]),  # [N, K]
        torch.cat([weight.scale for weight in integers]),  # [N, 1]
    )


def convert_parameter(value: Tensor, dtype: torch.dtype, location: str) -> Tensor:
    """Convert a tensor of a file to the dtype of the model.

    Args:
        value: as it is in the file; of quantized weights the product with their scales.
        dtype: of the model.
        location: file and name, for the error.

    Raises:
        FileError: for NaN or infinity, in the file or after the conversion.
    """
    converted = value.to(dtype)
    if not converted.is_floating_point() or torch.isfinite(converted).all():
        return converted
    if torch.isfinite(value.float()).all():  # torch has no isfinite for fp8
        raise FileError(
            f"{location} holds numbers up to {float(value.float().abs().max()):.3g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; set model.dtype=bfloat16 or float32"
        )
    raise FileError(f"{location} holds NaN or infinity; the file is damaged")


class DenoiserWeights:
    """The weights of all denoisers of a pipeline, by the names that layers have in `DualDenoiser`.

    Args:
        parts: a checkpoint for each prefix of layer names; `""` for a single denoiser.
    """

    def __init__(self, parts: Mapping[str, FileWeights]):
        self.parts = dict(parts)

    @property
    def paths(self) -> list[Path]:
        """Every file."""
        return [path for file in self.parts.values() for path in file.files.files]

    def locate(self, name: str) -> tuple[FileWeights, str]:
        """The checkpoint that a name belongs to, and the name there."""
        if "" in self.parts:
            return self.parts[""], name
        component, _, inner_name = name.partition(".")
        return self.parts[f"{component}."], inner_name

    def read_tensor(self, name: str) -> Tensor:
        """See `FileWeights.read_tensor`."""
        file, inner_name = self.locate(name)
        return file.read_tensor(inner_name)

    def read_int8_layer(self, name: str) -> QuantizedLayer:
        """See `FileWeights.read_int8_layer`."""
        file, inner_name = self.locate(name)
        return file.read_int8_layer(inner_name)

    def find_int8_layers(self) -> dict[str, CheckpointLayer]:
        """See `FileWeights.find_int8_layers`."""
        found: dict[str, CheckpointLayer] = {}
        for prefix, file in self.parts.items():
            found |= {prefix + name: layer for name, layer in file.find_int8_layers().items()}
        return found

    def find_inexact_layers(self) -> set[str]:
        """See `FileWeights.find_inexact_layers`."""
        found: set[str] = set()
        for prefix, file in self.parts.items():
            found |= {prefix + name for name in file.find_inexact_layers()}
        return found

    def read_provenance(self) -> dict[str, Any]:
        """How int8run made the (first) file; empty when another program did."""
        file = next(iter(self.parts.values()))
        return read_provenance(file.path, file.files.metadata)

    def fill_parameters(self, model: nn.Module, names: Iterable[str], device: torch.device) -> None:
        """Read parameters and buffers into a model, in the model's dtype.

        Args:
            model: has tensors of these names, with or without values.
            names: of parameters and buffers.
            device: where they go.

        Raises:
            FileError: for NaN or infinity.
        """
        for name in names:
            parent, _, child = name.rpartition(".")
            module = model.get_submodule(parent)
            before = getattr(module, child)
            value = self.read_tensor(name)
            dtype = before.dtype if before.is_floating_point() else value.dtype
            value = convert_parameter(value, dtype, f"{self.locate(name)[0].path}: {name}").to(device)
            if child in module._parameters:
                module._parameters[child] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[child] = value
