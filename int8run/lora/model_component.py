"""A denoiser or text encoder as `int8run.lora.match` sees it: the names and the shapes of its modules.

It knows that a pipeline can have two denoisers of the same names; it knows no files and no changes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from int8run.lora.module_names import NameTable, get_target_shape
from int8run.lora.row_slices import ModuleTarget, ModuleTargets
from int8run.models.denoiser_classes import find_replaced_reason
from int8run.models.denoiser_components import COMPONENTS_WITHOUT_LORAS
from int8run.models.dual_denoisers import split_denoiser


class ModelComponent:
    """A denoiser or text encoder, and the names of its modules in files.

    The two denoisers of one pipeline have the same names, and a name stands for modules of both.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        # `transformer.` and `transformer_2.` of two denoisers, "" of a single one
        self.name_tables: dict[str, NameTable] = {}
        self.class_names: dict[str, str] = {}
        for prefix, denoiser in split_denoiser(model).items():
            self.name_tables[prefix] = NameTable.from_model(denoiser)
            self.class_names[prefix] = type(denoiser).__name__

    @property
    def experts(self) -> list[str]:
        """Names of the two denoisers; empty for a single one."""
        return [prefix.removesuffix(".") for prefix in self.name_tables if prefix]

    def find_all_targets(
        self, names: Iterable[str], experts: Sequence[str] = ()
    ) -> dict[str, ModuleTargets | None]:
        """The targets of several names, see `NameTable.find_targets`.

        Args:
            names: without prefixes.
            experts: of two denoisers, those that are meant; empty: those that LoRAs are for.
        """
        names = list(names)
        found: dict[str, ModuleTargets | None] = dict.fromkeys(names)
        for prefix, name_table in self.name_tables.items():
            if prefix and not is_meant(prefix.removesuffix("."), experts):
                continue
            for name, targets in name_table.find_all_targets(names).items():
                if not targets:
                    continue
                of_others = found[name] or ()
                prefixed = [replace(target, module=prefix + target.module) for target in targets]
                found[name] = (*of_others, *prefixed)
        return found

    def get_weight_shape(self, target: ModuleTarget) -> tuple[int, ...]:
        """Shape of the weight of a target."""
        return get_target_shape(self.model, target.module)

    def find_replaced_reason(self, module: str) -> str | None:
        """Why a LoRA made for the usual class of this model cannot change a module; None where it can."""
        for prefix, class_name in self.class_names.items():
            if module.startswith(prefix):
                return find_replaced_reason(class_name, module.removeprefix(prefix))
        return None


def is_meant(component: str, experts: Sequence[str]) -> bool:
    """Whether a LoRA is for one of two denoisers.

    Args:
        component: its name in the pipeline.
        experts: what the LoRA's settings name; empty: nothing.
    """
    if experts:
        return component in experts
    return component not in COMPONENTS_WITHOUT_LORAS
