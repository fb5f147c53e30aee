"""How the arguments of the Triton product must lie in memory. `kernel.py` asks once for every layout."""

from math import ceil

import torch

from int8run.kernels.triton_calls import FLOATS, Layout

MAX_K = 131072  # int32 holds that many products of -128 * 127


def check_product(
    q: Layout,
    x_scale: Layout,
    qdata: Layout,
    w_scale: Layout,
    bias: Layout | None,
    *,
    group: int,
    out_dtype: torch.dtype,
) -> None:
    """Check everything but the low-rank branch. Names and shapes as in `kernel.int8_linear`.

    Raises:
        ValueError: for what the kernel does not take.
    """
    is_matrix = len(q.shape) == 2 and len(qdata.shape) == 2
    if not is_matrix or q.shape[1] != qdata.shape[1] or 0 in (*q.shape, *qdata.shape):
        raise ValueError(f"q must be [M, K] and qdata [N, K], not {list(q.shape)} and {list(qdata.shape)}")
    (m, k), n = q.shape, qdata.shape[0]
    if k > MAX_K:
        raise ValueError(f"K is {k}; int32 sums hold at most {MAX_K} products")
    _check_scale_shape(w_scale.shape, n, k, group)
    _check_contiguous("q", q, (m, k), torch.int8)
    _check_contiguous("x_scale", x_scale, (m, 1), torch.float32)
    _check_contiguous("qdata", qdata, (n, k), torch.int8)
    _check_contiguous("w_scale", w_scale, w_scale.shape, torch.float32)
    if bias is not None:
        _check_contiguous("bias", bias, (n,), *FLOATS)
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype must be bfloat16, float16 or float32, not {out_dtype}")


def _check_contiguous(name: str, tensor: Layout, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    if tensor.is_contiguous(shape, *dtypes):
        return
    names = " or ".join(str(dtype) for dtype in dtypes)
    raise ValueError(
        f"{name} must be contiguous {names} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}"
    )


def _check_scale_shape(shape: tuple[int, ...], n: int, k: int, group: int) -> None:
    if group < 0 or group % 32:
        raise ValueError(f"group must be 0 or a multiple of 32, not {group}")
    allowed: list[tuple[int, ...]] = [(n,)]
    if group:
        n_groups = ceil(k / group)
        allowed = [(n, n_groups), (ceil(n / group), n_groups)]
    if shape not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"w_scale must be {shapes} for group {group}, not {list(shape)}")


def check_branch(h: Layout | None, up: Layout | None, strengths: Layout | None, *, m: int, n: int) -> int:
    """Check the low-rank branch of a product [m, n].

    Returns:
        Its rank; 0 without one.

    Raises:
        ValueError: for what the kernel does not take.
    """
    if (h is None) != (up is None):
        raise ValueError("h and up come together")
    if h is None or up is None:
        return 0
    rank = h.shape[1] if len(h.shape) == 2 else 0
    if rank == 0 or h.shape[0] != m or up.shape != (n, rank):
        raise ValueError(f"h must be [{m}, R] and up [{n}, R], not {list(h.shape)} and {list(up.shape)}")
    if h.dtype != torch.float32 or not h.has_packed_columns:
        raise ValueError(f"h must be float32 with neighbouring columns, not {h.dtype}, strides {h.stride}")
    _check_contiguous("up", up, (n, rank), *FLOATS)
    if strengths is not None:
        _check_contiguous("strengths", strengths, (rank,), torch.float32)
    return rank
