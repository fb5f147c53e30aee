"""Calibration: which calls of the float model are looked at, and what is kept of every layer's input."""

import itertools
from dataclasses import replace

import pytest
import torch
from support.compare import assert_close
from support.helpers import TinyModel, randn
from support.run_job import make_spec
from support.tiny_pipeline import random_pipeline
from torch import nn

from int8run.errors import ConfigError
from int8run.generate.calibration_settings import CalibrationSettings
from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import NO_INPUTS, SampleInputs
from int8run.layers.fusion import group_by_shared_input
from int8run.layers.plan import plan_layers
from int8run.models.sampling import Sampling
from int8run.outlier.smoothquant import SmoothQuant
from int8run.ptq.calibration import capture_calibration_calls, collect_layer_statistics, interleave_by_image
from int8run.ptq.quantize import quantize_layers
from int8run.quant.rounding import AbsMax, Gptq
from int8run.report.console import Progress

TWO = CalibrationSettings(["a fox", "an owl"])
LINEARS = ["proj_in", "blocks.0.1", "blocks.0.3", "blocks.1.1", "blocks.1.3", "proj_out"]


# --- settings


@pytest.mark.parametrize(
    "prompts", [[], (), "a fox", "", [""], ["a fox", "  "], ["a fox", 5], 5, None, {"a fox": 1}], ids=repr
)
def test_prompts_are_a_list_of_texts(prompts):
    with pytest.raises(
        ConfigError,
        match=(
            r"^calibration\.prompts (is .*; it takes a list(: calibration\.prompts=\[|"
            r" with at least one prompt, and none may be blank: )|has 5 as entry 1, which is no text)"
        ),
    ):
        CalibrationSettings(prompts)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        *[("seed", value, r"0 to 9223372036854775807") for value in (-1, 2**63, 1.5, "7")],
        *[("num_timesteps", value, "1 to 1000") for value in (0, 1001, True)],
        *[("max_tokens_per_layer", value, r"1 to 1048576") for value in (0, 2**20 + 1, 64.0, None)],
    ],
)
def test_ranges(key, value, allowed):
    with pytest.raises(
        ConfigError, match=rf"^calibration\.{key} is {value!r}; allowed is a whole number from {allowed}$"
    ):
        CalibrationSettings(["a fox"], **{key: value})


@pytest.mark.parametrize(
    "override",
    [
        "calibration.prompts=[]",
        "calibration.prompts=a fox",
        "calibration.prompts=null",
        "calibration.prompts=5",
    ],
)
def test_the_command_line_says_what_is_wrong_with_the_prompts(override):
    with pytest.raises(ConfigError, match=r"calibration\.prompts is .*; it takes a list"):
        make_spec([override])


def test_every_image_has_a_seed_of_its_own():
    found = [(s.prompt, s.seed) for s in CalibrationSettings(["a fox", "an owl", "a fox"], seed=40).samples]
    assert found == [("a fox", 40), ("an owl", 41), ("a fox", 42)]
    assert len({s.key for s in CalibrationSettings(["a fox", "a fox"]).samples}) == 2


def test_what_calibrates_is_not_what_is_judged():
    spec = make_spec([])
    assert not set(spec.calibration.prompts) & set(spec.prompts.prompts)
    assert spec.calibration.seed >= spec.seed + len(spec.prompts.prompts)


# --- which calls are looked at


class Step(nn.Module):
    """A denoiser that is called by keyword."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, hidden_states, timestep):
        return self.linear(hidden_states)


class Pipe:
    """As much of a pipeline as a calibration uses; an image starts from its prompt's length and its seed."""

    device = torch.device("cpu")

    def __init__(self):
        self.batches = []

    def register_modules(self, denoiser):
        self.denoiser = denoiser

    def __call__(self, prompt, num_inference_steps, generator, callback_on_step_end, **rest):
        if isinstance(prompt, str):
            prompt, generator = [prompt], [generator]
        self.batches.append((prompt, [g.initial_seed() for g in generator]))
        x = torch.tensor(
            [[[len(p), g.initial_seed(), 0.0, 0.0]] for p, g in zip(prompt, generator, strict=True)]
        )
        for step in range(num_inference_steps):
            self.denoiser(hidden_states=x, timestep=torch.tensor(step))
            x.add_(1)  # in place: what was recorded must not change with it
        return type("Output", (), {"images": []})()


def recorded(calibration, steps, batch=1):
    """The pipeline, and of each call its time step and the seeds of its images."""
    pipe, denoiser = Pipe(), Step()
    calls = capture_calibration_calls(
        pipe,
        "denoiser",
        denoiser,
        calibration=calibration,
        sampling=Sampling(steps=steps, batch=batch),
        progress=Progress(enabled=False),
    )
    for call in calls:
        # the state of that step, and not of the last one
        assert (call["hidden_states"][..., 3] == call["timestep"]).all()
    return pipe, [
        (int(call["timestep"]), (call["hidden_states"][:, 0, 1] - call["timestep"]).int().tolist())
        for call in calls
    ]


@pytest.mark.parametrize(
    ("moments", "steps", "looked_at"),
    [
        (1, 8, [0]),
        (2, 8, [0, 7]),
        (3, 9, [0, 4, 8]),
        (4, 8, [0, 2, 5, 7]),
        (4, 4, [0, 1, 2, 3]),
        (7, 8, [0, 1, 2, 4, 5, 6, 7]),
        (5, 3, [0, 1, 2]),
        (1000, 2, [0, 1]),
        (4, 1, [0]),
    ],
    ids=str,
)
def test_moments_are_spread_over_the_steps(moments, steps, looked_at):
    calibration = replace(TWO, num_timesteps=moments)
    _, found = recorded(calibration, steps)
    assert found == [(step, [seed]) for seed in (1000, 1001) for step in looked_at]


@pytest.mark.parametrize(
    ("batch", "seeds"),
    [(1, [[7], [8], [9]]), (2, [[7, 8], [9]]), (3, [[7, 8, 9]]), (8, [[7, 8, 9]])],
    ids=str,
)
def test_images_come_in_the_batches_of_the_run(batch, seeds):
    pipe, found = recorded(CalibrationSettings(["a", "bb", "ccc"], seed=7, num_timesteps=2), 5, batch)
    seeds_of_batches = [batch_seeds for _, batch_seeds in pipe.batches]
    prompts = list(itertools.chain.from_iterable(batch_prompts for batch_prompts, _ in pipe.batches))

    assert seeds_of_batches == seeds
    assert prompts == ["a", "bb", "ccc"]
    assert found == [(step, group) for group in seeds for step in (0, 4)]


def test_no_hook_stays_behind():
    denoiser = Step()
    capture_calibration_calls(
        Pipe(),
        "denoiser",
        denoiser,
        calibration=TWO,
        sampling=Sampling(steps=2),
        progress=Progress(enabled=False),
    )
    collect_layer_statistics(
        denoiser,
        plan_layers(denoiser, lambda name: None),
        groups=[["linear"]],
        calls=[call()],
        calibration=TWO,
    )

    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())


# --- what is kept of a layer's input


def call(*shape, seed=0):
    return {"hidden_states": randn(*(shape or (2, 6, 4)), seed=seed), "timestep": torch.tensor(0)}


def of_one_layer(calls, **settings):
    """The statistics of a lone layer that is given these inputs."""
    denoiser = Step()
    plans = plan_layers(denoiser, lambda name: None)
    calls = [c if isinstance(c, dict) else {"hidden_states": c, "timestep": torch.tensor(0)} for c in calls]
    return collect_layer_statistics(
        denoiser, plans, groups=[["linear"]], calls=calls, calibration=replace(TWO, **settings)
    ).get("linear")


def tiny_statistics(calls, model=None, calibration=TWO, together=()):
    model = model or TinyModel()
    plans = plan_layers(model, lambda name: None)
    groups = [*together, *([name] for name in LINEARS if not any(name in group for group in together))]
    return collect_layer_statistics(
        model, plans, groups=groups, calls=[{"x": x} for x in calls], calibration=calibration
    )


def is_rows_of(sample, x):
    """Whether each input of the sample has tokens of one input of x, in their order and none twice."""
    for kept in sample:
        found = [
            [int((row == token).all(-1).nonzero()[0]) for token in kept]
            for row in x.flatten(0, -3)
            if all((row == token).all(-1).any() for token in kept)
        ]
        if not any(places == sorted(set(places)) for places in found):
            return False
    return True


def test_the_largest_is_of_every_row_of_every_call():
    calls = [randn(2, 50, 7, seed=i) for i in range(3)]
    calls[1][1, 33, 2], calls[2][0, 7, 5] = -40, 60
    model, inputs = TinyModel(), {name: [] for name in LINEARS}
    statistics = tiny_statistics(calls, model, replace(TWO, max_tokens_per_layer=6))
    for name in LINEARS:
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: inputs[name].append(args[0])
        )
    for x in calls:
        model(x)

    assert list(statistics) == LINEARS

    for name, seen in statistics.items():
        together = torch.cat(inputs[name])
        assert seen.input_absmax.dtype == torch.float32 and torch.equal(
            seen.input_absmax, together.abs().amax((0, 1))
        )
        # two rows of each call, so that most of the largest were not kept
        assert seen.sample.shape == (6, 1, together.shape[-1]) and is_rows_of(seen.sample, together)

    assert statistics["proj_in"].input_absmax[2] == 40 and statistics["proj_in"].input_absmax[5] == 60


@pytest.mark.parametrize(
    ("shape", "rows", "kept"),
    [
        ((2, 50, 4), 60, (6, 10, 4)),
        ((2, 50, 4), 1000, (6, 50, 4)),
        ((2, 50, 4), 1, (3, 1, 4)),
        ((1, 50, 4), 60, (3, 20, 4)),
        ((3, 2, 5, 4), 54, (18, 3, 4)),  # each of 6 images
        ((300, 5, 4), 60, (60, 1, 4)),
        ((4, 50, 5, 4), 60, (60, 1, 4)),  # frames as tokens: not every pixel is kept
        ((7, 4), 60, (21, 1, 4)),
        ((500, 4), 60, (60, 1, 4)),
        ((4,), 60, (3, 1, 4)),  # without a token axis each row stands alone
    ],
    ids=str,
)
def test_as_many_rows_are_kept_as_asked_for(shape, rows, kept):
    calls = [randn(*shape, seed=i) for i in range(3)]
    seen = of_one_layer(calls, max_tokens_per_layer=rows)

    assert seen.sample.shape == kept

    inputs = [x if x.dim() > 2 else x.reshape(-1, 1, 4) for x in calls]
    for i, x in enumerate(inputs):  # the calls of an image stand side by side
        assert is_rows_of(seen.sample[i::3], x)


def test_the_rows_of_all_images_and_calls_have_their_share():
    calls = [100 * i + torch.arange(2)[:, None, None] * 10.0 + randn(2, 50, 4, seed=i) for i in range(3)]
    sample = of_one_layer(calls, max_tokens_per_layer=60).sample
    assert (sample.mean((1, 2)) / 10).round().tolist() == [0, 10, 20, 1, 11, 21]


def test_calls_of_different_lengths_are_kept_to_the_shortest():
    seen = of_one_layer(
        [randn(2, 50, 4), randn(1, 3, 4, seed=1), randn(2, 9, 4, seed=2)], max_tokens_per_layer=60
    )
    assert seen.sample.shape == (5, 3, 4)


def test_an_empty_input_is_passed_over():
    seen = of_one_layer([torch.zeros(2, 0, 4), randn(2, 9, 4)], max_tokens_per_layer=40)
    assert seen.sample.shape == (2, 9, 4)
    assert of_one_layer([torch.zeros(0, 4)]) is None


def test_the_dtype_of_the_model_is_kept_and_maxima_are_float32():
    seen = tiny_statistics([randn(2, 9, 7, dtype=torch.bfloat16)], TinyModel(dtype=torch.bfloat16))["proj_in"]
    assert (seen.sample.dtype, seen.input_absmax.dtype, seen.weight_absmax.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )


def test_the_same_seed_keeps_the_same_rows():
    calls = [randn(2, 50, 7, seed=i) for i in range(2)]
    few = replace(TWO, max_tokens_per_layer=16)
    first, again, other = (tiny_statistics(calls, calibration=c) for c in (few, few, replace(few, seed=5)))
    for name in LINEARS:
        assert torch.equal(first[name].sample, again[name].sample)
        assert not torch.equal(first[name].sample, other[name].sample)
        assert torch.equal(first[name].input_absmax, other[name].input_absmax)


def test_calibrating_draws_nothing_from_the_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tiny_statistics([randn(2, 50, 7)], calibration=replace(TWO, max_tokens_per_layer=16))

    assert torch.equal(torch.get_rng_state(), before)


def test_layers_with_the_same_input_know_the_weights_of_all():
    model = TinyModel()
    model.blocks[0][1].weight[3, 5], model.blocks[1][1].weight[7, 9] = 11, -12
    alone = tiny_statistics([randn(2, 9, 7)], model)

    assert alone["blocks.0.1"].weight_absmax[5] == 11 and alone["blocks.1.1"].weight_absmax[5] < 1

    together = tiny_statistics([randn(2, 9, 7)], model, together=[["blocks.0.1", "blocks.1.1"]])
    weights = torch.cat([model.blocks[0][1].weight, model.blocks[1][1].weight])
    for name in ("blocks.0.1", "blocks.1.1"):
        assert torch.equal(together[name].weight_absmax, weights.abs().amax(0))

    assert torch.equal(together["proj_out"].weight_absmax, model.proj_out.weight.abs().amax(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_is_rejected_by_name(value):
    calls = [randn(2, 9, 7), randn(2, 9, 7, seed=1)]
    calls[1][0, 3, 2] = value
    message = (
        r"^proj_in: 1 of 126 inputs are NaN or infinite in a calibration step of the float model; "
        r"check the checkpoint, or try model"
    )
    with pytest.raises(ConfigError, match=message):
        tiny_statistics(calls)


def test_the_first_layer_that_is_given_nan_is_named():
    model = TinyModel()
    model.blocks[1][1].bias[4] = float("nan")
    with pytest.raises(
        ConfigError, match=r"^blocks\.1\.3: 18 of 1728 inputs are NaN or infinite in a calibration step"
    ):
        tiny_statistics([randn(2, 9, 7)], model)


def test_channels_that_never_change_are_counted_in_one_line(caplog):
    x = randn(2, 9, 7)
    x[..., 3], x[..., 6] = 0, 2.5
    model = TinyModel()
    # a GELU of -100 is 0, whatever comes before it
    model.blocks[1][1].weight[:5], model.blocks[1][1].bias[:5] = 0, -100
    tiny_statistics([x], model)

    assert caplog.messages == [
        "calibration: 2 layers have input channels that never change (blocks.1.3: 5 of 96); "
        "what is fitted to them is "
        "a guess; more calibration.prompts or a larger calibration.num_timesteps may show them changing"
    ]


def test_channels_that_change_between_calls_or_tokens_only_do_change(caplog):
    calls = [torch.ones(1, 1, 4) * randn(4), torch.ones(1, 1, 4) * randn(4, seed=1)]
    of_one_layer(calls)

    assert not caplog.messages

    of_one_layer(calls[:1])  # one row says nothing about change

    assert not caplog.messages

    same_start = randn(2, 6, 4)
    same_start[:, 0] = 1
    of_one_layer([same_start])

    assert not caplog.messages

    of_one_layer([calls[0], calls[0]])

    assert len(caplog.messages) == 1 and "(linear: 4 of 4)" in caplog.text


class Detour(TinyModel):
    """Skips a block."""

    def forward(self, x):
        return self.proj_out(self.blocks[0](self.proj_in(x)))


def test_a_layer_that_no_call_reaches_is_left_out_and_rejected_where_it_is_needed():
    model = Detour()
    statistics = tiny_statistics([randn(2, 9, 7)], model)

    assert list(statistics) == ["proj_in", "blocks.0.1", "blocks.0.3", "proj_out"]

    plans = plan_layers(model, lambda name: None)
    everywhere = {p.name: SmoothQuant() for p in plans}
    message = (
        r"^blocks\.1\.1: the calibration never reached it; "
        r"keep the layer float, or take other calibration\.prompts$"
    )
    for methods, rounding in ((everywhere, AbsMax()), ({}, Gptq())):
        with pytest.raises(ConfigError, match=message):
            list(quantize_layers(model, plans, methods=methods, rounding=rounding, statistics=statistics))
    reached = [p for p in plans if p.name in statistics]

    assert (
        len(list(quantize_layers(model, reached, methods=everywhere, rounding=Gptq(), statistics=statistics)))
        == 4
    )


# --- a real pipeline


@pytest.fixture(scope="module")
def flux():
    """A small FLUX pipeline's denoiser with the calls that a calibration looks at."""
    with torch.random.fork_rng():
        pipe = random_pipeline()
    pipe.set_progress_bar_config(disable=True)
    denoiser = pipe.transformer.eval().requires_grad_(False)
    calibration = CalibrationSettings(["a", "b", "a b"], num_timesteps=2, max_tokens_per_layer=48)
    sampling = Sampling(steps=3, guidance=1.0, height=32, width=32, batch=2)
    return (
        denoiser,
        capture_calibration_calls(
            pipe,
            "transformer",
            denoiser,
            calibration=calibration,
            sampling=sampling,
            progress=Progress(enabled=False),
        ),
        calibration,
    )


def test_a_real_denoiser_is_seen_whole(flux):
    denoiser, calls, calibration = flux

    assert [len(c["hidden_states"]) for c in calls] == [2, 2, 1, 1]

    plans = plan_layers(denoiser, lambda name: None)
    names = ("to_q", "to_k", "to_v")
    groups = group_by_shared_input([p.name for p in plans], [[f"attn.{name}" for name in names]])
    statistics = collect_layer_statistics(
        denoiser, plans, groups=groups, calls=calls, calibration=calibration
    )

    assert statistics.keys() == {p.name for p in plans}

    for plan in plans:
        seen = statistics[plan.name]
        assert seen.sample.shape[-1] == plan.in_features == len(seen.input_absmax) == len(seen.weight_absmax)
        assert (
            seen.sample.shape[:2].numel() <= calibration.max_tokens_per_layer
            and (seen.sample.abs().amax((0, 1)) <= seen.input_absmax).all()
        )
    q, k, v = (f"transformer_blocks.1.attn.{name}" for name in names)
    factors = [
        SmoothQuant().fit(denoiser.get_submodule(name).weight, statistics[name]).factor for name in (q, k, v)
    ]

    assert torch.equal(factors[0], factors[1]) and torch.equal(factors[0], factors[2])


def test_gptq_and_smoothquant_work_on_what_a_calibration_found(flux):
    denoiser, calls, calibration = flux
    plans = [p for p in plan_layers(denoiser, lambda name: None) if p.name.endswith("ff.net.2")]
    statistics = collect_layer_statistics(
        denoiser, plans, groups=[[p.name] for p in plans], calls=calls, calibration=calibration
    )
    for plan, layer in quantize_layers(
        denoiser,
        plans,
        methods={p.name: SmoothQuant() for p in plans},
        rounding=Gptq(),
        statistics=statistics,
    ):
        sample, weight = statistics[plan.name].sample, denoiser.get_submodule(plan.name).weight
        ours = layer.transform.round_input(sample) @ layer.weight.dequantize().T
        assert_close(plan.name, ours, sample @ weight.T, 0.01)
        assert (plan.outlier, plan.rounding) == ("smoothquant alpha=0.5", "gptq")


def test_a_sample_goes_by_image_so_that_its_halves_hold_different_ones():
    # two batches of two images, two moments each: the number says image, the fraction the moment
    calls = [
        torch.tensor([a, b])[:, None, None].expand(2, 3 + i, 1)
        for i, (a, b) in enumerate([(0.1, 1.1), (0.2, 1.2), (2.1, 3.1), (2.2, 3.2)])
    ]
    sample = interleave_by_image(calls)

    assert sample.shape == (8, 3, 1)

    first, second = (set(half.flatten().int().tolist()) for half in sample.tensor_split(2))

    assert (first, second) == ({0, 2}, {1, 3})


def test_calibration_of_a_pipeline_that_begins_with_images_takes_those_of_the_run(tmp_path):
    inputs = [SampleInputs(strength=strength) for strength in (0.5, 0.7)]
    samples = [Sample("a", 0, "0", inputs=each) for each in (*inputs, NO_INPUTS, inputs[0])]

    calibration = CalibrationSettings(["x", "y", "z"], seed=5).with_inputs(samples)

    made = calibration.samples
    assert [(s.prompt, s.seed, s.inputs.strength) for s in made] == [
        ("x", 5, 0.5),
        ("y", 6, 0.7),
        ("z", 7, 0.5),
    ]
    assert CalibrationSettings(["x"]).with_inputs([Sample("a", 0, "0")]).samples[0].inputs.is_empty
