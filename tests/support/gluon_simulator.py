"""Runs the Hopper kernel's own source in Python, one program after another, on a machine without a GPU.

Gluon has no interpreter. This takes the place of the parts of Gluon that `kernels/int8_linear/hopper.py`
uses, and is stricter than the hardware where a mistake would show there as a wrong number now and then, or as
a program that never ends:

- a wait for a barrier that no load will fill raises, instead of waiting for ever;
- a load into a buffer that a product may still read raises, and so does a product that reads a buffer whose
  load has not been waited for;
- a product's sums are there only after a wait, so that reading them early gives the old ones;
- addresses outside of a tensor raise, and so does an element of the output that is written twice.

What it cannot find: whether a layout says of a register what the hardware does, fences that are missing
between threads, and anything about time.
"""

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from int8run.kernels.int8_linear import hopper
from int8run.kernels.int8_linear.tile import choose_block_r

GLUON_FUNCTIONS = (
    "_hopper_kernel",
    "_count_own_tiles",
    "_find_tile",
    "_load_step",
    "_split_columns",
    "_store_piece",
    "_add_branch",
)


class UnfilledBufferError(Exception):
    """A program waits for a load that was never ordered, or reads without waiting."""


class OverwrittenBufferError(Exception):
    """A load goes to a buffer that is still being read."""


class Block(torch.Tensor):
    """A tensor that is split as Gluon does, into the halves of a last dimension of 2."""

    def split(self) -> tuple[Tensor, Tensor]:
        return self[..., 0], self[..., 1]

    def to(self, dtype: Any) -> Tensor:
        return super().to(getattr(dtype, "dtype", dtype))


@dataclass
class Pointer:
    """An address in a tensor, or a block of them: `pointer + offsets`."""

    tensor: Tensor
    offsets: Any = 0
    times_written: Tensor | None = None

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=ElementType(self.tensor.dtype))

    def __add__(self, offsets: Any) -> "Pointer":
        return Pointer(self.tensor, self.offsets + offsets, self.times_written)

    def find_elements(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The mask in full, and the flat indices of what it selects."""
        offsets, mask = torch.broadcast_tensors(torch.as_tensor(self.offsets), mask)
        chosen = offsets[mask]
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.tensor.numel():
            raise IndexError(f"an address is outside of {list(self.tensor.shape)}")
        return mask, chosen


class ElementType:
    """What `pointer.dtype.element_ty` knows."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.primitive_bitwidth = dtype, 8 * dtype.itemsize


class Operand:
    """A descriptor: a matrix, and the block of it that one load brings."""

    def __init__(self, matrix: Tensor, rows: int, columns: int):
        self.matrix, self.layout = matrix, None
        self.block_type = SimpleNamespace(shape=[rows, columns], nbytes=rows * columns)

    def read_block(self, row: int, column: int) -> Tensor:
        """A block, zeros outside of the matrix."""
        rows, columns = self.block_type.shape
        found = self.matrix[row : row + rows, column : column + columns]
        block = torch.zeros(rows, columns, dtype=self.matrix.dtype)
        block[: found.shape[0], : found.shape[1]] = found
        return block


@dataclass
class Barrier:
    """Counts the bytes of a buffer's loads; its phase flips when all have come."""

    phases_ordered: int = 0
    phases_awaited: int = 0
    bytes_missing: int = 0


@dataclass
class Buffer:
    """One stage of an operand in shared memory."""

    barrier: Barrier | None = None
    phase: int = 0
    content: Tensor | None = None
    readers: int = 0  # products under way
    is_transposed: bool = False
    origin: "Buffer | None" = None

    def permute(self, order: tuple[int, int]) -> "Buffer":
        assert order == (1, 0)
        return Buffer(is_transposed=True, origin=self)

    def read(self) -> Tensor:
        """What a product finds in it."""
        buffer = self.origin or self
        if buffer.content is None:
            raise UnfilledBufferError("a product reads a buffer that nothing was loaded into")
        if buffer.barrier is not None and buffer.barrier.phases_awaited < buffer.phase:
            raise UnfilledBufferError("a product reads a buffer before its load was waited for")
        return buffer.content.T if self.is_transposed else buffer.content


@dataclass
class Product:
    """A warp-group product that was started: what it will add, and what it reads meanwhile."""

    buffers: list[Buffer]
    sums: Tensor
    part: Tensor


@dataclass
class Machine:
    """One program: its number, and its products in the order in which they were started."""

    program: int
    programs: int
    warps: int
    running: deque[Product] = field(default_factory=deque)

    # -- the copy engine ---------------------------------------------------------------------------

    def expect(self, barrier: Barrier, n_bytes: int) -> None:
        if barrier.bytes_missing:
            raise UnfilledBufferError("a barrier is armed again before its bytes have been ordered")
        barrier.phases_ordered += 1
        barrier.bytes_missing = n_bytes

    def load(self, operand: Operand, place: list[int], barrier: Barrier, buffer: Buffer) -> None:
        if buffer.readers:
            raise OverwrittenBufferError("a load goes to a buffer that a product still reads")
        if buffer.content is not None and barrier.phases_awaited < buffer.phase:
            raise OverwrittenBufferError("a load goes to a buffer that no product has read")
        buffer.content = operand.read_block(*place)
        buffer.barrier, buffer.phase = barrier, barrier.phases_ordered
        barrier.bytes_missing -= operand.block_type.nbytes

    def wait(self, barrier: Barrier, phase: int) -> None:
        if barrier.phases_awaited == barrier.phases_ordered or barrier.bytes_missing:
            raise UnfilledBufferError("a program waits for a load that was never ordered")
        if barrier.phases_awaited % 2 != phase:
            raise UnfilledBufferError("a program waits for the wrong phase of a barrier")
        barrier.phases_awaited += 1

    # -- the tensor cores --------------------------------------------------------------------------

    def multiply(self, a: Any, b: Buffer, sums: Tensor, is_async: bool) -> Tensor:
        left = a.read() if isinstance(a, Buffer) else a
        exact = torch.float64 if left.dtype == torch.int8 else torch.float32
        part = (left.to(exact) @ b.read().to(exact)).to(sums.dtype)
        buffers = [buffer.origin or buffer for buffer in (a, b) if isinstance(buffer, Buffer)]
        for buffer in buffers:
            buffer.readers += 1
        self.running.append(Product(buffers, sums, part))
        if not is_async:
            self.finish(0)
        return sums

    def finish(self, most_running: int) -> None:
        """Let the oldest products end, until at most so many are under way."""
        while len(self.running) > most_running:
            done = self.running.popleft()
            done.sums += done.part
            for buffer in done.buffers:
                buffer.readers -= 1


class Gluon:
    """Takes the place of `gluon.language`."""

    int8, int32, int64, float32 = torch.int8, torch.int32, torch.int64, torch.float32
    static_range = range

    class NVMMASharedLayout:
        @staticmethod
        def get_default_for(shape: list[int], dtype: torch.dtype) -> None:
            return None

    def __init__(self, machine: Machine):
        self.machine = machine
        for name in ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "BlockedLayout"):
            setattr(self, name, lambda *arguments, **settings: None)

    def num_warps(self) -> int:
        return self.machine.warps

    def program_id(self, axis: int) -> int:
        return self.machine.program

    def num_programs(self, axis: int) -> int:
        return self.machine.programs

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any, value: Any = None) -> Any:
        if value is not None:
            return Buffer(content=value)
        made = [Barrier() if dtype == torch.int64 else Buffer() for _ in range(shape[0])]
        return SimpleNamespace(index=made.__getitem__)

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: Any) -> Tensor:
        return torch.zeros(shape, dtype=dtype).as_subclass(Block)

    def arange(self, start: int, end: int, layout: Any) -> Tensor:
        return torch.arange(start, end)

    def convert_layout(self, value: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
        return value

    def load(self, pointer: Pointer, mask: Tensor, other: float) -> Tensor:
        mask, chosen = pointer.find_elements(mask)
        found = torch.full(mask.shape, other, dtype=pointer.tensor.dtype)
        found[mask] = pointer.tensor.flatten()[chosen]
        return found

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        mask, chosen = pointer.find_elements(mask)
        pointer.tensor.view(-1)[chosen] = value.as_subclass(torch.Tensor)[mask]
        pointer.times_written.view(-1)[chosen] += 1
        if (pointer.times_written > 1).any():
            raise AssertionError("an element of the output is written twice")


def simulate(
    q: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    branch: tuple[Tensor, Tensor, Tensor | None] | None,
    dtype: torch.dtype,
    tile: Any,
    programs: int,
) -> Tensor:
    """What `launch_hopper` computes: the kernel for each program in turn.

    Args:
        q, x_scale, qdata, w_scale, bias: as `kernel.int8_linear` takes them, on the CPU.
        branch: h, up and strengths; None: no branch.
        dtype: of the output.
        tile: of the Hopper kernel.
        programs: how many there are.

    Raises:
        UnfilledBufferError, OverwrittenBufferError: where the hardware would go wrong.
        AssertionError: for an element of the output that no program writes, or two.
    """
    (m, k), n = q.shape, qdata.shape[0]
    h, up, strengths = branch or (None, None, None)
    rank, stride_hm = (0, 0) if h is None else (h.shape[1], h.stride(0))
    y = torch.full((m, n), float("nan"), dtype=dtype)
    times_written = torch.zeros(m, n, dtype=torch.int64)
    for program in range(programs):
        machine = Machine(program, programs, tile.warps)
        with patch.multiple(hopper, **make_stand_ins(machine)):
            hopper._hopper_kernel(
                Operand(q, tile.block_m, tile.block_k),
                Operand(qdata, tile.block_n, tile.block_k),
                *[None if t is None else Pointer(t) for t in (x_scale, w_scale, bias, h, up, strengths)],
                Pointer(y, 0, times_written),
                m,
                n,
                k,
                rank,
                stride_hm,
                BLOCK_R=choose_block_r(rank),
                GROUP_M=tile.group_m,
                STAGES=tile.stages,
                PIECE=hopper.HOPPER_PIECE,
            )
        assert not machine.running, "a program ends before its products do"
    assert (times_written == 1).all(), "an element of the output is never written"
    return y


def make_stand_ins(machine: Machine) -> dict[str, Any]:
    """What takes the place of Gluon's names in the kernel's module."""

    def finish(most_running: int, deps: tuple[Tensor]) -> Tensor:
        machine.finish(most_running)
        return deps[0]

    barrier = SimpleNamespace(
        init=lambda barrier, count: None,
        expect=machine.expect,
        wait=machine.wait,
        MBarrierLayout=lambda: None,
    )
    functions = {name: getattr(hopper, name).fn for name in GLUON_FUNCTIONS}
    return {
        **functions,
        "gl": Gluon(machine),
        "mbarrier": barrier,
        "async_load": machine.load,
        "warpgroup_mma": machine.multiply,
        "warpgroup_mma_wait": finish,
        "fence_async_shared": lambda: None,
    }
