"""Quantize a checkpoint from file to file, a few megabytes at a time: the model is never in memory.

task=quantize plans the new file with `stream_plan` and writes it with `write_targets`. One thread reads, one
quantizes and one writes. Names of layers and families are not known here.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from int8run.checkpoints.comfy_grouped import CodeTensors, iterate_code_rows, iterate_code_tables
from int8run.checkpoints.comfy_int8 import SCALE, WEIGHT, sibling_key
from int8run.checkpoints.header import DTYPES
from int8run.checkpoints.layer import CheckpointLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.writer import StreamWriter
from int8run.errors import ConfigError, FileError
from int8run.export import stream_blocks
from int8run.export.stream_blocks import Block, iterate_blocks, iterate_sample
from int8run.export.stream_plan import DTYPE_NAMES, QuantizationRecipe, Target
from int8run.export.weight_layers import find_weight_layer, iterate_transform_tensors
from int8run.kernels.cpu import rows as kernel
from int8run.kernels.cpu.rows import RowSums, quantize_weight_rows
from int8run.kernels.quantize_rowwise.reference import INT8_MAX
from int8run.outlier.base import OutlierTransform
from int8run.ptq.quantize import check_weight
from int8run.quant.codebook import find_sample_step
from int8run.quant.grouped_rounding import GroupLayout, Levels, choose_levels, get_even_levels
from int8run.quant.rounding import AbsMax, RoundsGroups
from int8run.quant.weight import QuantizedWeight

BUFFERS = 3  # one that is read into, one that is quantized, one that is written


def check_finite_values(path: Path, key: str, data: Tensor) -> None:
    """Refuse NaN and infinity, which would be passed on.

    Raises:
        FileError: naming the tensor.
    """
    if data.dtype not in DTYPE_NAMES:
        return
    # a sum is quicker than a look at each number, and finite if they all are, but for overflow
    if math.isfinite(data.sum(dtype=torch.float32).item()):
        return
    if not data.isfinite().all():
        raise FileError(f"{path}: {key} holds NaN or infinity; the file is damaged")


@dataclass(frozen=True)
class PendingWrite:
    """What the writing thread has to do.

    Args:
        done: ends with it.
        buffer: in which the data lie; None: they have memory of their own.
        pool: gets the buffer back.
    """

    done: "Future[None]"
    buffer: Tensor | None
    pool: list[Tensor] | None


class Streamer:
    """Moves blocks: one thread reads ahead, the caller's quantizes, and one writes behind.

    All errors are raised by `run`.

    Args:
        files: the source.
        stored: the source's weights by name.
        writer: has an entry for everything that the targets add.
        recipe: how layers become INT8.
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
        self.files = files
        self.stored = stored
        self.writer = writer
        self.recipe = recipe
        self.on_bytes = on_bytes
        # buffers that nobody uses now: for blocks as they are read, and for the integers made of them
        block_bytes = stream_blocks.BLOCK_BYTES
        self.sources = [torch.empty(block_bytes, dtype=torch.uint8) for _ in range(BUFFERS)]
        self.results = [torch.empty(block_bytes // 2, dtype=torch.int8) for _ in range(BUFFERS - 1)]
        self.writes: deque[PendingWrite] = deque()
        self.sums: list[RowSums] = []  # of the current target
        # of the current target, where it has 4 or 6 bits
        self.levels: Levels | None = None
        self.codebook: Tensor | None = None
        self.corrections: list[Tensor] = []

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
                    buffer = self.take_buffer(self.sources)
                    waiting.append((block, buffer, reader.submit(self.read, block, buffer)))
                    if len(waiting) == BUFFERS - 1:
                        self.process_block(*waiting.popleft())
            while waiting:
                self.process_block(*waiting.popleft())
            while self.writes:
                self.wait_for_oldest_write()

    def take_buffer(self, pool: list[Tensor]) -> Tensor:
        """A buffer that nobody uses; of a pool without any, the next one that has been written."""
        while not pool:
            self.wait_for_oldest_write()
        return pool.pop()

    def wait_for_oldest_write(self) -> None:
        """Its buffer goes back into the pool that it is of."""
        write = self.writes.popleft()
        write.done.result()
        if write.buffer is not None and write.pool is not None:
            write.pool.append(write.buffer)

    def write(
        self,
        key: str,
        data: Tensor | bytes,
        *,
        buffer: Tensor | None = None,
        pool: list[Tensor] | None = None,
    ) -> None:
        """Let the other thread write.

        Args:
            key: of the tensor in the new file.
            data: its next bytes.
            buffer: in which the data lie; None: they have memory of their own.
            pool: gets the buffer back once it is written.
        """
        done = self.writing.submit(self.writer.write, key, data)
        self.writes.append(PendingWrite(done, buffer, pool))

    def read(self, block: Block, buffer: Tensor) -> Tensor:
        """Read the numbers of a block.

        Returns:
            Float weights as the file has them; quantized ones dequantized, in float32, or where they are
            copied their integers.
        """
        layer = find_weight_layer(self.stored, block.key)
        is_dequantized = layer is not None and layer.granularity != "" and not block.target.copied
        if layer is not None and is_dequantized:
            found = layer.read_weight(self.files, block.rows).contiguous()
        elif self.files.get_byte_range(block.key, block.rows)[1] <= buffer.numel():
            found = self.files.read_into(block.key, block.rows, buffer)
        else:
            found = self.files.read(block.key, block.rows)
        self.files.drop_from_page_cache(block.key, self.find_read_rows(block))
        return found

    def find_read_rows(self, block: Block) -> slice | None:
        """The rows of the file that a block is read from; None: all, as of a weight stored as [K, N]."""
        layer = self.stored.get(block.key.removesuffix(WEIGHT))
        if layer is not None and layer.granularity == "transposed":
            return None
        return block.rows

    def process_block(self, block: Block, buffer: Tensor, reading: "Future[Tensor]") -> None:
        """Copy, quantize or convert a block once it is read, and let it be written.

        Args:
            block: some rows of a tensor.
            buffer: that it is read into.
            reading: gives its numbers.
        """
        data, target = reading.result(), block.target
        if target.copied:
            self.write(target.key, data, buffer=buffer, pool=self.sources)
            for key, scales in self.iterate_scales(block):
                self.write(key, scales)
        elif target.int8:
            if target.codes is None:
                self.quantize(block, data)
            else:
                self.quantize_codes(block, data, target.codes)
            self.sources.append(buffer)  # what is written of it is in another one
        else:
            check_finite_values(self.files.path, block.key, data)
            self.write(target.key, self.convert(block, data), buffer=buffer, pool=self.sources)
        if block.last and target.int8:
            for key, tensor in self.iterate_tables(target):
                self.write(key, tensor)
            self.note_quality(target)
        _, num_bytes = self.files.get_byte_range(block.key, self.find_read_rows(block))
        self.on_bytes(num_bytes)

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

    def iterate_scales(self, block: Block) -> Iterator[tuple[str, Tensor]]:
        """The scales of the rows of a weight whose numbers are copied, as the new file holds them.

        Corrections have a column for each row: they are collected until the last one.
        """
        rows, key = block.rows, block.target.key
        assert rows is not None
        layer = self.stored[block.key.removesuffix(WEIGHT)]
        if not layer.is_grouped:
            scale = layer.read_scales(self.files, rows.start, rows.stop)  # float32 [rows, 1]
            yield sibling_key(key, SCALE), scale.contiguous()
            return
        weight = layer.read_grouped_weight(self.files, rows)
        yield from list(iterate_code_rows(key, weight))[1:]
        self.codebook = weight.codebook
        if weight.correction is not None:
            self.corrections.append(weight.correction)

    def iterate_tables(self, target: Target) -> Iterator[tuple[str, Tensor | bytes]]:
        """What stands once beside a weight that was written; forgets what was collected for it."""
        if target.codes is None:
            yield from iterate_transform_tensors(target.key, target.transform, target.shape)
            return
        correction = torch.cat(self.corrections, dim=1) if self.corrections else None
        group_size = target.codes.group_size
        yield from iterate_code_tables(target.key, self.codebook, correction, group_size, target.transform)
        self.codebook, self.levels, self.corrections = None, None, []

    def quantize(self, block: Block, data: Tensor) -> None:
        """Quantize the rows of a block and let them be written. data: float [rows, ...]."""
        data = data.flatten(1)
        target, (rows, columns) = block.target, data.shape
        if not self.sums:
            self.fit(target)
        num_values = rows * columns
        if num_values <= stream_blocks.BLOCK_BYTES // 2:
            buffer = self.take_buffer(self.results)
        else:
            buffer = torch.empty(num_values, dtype=torch.int8)
        q = buffer[:num_values].view(rows, columns)
        scale = torch.empty(rows, 1)
        sums = self.round(data, q, scale, target.transform)
        if not sums.finite:
            self.refuse_infinity(target, data)
        self.sums.append(sums)
        if buffer.numel() == stream_blocks.BLOCK_BYTES // 2:
            self.write(target.key, q, buffer=buffer, pool=self.results)
        else:
            self.write(target.key, q)
        self.write(sibling_key(target.key, SCALE), scale)

    def refuse_infinity(self, target: Target, data: Tensor) -> NoReturn:
        """Raise ConfigError for rows that are not finite, or not under the transform."""
        assert target.plan is not None
        check_weight(target.plan, data)
        raise ConfigError(
            f"{target.plan.name}: the weight holds numbers too large for float32 arithmetic; check the "
            "checkpoint"
        )

    def quantize_codes(self, block: Block, data: Tensor, codes: CodeTensors) -> None:
        """The same of a weight of 4 or 6 bits, whose levels depend on all of it."""
        target, layout = block.target, GroupLayout(codes.bits, codes.group_size)
        if self.levels is None:
            self.levels = self.choose_levels(target, layout)
            self.codebook = self.levels.codebook
        x = self.transform_rows(target, data)
        rounding = self.recipe.rounding
        assert isinstance(rounding, RoundsGroups), "checked before"
        weight = rounding.round_groups(x, None, layout, self.levels)
        self.sums.append(sum_rows(x, weight.decode()))
        for key, rows in iterate_code_rows(target.key, weight):
            self.write(key, rows)

    def transform_rows(self, target: Target, data: Tensor) -> Tensor:
        """Rows of a weight in the basis in which they are rounded, float32 [rows, K].

        Raises:
            ConfigError: for NaN or infinity.
        """
        x = target.transform.transform_rows(data.flatten(1))
        if not bool(x.isfinite().all()):
            self.refuse_infinity(target, data)
        return x

    def choose_levels(self, target: Target, layout: GroupLayout) -> Levels:
        """The levels for a whole weight, by as many of its rows as they take."""
        if layout.bits == 6:  # the same for every weight
            return get_even_levels(torch.device("cpu"))
        step = find_sample_step((target.shape[0], target.shape[1]))
        buffer = torch.empty(stream_blocks.BLOCK_BYTES, dtype=torch.uint8)
        sample = [
            self.transform_rows(target, self.read(block, buffer))
            for block in iterate_sample(target, self.files, self.stored, step)
        ]
        return choose_levels(torch.cat(sample), layout)

    def round(self, data: Tensor, q: Tensor, scale: Tensor, transform: OutlierTransform) -> RowSums:
        """Transform and round rows into `q` and `scale`.

        Args:
            data: float [rows, K].
            q: int8 [rows, K], is filled.
            scale: float32 [rows, 1], is filled.
            transform: of the weight.
        """
        if transform.rearranges_columns:
            arranged = torch.empty_like(q)
            columns = transform.arrange_columns(data)
            sums = self.round_columns(columns, arranged, scale, transform)
            q.copy_(transform.restore_columns(arranged))
            return sums
        return self.round_columns(data, q, scale, transform)

    def round_columns(self, data: Tensor, q: Tensor, scale: Tensor, transform: OutlierTransform) -> RowSums:
        """The same of columns that lie as they are transformed."""
        if isinstance(self.recipe.rounding, AbsMax):
            return quantize_weight_rows(data, q, scale, transform.factor, transform.rotation)
        x = kernel.transform_rows(data.float(), transform.factor, transform.rotation)
        rounded = self.recipe.rounding.round_weight(x, None)
        q.copy_(rounded.qdata)
        scale.copy_(rounded.scale)
        return sum_rows(x, rounded)

    def fit(self, target: Target) -> None:
        """Fit a transform with factors to the weight.

        Methods without a calibration need only the largest number of each column.
        """
        if target.transform.factor is None:
            return
        largest = torch.zeros(target.shape[1])
        buffer = torch.empty(stream_blocks.BLOCK_BYTES, dtype=torch.uint8)
        source = replace(target, parts=target.fitted_parts or target.parts)
        for block in iterate_blocks(source, self.files, self.stored):
            largest = torch.maximum(largest, self.read(block, buffer).float().abs().amax(0))
        target.transform = self.recipe.outlier.fit(largest[None], None)

    def note_quality(self, target: Target) -> None:
        """Note in the plan how good the integers are: their SQNR, and the share of saturated ones."""
        assert target.plan is not None
        if not target.copied:
            signal = sum(sums.signal for sums in self.sums)
            noise = sum(sums.noise for sums in self.sums)
            saturated = sum(sums.saturated for sums in self.sums)
            target.plan.measured["weight_sqnr_db"] = math.inf
            if signal and noise:
                target.plan.measured["weight_sqnr_db"] = 10 * math.log10(signal / noise)
            target.plan.measured["saturated_share"] = saturated / math.prod(target.shape)
        self.sums = []


def sum_rows(x: Tensor, rounded: QuantizedWeight) -> RowSums:
    """How far rounded rows are from what they were. x: float32 [n, K]."""
    noise = x - rounded.dequantize()
    return RowSums(
        bool(x.isfinite().all()),
        x.double().square().sum().item(),
        noise.double().square().sum().item(),
        int((rounded.qdata.abs() == INT8_MAX).sum()),
    )


def write_targets(
    files: TensorFiles,
    stored: Mapping[str, CheckpointLayer],
    targets: Sequence[Target],
    path: Path,
    metadata: Mapping[str, str],
    recipe: QuantizationRecipe,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the targets to a file.

    Args:
        files: the source.
        stored: the source's weights by name.
        targets: as `plan_targets` gives them.
        path: of the new file.
        metadata: of its header.
        recipe: how layers become INT8.
        on_bytes: called with the number of bytes read, for progress.

    Returns:
        The size of the file in bytes.

    Raises:
        ConfigError: for a weight that cannot be quantized.
        FileError: when the source cannot be read or the new file not be written.
    """
    entries = [entry for target in targets for entry in target.list_entries()]
    with StreamWriter(path, entries, metadata) as writer:
        Streamer(files, stored, writer, recipe, on_bytes).run(targets)
        writer.finish()
        return writer.nbytes
