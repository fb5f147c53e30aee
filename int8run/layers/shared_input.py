"""One quantization for layers that read the same tensor, their LoRAs' first halves included.

`fusion.share_inputs` gives one `SharedInput` to the layers of a group; `Int8Linear` asks it at every call.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from int8run.backends.base import QuantizedInput
from int8run.layers.low_rank_branch import LowRankBranch

# the version of a tensor that has none, because it was made in inference mode
NO_VERSION = -1


class JointBranches:
    """Branches whose down-projections are multiplied with one input together, as one matrix.

    Args:
        branches: of layers with the same backend, fused; each wants the input at quantization.
    """

    def __init__(self, branches: Iterable[LowRankBranch]):
        self.branches = tuple(branches)
        self.parts: list[Tensor] = []  # what `down` was made of
        self.down: Tensor | None = None

    @property
    def is_idle(self) -> bool:
        """Whether all strengths are 0; never in compiled code, which does not read them."""
        if torch.compiler.is_compiling():
            return False
        return all(branch.is_idle for branch in self.branches)

    def is_on(self, device: torch.device) -> bool:
        """Whether all of them are there; offloading may bring one layer at a time."""
        return all(get_down(branch).device == device for branch in self.branches)

    def get_down(self) -> Tensor:
        """The down-projections of all branches below each other, [R, K]."""
        parts = [get_down(branch) for branch in self.branches]
        is_known = len(parts) == len(self.parts) and all(map(_is_same, parts, self.parts))
        if is_known and self.down is not None and self.down.device == parts[0].device:
            return self.down
        # made anew after the model was moved to another device
        down = torch.cat(parts)
        if not torch.compiler.is_compiling():
            self.parts, self.down = parts, down
        return down

    def select(self, quantized: QuantizedInput, branch: LowRankBranch) -> QuantizedInput:
        """The quantization with the products of one branch alone."""
        assert quantized.down_product is not None
        start = 0
        for other in self.branches:
            rank = get_down(other).shape[0]
            if other is branch:
                return quantized._replace(down_product=quantized.down_product[:, start : start + rank])
            start += rank
        raise ValueError("the branch is not one of these")


def _is_same(part: Tensor, other: Tensor) -> bool:
    return part is other


def get_down(branch: LowRankBranch) -> Tensor:
    """The down-projection of a fused branch."""
    assert branch.fused is not None
    return branch.fused.down


def join_branches(branches: Iterable[LowRankBranch | None]) -> list[JointBranches]:
    """Join the branches that want the input, as many in one as their backend can multiply at once."""
    joined: list[list[LowRankBranch]] = []
    room = 0
    for branch in branches:
        if branch is None or branch.fused is None or not branch.fused.needs_input:
            continue
        rank, most = branch.fused.down.shape[0], branch.fused.max_rank
        if not joined or (most is not None and rank > room):
            joined.append([])
            room = most or 0
        joined[-1].append(branch)
        room -= rank
    return [JointBranches(members) for members in joined]


class SharedInput:
    """One quantization for layers that read the same tensor, such as q, k and v of an attention.

    Holds the last input and its quantization until every layer of the group has taken it. An input that
    changed in between, or is another tensor, is quantized anew: sharing never depends on the order in which a
    model calls its layers. Compiled code sees only which tensor it is, not whether it changed: a model that
    changes a tensor in place between two layers that read it must not share it. None of the families in
    `conf/model_type/` does that.

    Branches that want the input at quantization are multiplied with it together. Where their ranks are too
    many for that, the input is quantized once for as many as can be.

    Args:
        num_layers: how many layers read the tensor.
    """

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self.branches: list[LowRankBranch | None] = [None] * num_layers  # by the layers' places
        self.joints: list[JointBranches] = []
        self.num_waiting = 0  # layers that have not taken the current quantization
        self.x: Tensor | None = None
        self.version = 0
        # of x, by the place of the joint branches that were multiplied with it
        self.quantized: dict[int, QuantizedInput] = {}

    def set_branch(self, place: int, branch: LowRankBranch | None) -> None:
        """Note the branch of one of the layers; None: it has none."""
        self.branches[place] = branch
        self.joints = join_branches(self.branches)
        self.forget()

    def get(
        self, x: Tensor, quantize: Callable[[Tensor | None], QuantizedInput], branch: LowRankBranch | None
    ) -> QuantizedInput:
        """The quantization of x, computed by the first layer that asks.

        Args:
            x: the layers' input.
            quantize: quantizes it and multiplies it with a down-projection.
            branch: of the layer that asks, where it is active.
        """
        if branch is not None and (branch.fused is None or not branch.fused.needs_input):
            branch = None  # it asks nothing of the quantization
        place = self.find_joint(branch, x.device)
        version = get_tensor_version(x)
        if version == NO_VERSION or place is None:
            # a change of x would go unseen, or the branch cannot be joined now: not shared
            return quantize(None if branch is None else get_down(branch))
        if self.x is not x or self.version != version:
            self.x, self.version, self.quantized = x, version, {}
            self.num_waiting = self.num_layers
        if branch is None and self.quantized:
            place = min(self.quantized)  # any will do
        quantized = self.quantized.get(place)
        if quantized is None or (branch is not None and quantized.down_product is None):
            quantized = self.quantized[place] = quantize(self.get_down(place, x.device))
        self.num_waiting -= 1
        if self.num_waiting == 0:
            self.forget()
        return quantized if branch is None else self.joints[place].select(quantized, branch)

    def find_joint(self, branch: LowRankBranch | None, device: torch.device) -> int | None:
        """The place of the joint branches that a branch is one of; without one, of any that are active.

        None: the branch was not noted, or others are not on the device.
        """
        for place, joint in enumerate(self.joints):
            if not joint.is_on(device):
                continue
            if branch is None and not joint.is_idle:
                return place
            if any(other is branch for other in joint.branches):
                return place
        return 0 if branch is None else None

    def get_down(self, place: int, device: torch.device) -> Tensor | None:
        """What is multiplied with an input on this device; None without active branches."""
        if not self.joints or self.joints[place].is_idle or not self.joints[place].is_on(device):
            return None
        return self.joints[place].get_down()

    def forget(self) -> None:
        """Let go of the input and its quantization."""
        self.x = None
        self.quantized = {}


def get_tensor_version(x: Tensor) -> int:
    """How often x was changed in place; 0 in compiled code, NO_VERSION for a tensor of inference mode."""
    if torch.compiler.is_compiling():
        return 0
    return NO_VERSION if x.is_inference() else x._version
