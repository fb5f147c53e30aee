"""The keys of a LoRA file by module, and the modules that cannot be applied.

A module is applied whole or not at all: without a part that is not known, the rest would be another LoRA.
`int8run.lora.load` reads the tensors of what is left.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.key_parsing import (
    NEW_NORM,
    UNKNOWN_SUFFIX,
    find_suffix,
    normalize_key,
    parse_key,
    remove_adapter_name,
)
from int8run.lora.module_names import flatten_name
from int8run.lora.unread_types import find_types_beside_a_lora
from int8run.lora.untrusted_text import sanitize_text
from int8run.utils.plurals import count_noun

# component, and the module's name with underscores for dots: files may have one module in both spellings
ModuleName = tuple[str, str]
PLAIN_WEIGHT = "a weight of a model, not a change of one"
LONE_ALPHA = "an alpha without a change"
# `x.lora_A.default_0.default.absmax` is four levels below its module
MAX_LEVELS_BELOW_MODULE = 5
MAX_PART_CHARS = 40


@dataclass
class ModuleKeys:
    """The keys of one module.

    Args:
        component: `denoiser`, `text_encoder`, ...
        name: of the module, as its first key has it, without prefixes.
        by_part: part of its adapter -> the keys that are that part; more than one: in several spellings.
    """

    component: str
    name: str
    by_part: dict[str, list[str]] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """All keys of the module."""
        return [key for keys in self.by_part.values() for key in keys]

    @property
    def is_plain_weight(self) -> bool:
        """Whether it is a weight of a model, and nothing that changes one."""
        return set(self.by_part) == {"weight"}

    @property
    def is_lora(self) -> bool:
        """Whether a model's own file cannot have it."""
        return not self.by_part.keys() <= {"weight", NEW_NORM}


@dataclass
class KeyGroups:
    """The keys of a file by module.

    Args:
        modules: those that are applied.
        skipped: key that is not applied -> reason.
    """

    modules: list[ModuleKeys]
    skipped: dict[str, str]


def group_keys(path: Path, keys: Iterable[str]) -> KeyGroups:
    """Sort the keys of a file by module, and find the modules that are applied whole.

    Raises:
        LoraError: when the file holds several adapters of one component.
    """
    keys = list(keys)
    check_adapter_names(path, keys)
    modules: dict[ModuleName, ModuleKeys] = {}
    skipped: dict[str, str] = {}
    for key in keys:
        component, name, part, reason = parse_key(key)
        if part is None:
            skipped[key] = reason
        else:
            module = modules.setdefault((component, flatten_name(name)), ModuleKeys(component, name))
            module.by_part.setdefault(part, []).append(key)

    has_lora = any(module.is_lora for module in modules.values())
    if not has_lora:  # the norms of a whole model are no change
        for module in modules.values():
            module.by_part = {"weight": module.keys}
    incomplete = find_incomplete_modules(modules, skipped)
    for module_name, module in modules.items():
        skip_reason = incomplete.get(module_name) or find_idle_reason(module)
        if skip_reason is not None:
            skipped |= dict.fromkeys(module.keys, skip_reason)
    if has_lora:
        skipped |= find_types_beside_a_lora(keys)
    applied = [module for module in modules.values() if not any(key in skipped for key in module.keys)]
    return KeyGroups(applied, skipped)


def check_adapter_names(path: Path, keys: Iterable[str]) -> None:
    """Check that a file holds one adapter: several would have to be told apart.

    Raises:
        LoraError: with the names that PEFT has for them.
    """
    names_by_component: dict[str, set[str]] = {}
    for key in keys:
        _, adapter = remove_adapter_name(key)
        if adapter:
            names_by_component.setdefault(parse_key(key).component, set()).add(adapter)
    for names in names_by_component.values():
        if len(names) > 1:
            listed = ", ".join(sanitize_text(name, MAX_PART_CHARS) for name in sorted(names)[:5])
            raise LoraError(
                f"{path} holds {len(names)} adapters: {listed}; save each into a file of its own "
                "(save_lora_weights of diffusers does), and give those that are meant as a stack"
            )


def find_incomplete_modules(
    modules: Mapping[ModuleName, ModuleKeys], skipped: dict[str, str]
) -> dict[ModuleName, str]:
    """The modules that have a part that is not applied, each with the reason.

    Args:
        modules: what is known of each.
        skipped: keys that are not applied -> reason; where one is found to be a part of a module, it gets
            the reason of that module.
    """
    changes = {name for name, module in modules.items() if not module.is_plain_weight}
    incomplete: dict[ModuleName, str] = {}
    for key, reason in skipped.items():
        component, name, _, _ = parse_key(key)
        owner, part = find_owner(component, name, changes)
        if owner is None:
            incomplete.setdefault((component, flatten_name(name)), reason)
            continue
        if reason == UNKNOWN_SUFFIX:
            reason = describe_unknown_part(part)
        skipped[key] = incomplete.setdefault(owner, reason)

    # a tensor below a module is another part of it
    owners = changes | incomplete.keys()
    for module_name, module in modules.items():
        if module.is_plain_weight:
            owner, part = find_owner(module.component, module.name, owners, itself=False)
            if owner is not None:
                incomplete[module_name] = incomplete.setdefault(owner, describe_unknown_part(part))
    return incomplete


def find_owner(
    component: str, name: str, modules: Collection[ModuleName], *, itself: bool = True
) -> tuple[ModuleName | None, str]:
    """The module that a name belongs to: the nearest one above it, or, unless told otherwise, itself.

    Returns:
        The module, and what follows it in the name.
    """
    for level, candidate in enumerate(iter_levels(name)):
        module = component, flatten_name(candidate)
        if module in modules and (itself or level > 0):
            return module, name.removeprefix(candidate).removeprefix(".")
    return None, ""


def iter_levels(name: str) -> Iterator[str]:
    """`a.b.c` -> `a.b.c`, `a.b`, `a`."""
    for _ in range(MAX_LEVELS_BELOW_MODULE):
        yield name
        name, dot, _ = name.rpartition(".")
        if not dot:
            return


def describe_unknown_part(part: str) -> str:
    """The reason for a module with a part that is not known."""
    return f"modules with a part that is not known ({sanitize_text(part, MAX_PART_CHARS)})"


def find_idle_reason(module: ModuleKeys) -> str | None:
    """Why the parts of a module do nothing; None: they do something."""
    if module.by_part.keys() == {"alpha"}:
        return LONE_ALPHA
    if "weight" in module.by_part and "on_input" not in module.by_part:
        return PLAIN_WEIGHT
    return None


# -- parts that are in a file twice --------------------------------------------------------------------------


def choose_keys(module: ModuleKeys, get_tensor: Callable[[str], Tensor]) -> dict[str, str]:
    """One key for each part of a module; copies under another spelling of its name are left out.

    Some files hold every module twice, so that programs with either names can read them.

    Raises:
        LoraError: when the spellings do not hold the same.
    """
    chosen = {part: keys[0] for part, keys in module.by_part.items()}
    for part, keys in module.by_part.items():
        for key in keys[1:]:
            if not is_copy(module, part, key, get_tensor):
                raise LoraError(
                    f"is in the file twice, as {chosen[part]} and {key}; which one is meant cannot be told"
                )
    return chosen


def describe_copies(num_copies: int) -> list[str]:
    """A line about modules that are in a file under two names; none where there are no such modules."""
    if not num_copies:
        return []
    copies = count_noun(num_copies, "module", "are")
    return [f"{copies} in the file under two names with the same values; each counts once"]


def is_copy(module: ModuleKeys, part: str, key: str, get_tensor: Callable[[str], Tensor]) -> bool:
    """Whether a key that is a part once more belongs to a copy of the whole module."""
    first = module.by_part[part][0]
    if not has_same_bytes(get_tensor(first), get_tensor(key)):
        return False
    stem, first_stem = get_stem(key), get_stem(first)
    return stem != first_stem and list_parts(module, stem) == list_parts(module, first_stem)


def has_same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal, dtype included; PyTorch compares the numbers of few dtypes."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8))


def list_parts(module: ModuleKeys, stem: str) -> list[str]:
    """The parts of a module whose keys have this spelling of its name."""
    return [part for part, keys in module.by_part.items() if stem in map(get_stem, keys)]


def get_stem(key: str) -> str:
    """The module in a key as it is spelled there, prefixes included: `a.b.lora_A.weight` -> `a.b`."""
    plain_key = normalize_key(key)
    return plain_key.removesuffix(find_suffix(plain_key))
