"""What a quantized checkpoint will hold, planned from the headers of its source alone.

task=quantize calls `plan_targets` and checks the plan before `stream_quantizer` writes it. No weight is read
here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from int8run.checkpoints.comfy_grouped import (
    CodeTensors,
    describe_made_codes,
    describe_stored_codes,
    find_marker_obstacle,
    plan_grouped_entries,
)
from int8run.checkpoints.comfy_int8 import WEIGHT, is_conv_shape, plan_int8_entries
from int8run.checkpoints.detect import get_logical_shapes, is_scaled_fp8_marker
from int8run.checkpoints.header import DTYPES
from int8run.checkpoints.layer import CheckpointLayer, have_one_layout
from int8run.checkpoints.part_dtypes import PARAMETER, check_part_dtype
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.writer import TensorEntry
from int8run.errors import FileError
from int8run.export.weight_layers import find_weight_layer
from int8run.layers.int8_conv import DEPTHWISE
from int8run.layers.plan import CONV, LayerPlan
from int8run.models.tensor_part import TensorPart, join_shapes
from int8run.outlier.base import OutlierMethod, OutlierTransform, find_channel_obstacle, fit_convolution
from int8run.ptq.bits import find_bits_obstacle
from int8run.quant.grouped_rounding import GroupLayout
from int8run.quant.rounding import Rounding

# dtypes of the float model, as safetensors names them
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
KeyParts = Mapping[str, tuple[TensorPart, ...]]


@dataclass(frozen=True)
class QuantizationRecipe:
    """How layers become INT8.

    Args:
        outlier: the method of every layer that it can take.
        rounding: of the weights.
        dtype: of weights that are quantized in the source and are to be float.
        has_convolutions: whether the weights of convolutions become INT8 as well.
        layout: of the weights of Linears, of 4 or 6 bits; None: they have 8.
    """

    outlier: OutlierMethod
    rounding: Rounding
    dtype: torch.dtype = torch.bfloat16
    has_convolutions: bool = False
    layout: GroupLayout | None = None


@dataclass
class Target:
    """One tensor of the new file, and what is written beside it.

    Args:
        key: in the new file.
        parts: rows of the source's tensors, one after the other; keys as they are in the source.
        shape: of the whole.
        dtype: safetensors' name, of what stays float.
        plan: of a weight with two dimensions, and of a convolution's where these may become INT8.
        copied: its integers are taken as they are.
        transform: of an INT8 weight; one that is fitted to the weight itself is replaced when that was read.
        fitted_parts: rows of the source that it is fitted to, where other targets are of the same layer of
            the model, which has one transform; empty: `parts`.
        codes: which tensors a weight of 4 or 6 bits is; None: it has 8.
    """

    key: str
    parts: tuple[TensorPart, ...]
    shape: tuple[int, ...]
    dtype: str
    plan: LayerPlan | None = None
    copied: bool = False
    transform: OutlierTransform = field(default_factory=OutlierTransform)
    fitted_parts: tuple[TensorPart, ...] = ()
    codes: CodeTensors | None = None

    @property
    def int8(self) -> bool:
        """Whether it is written as INT8."""
        return self.plan is not None and self.plan.skip_reason is None

    def list_entries(self) -> list[TensorEntry]:
        """The tensors that it adds to the new file."""
        if self.int8 and self.codes is not None:
            rows, columns = self.shape
            return plan_grouped_entries(self.key, (rows, columns), self.codes, self.transform)
        if self.int8:
            return plan_int8_entries(self.key, self.shape, self.transform)
        return [TensorEntry(self.key, self.dtype, self.shape)]


def keep_own_names(files: TensorFiles, stored: Mapping[str, CheckpointLayer]) -> KeyParts:
    """Every tensor under its own name, without what stands beside quantized weights."""
    siblings = {key for layer in stored.values() for key in layer.sibling_keys}
    parts_by_key = {}
    for key in files:
        if key not in siblings and not is_scaled_fp8_marker(key):
            parts_by_key[key] = (TensorPart(key),)
    return parts_by_key


def plan_targets(
    files: TensorFiles,
    stored: Mapping[str, CheckpointLayer],
    parts_by_key: KeyParts,
    why_float: Callable[[str, tuple[TensorPart, ...]], str | None],
    recipe: QuantizationRecipe,
) -> list[Target]:
    """What the new file will hold, in the order in which the source is read best.

    Args:
        files: the source.
        stored: the source's weights by name.
        parts_by_key: key in the new file -> what it is made of.
        why_float: why a weight (its new key, its parts) is not to become INT8, or None; integers that can be
            copied are copied all the same.
        recipe: how the others become INT8.

    Raises:
        FileError: when tensors that are to be one do not go together.
    """
    shapes = get_logical_shapes(files, stored)
    planner = LayerPlanner(files, recipe)
    targets = []
    for key, parts in parts_by_key.items():
        shape = join_shapes(parts, shapes)
        if shape is None:
            listed = ", ".join(f"{part.key} {list(shapes[part.key])}" for part in parts)
            raise FileError(
                f"{files.path}: {listed} are to be one tensor, {key}, and their shapes do not go together; "
                "the file is damaged"
            )
        check_can_be_written(key, parts, files)
        layers = [find_weight_layer(stored, part.key) for part in parts]
        part_dtypes = [files[part.key].dtype for part in parts]
        target = Target(key, parts, shape, choose_float_dtype(part_dtypes, layers, recipe.dtype))
        matrices = [layer for layer in layers if layer is not None and len(layer.shape) == 2]
        all_parts_are_matrices = len(matrices) == len(parts)
        if all_parts_are_matrices:
            # fills target.plan, .transform and .copied
            planner.plan_layer(target, matrices, why_float(key, parts))
        elif is_conv_shape(shape) and key.endswith(WEIGHT):
            convolutions = [layer for layer in layers if layer is not None]
            planner.plan_convolution(target, convolutions, why_float(key, parts))
        targets.append(target)
    # by the place of each target's first part in the source
    position = {key: i for i, key in enumerate(files)}
    return sorted(targets, key=lambda target: min(position[part.key] for part in target.parts))


def check_can_be_written(key: str, parts: Sequence[TensorPart], files: TensorFiles) -> None:
    """Check that tensors can be written: copied as they are, or joined as floats where their dtypes differ.

    Args:
        key: of the tensor in the new file.
        parts: what it is made of.
        files: the source.

    Raises:
        FileError: for numbers of less than a byte, and integers that are to be one tensor with floats.
    """
    infos = [files[part.key] for part in parts]
    is_mixed = len({info.dtype for info in infos}) > 1
    for info in infos:
        if DTYPES[info.dtype].bits < 8:
            raise FileError(
                f"{info.file}: {info.key} is {info.dtype}, which int8run cannot write into {key}; "
                "take a checkpoint in another format"
            )
        # the dtypes of weights were checked when their layers were recognized
        is_weight = info.key.endswith(WEIGHT)
        if is_mixed and not is_weight:
            check_part_dtype(info, PARAMETER)


def choose_float_dtype(
    part_dtypes: Sequence[str], layers: Sequence[CheckpointLayer | None], dtype: torch.dtype
) -> str:
    """The dtype of a tensor that stays float: its own, unless a scale is multiplied in or it is blocks.

    Args:
        part_dtypes: of its parts in the source.
        layers: of its parts; None for what is not the weight of one.
        dtype: of parts that have a scale, or are blocks of a GGUF file.

    Returns:
        safetensors' name; float32 where the parts differ.
    """
    found = set()
    for part_dtype, layer in zip(part_dtypes, layers, strict=True):
        if layer is not None and layer.is_dequantized:
            found.add(DTYPE_NAMES[dtype])
        else:
            found.add(part_dtype)
    if len(found) != 1:
        return "F32"
    return found.pop()


class LayerPlanner:
    """Decides what becomes of the weights with two dimensions.

    Args:
        files: the source.
        recipe: how layers become INT8.
    """

    def __init__(self, files: TensorFiles, recipe: QuantizationRecipe):
        self.files = files
        self.recipe = recipe
        self.transforms: dict[int, OutlierTransform] = {}  # by width: what the method does to any such weight

    def plan_layer(self, target: Target, layers: Sequence[CheckpointLayer], reason: str | None) -> None:
        """Give a target its plan: float, copied integers, or INT8 made here.

        Args:
            target: a weight.
            layers: of its parts in the source.
            reason: why it is to stay float; integers that can be copied are copied all the same.
        """
        pairs = zip(target.parts, layers, strict=True)
        rows, columns = sum(part.count_rows(layer.rows) for part, layer in pairs), layers[0].columns
        target.plan = plan = LayerPlan(target.key.removesuffix(WEIGHT), columns, rows, reason)
        if target.shape != (rows, columns) or not target.key.endswith(WEIGHT):
            plan.skip_reason = reason or "no matrix in this naming"
            return
        if not rows * columns:
            plan.skip_reason = reason or "empty"
            return
        copied_transform = self.find_copied_transform(layers)
        if copied_transform is not None:
            target.transform, target.copied = copied_transform, True
            plan.skip_reason, plan.outlier, plan.rounding = None, copied_transform.label, "as in the source"
            if layers[0].is_grouped:
                target.codes = describe_stored_codes(self.files, layers[0])
                plan.bits = target.codes.bits
            return
        if reason is not None:
            return
        plan.rounding = self.recipe.rounding.name
        plan.outlier_skip_reason = self.recipe.outlier.unsupported_reason(columns) or ""
        if not plan.outlier_skip_reason:
            target.transform = self.get_transform(columns)
        plan.outlier = target.transform.label
        if self.recipe.layout is not None:
            self.plan_bits(target, plan, self.recipe.layout)

    def plan_bits(self, target: Target, plan: LayerPlan, layout: GroupLayout) -> None:
        """Give a layer its bits: those that were asked for where the format can hold it, else 8."""
        obstacle = find_bits_obstacle(plan, layout) or find_marker_obstacle(target.transform)
        if obstacle is not None:
            plan.bits_reason = obstacle
            return
        plan.bits = layout.bits
        target.codes = describe_made_codes(layout)

    def plan_convolution(self, target: Target, layers: Sequence[CheckpointLayer], reason: str | None) -> None:
        """Give the weight of a convolution its plan, where these may become INT8, or are in the source.

        Its stride, padding and dilation are not in the file: what a model's convolution cannot be INT8 for is
        refused when the file is loaded.

        Args:
            target: a weight [N, C / groups, *kernel].
            layers: of its parts in the source, as far as they are quantized.
            reason: why it is to stay float.
        """
        is_copied = len(layers) == len(target.parts) and all(layer.is_usable_as_is for layer in layers)
        if not is_copied and not self.recipe.has_convolutions:
            return
        if self.recipe.rounding.needs_calibration and not is_copied:
            reason = reason or f"rounding={self.recipe.rounding.name} is for Linears"
        rows, columns = target.shape[0], prod(target.shape[1:])
        target.plan = plan = LayerPlan(
            target.key.removesuffix(WEIGHT),
            columns,
            rows,
            reason,
            kind=CONV,
            shape="x".join(map(str, target.shape[2:])),
            taps=prod(target.shape[2:]),
        )
        copied_transform = self.find_copied_transform(layers) if is_copied else None
        if copied_transform is not None:
            target.transform, target.copied = copied_transform, True
            plan.skip_reason, plan.outlier, plan.rounding = None, target.transform.label, "as in the source"
        elif target.shape[1] == 1:
            plan.skip_reason = reason or DEPTHWISE
        elif reason is None:
            self.plan_conv_transform(target, plan)
            plan.outlier, plan.rounding = target.transform.label, self.recipe.rounding.name

    def plan_conv_transform(self, target: Target, plan: LayerPlan) -> None:
        """Give a convolution that is quantized here its transform, or the plan why it has none."""
        outlier = self.recipe.outlier
        plan.outlier_skip_reason = find_channel_obstacle(outlier, plan.channels) or ""
        if not plan.outlier_skip_reason:
            target.transform = fit_convolution(outlier, torch.empty(1, plan.in_features), plan.taps)

    def find_copied_transform(self, layers: Sequence[CheckpointLayer]) -> OutlierTransform | None:
        """The transform of layers whose integers can be one weight as they are; None: they cannot."""
        if not all(layer.is_usable_as_is for layer in layers) or not have_one_layout(self.files, layers):
            return None
        first, *others = [layer.read_transform(self.files) for layer in layers]
        if not all(transform.has_same_input_transform(first) for transform in others):
            return None
        return first

    def get_transform(self, columns: int) -> OutlierTransform:
        """The transform of a weight with so many columns, before it is fitted to the weight."""
        if columns not in self.transforms:
            self.transforms[columns] = self.recipe.outlier.fit(torch.ones(1, columns), None)
        return self.transforms[columns]
