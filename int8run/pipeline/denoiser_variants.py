"""Finds out whether the weights of a model are of a class of our own, which their repository does not name.

`load` asks it once the files are there, `task=bench task.rows=N` of configs. Headers alone are read.
"""

import logging
from dataclasses import replace
from pathlib import Path

from int8run.checkpoints.reader import TensorFiles
from int8run.models.denoiser_classes import choose_variant, has_variants
from int8run.models.source import ResolvedDenoiser, ResolvedModel
from int8run.models.state_dict_adapter import find_denoiser_keys
from int8run.models.tensor_part import Shape
from int8run.utils.paths import SAFETENSORS

log = logging.getLogger(__name__)


def choose_denoiser_classes(source: ResolvedModel) -> ResolvedModel:
    """Return a model whose denoisers are of the classes that their weights are for.

    Raises:
        FileError: when a file that may be of another class cannot be read.
    """
    denoisers = tuple(choose_denoiser_class(denoiser) for denoiser in source.denoisers)
    return replace(source, denoisers=denoisers)


def choose_classes_of_configs(source: ResolvedModel) -> ResolvedModel:
    """Do the same for a model whose weights need not be here; where they are not, the config's class stays.

    Raises:
        FileError: when a file that may be of another class cannot be read.
    """
    denoisers = []
    for denoiser in source.denoisers:
        if has_variants(denoiser.class_name) and not has_weights(denoiser.weights):
            log.warning(
                "The weights of the %s are not here, and its layers are those of the %s that the repository "
                "names; a pruned file may have others",
                denoiser.component,
                denoiser.class_name,
            )
            denoisers.append(denoiser)
            continue
        denoisers.append(choose_denoiser_class(denoiser))
    return replace(source, denoisers=tuple(denoisers))


def has_weights(path: Path) -> bool:
    """Whether a path is a file, or a folder with weights."""
    return path.is_file() or any(path.glob(f"*{SAFETENSORS}"))


def choose_denoiser_class(denoiser: ResolvedDenoiser) -> ResolvedDenoiser:
    """Return a denoiser with the class and the config that its weights are for."""
    if not has_variants(denoiser.class_name):
        return denoiser
    shapes = read_denoiser_shapes(denoiser.weights)
    name, config = choose_variant(denoiser.class_name, denoiser.config, shapes)
    if name != denoiser.class_name:
        log.info("%s holds a %s, not a %s", denoiser.weights, name, denoiser.class_name)
    return replace(denoiser, class_name=name, config=config)


def read_denoiser_shapes(weights: Path) -> dict[str, Shape]:
    """Return the shapes of a denoiser's tensors in a file or a folder, by their keys without prefix."""
    with TensorFiles.open(weights) as files:
        return {name: files[key].shape for name, key in find_denoiser_keys(files).items()}
