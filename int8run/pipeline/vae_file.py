"""A VAE whose files hold quantized weights: `save=` of a run wrote it, or another program.

load.py opens it in the place of diffusers, which would take integers for floats, and gives the pipeline its
float form. `pipeline.vae` takes the INT8 layers as they are.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from int8run.checkpoints.layer import CheckpointLayer
from int8run.errors import FileError
from int8run.layers.int8_conv import find_conv_obstacle, is_convolution
from int8run.layers.int8_linear import QuantizedLayer
from int8run.layers.plan import LayerPlan
from int8run.models.loader import VAE, get_part_class
from int8run.models.model_folders import read_model_index, resolve_part_folder
from int8run.models.source import build_empty_model, read_config
from int8run.pipeline.checkpoint_weights import DenoiserWeights, FileWeights
from int8run.pipeline.model_files import find_scaled_layers
from int8run.quant.grouped_weight import count_bits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VaeFile:
    """A VAE out of files with quantized weights.

    Args:
        module: its float form; a quantized weight is the product with its scales there.
        weights: the files.
        layers: those whose integers can be used as they are, by module name.
    """

    module: nn.Module
    weights: DenoiserWeights
    layers: Mapping[str, CheckpointLayer]

    @property
    def location(self) -> str:
        """Where the files are, for messages."""
        return str(self.weights.parts[""].path)

    def apply_to_plans(self, plans: Sequence[LayerPlan], padding_convolutions: Sequence[str]) -> None:
        """Change the plans of a VAE to what the files have; without INT8 layers they stay as they are.

        Args:
            plans: of every Linear and convolution.
            padding_convolutions: names of subclasses of convolutions that INT8 knows.

        Raises:
            FileError: for the weight of a convolution that INT8 does not have.
        """
        if not self.layers:
            return
        inexact = self.weights.find_inexact_layers()  # quantized again, as if they were float
        kept_float = self.weights.read_provenance().get("kept_float")
        reasons = kept_float if isinstance(kept_float, Mapping) else {}
        for plan in plans:
            if plan.name in self.layers:
                self.check_layer(plan.name, padding_convolutions)
                plan.skip_reason = None
            elif plan.name not in inexact:
                plan.skip_reason = str(reasons.get(plan.name) or plan.skip_reason or "float in the file")

    def check_layer(self, name: str, padding_convolutions: Sequence[str]) -> None:
        """Raise FileError for integers of a convolution that INT8 does not have."""
        module = self.module.get_submodule(name)
        if not is_convolution(module):
            return
        obstacle = find_conv_obstacle(module, known_subclasses=padding_convolutions)
        if obstacle is not None:
            raise FileError(
                f"{self.location} has INT8 numbers for {name}, which is {obstacle}; the file is for another "
                "VAE"
            )

    def read_layers(
        self, plans: Sequence[LayerPlan], device: torch.device
    ) -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
        """Read the INT8 layers, one at a time.

        Args:
            plans: of layers in the files; what is known of each is put there.
            device: where they go.
        """
        provenance = self.weights.read_provenance()
        facts_by_layer = provenance.get("layers")
        if not isinstance(facts_by_layer, Mapping):
            facts_by_layer = {}
        for plan in plans:
            layer = self.weights.read_int8_layer(plan.name)
            layer.transform.to(device)
            weight = layer.weight.to(device)
            plan.bits = count_bits(weight)
            plan.outlier = layer.transform.label
            plan.rounding = str(provenance.get("rounding", "unknown"))
            facts = facts_by_layer.get(plan.name)
            if isinstance(facts, Mapping):
                plan.measured |= {name: value for name, value in facts.items() if isinstance(value, float)}
            bias: Tensor | None = getattr(self.module.get_submodule(plan.name), "bias", None)
            yield plan, QuantizedLayer(weight, layer.transform, bias)


def find_vae_place(folder: Path, parts: Mapping[str, Sequence[str]]) -> tuple[str, Path] | None:
    """The class and the folder of a pipeline's VAE; None: it has none here.

    Args:
        folder: of the pipeline.
        parts: components from elsewhere, as `model.parts` names them; one of them may be the VAE.

    Raises:
        FileError: when it is on the hub and cannot be downloaded.
    """
    if VAE in parts:
        class_name, location = parts[VAE]
        return class_name, resolve_part_folder(VAE, location)
    entry = read_model_index(folder, str(folder)).get(VAE)
    if not isinstance(entry, list) or len(entry) != 2 or None in entry or not (folder / VAE).is_dir():
        return None
    return str(entry[1]), folder / VAE


def open_vae_file(
    folder: Path,
    parts: Mapping[str, Sequence[str]],
    dtype: torch.dtype,
    device: torch.device,
) -> VaeFile | None:
    """Open the VAE of a pipeline where its files hold quantized weights; None: diffusers reads it.

    Args:
        folder: of the pipeline.
        parts: components from elsewhere.
        dtype: of the float model.
        device: where its float form goes.

    Raises:
        FileError: when they are damaged, or of another VAE than their config says.
    """
    place = find_vae_place(folder, parts)
    if place is None:
        return None
    class_name, vae_folder = place
    if not find_scaled_layers(vae_folder):
        return None
    cls = get_part_class(VAE, class_name)
    module = build_empty_model(cls, read_config(vae_folder), VAE, dtype)
    weights = DenoiserWeights({"": FileWeights(vae_folder, module)})
    weights.fill_parameters(module, list(module.state_dict()), device)
    module.to(device)  # buffers that no file holds
    return VaeFile(module, weights, weights.find_int8_layers())
