"""One float weight or bias of a model with LoRAs in it, which can be taken out again to the bit.

`lora.float_merge` has one for each parameter that LoRAs change.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from int8run.errors import LoraError
from int8run.layers.shared_input import NO_VERSION, get_tensor_version
from int8run.lora.apply import (
    IndexedDeltas,
    add_deltas,
)
from int8run.lora.size_limits import check_fits

# dtypes that a model may have been moved to and back, which leaves its weights rounded
ROUNDING_DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
# bytes of a number -> integers of that size
INTEGERS_BY_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MergedParameter:
    """A float weight or bias of a module, as it was, and what LoRAs add to it.

    Args:
        module: the one that it belongs to.
        name: `weight`, `bias`, or that of another parameter.
        deltas: what is added to it.
        known_original: its value without any LoRA, where that is in memory already; None: it is copied here.
    """

    def __init__(
        self, module: nn.Module, name: str, deltas: IndexedDeltas, known_original: Tensor | None = None
    ):
        # weak, because the module holds this object: a circle would keep a dropped model in memory
        self._module = weakref.ref(module)
        self.name, self.deltas = name, deltas
        self.parameter: Tensor | None = getattr(module, name)
        self.is_registered = name in module._parameters  # some norms hold a bias of None as an attribute
        self.original = known_original
        if known_original is None and self.parameter is not None:
            self.original = self.parameter.detach().clone()
        self.version = NO_VERSION  # of the parameter when it was last written here
        self.checksum: int | None = None  # of its bits then; None: not computed
        self.strengths: Sequence[float] = ()

    @property
    def is_float8(self) -> bool:
        """Whether what is written is rounded to 8 bits."""
        return self.parameter is not None and self.parameter.element_size() == 1

    def find_module(self) -> nn.Module | None:
        """The module; None where it does not exist any more."""
        return self._module()

    def create_if_missing(self, device: torch.device) -> None:
        """A bias of zeros, where the module has none.

        Raises:
            LoraError: when the module cannot take one.
        """
        module = self.find_module()
        if self.original is not None or module is None:
            return
        weight = module.weight
        assert isinstance(weight, Tensor)
        zeros = torch.zeros(weight.shape[0], dtype=weight.dtype, device=device)
        self.parameter = nn.Parameter(zeros, requires_grad=False)
        setattr(module, self.name, self.parameter)
        if getattr(module, self.name) is not self.parameter:
            raise LoraError(
                f"a {type(module).__name__} cannot be given a {self.name}, which the LoRA changes"
            )

    def merge(self, strengths: Sequence[float]) -> None:
        """Write the parameter for these strengths; where all are 0, it is the original to the bit.

        Raises:
            LoraError: for values that its dtype cannot hold; a sentence without its subject.
        """
        if self.parameter is None:
            return
        value = self.compute_value(strengths)
        if value.dtype != self.parameter.dtype:
            check_fits(value, self.parameter.dtype)
        self.parameter.copy_(value)
        self.version, self.strengths = get_tensor_version(self.parameter), strengths
        self.checksum = None

    def remember(self) -> None:
        """Note what the parameter holds, so that writes through `.data` are noticed, too."""
        if self.parameter is not None:
            self.checksum = compute_checksum(self.parameter)

    def compute_value(self, strengths: Sequence[float]) -> Tensor:
        """The value for these strengths, in float32 unless it is the original."""
        assert self.parameter is not None
        if self.original is None:
            original = torch.zeros_like(self.parameter)
        else:
            original = self.original.to(self.parameter.device)  # the model may have moved since
        is_untouched = not any(strengths[index] for index, _ in self.deltas)
        if is_untouched:
            return original
        return add_deltas(original, self.deltas, strengths, original)

    def restore(self) -> None:
        """Bring back what was there, unless somebody else has put something else there since."""
        module = self.find_module()
        if module is None or self.parameter is None or self.is_changed_outside():
            return
        if self.original is not None:
            self.parameter.copy_(self.original)
            return
        if not self.is_registered:
            delattr(module, self.name)
        setattr(module, self.name, None)
        self.parameter = None

    def is_changed_outside(self) -> bool:
        """Whether the parameter was replaced, or written to by somebody else, since it was written here.

        Equal values are no change. Moving a model to another device or dtype is none either, nor back again.
        """
        module = self.find_module()
        parameter = self.parameter
        if module is None or parameter is None:
            return False
        is_replaced = getattr(module, self.name, None) is not parameter
        if is_replaced:
            return True
        has_version = self.version in (NO_VERSION, get_tensor_version(parameter))
        if has_version and self.checksum in (None, compute_checksum(parameter)):
            return False
        known_values = [self.compute_value(self.strengths)]
        if self.original is not None:
            known_values.append(self.original)
        return not any(equals_after_moving(parameter, value) for value in known_values)


def equals_after_moving(parameter: Tensor, value: Tensor) -> bool:
    """Whether a parameter has this value, be it rounded by a dtype that the model was moved to and back."""
    dtypes = (parameter.dtype, *ROUNDING_DTYPES)
    return any(torch.equal(parameter, value.to(dtype).to(parameter)) for dtype in dtypes)


def compute_checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bits as integers; 0 where it is not in memory."""
    if tensor.is_meta:
        return 0
    integers = tensor.detach().contiguous().view(INTEGERS_BY_SIZE[tensor.element_size()])
    return int(integers.sum(dtype=torch.int64))


@contextmanager
def name_module(name: str) -> Iterator[None]:
    """Put the name of a module in front of errors that are sentences without a subject."""
    try:
        yield
    except LoraError as error:
        raise LoraError(f"{name} {error}") from error


def check_is_float(name: str, dtype: torch.dtype) -> None:
    """Check that a weight holds numbers that can be added to.

    Raises:
        LoraError: for integers, which other programs pack their quantized weights into.
    """
    if not dtype.is_floating_point:
        raise LoraError(
            f"the weight of {name} is {str(dtype).removeprefix('torch.')}: another program has "
            "quantized the model; put LoRAs on the float model, and quantize it with quantize_"
        )
