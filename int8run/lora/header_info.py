"""What the LoRA files of a stack say about themselves, read from their headers before anything is loaded.

A run reads the headers first, so that a file that is missing or made for another base model fails within a
second. Then it uses them for trigger words and for warnings about few-step LoRAs.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from int8run.checkpoints.header import read_header
from int8run.errors import LoraError
from int8run.generate.prompts import Sample
from int8run.lora import few_step
from int8run.lora.base_model import LoraBase, check_lora_base, detect_lora_base
from int8run.lora.config import Adapter, LoraSettings
from int8run.lora.few_step_differences import list_differences
from int8run.lora.find import find_lora
from int8run.lora.side_files import list_side_files
from int8run.lora.trigger_words import (
    TriggerWords,
    append_triggers,
    find_missing_triggers,
    find_trigger_words,
)
from int8run.models.sampling import Sampling

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraHeader:
    """One file of a stack, as far as its header tells.

    Args:
        name: of its adapter.
        path: of the file.
        tensors: tensor name -> entry with its `shape` and `dtype`.
        metadata: untrusted.
        base: the base model that it was made for; None: nothing tells.
        triggers: its trigger words; None: none are known.
    """

    name: str
    path: Path
    tensors: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    base: LoraBase | None
    triggers: TriggerWords | None

    @property
    def files(self) -> list[Path]:
        """Every file that decides what the LoRA does: its own, and those beside it that are read."""
        return [self.path, *list_side_files(self.path, self.metadata)]


def read_lora_headers(stack: LoraSettings, lora_base: str, lora_dir: Path | None = None) -> list[LoraHeader]:
    """Find the files of a stack and read their headers.

    Args:
        stack: its adapters.
        lora_base: base model of the model.
        lora_dir: the user's folder of LoRAs.

    Raises:
        LoraError: when a file is not found, is damaged, or was surely made for another base model.
    """
    if lora_dir is not None and not lora_dir.is_dir():
        raise LoraError(f"lora_dir={lora_dir}: no such folder (looked for {lora_dir.absolute()})")
    headers = []
    for adapter in stack.adapters:
        source, weight_name = adapter.get_source(lora_base)
        path = find_lora(source, weight_name, lora_dir)
        tensors, metadata = read_header(path)
        base = detect_lora_base(tensors, metadata)
        warning = check_lora_base(path, base, lora_base)
        if warning is not None:
            log.warning("%s", warning)
        header = LoraHeader(
            name=adapter.name,
            path=path,
            tensors=tensors,
            metadata=metadata,
            base=base,
            triggers=find_trigger_words(path, metadata),
        )
        headers.append(header)
    return headers


# -- trigger words -----------------------------------------------------------------------------------------


def add_trigger_words(
    samples: Sequence[Sample], headers: Sequence[LoraHeader], stack: LoraSettings
) -> list[Sample]:
    """The samples, with the trigger words that their prompts lack if the stack inserts them.

    Without that, a warning for each LoRA tells how many prompts lack its words.

    Args:
        samples: what is to be generated.
        headers: of the stack's files, in its order.
        stack: its LoRAs that are not used are skipped.
    """
    for header, is_used in zip(headers, stack.is_used, strict=True):
        triggers = header.triggers
        if not is_used or triggers is None:
            continue
        log_trigger_words(header.name, triggers, samples, is_inserting=stack.insert_triggers)
        # guessed ones are frequent in the training captions, but nobody named them as triggers
        if stack.insert_triggers and not triggers.is_guessed:
            samples = [
                replace(sample, prompt=append_triggers(sample.prompt, triggers.words)) for sample in samples
            ]
    return list(samples)


def log_trigger_words(
    name: str, triggers: TriggerWords, samples: Sequence[Sample], *, is_inserting: bool
) -> None:
    """Log the trigger words of a LoRA, and how many prompts lack them."""
    words = ", ".join(triggers.words)
    if triggers.is_guessed:
        log.info("LoRA %r names no trigger words; frequent in its training captions: %s", name, words)
        return
    n_lacking = sum(bool(find_missing_triggers(sample.prompt, triggers.words)) for sample in samples)
    if not n_lacking:
        log.info("LoRA %r has trigger words, and every prompt has them: %s", name, words)
    elif is_inserting:
        log.info(
            "LoRA %r has trigger words, now added to %d of %d prompts: %s",
            name,
            n_lacking,
            len(samples),
            words,
        )
    else:
        log.warning(
            "LoRA %r has trigger words that %d of %d prompts lack: %s; lora.insert_triggers=true adds them",
            name,
            n_lacking,
            len(samples),
            words,
        )


# -- few-step LoRAs ----------------------------------------------------------------------------------------


def list_few_step_warnings(
    headers: Sequence[LoraHeader],
    stack: LoraSettings,
    *,
    lora_base: str,
    location: str,
    sampling: Sampling,
    scheduler: Any,
) -> list[str]:
    """Warnings about the few-step LoRAs of a stack, and about LoRAs that are for training only.

    A few-step LoRA is warned of where settings contradict it, where the model is distilled already, and where
    there is no preset for its base.

    Args:
        headers: of the stack's files, in its order.
        stack: the LoRAs; unused ones are skipped.
        lora_base: base model of the model.
        location: of the model.
        sampling: of the run.
        scheduler: that the pipeline has.
    """
    lines = []
    for adapter, header, is_used in zip(stack.adapters, headers, stack.is_used, strict=True):
        if not is_used:
            continue
        if few_step.is_for_training_only(header.path, header.metadata):
            lines.append(
                f"LoRA {adapter.name!r} says that it is for training; "
                "images generated with it are usually worse"
            )
        preset_name = find_preset_name(adapter, header, lora_base)
        if preset_name is None:
            continue
        distilled_warning = few_step.warn_about_distilled_model(preset_name, location)
        if distilled_warning is not None:
            lines.append(f"LoRA {adapter.name!r}: {distilled_warning}")
        if few_step.has_preset(preset_name, lora_base):
            # a file that names no steps is taken to be made for those of the run
            steps = few_step.parse_steps_in_name(header.path) or sampling.steps
            preset = few_step.get_preset(preset_name, lora_base, steps)
            lines += list_preset_warnings(adapter, preset, stack, sampling, scheduler)
        else:
            lines.append(
                f"LoRA {adapter.name!r} looks like a few-step LoRA ({preset_name}), and nothing is known "
                f"about it on {lora_base}; "
                "set sampler.steps, sampler.guidance and sampler.scheduler as its author says"
            )
    return lines


def find_preset_name(adapter: Adapter, header: LoraHeader, lora_base: str) -> str | None:
    """The few-step preset of a LoRA: named at its adapter, or recognized by its file; None without one.

    One that is made for the base model counts before others with the same words.
    """
    if adapter.few_step is not None:
        return adapter.few_step
    preset_for_base = few_step.detect_preset(header.path, header.metadata, lora_base)
    if preset_for_base is not None:
        return preset_for_base
    return few_step.detect_preset(header.path, header.metadata)


def list_preset_warnings(
    adapter: Adapter, preset: few_step.FewStepPreset, stack: LoraSettings, sampling: Sampling, scheduler: Any
) -> list[str]:
    """One line for each setting of a run that contradicts the preset of one adapter."""
    own_strength: float | None = None
    companions: dict[str, float] = {}
    for other, strength in zip(stack.adapters, stack.strengths, strict=True):
        if other.name == adapter.name:
            own_strength = strength
        elif strength:
            companions[other.name] = strength
    differences = list_differences(
        preset,
        sampling,
        scheduler=type(scheduler).__name__,
        strength=own_strength,
        companions=companions,
        scheduler_config=scheduler.config,
    )
    hint = ""
    if not adapter.few_step:
        hint = f"; few_step: {preset.name} at the adapter sets steps, scheduler and guidance"
    return [f"LoRA {adapter.name!r}: {line}{hint}" for line in differences]
