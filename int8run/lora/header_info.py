"""What the LoRA files of a stack say about themselves, read from their headers before anything is loaded."""

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
from int8run.lora.config import LoraSettings
from int8run.lora.find import find_lora
from int8run.lora.metadata import TriggerWords, append_triggers, find_missing_triggers, find_trigger_words
from int8run.models.sampling import Sampling

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraHeader:
    """One file of a stack, as far as its header tells."""

    name: str
    path: Path
    header: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    base: LoraBase | None
    triggers: TriggerWords | None


def read_lora_headers(stack: LoraSettings, lora_base: str, lora_dir: Path | None = None) -> list[LoraHeader]:
    """Find the files of a stack and read their headers.

    Raises:
        LoraError: a file that is not there, is damaged, or was surely made for another base model.
    """
    heads = []
    if lora_dir is not None and not lora_dir.is_dir():
        raise LoraError(f"lora_dir={lora_dir}: no such folder (looked for {lora_dir.absolute()})")
    for adapter in stack.adapters:
        path = find_lora(*adapter.get_source(lora_base), lora_dir)
        header, metadata = read_header(path)
        base = detect_lora_base(header, metadata)
        if (doubt := check_lora_base(path, base, lora_base)) is not None:
            log.warning("%s", doubt)
        heads.append(
            LoraHeader(adapter.name, path, header, metadata, base, find_trigger_words(path, metadata))
        )
    return heads


def add_trigger_words(
    samples: Sequence[Sample], heads: Sequence[LoraHeader], stack: LoraSettings
) -> list[Sample]:
    """The samples with the trigger words that their prompts lack, if the stack inserts them; else one warning for each LoRA."""
    told = {
        head.name: head.triggers
        for head, on in zip(heads, stack.is_used, strict=True)
        if on and head.triggers is not None
    }
    for name, triggers in told.items():
        words, listed = triggers.words, ", ".join(triggers.words)
        if triggers.is_guessed:  # nobody named them: they are frequent in the captions that it was trained on
            log.info("LoRA %r names no trigger words; frequent in its training captions: %s", name, listed)
            continue
        lacking = sum(bool(find_missing_triggers(sample.prompt, words)) for sample in samples)
        if not lacking:
            log.info("LoRA %r has trigger words, and every prompt has them: %s", name, listed)
        elif stack.insert_triggers:
            log.info(
                "LoRA %r has trigger words, now added to %d of %d prompts: %s",
                name,
                lacking,
                len(samples),
                listed,
            )
        else:
            log.warning(
                "LoRA %r has trigger words that %d of %d prompts lack: %s; lora.insert_triggers=true adds them",
                name,
                lacking,
                len(samples),
                listed,
            )
        samples = [
            replace(s, prompt=append_triggers(s.prompt, words)) if stack.insert_triggers else s
            for s in samples
        ]
    return list(samples)


def list_few_step_warnings(
    heads: Sequence[LoraHeader],
    stack: LoraSettings,
    lora_base: str,
    location: str,
    sampling: Sampling,
    scheduler: Any,
) -> list[str]:
    """What of a run speaks against its few-step LoRA, chosen by name or recognised by the file's words: a line each.

    Args:
        location: of the model.
        scheduler: that the pipeline has.
    """
    lines = []
    strengths = dict(zip((a.name for a in stack.adapters), stack.strengths, strict=True))
    for adapter, head, on in zip(stack.adapters, heads, stack.is_used, strict=True):
        name = (
            adapter.few_step
            or few_step.detect_preset(head.path, head.metadata, lora_base)
            or few_step.detect_preset(head.path, head.metadata)
        )
        if on and few_step.is_for_training_only(head.path, head.metadata):
            lines.append(
                f"LoRA {adapter.name!r} says that it serves training; pictures drawn with it are usually worse"
            )
        if not on or name is None:
            continue
        if (distilled := few_step.warn_about_distilled_model(name, location)) is not None:
            lines.append(f"LoRA {adapter.name!r}: {distilled}")
        if lora_base not in few_step.load_table()["presets"][name]["bases"]:
            lines.append(
                f"LoRA {adapter.name!r} looks like a few-step LoRA ({name}), and nothing is known of it on {lora_base}; "
                "set sampler.steps, sampler.guidance and sampler.scheduler as its author says"
            )
            continue
        preset = few_step.get_preset(
            name, lora_base, few_step.parse_steps_in_name(head.path) or sampling.steps
        )
        others = {other: s for other, s in strengths.items() if other != adapter.name and s}
        told = few_step.list_differences(
            preset, sampling, type(scheduler).__name__, strengths[adapter.name], others, scheduler.config
        )
        wish = (
            ""
            if adapter.few_step
            else f"; few_step: {name} at the adapter sets steps, scheduler and guidance"
        )
        lines += [f"LoRA {adapter.name!r}: {line}{wish}" for line in told]
    return lines
