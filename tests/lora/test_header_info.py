"""What the headers of a stack tell before loading: base models, trigger words, few-step LoRAs."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from support.cli_process import Command, command_in
from support.helpers import randn

from int8run.errors import LoraError
from int8run.generate.prompts import Sample, build_samples
from int8run.lora.config import Adapter, LoraSettings
from int8run.lora.header_info import add_trigger_words, list_few_step_warnings, read_lora_headers
from int8run.models.sampling import Sampling
from int8run.pipeline import build


def save_lora(path: Path, metadata: Mapping[str, str] | None = None, hidden: int = 384) -> Path:
    """A LoRA file whose one module is that of a FLUX-like model with this hidden size."""
    key = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {
        f"{key}.lora_A.weight": randn(2, hidden).half(),
        f"{key}.lora_B.weight": torch.ones(hidden, 2).half(),
    }
    save_file(tensors, path, metadata=dict(metadata or {}))
    return path


def make_stack(files: Sequence[Path], strengths: Sequence[float] = (), **options: object) -> LoraSettings:
    """A stack of these files, called by their stems."""
    adapters = [
        Adapter(f.stem, str(f), s) for f, s in zip(files, strengths or [1.0] * len(files), strict=True)
    ]
    return LoraSettings(adapters, **options).resolve_for_base("tiny")


# -- base models ---------------------------------------------------------------------------------------------


def test_headers_are_read_in_order(tmp_path: Path) -> None:
    named = save_lora(tmp_path / "named.safetensors", {"modelspec.trigger_phrase": "ghibsky style"})
    plain = save_lora(tmp_path / "plain.safetensors")

    first, second = read_lora_headers(make_stack([named, plain]), "tiny")

    assert (first.name, first.path, first.base.name, first.triggers.words) == (
        "named",
        named,
        "tiny",
        ("ghibsky style",),
    )
    assert first.metadata == {"modelspec.trigger_phrase": "ghibsky style"} and len(first.tensors) == 2
    assert (second.name, second.base.name, second.triggers) == ("plain", "tiny", None)
    assert read_lora_headers(LoraSettings(), "tiny") == []


def test_files_are_found_in_lora_dir(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    save_lora(tmp_path / "mine" / "style.safetensors")

    stack = LoraSettings([Adapter("a", "style")])

    assert (
        read_lora_headers(stack, "tiny", tmp_path / "mine")[0].path == tmp_path / "mine" / "style.safetensors"
    )
    with pytest.raises(
        LoraError, match=r"LoRA file not found: styl; searched .*/mine, .*nearest there: style"
    ):
        read_lora_headers(LoraSettings([Adapter("a", "styl")]), "tiny", tmp_path / "mine")


def test_contradicting_tag_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_lora_headers(
        make_stack([save_lora(tmp_path / "odd.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})]),
        "tiny",
    )
    (said,) = caplog.messages

    assert said == (
        "odd.safetensors: its header says 'sdxl_base_v1-0', its shapes are those of the tiny model "
        "of int8run; the shapes count"
    )


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """The command, which may not come so far as to load a model."""

    def never(*_: object) -> None:
        raise AssertionError("a model is loaded for a LoRA that cannot be used")

    monkeypatch.setattr(build, "load_model", never)
    with command_in(tmp_path / "work", monkeypatch, capsys) as run:
        yield run


def test_lora_of_another_base_is_rejected_before_loading(tmp_path: Path, command: Command) -> None:
    file = save_lora(tmp_path / "big.safetensors", hidden=3072)
    outcome = command("lora=file", f"lora.adapters.0.path={file}", "tracker=none")

    assert outcome.code == 3
    assert re.fullmatch(
        r"big\.safetensors was made for FLUX\.1 or .* \(.*\), the model is the tiny model of "
        r"int8run \(hidden 384\); choose a LoRA made "
        r"for the tiny model of int8run, or the model that this one was made for",
        outcome.message,
    )


def test_missing_lora_is_reported_before_loading(command: Command) -> None:
    outcome = command("lora=file", "lora.adapters.0.path=absent.safetensors", "tracker=none")

    assert outcome.code == 3 and outcome.message.startswith(
        "LoRA file not found: absent.safetensors; searched "
    )


# -- trigger words -------------------------------------------------------------------------------------------


@pytest.fixture
def styles(tmp_path: Path) -> list[Path]:
    """Two LoRAs with trigger words and one without."""
    words = {"ink": "ink drawing", "gloss": "gl0ss, shiny", "plain": ""}
    return [
        save_lora(tmp_path / f"{name}.safetensors", {"modelspec.trigger_phrase": text})
        for name, text in words.items()
    ]


SAMPLES = build_samples(["a fox, Ink  drawing", "an owl"], 1, 0)


def add_words(
    styles: list[Path], caplog: pytest.LogCaptureFixture, strengths: Sequence[float], insert: bool
) -> list[Sample]:
    """The samples after their trigger words were looked for; only warnings come into the log."""
    stack = make_stack(styles, strengths, insert_triggers=insert)
    heads = read_lora_headers(stack, "tiny")
    with caplog.at_level(logging.WARNING):
        return add_trigger_words(SAMPLES, heads, stack)


def test_missing_trigger_words_are_one_warning_for_each_lora(
    styles: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert add_words(styles, caplog, [1.0, -0.5, 1.0], False) == SAMPLES
    assert caplog.messages == [
        "LoRA 'ink' has trigger words that 1 of 2 prompts lack: ink drawing; "
        "lora.insert_triggers=true adds them",
        "LoRA 'gloss' has trigger words that 2 of 2 prompts lack: gl0ss, shiny; "
        "lora.insert_triggers=true adds them",
    ]


def test_trigger_words_are_inserted_where_they_are_missing(
    styles: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    found = add_words(styles, caplog, [1.0, -0.5, 1.0], True)

    assert [s.prompt for s in found] == [
        "a fox, Ink  drawing, gl0ss, shiny",
        "an owl, ink drawing, gl0ss, shiny",
    ]
    # names of files and keys of trackers stay, so that runs with and without can be compared
    assert [(s.key, s.seed) for s in found] == [(s.key, s.seed) for s in SAMPLES] and caplog.messages == []


@pytest.mark.parametrize("insert", [False, True])
def test_unused_lora_has_no_trigger_words(
    styles: list[Path], caplog: pytest.LogCaptureFixture, insert: bool
) -> None:
    found = add_words(styles[:2], caplog, [1.0, 0.0], insert)

    assert [s.prompt for s in found] == [SAMPLES[0].prompt, "an owl, ink drawing" if insert else "an owl"]
    assert [m.partition(" has ")[0] for m in caplog.messages] == ([] if insert else ["LoRA 'ink'"])


def test_missing_lora_dir_is_rejected() -> None:
    with pytest.raises(LoraError, match=r"^lora_dir=nowhere: no such folder \(looked for /.*/nowhere\)$"):
        read_lora_headers(LoraSettings([Adapter("a", "ink")]), "tiny", Path("nowhere"))


# -- few-step LoRAs ------------------------------------------------------------------------------------------

FOUR_STEPS = Sampling(steps=4, guidance=1.0, scheduler="LCMScheduler")


def list_warnings(
    stack: LoraSettings,
    sampling: Sampling,
    scheduler: str,
    base: str = "sd15",
    location: str = "somebody/model",
) -> list[str]:
    """Lines about a stack on a model of this base, whatever the shapes in its files."""
    return list_few_step_warnings(
        read_lora_headers(stack, "tiny"),
        stack,
        lora_base=base,
        location=location,
        sampling=sampling,
        scheduler=getattr(diffusers, scheduler)(),
    )


def make_few_step_stack(
    path: Path, strength: float | None = None, preset: str | None = "lcm", others: Sequence[Adapter] = ()
) -> LoraSettings:
    """A stack whose first is a few-step LoRA."""
    return LoraSettings([Adapter("fast", str(path), strength, few_step=preset), *others]).resolve_for_base(
        "sd15"
    )


def test_matching_run_has_no_few_step_warning(tmp_path: Path) -> None:
    assert (
        list_warnings(make_few_step_stack(save_lora(tmp_path / "a.safetensors")), FOUR_STEPS, "LCMScheduler")
        == []
    )


def test_each_contradicting_setting_is_one_line(tmp_path: Path) -> None:
    other = Adapter("style", str(save_lora(tmp_path / "b.safetensors")), 0.9)
    off = Adapter("off", str(save_lora(tmp_path / "c.safetensors")), 3.0, enabled=False)
    stack = make_few_step_stack(save_lora(tmp_path / "a.safetensors"), 0.5, others=[other, off])

    made_for = "lcm on sd15 is made for"

    assert list_warnings(stack, Sampling(steps=28), "DDIMScheduler") == [
        f"LoRA 'fast': sampler.steps is 28; {made_for} 4 (2 to 8)",
        f"LoRA 'fast': the scheduler is DDIMScheduler; {made_for} LCMScheduler",
        f"LoRA 'fast': its strength is 0.5; {made_for} 1",
        "LoRA 'fast': LoRA 'style' has strength 0.9; beside lcm at most 0.45 is advised",
    ]


def test_strength_of_the_stack_counts(tmp_path: Path) -> None:
    stack = LoraSettings(
        [Adapter("fast", str(save_lora(tmp_path / "a.safetensors")), 1.0, few_step="lcm")], strength=0.5
    )

    assert list_warnings(stack, FOUR_STEPS, "LCMScheduler") == [
        "LoRA 'fast': its strength is 0.5; lcm on sd15 is made for 1"
    ]


def test_few_step_lora_is_recognized_without_a_preset(tmp_path: Path) -> None:
    stack = make_few_step_stack(save_lora(tmp_path / "my_lcm_lora.safetensors"), 1.0, preset=None)
    wish = "; few_step: lcm at the adapter sets steps, scheduler and guidance"

    assert list_warnings(stack, Sampling(steps=28), "LCMScheduler") == [
        f"LoRA 'fast': sampler.steps is 28; lcm on sd15 is made for 4 (2 to 8){wish}"
    ]
    assert list_warnings(stack, FOUR_STEPS, "LCMScheduler") == []


def test_settings_of_the_scheduler_in_use_are_compared(tmp_path: Path) -> None:
    stack = make_few_step_stack(save_lora(tmp_path / "a.safetensors"), preset="pcm")

    assert list_warnings(stack, FOUR_STEPS, "DDIMScheduler")[0] == (
        "LoRA 'fast': the scheduler's timestep_spacing is leading; pcm on sd15 is made for trailing"
    )


def test_steps_in_the_file_name_count(tmp_path: Path) -> None:
    stack = make_few_step_stack(save_lora(tmp_path / "lcm-2steps.safetensors"))

    assert list_warnings(stack, FOUR_STEPS, "LCMScheduler") == [
        "LoRA 'fast': sampler.steps is 4; lcm on sd15 is made for 2"
    ]


def test_training_adapter_is_a_warning(tmp_path: Path) -> None:
    stack = LoraSettings(
        [Adapter("a", str(save_lora(tmp_path / "zimage_turbo_training_adapter_v1.safetensors")), 1.0)]
    )
    (line,) = list_warnings(stack, FOUR_STEPS, "LCMScheduler")

    assert line == "LoRA 'a' says that it is for training; images generated with it are usually worse"


def test_base_without_a_preset_is_a_warning(tmp_path: Path) -> None:
    stack = make_few_step_stack(save_lora(tmp_path / "my_lcm_lora.safetensors"), 1.0, preset=None)
    line = "LoRA 'fast' looks like a few-step LoRA (lcm), and nothing is known about it on flux; "

    line += "set sampler.steps, sampler.guidance and sampler.scheduler as its author says"

    assert list_warnings(stack, Sampling(steps=28), "DDIMScheduler", base="flux") == [line]


def test_distilled_model_is_a_warning(tmp_path: Path) -> None:
    stack = make_few_step_stack(save_lora(tmp_path / "a.safetensors"))
    (line,) = list_warnings(stack, FOUR_STEPS, "LCMScheduler", location="someone/sd-turbo")

    assert (
        line == "LoRA 'fast': someone/sd-turbo is made for few steps already; "
        "a few-step LoRA (lcm) on top of it overcooks the image"
    )


@pytest.mark.parametrize("out", [{"strength": 0.0}, {"enabled": False}], ids=str)
def test_unused_few_step_lora_has_no_warning(tmp_path: Path, out: dict[str, object]) -> None:
    file = save_lora(tmp_path / "lcm.safetensors")
    stack = LoraSettings(
        [Adapter("fast", str(file), few_step="lcm", **{"strength": 1.0, **out})]
    ).resolve_for_base("sd15")

    assert list_warnings(stack, Sampling(steps=28), "DDIMScheduler") == []
