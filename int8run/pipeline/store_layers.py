"""Keep INT8 layers: in the cache for the next run, and in the file or folder of `save=`, with the INT8 VAE.

build.py calls it with the layers that were made and their provenance.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from int8run.checkpoints.comfy_grouped import find_marker_obstacle
from int8run.export.save_denoiser import keep_own_names, save_denoiser, write_tensors
from int8run.layers.grouped_int8_linear import GroupedInt8Linear
from int8run.layers.int8_conv import Int8Layer
from int8run.models.dual_denoisers import split_denoiser
from int8run.models.loader import VAE
from int8run.models.resolve_weights import WEIGHTS_NAME
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.vae import QuantizedVae
from int8run.utils.disk_cache import DiskCache
from int8run.utils.paths import SAFETENSORS, expand_path
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
HEADER_BYTES_PER_LAYER = 512  # about


def cache_layers(
    cache: DiskCache, key: str, layers: Mapping[str, Int8Layer], provenance: Mapping[str, Any]
) -> None:
    """Write the INT8 layers of all denoisers to one file of the cache.

    Args:
        cache: of earlier and later runs.
        key: of the settings that made the layers.
        layers: by name.
        provenance: how they were made.
    """
    obstacle = find_cache_obstacle(layers)
    if obstacle is not None:
        log.info("The INT8 layers are not kept for later runs: %s", obstacle)
        return
    num_bytes = sum(map(estimate_file_bytes, layers.values()))
    names = keep_own_names(f"{name}.weight" for name in layers)

    def write(path: Path) -> None:
        write_tensors(path, names, layers, {}, provenance)

    cache.put("int8", key, num_bytes, write)


def estimate_file_bytes(layer: Int8Layer) -> int:
    """About how many bytes of a file a layer takes."""
    num_weights = layer.in_features * layer.out_features
    scale_bytes = 4 * layer.out_features
    if isinstance(layer, GroupedInt8Linear):
        scale_bytes += layer.group_scale.element_size() * num_weights // layer.group_size
    return num_weights * layer.bits // 8 + scale_bytes + HEADER_BYTES_PER_LAYER


def find_cache_obstacle(layers: Mapping[str, Int8Layer]) -> str | None:
    """Why no file can hold some layers; None: one can."""
    for layer in layers.values():
        obstacle = None if layer.bits == 8 else find_marker_obstacle(layer.transform)
        if obstacle is not None:
            return obstacle
    return None


def save_layers(
    save: str, loaded: LoadedModel, layers: Mapping[str, Int8Layer], provenance: Mapping[str, Any]
) -> None:
    """Write every denoiser with its INT8 layers.

    Args:
        save: a `.safetensors` file or a folder.
        loaded: the float model.
        layers: by name.
        provenance: how they were made.
    """
    parts = split_denoiser(loaded.denoiser)
    for denoiser in loaded.source.denoisers:
        is_single = "" in parts
        prefix = "" if is_single else f"{denoiser.component}."
        own_layers = {
            name.removeprefix(prefix): layer for name, layer in layers.items() if name.startswith(prefix)
        }
        path = save_denoiser(
            get_save_location(save, "" if is_single else denoiser.component),
            parts[prefix],
            own_layers,
            provenance,
            denoiser.config,
        )
        megabytes = path.stat().st_size / 1e6
        log.info("Saved %s to %s (%.1f MB)", count_noun(len(own_layers), "INT8 layer"), path, megabytes)


def list_saved_files(save: str, denoiser: nn.Module) -> list[Path]:
    """The files of weights that `save_layers` wrote.

    Args:
        save: a `.safetensors` file or a folder.
        denoiser: of the model, two joined ones among them.
    """
    files = []
    for prefix in split_denoiser(denoiser):
        path = expand_path(get_save_location(save, prefix.removesuffix("."))).absolute()
        files.append(path if path.suffix == SAFETENSORS else path / WEIGHTS_NAME)
    return files


def save_vae(save: str, vae: QuantizedVae, provenance: Mapping[str, Any]) -> None:
    """Write the INT8 VAE beside the denoiser, as the folder of a VAE in a diffusers pipeline.

    Args:
        save: of the denoiser.
        vae: the INT8 one.
        provenance: how it was made.
    """
    float_vae: Any = vae.float_vae
    path = save_denoiser(
        get_vae_folder(save), float_vae, vae.layers, provenance, json.loads(float_vae.to_json_string())
    )
    log.info(
        "Saved the VAE with %s to %s; 'model.parts.vae=[%s, %s]' int8.vae=int8 uses it",
        count_noun(len(vae.layers), "INT8 layer"),
        path.parent,
        type(float_vae).__name__,
        path.parent,
    )


def get_vae_folder(save: str) -> str:
    """Where the INT8 VAE is written: `x_vae` beside `x.safetensors`, `vae` in a folder."""
    return get_save_location(save, VAE).removesuffix(Path(save).suffix)


def get_save_location(save: str, component: str) -> str:
    """Where one denoiser is written.

    Args:
        save: a `.safetensors` file or a folder.
        component: one of two denoisers, which gets a file (`x_transformer_2.safetensors`) or a folder
            (`x/transformer_2`) for itself; empty: the only denoiser.
    """
    if not component:
        return save
    path = Path(save)
    if path.suffix:
        return str(path.with_name(f"{path.stem}_{component}{path.suffix}"))
    return str(path / component)
