"""Compare tensors that stayed float with those of the base: biases, norms, embedders, layers left out.

`file_audit` calls `measure_change`. They are equal but for the rounding to another dtype, unless somebody
trained or corrected them.
"""

import math
from math import prod

import torch

from int8run.audit.base_weight import BaseTensor
from int8run.audit.stored_numbers import iterate_spans
from int8run.checkpoints.reader import TensorFiles


def measure_change(files: TensorFiles, key: str, base: BaseTensor) -> float:
    """How far a float tensor of a file is from the base's, as a share of its size; 0: equal.

    Infinite where no share can say it: NaN or infinity where the base has none, or zeros in the base.
    Infinity that both have, as masks do, is equal.

    Args:
        files: the file.
        key: of the tensor.
        base: what the base has for it.

    Raises:
        FileError: when either cannot be read.
    """
    shape = files[key].shape
    if not shape:
        shape = (1,)
    difference = signal = 0.0
    for span in iterate_spans(shape[0], prod(shape[1:])):
        rows = span.rows if files[key].shape else None
        own = files.read(key, rows)
        files.drop_from_page_cache(key, rows)
        own = own.reshape(span.stop - span.start, -1)
        other = base.read_rows(span.start, span.stop, allow_infinity=True)
        finite = torch.where(other.isinf(), 0, other)
        signal += float(finite.float().square().sum(dtype=torch.float64))
        if torch.equal(own, other.to(own.dtype)):
            continue
        apart = torch.where(own == other, 0, own.double() - other.double())
        difference += float(apart.square().sum())
    if difference == 0:
        return 0.0
    if signal == 0 or not math.isfinite(difference):
        return math.inf
    relative: float = (difference / signal) ** 0.5
    return relative


def holds_nan(files: TensorFiles, key: str) -> bool:
    """Whether a float tensor has numbers that are none. Infinity is allowed: masks are made of it.

    Args:
        files: the file.
        key: of the tensor.

    Raises:
        FileError: when it cannot be read.
    """
    shape = files[key].shape
    if not shape:
        return bool(files.read(key).isnan())
    for span in iterate_spans(shape[0], prod(shape[1:])):
        has_nan = bool(files.read(key, span.rows).isnan().any())
        files.drop_from_page_cache(key, span.rows)
        if has_nan:
            return True
    return False
