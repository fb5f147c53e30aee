"""LoRAs that are relative to a changed base (PiSSA, OLoRA, CorDA, ...), made relative to the base itself.

Such an initialization takes `scale * B0 A0` out of the base weight and starts the adapter with B0 and A0. The
trained adapter alone is then not the change of the model: that is `scale * (B A - B0 A0)`. PEFT subtracts the
initial adapter the same way (`LoraModel.subtract_mutated_init`), when it is told where that was saved.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from int8run.errors import LoraError
from int8run.lora.adapters.change import LoraChange
from int8run.lora.adapters.dora import DoRA
from int8run.lora.adapters.lora import LoRA
from int8run.lora.written_settings import INITIAL_WORD, PEFT_FILE

INITIAL_SUFFIXES = (".lora_A", ".lora_B", ".lora_magnitude_vector")
HOW_TO_CONVERT = (
    "save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), or put the "
    "initial adapter into a folder called initial beside the file"
)


def find_initial_adapter(path: Path) -> Path | None:
    """The file with the initial factors of a LoRA: a folder or a file beside it, with `init` in its name.

    Raises:
        LoraError: when there are several.
    """
    files = []
    for file in path.parent.glob("*.safetensors"):
        if file != path and INITIAL_WORD in file.stem.lower():
            files.append(file)
    for folder in path.parent.glob("*"):
        if folder.is_dir() and INITIAL_WORD in folder.name.lower():
            files += list_adapter_files(folder)

    if len(files) > 1:
        names = ", ".join(sorted(str(file.relative_to(path.parent)) for file in files))
        raise LoraError(f"{path}: several files may hold its initial factors ({names}); leave one of them")
    return files[0] if files else None


def list_adapter_files(folder: Path) -> list[Path]:
    """The adapter in a folder: PEFT's file, else every `.safetensors` file."""
    named = folder / PEFT_FILE
    if named.is_file():
        return [named]
    return list(folder.glob("*.safetensors"))


def split_initial_keys(keys: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The keys of a file, and apart from them those of initial factors that are in the same file.

    PEFT has the name of an adapter in its keys: `x.lora_A.pissa_init.weight`.

    Returns:
        The other keys, and key without the adapter's name -> key.
    """
    others, initial = [], {}
    for key in keys:
        name, _, weight = key.rpartition(".")
        if weight != "weight":
            name = key
        half, _, adapter = name.rpartition(".")
        if half.endswith(INITIAL_SUFFIXES) and INITIAL_WORD in adapter.lower():
            initial[f"{half}.weight"] = key
        else:
            others.append(key)
    return others, initial


def subtract_initial(change: LoraChange, initial: LoraChange | None) -> LoraChange:
    """The change without what the initial factors had taken out of the base.

    Raises:
        LoraError: when there are no initial factors for it, or they do not fit.
    """
    start = find_initial_pair(initial)
    if start is None:
        raise LoraError("has no initial factors; the file of the initial adapter is not that of this LoRA")
    trained = change.weight_delta
    if isinstance(trained, LoRA):
        return replace(change, weight_delta=subtract_pair(trained, start))
    if isinstance(trained, DoRA) and isinstance(trained.inner, LoRA):
        inner = subtract_pair(trained.inner, start)
        return replace(change, weight_delta=replace(trained, inner=inner))
    raise LoraError("is not a low-rank pair, and its initial factors cannot be subtracted")


def find_initial_pair(initial: LoraChange | None) -> LoRA | None:
    """The low-rank pair of an initial adapter; None: it has none."""
    delta = None if initial is None else initial.weight_delta
    if isinstance(delta, DoRA):
        delta = delta.inner  # its norms are those of the base
    return delta if isinstance(delta, LoRA) else None


def subtract_pair(trained: LoRA, initial: LoRA) -> LoRA:
    """`scale B A - scale0 B0 A0` as one pair of both ranks together.

    Raises:
        LoraError: when the two are of different shapes.
    """
    if trained.pair.shape != initial.pair.shape or trained.mid is not None or initial.mid is not None:
        raise LoraError(
            f"changes a weight of {list(trained.pair.shape)}, its initial factors one of "
            f"{list(initial.pair.shape)}; they are not those of this LoRA"
        )
    if trained.scale == 0:
        raise LoraError("has alpha 0, and its initial factors cannot be subtracted")
    ratio = initial.scale / trained.scale
    down = torch.cat([trained.lora_A.float(), initial.lora_A.float()])  # [r + r0, K]
    # of a convolution, one of the two may have more dimensions of 1
    initial_up = initial.lora_B.float().reshape(*initial.lora_B.shape[:2], *trained.lora_B.shape[2:])
    up = torch.cat([trained.lora_B.float(), -ratio * initial_up], dim=1)  # [N, r + r0]
    return replace(trained, lora_A=down, lora_B=up)


def relative_base_error(initialization: str) -> LoraError:
    """The error for a LoRA whose initial factors are not there."""
    return LoraError(
        f"was initialized by {initialization}, which changed the base weights: its tensors are no change of "
        f"the model. Its initial factors are not beside it; {HOW_TO_CONVERT}"
    )
