"""The process of one method; `bench.py` starts it."""

from collections.abc import Callable

import sidebyside
import torch
from case import make_case
from methods import METHODS


def prepare_method(request: sidebyside.Reply) -> tuple[Callable[[], object], sidebyside.Reply]:
    """Build the layer for one shape, and its error."""
    torch._dynamo.reset()
    method = METHODS[request["method"]]
    case = make_case(*request["shape"], rank=method.rank)
    forward = method.build(case)
    x = case.x
    error = case.error(forward(x))
    return lambda: forward(x), {"error": error}


if __name__ == "__main__":
    sidebyside.serve_requests(prepare_method)
