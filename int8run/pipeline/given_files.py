"""Refuses files that are for another model by the names in their headers, before any weight is read.

build.py calls it while the model is loaded: the denoisers are known then, and nothing of them is in memory.
What these checks let pass is looked at once more, and in full, where it is used. Text encoders of `clip=`
need no check here: text_encoders.py opens them before the pipeline is loaded.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.lora.entries import Entry
from int8run.lora.file_match import report_unmatched
from int8run.lora.key_parsing import DENOISER
from int8run.lora.match import MatchRequest, locate_changes, match_file
from int8run.lora.model_component import ModelComponent
from int8run.models.dual_denoisers import DualDenoiser
from int8run.models.family import ModelSource
from int8run.pipeline.checkpoint_paths import check_has_int8_layers, resolve_checkpoint_paths
from int8run.pipeline.checkpoint_weights import DenoiserWeights, FileWeights


def check_checkpoint_fits(
    checkpoint: str | Mapping[str, str], skeletons: Mapping[str, nn.Module], model: ModelSource
) -> None:
    """Check that `int8.checkpoint` holds INT8 layers of these denoisers.

    Args:
        checkpoint: a file or folder, or one for each denoiser.
        skeletons: the denoisers without weights, by component.
        model: says what the file leaves open.

    Raises:
        FileError: when it does not.
        ConfigError: when it is not clear which file belongs to which denoiser.
    """
    paths = resolve_checkpoint_paths(checkpoint, list(skeletons))
    declared = DeclaredFormat(model.quant_format, model.sdnq)
    files = {}
    for component, skeleton in skeletons.items():
        files[f"{component}."] = FileWeights(
            paths[component],
            skeleton,
            is_partial=True,
            declared=declared,
            reports_unused=False,
        )
    check_has_int8_layers(DenoiserWeights(files), checkpoint)


def check_loras_fit(entries: Sequence[Entry], skeletons: Mapping[str, nn.Module]) -> None:
    """Check that LoRAs which change nothing but the denoiser change some module of it.

    Args:
        entries: the LoRAs.
        skeletons: the denoisers without weights, by component.

    Raises:
        LoraError: for the first one that does not.
    """
    denoiser: nn.Module = DualDenoiser(skeletons)
    if len(skeletons) == 1:
        denoiser = next(iter(skeletons.values()))
    components = {DENOISER: ModelComponent(denoiser)}
    for entry in entries:
        request = MatchRequest(entry.file, entry.components)
        changes = entry.file.changes
        if set(changes) != {DENOISER} or not request.includes(DENOISER):
            continue
        if not locate_changes(DENOISER, changes[DENOISER], components, request.experts):
            # which raises, because nothing is matched
            report_unmatched(entry.file, match_file(request, components), strict=True)
