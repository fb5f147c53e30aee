"""Quantize a checkpoint from file to file, a few megabytes at a time: the model is never in memory.

What is written is planned from the headers alone. Then one thread reads, one quantizes and one writes.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from int8run.checkpoints.comfy_int8 import (
    FACTOR,
    SCALE,
    WEIGHT,
    encode_marker,
    plan_int8_entries,
    sibling_key,
)
from int8run.checkpoints.detect import get_logical_shapes, is_scaled_fp8_marker
from int8run.checkpoints.header import DTYPES
from int8run.checkpoints.layer import FLOAT, CheckpointLayer
from int8run.checkpoints.part_dtypes import PARAMETER, check_part_dtype
from int8run.checkpoints.quant_metadata import MARKER
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.writer import StreamWriter, TensorEntry
from int8run.errors import ConfigError, FileError
from int8run.kernels.cpu import rows as kernel
from int8run.kernels.cpu.rows import RowSums, quantize_weight_rows
from int8run.kernels.quantize_rowwise.reference import INT8_MAX
from int8run.layers.plan import LayerPlan
from int8run.models.state_dict_adapter import TensorPart, join_shapes
from int8run.outlier.base import OutlierMethod, OutlierTransform
from int8run.ptq.quantize import check_weight
from int8run.quant.rounding import AbsMax, Rounding

BLOCK_BYTES = 4 * 2**20  # of a weight that are read at a time
BUFFERS = 3  # one that is read into, one that is quantized, one that is written
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
KeyParts = Mapping[str, tuple[TensorPart, ...]]


@dataclass(frozen=True)
class QuantizationRecipe:
    """How layers become INT8.

    Args:
        dtype: of weights that are quantized in the source and are to be float.
    """

    outlier: OutlierMethod
    rounding: Rounding
    dtype: torch.dtype = torch.bfloat16


@dataclass
class Target:
    """One tensor of the new file, and what is written beside it.

    Args:
        parts: rows of the source's tensors, one after the other; keys as they are in the source.
        dtype: the format's word.
        plan: of a weight with two dimensions.
        copied: its integers are taken as they are.
        transform: of an INT8 weight; one that is fitted to the weight itself is replaced when that was read.
    """

    key: str
    parts: tuple[TensorPart, ...]
    shape: tuple[int, ...]
    dtype: str
    plan: LayerPlan | None = None
    copied: bool = False
    transform: OutlierTransform = field(default_factory=OutlierTransform)

    @property
    def int8(self) -> bool:
        """Whether it is written as INT8."""
        return self.plan is not None and self.plan.skip_reason is None

    def entries(self) -> list[TensorEntry]:
        """What it adds to the new file."""
        return (
            plan_int8_entries(self.key, self.shape, self.transform)
            if self.int8
            else [TensorEntry(self.key, self.dtype, self.shape)]
        )


def keep_own_names(files: TensorFiles, stored: Mapping[str, CheckpointLayer]) -> KeyParts:
    """Every tensor under its own name, without what stands beside quantized weights."""
    beside = {key for layer in stored.values() for key in layer.sibling_keys}
    return {key: (TensorPart(key),) for key in files if key not in beside and not is_scaled_fp8_marker(key)}


def plan_targets(
    files: TensorFiles,
    stored: Mapping[str, CheckpointLayer],
    names: KeyParts,
    why_float: Callable[[str, tuple[TensorPart, ...]], str | None],
    recipe: QuantizationRecipe,
) -> list[Target]:
    """What the new file will hold, in the order in which the source is read best.

    Args:
        stored: the source's weights by name.
        names: key in the new file -> what it is made of.
        why_float: the reason why a weight (its new key, its parts) stays float, or None.

    Raises:
        FileError: when tensors that are to be one do not go together.
    """
    shapes = get_logical_shapes(files, stored)
    transforms: dict[int, OutlierTransform] = {}  # by width: what a method does to any weight of it
    targets = []
    for key, parts in names.items():
        shape = join_shapes(parts, shapes)
        if shape is None:
            listed = ", ".join(f"{part.key} {list(shapes[part.key])}" for part in parts)
            raise FileError(
                f"{files.path}: {listed} are to be one tensor, {key}, and their shapes do not go together; "
                "the file is damaged"
            )
        layers = [
            stored.get(part.key.removesuffix(WEIGHT)) if part.key.endswith(WEIGHT) else None for part in parts
        ]
        check_can_be_written(key, parts, files)
        target = Target(
            key,
            parts,
            shape,
            choose_float_dtype([files[part.key].dtype for part in parts], layers, recipe.dtype),
        )
        matrices = [layer for layer in layers if layer is not None and len(layer.shape) == 2]
        if matrices and len(matrices) == len(parts):
            plan_layer(target, matrices, files, why_float(key, parts), recipe, transforms)
        targets.append(target)
    place = {key: i for i, key in enumerate(files)}
    return sorted(targets, key=lambda target: min(place[part.key] for part in target.parts))


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
        if is_mixed and not info.key.endswith(WEIGHT):  # weights were looked at when they were classified
            check_part_dtype(info, PARAMETER)


def plan_layer(
    target: Target,
    layers: Sequence[CheckpointLayer],
    files: TensorFiles,
    why: str | None,
    recipe: QuantizationRecipe,
    transforms: dict[int, OutlierTransform],
) -> None:
    """Decide what becomes of a weight with two dimensions."""
    rows, columns = sum(layer.rows for layer in layers), layers[0].columns
    target.plan = plan = LayerPlan(target.key.removesuffix(WEIGHT), columns, rows, why)
    if target.shape != (rows, columns) or not target.key.endswith(WEIGHT):
        plan.skip_reason = why or "no matrix in this naming"
        return
    if not rows * columns:
        plan.skip_reason = why or "empty"
        return
    if all(layer.is_exact for layer in layers):
        found = [layer.read_transform(files) for layer in layers]
        if all(transform.has_same_input_transform(found[0]) for transform in found):
            target.transform, target.copied = found[0], True
            plan.skip_reason, plan.outlier, plan.rounding = None, found[0].label, "as in the source"
            return
    if why is not None:
        return
    plan.rounding = recipe.rounding.name
    plan.outlier_skip_reason = recipe.outlier.unsupported_reason(columns) or ""
    if not plan.outlier_skip_reason:
        if columns not in transforms:
            transforms[columns] = recipe.outlier.fit(torch.ones(1, columns), None)
        target.transform = transforms[columns]
    plan.outlier = target.transform.label


def choose_float_dtype(
    words: Sequence[str], layers: Sequence[CheckpointLayer | None], dtype: torch.dtype
) -> str:
    """The dtype of a tensor that stays float: its own, unless it has a scale, which is multiplied in."""
    scaled = [layer is not None and layer.granularity != "" for layer in layers]
    found = {DTYPE_NAMES[dtype] if s else word for word, s in zip(words, scaled, strict=True)}
    return found.pop() if len(found) == 1 else "F32"


@dataclass(frozen=True)
class Block:
    """Rows of one tensor of the source, as many as are processed at a time.

    `rows` is None for all of a tensor without dimensions.
    """

    target: Target
    key: str
    rows: slice | None
    last: bool


def check_finite_values(path: Path, key: str, data: Tensor) -> None:
    """Refuse NaN and infinity, which would be passed on.

    Raises:
        FileError: naming the tensor.
    """
    # a sum is quicker than a look at each number, and finite if they all are, but for overflow
    if (
        data.dtype in DTYPE_NAMES
        and not math.isfinite(data.sum(dtype=torch.float32).item())
        and not data.isfinite().all()
    ):
        raise FileError(f"{path}: {key} holds NaN or infinity; the file is damaged")


def iterate_blocks(
    target: Target, files: TensorFiles, stored: Mapping[str, CheckpointLayer]
) -> Iterator[Block]:
    """The blocks of a target, in the order in which they are written."""
    spans = [span for part in target.parts for span in iterate_row_spans(part, files, stored)]
    for i, (key, rows) in enumerate(spans):
        yield Block(target, key, rows, i == len(spans) - 1)


def iterate_row_spans(
    part: TensorPart, files: TensorFiles, stored: Mapping[str, CheckpointLayer]
) -> Iterator[tuple[str, slice | None]]:
    """The rows of one part in pieces; halves that change places come the other way round."""
    layer = stored.get(part.key.removesuffix(WEIGHT)) if part.key.endswith(WEIGHT) else None
    shape = files[part.key].shape if layer is None or len(layer.shape) != 2 else (layer.rows, layer.columns)
    if not shape:
        yield part.key, None
        return
    first, end, _ = (part.rows or slice(None)).indices(shape[0])
    half = end - (end - first) // 2
    row_bytes = math.prod(shape[1:]) * max(1, DTYPES[files[part.key].dtype][0] // 8)
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    if layer is not None and layer.storage_dtype != FLOAT:
        # its numbers become float32 on the way; some kinds are undone as a whole
        step = (
            max(1, step // 4)
            if layer.granularity != "transposed" and layer.outlier_method != "quip"
            else shape[0]
        )
    for start, stop in ((half, end), (first, half)) if part.swap_halves else ((first, end),):
        for row in range(start, stop, step):
            yield part.key, slice(row, min(row + step, stop))


class Streamer:
    """Moves blocks: one thread reads ahead, the caller's quantizes, and one writes behind.

    All errors are raised by `run`.

    Args:
        writer: has an entry for everything that the targets add.
        on_bytes: called with the number of bytes read, for progress.
    """

    def __init__(
        self,
        files: TensorFiles,
        stored: Mapping[str, CheckpointLayer],
        writer: StreamWriter,
        recipe: QuantizationRecipe,
        on_bytes: Callable[[int], None],
    ):
        self.files, self.stored, self.writer, self.recipe, self.on_bytes = (
            files,
            stored,
            writer,
            recipe,
            on_bytes,
        )
        self.sources = [torch.empty(BLOCK_BYTES, dtype=torch.uint8) for _ in range(BUFFERS)]
        self.results = [torch.empty(BLOCK_BYTES // 2, dtype=torch.int8) for _ in range(BUFFERS - 1)]
        self.writes: deque[tuple[Future[None], list[Tensor], Tensor | None]] = deque()
        self.sums: list[RowSums] = []  # of the current target

    def run(self, targets: Iterable[Target]) -> None:
        """Write all targets.

        Raises:
            ConfigError: for a weight that cannot be quantized.
            FileError: when the source cannot be read or the new file not be written.
        """
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as self.writing:
            waiting: deque[tuple[Block, Tensor, Future[Tensor]]] = deque()
            for target in targets:
                for block in iterate_blocks(target, self.files, self.stored):
                    buffer = self.free(self.sources)
                    waiting.append((block, buffer, reader.submit(self.read, block, buffer)))
                    if len(waiting) == BUFFERS - 1:
                        self.handle(*waiting.popleft())
            while waiting:
                self.handle(*waiting.popleft())
            while self.writes:
                self.wait()

    def free(self, pool: list[Tensor]) -> Tensor:
        """A buffer that nobody uses."""
        while not pool:
            self.wait()
        return pool.pop()

    def wait(self) -> None:
        """For the oldest write; its buffer is free then."""
        future, pool, buffer = self.writes.popleft()
        future.result()
        if buffer is not None:
            pool.append(buffer)

    def write(self, key: str, data: Tensor | bytes, pool: list[Tensor], buffer: Tensor | None = None) -> None:
        """Let the other thread write; the buffer goes back into its pool afterwards."""
        self.writes.append((self.writing.submit(self.writer.write, key, data), pool, buffer))

    def read(self, block: Block, buffer: Tensor) -> Tensor:
        """Read the numbers of a block.

        Returns:
            Float weights as the file has them; quantized ones dequantized, in float32, or where they are
            copied their integers.
        """
        layer = self.stored.get(block.key.removesuffix(WEIGHT)) if block.key.endswith(WEIGHT) else None
        if layer is not None and layer.granularity and not block.target.copied:
            found = layer.read_weight(self.files, block.rows).contiguous()
        elif self.files.get_byte_range(block.key, block.rows)[1] <= buffer.numel():
            found = self.files.read_into(block.key, block.rows, buffer)
        else:
            found = self.files.read(block.key, block.rows)
        self.files.drop_from_page_cache(block.key, self.held(block))
        return found

    def held(self, block: Block) -> slice | None:
        """The rows in the file: a weight that is stored as [K, N] is one block."""
        layer = self.stored.get(block.key.removesuffix(WEIGHT))
        return None if layer is not None and layer.granularity == "transposed" else block.rows

    def handle(self, block: Block, buffer: Tensor, reading: "Future[Tensor]") -> None:
        """What happens to a block once it is read."""
        data, target = reading.result(), block.target
        if target.copied:
            self.write(target.key, data, self.sources, buffer)
            self.write(sibling_key(target.key, SCALE), self.copied_scales(block), self.sources)
        elif target.int8:
            self.quantize(block, data)
            self.sources.append(buffer)
        else:
            check_finite_values(self.files.path, block.key, data)
            self.write(target.key, self.convert(block, data), self.sources, buffer)
        if block.last and target.int8:
            self.write(sibling_key(target.key, MARKER), encode_marker(target.transform), self.sources)
            if target.transform.factor is not None:
                self.write(sibling_key(target.key, FACTOR), target.transform.factor, self.sources)
            self.judge(target)
        self.on_bytes(self.files.get_byte_range(block.key, self.held(block))[1])

    def convert(self, block: Block, data: Tensor) -> Tensor:
        """The numbers of a float tensor in the dtype that they have in the new file.

        Raises:
            FileError: for numbers that it cannot hold.
        """
        dtype_name = block.target.dtype
        # bytes of what torch does not know stay bytes
        dtype = getattr(torch, DTYPES[dtype_name].torch_name or "uint8", torch.uint8)
        converted = data.to(dtype)
        if converted.dtype != data.dtype and not converted.isfinite().all():
            raise FileError(
                f"{self.files.path}: {block.key} holds numbers that are too large for {dtype_name}; "
                "set model.dtype=bfloat16 or float32 on the command line"
            )
        return converted

    def copied_scales(self, block: Block) -> Tensor:
        """One scale for each row of a weight whose integers are copied. Returns float32 [rows, 1]."""
        rows = block.rows
        assert rows is not None
        return (
            self.stored[block.key.removesuffix(WEIGHT)]
            .read_scales(self.files, rows.start, rows.stop)
            .contiguous()
        )

    def quantize(self, block: Block, data: Tensor) -> None:
        """Quantize the rows of a block and let them be written. data: float [rows, K]."""
        target, (rows, columns) = block.target, data.shape
        if not self.sums:
            self.fit(target)
        buffer = (
            self.free(self.results)
            if rows * columns <= BLOCK_BYTES // 2
            else torch.empty(rows * columns, dtype=torch.int8)
        )
        q, scale = buffer[: rows * columns].view(rows, columns), torch.empty(rows, 1)
        sums = self.round(data, q, scale, target.transform)
        if not sums.finite:
            assert target.plan is not None
            check_weight(target.plan, data)
            raise ConfigError(
                f"{target.plan.name}: the weight holds numbers too large for float32 arithmetic; check the "
                "checkpoint"
            )
        self.sums.append(sums)
        self.write(target.key, q, self.results, buffer if buffer.numel() == BLOCK_BYTES // 2 else None)
        self.write(sibling_key(target.key, SCALE), scale, self.results)

    def round(self, data: Tensor, q: Tensor, scale: Tensor, transform: OutlierTransform) -> RowSums:
        """Transform and round rows into `q` and `scale`."""
        if isinstance(self.recipe.rounding, AbsMax):
            return quantize_weight_rows(data, q, scale, transform.factor, transform.rotation)
        x = kernel.transform_rows(data.float(), transform.factor, transform.rotation)
        rounded = self.recipe.rounding.round_weight(x, None)
        q.copy_(rounded.qdata)
        scale.copy_(rounded.scale)
        noise = x - rounded.dequantize()
        saturated = int((q.abs() == INT8_MAX).sum())
        return RowSums(
            bool(x.isfinite().all()),
            x.double().square().sum().item(),
            noise.double().square().sum().item(),
            saturated,
        )

    def fit(self, target: Target) -> None:
        """Fit a transform with factors to the weight.

        Methods without a calibration need only the largest number of each column.
        """
        if target.transform.factor is None:
            return
        largest = torch.zeros(target.shape[1])
        buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        for block in iterate_blocks(target, self.files, self.stored):
            largest = torch.maximum(largest, self.read(block, buffer).float().abs().amax(0))
        target.transform = self.recipe.outlier.fit(largest[None], None)

    def judge(self, target: Target) -> None:
        """Note in the plan how good the integers are."""
        assert target.plan is not None
        if not target.copied:
            signal, noise = sum(s.signal for s in self.sums), sum(s.noise for s in self.sums)
            target.plan.measured["weight_sqnr_db"] = (
                10 * math.log10(signal / noise) if signal and noise else math.inf
            )
            target.plan.measured["saturated_share"] = sum(s.saturated for s in self.sums) / math.prod(
                target.shape
            )
        self.sums = []


def write_targets(
    files: TensorFiles,
    stored: Mapping[str, CheckpointLayer],
    targets: Sequence[Target],
    path: Path,
    metadata: Mapping[str, str],
    recipe: QuantizationRecipe,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the targets to a file. Returns its size."""
    with StreamWriter(path, [entry for target in targets for entry in target.entries()], metadata) as writer:
        Streamer(files, stored, writer, recipe, on_bytes).run(targets)
        writer.finish()
        return writer.nbytes
