"""LoRAs on a model: merged in float, beside INT8 layers, in their integers; strengths and their undoing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.compare import assert_close
from support.helpers import CPU, TinyModel, lora_file, on_int8, randn, shipped, to_int8, usable
from torch import nn

from int8run.errors import ConfigError, LoraError
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.plan import Int8Settings
from int8run.lora.adapters.base import LoraDelta
from int8run.lora.adapters.change import LoraChange
from int8run.lora.adapters.diff import Diff
from int8run.lora.adapters.dora import DoRA
from int8run.lora.adapters.ia3 import IA3
from int8run.lora.adapters.loha import LoHa
from int8run.lora.adapters.lokr import LoKr
from int8run.lora.adapters.lora import LoRA
from int8run.lora.adapters.low_rank import LowRankPair
from int8run.lora.adapters.oft import OFT, RotationStage
from int8run.lora.apply import balance_factors
from int8run.lora.change_size import ChangeSize, describe_large_change
from int8run.lora.entries import Entry
from int8run.lora.stack import LoraStack
from int8run.outlier.base import OutlierMethod
from int8run.outlier.convrot import ConvRot
from int8run.outlier.hadanorm import HadaNorm
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.quant.rounding import Gptq, Mse

LINEARS = ["proj_in", "blocks.0.1", "blocks.0.3", "blocks.1.1", "blocks.1.3", "proj_out"]
X = randn(9, 7)


def make_lora(model: nn.Module, names: list[str], seed: int = 10, rank: int = 3) -> dict[str, LoraChange]:
    """A LoRA for these layers, strong enough to be seen over INT8's rounding."""
    changes = {}
    for i, name in enumerate(names):
        n, k = model.get_submodule(name).weight.shape
        changes[name] = LoraChange(
            LoRA(randn(rank, k, seed=seed + 2 * i), randn(n, rank, seed=seed + 2 * i + 1), 0.02)
        )
    return changes


def merge_into(model: nn.Module, *stack: dict[str, LoraChange]) -> LoraStack:
    """LoRAs on a float model."""
    loras = LoraStack(model)
    entries = [Entry(f"lora{i}", lora_file(changes, f"lora{i}")) for i, changes in enumerate(stack)]
    loras.install(entries, loras.match_entries(entries))
    return loras


# -- in float ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_adds_up_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    model = TinyModel(dtype=dtype)
    before = {name: model.get_submodule(name).weight.clone() for name in LINEARS}
    first, second = make_lora(model, LINEARS[:3]), make_lora(model, LINEARS[2:5], seed=30)
    merge_into(model, first, second).set_strengths([0.8, -0.5])
    for name in LINEARS:
        wanted = before[name].float()
        for changes, strength in ((first, 0.8), (second, -0.5)):
            if name in changes:
                wanted = wanted + strength * changes[name].weight_delta.compute_delta(before[name])
        assert torch.equal(model.get_submodule(name).weight, wanted.to(dtype)), name
        assert torch.equal(model.get_submodule(name).weight, before[name]) == (name == "proj_out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_is_undone_exactly_and_does_not_drift(dtype: torch.dtype) -> None:
    model = TinyModel(dtype=dtype)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    loras = merge_into(model, make_lora(model, LINEARS))
    loras.set_strengths([0.7])
    once = {name: weight.clone() for name, weight in model.named_parameters()}

    for strength in (20.0, -0.3, 0.7):
        loras.set_strengths([strength])

    assert all(torch.equal(weight, once[name]) for name, weight in model.named_parameters())

    loras.set_strengths([0])

    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_missing_bias_is_created() -> None:
    model = TinyModel()
    plain = model(X)

    loras = merge_into(
        model,
        {"proj_out": LoraChange(None, torch.ones(12)), "proj_in": LoraChange(None, torch.full((64,), 0.0))},
    )

    assert torch.equal(model(X), plain), "a bias of zeros changes nothing"

    loras.set_strengths([0.5])

    assert_close("bias", model(X), plain + 0.5, 1e-6)

    loras.set_strengths([0])

    assert torch.equal(model(X), plain)


def test_norms_are_changed() -> None:
    model = TinyModel()
    norm = model.blocks[0][0]

    merge_into(
        model, {"blocks.0.0": LoraChange(Diff(torch.full((64,), 0.5), "norm"), torch.full((64,), 0.25))}
    ).set_strengths([2.0])

    assert torch.equal(norm.weight, torch.full((64,), 2.0)) and torch.equal(norm.bias, torch.full((64,), 0.5))


# -- beside and in INT8 layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dynamic", "bake", "stochastic"])
@pytest.mark.parametrize("outlier", [NoOutlier(), ConvRot(), QuaRot(32), HadaNorm(32)], ids=lambda m: m.name)
@pytest.mark.parametrize("strengths", [[0.8, 0.4], [1.0, 0.0], [-1.5, 1.0]], ids=str)
def test_every_mode_agrees_with_the_merged_float_model(
    outlier: OutlierMethod, strengths: list[float], mode: str
) -> None:
    model = TinyModel()
    stack = [make_lora(model, LINEARS), make_lora(model, LINEARS[1:4], seed=30)]
    int8, _ = to_int8(model, outlier=outlier)
    plain = model(X)
    loras = on_int8(model, int8, stack, mode)

    loras.set_strengths(strengths)

    assert loras.layers_by_mode == {mode: 6}
    # the LoRA is far outside the tolerance
    assert (model(X) - plain).norm() > 0.3 * plain.norm()
    assert_close(mode, int8(X), model(X), 0.05)


@pytest.mark.parametrize("mode", ["dynamic", "bake", "stochastic"])
def test_strengths_change_without_a_rebuild_and_back(mode: str) -> None:
    model = TinyModel()
    int8, _ = to_int8(model, outlier=ConvRot())
    plain, layers = int8(X), dict(int8.named_modules())

    loras = on_int8(model, int8, [make_lora(model, LINEARS)], mode)

    assert torch.equal(int8(X), plain)

    loras.set_strengths([1.0])
    strong = int8(X)

    assert not torch.equal(strong, plain)

    loras.set_strengths([0.0])

    assert torch.equal(int8(X), plain), "undone to the bit"

    loras.set_strengths([-2.0])
    loras.set_strengths([1.0])

    assert torch.equal(int8(X), strong), "the way there has no say"
    assert all(int8.get_submodule(name) is module for name, module in layers.items())


@pytest.mark.parametrize("mode", ["bake", "stochastic"])
def test_merged_weights_do_not_depend_on_the_order(mode: str) -> None:
    results = []
    for order in ((0, 1), (1, 0)):
        model = TinyModel()
        int8, _ = to_int8(model)
        stack, strengths = [make_lora(model, LINEARS), make_lora(model, LINEARS, seed=30)], [0.8, -0.4]
        loras = on_int8(model, int8, [stack[i] for i in order], mode)
        loras.set_strengths([strengths[i] for i in order])
        results.append([m.read_qdata() for m in int8.modules() if isinstance(m, Int8Linear)])

    differing = [(a != b).float().mean().item() for a, b in zip(*results, strict=True)]

    # sums in another order move a number over the edge of a step now and then
    assert max(differing) < 0.002, differing


def test_same_lora_twice_acts_with_both_strengths(caplog: pytest.LogCaptureFixture) -> None:
    model = TinyModel()
    once, twice = to_int8(model)[0], to_int8(model)[0]
    changes = make_lora(model, LINEARS)
    on_int8(model, once, [changes]).set_strengths([0.75])
    loras = LoraStack(TinyModel(), mode="dynamic")
    entries = [Entry("a", lora_file(changes)), Entry("b", lora_file(changes))]
    loras.install(entries, loras.match_entries(entries))
    loras.attach(twice)

    loras.set_strengths([0.5, 0.25])

    assert_close("twice", twice(X), once(X), 1e-5)
    assert (
        "LoRA 'b' holds the same weights as 'a'; together they act like one with both strengths added"
        in caplog.text
    )


def test_float_layers_are_merged() -> None:
    model = TinyModel()
    int8, _ = to_int8(model, keep_float=("proj_in", "proj_out"))

    loras = on_int8(model, int8, [make_lora(model, LINEARS)])

    assert loras.layers_by_mode == {"dynamic": 4}

    for strength in (1.0, -0.5):
        # the copy shares the float weights, so the merge reaches them; the INT8 ones were made before it
        loras.set_strengths([strength])
        assert_close(f"strength {strength}", int8(X), model(X), 0.04)


FULL_KINDS = ("diff", "IA3 on inputs", "DoRA by columns", "OFT", "OFT on inputs")


def rotate_blocks(num_features: int, on_input: bool) -> OFT:
    """A rotation of blocks of 4 rows or inputs."""
    skew = 0.2 * randn(num_features // 4, 4, 4, seed=16)
    angles = torch.matrix_exp(skew - skew.mT)
    return OFT((RotationStage(angles),), num_features, on_input=on_input)


def make_adapters(n: int, k: int) -> dict[str, LoraChange]:
    """One change of each kind for an [n, k] weight."""

    def pair(rank, seed):
        return LowRankPair(randn(n, rank, seed=seed), randn(rank, k, seed=seed + 1) * 0.05)

    plain = LoRA(randn(3, k, seed=1), randn(n, 3, seed=2), 0.02)
    cores: dict[str, LoraDelta] = {
        "LoHa": LoHa(pair(2, 3), pair(2, 5), 3.0),
        "LoKr": LoKr(
            randn(4, 4, seed=7) * 0.1,
            LowRankPair(randn(n // 4, 2, seed=8), randn(2, k // 4, seed=9) * 0.2),
            1.0,
        ),
        "diff": Diff(randn(n, k, seed=10) * 0.05),
        "IA3": IA3(randn(n, seed=11) * 0.3),
        "IA3 on inputs": IA3(randn(k, seed=12) * 0.3, on_input=True),
        "DoRA": DoRA(plain, randn(n, seed=13).abs() + 0.3),
        "DoRA by columns": DoRA(plain, randn(k, seed=14).abs() + 0.3, on_input=True),
        "OFT": rotate_blocks(n, on_input=False),
        "OFT on inputs": rotate_blocks(k, on_input=True),
    }
    return {name: LoraChange(core, randn(n, seed=15) * 0.1) for name, core in cores.items()}


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("kind", make_adapters(8, 8))
@pytest.mark.parametrize("mode", ["auto", "bake", "stochastic"])
def test_every_adapter_type_changes_int8_layers(mode: str, kind: str, strength: float) -> None:
    model = TinyModel()
    changes = {
        name: make_adapters(*model.get_submodule(name).weight.shape)[kind]
        for name in ("blocks.0.1", "blocks.1.3")
    }
    int8, _ = to_int8(model, outlier=ConvRot())
    plain_int8, plain = int8(X), model(X)
    loras = on_int8(model, int8, [changes], mode)
    loras.set_strengths([strength])

    effect = (model(X) - plain).norm() / plain.norm()

    assert effect > 0.05
    assert_close(kind, int8(X), model(X), max(0.04, 0.1 * effect))

    loras.set_strengths([0.0])

    assert torch.equal(int8(X), plain_int8)

    full = kind in FULL_KINDS

    assert loras.layers_by_mode == ({mode: 2} if mode != "auto" else {"bake": 2} if full else {"dynamic": 2})


@pytest.mark.parametrize("kind", FULL_KINDS)
def test_dynamic_rejects_adapters_without_a_low_rank_form(kind: str) -> None:
    model = TinyModel()
    int8, _ = to_int8(model)
    word = kind.partition(" ")[0]

    message = (
        rf"^blocks\.0\.1: lora\.mode=dynamic is not possible: a {word} that has no low-rank form; "
        rf"set lora\.mode=auto and one strength"
    )

    with pytest.raises(LoraError, match=message):
        on_int8(model, int8, [{"blocks.0.1": make_adapters(96, 64)[kind]}], "dynamic")
    with pytest.raises(
        LoraError,
        match=r"^blocks\.0\.1: a schedule of strengths needs lora\.mode=dynamic, which is not possible: a",
    ):
        on_int8(model, int8, [{"blocks.0.1": make_adapters(96, 64)[kind]}], "auto", scheduled=True)


def test_without_float_weights_auto_is_stochastic_and_bake_is_rejected() -> None:
    model = TinyModel()
    changes = {
        "blocks.0.1": make_adapters(96, 64)["diff"],
        "blocks.1.1": make_lora(model, ["blocks.1.1"])["blocks.1.1"],
    }

    int8, _ = to_int8(model)

    assert on_int8(model, int8, [changes], "auto", float_weights=False).layers_by_mode == {
        "stochastic": 1,
        "dynamic": 1,
    }
    with pytest.raises(
        LoraError,
        match=r"lora\.mode=bake needs the float weight of blocks\.0\.1.*set lora\.mode=dynamic, "
        r"stochastic or auto",
    ):
        on_int8(model, to_int8(model)[0], [changes], "bake", float_weights=False)


def test_auto_compares_the_cost_of_a_branch() -> None:
    model = TinyModel()
    int8, _ = to_int8(model)
    asked = []

    def overhead(name: str, layer: Int8Linear, rank: int) -> float:
        asked.append((name, rank))
        return 1.6 if name == "blocks.0.1" else 1.5

    stack = [make_lora(model, LINEARS[1:3]), make_lora(model, LINEARS[1:3], seed=40, rank=5)]
    loras = on_int8(model, int8, stack, "auto", overhead=overhead, max_overhead=0.5)

    assert loras.layers_by_mode == {"bake": 1, "dynamic": 1} and asked == [
        ("blocks.0.1", 8),
        ("blocks.0.3", 8),
    ]


def test_auto_avoids_branches_wider_than_the_layer() -> None:
    model = TinyModel()
    int8, _ = to_int8(model)

    assert on_int8(model, int8, [make_lora(model, ["blocks.0.1"], rank=64)], "auto").layers_by_mode == {
        "bake": 1
    }
    assert on_int8(
        model, to_int8(model)[0], [make_lora(model, ["blocks.0.1"], rank=64)], "dynamic"
    ).layers_by_mode == {"dynamic": 1}


def test_rounding_that_needs_calibration_is_replaced_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "int8run")
    model = TinyModel()
    changes = {"blocks.0.1": make_adapters(96, 64)["diff"]}
    for rounding, said in ((Mse(), False), (Gptq(), True)):
        caplog.clear()
        int8, _ = to_int8(model)
        on_int8(model, int8, [changes], "auto", rounding=rounding).set_strengths([1.0])
        line = "LoRAs on 1 layer by lora.mode=bake: rounded by absmax, because gptq needs calibration"
        assert (line in caplog.messages) == said


def test_schedule_is_dynamic_at_any_cost() -> None:
    model = TinyModel()
    int8, _ = to_int8(model)

    loras = on_int8(
        model,
        int8,
        [make_lora(model, LINEARS)],
        "auto",
        scheduled=True,
        overhead=lambda *_: 99.0,
        max_overhead=0.0,
    )

    assert loras.layers_by_mode == {"dynamic": 6}


def test_clipped_weights_are_counted_and_scales_grow() -> None:
    model = TinyModel()
    int8, _ = to_int8(model)
    weight = model.blocks[0][1].weight
    loras = on_int8(model, int8, [{"blocks.0.1": LoraChange(Diff(weight.clone()))}], "stochastic")

    loras.set_strengths([1.0])

    assert 0.05 < loras.clipped_share < 0.8
    assert_close("doubled", int8.blocks[0][1](randn(5, 64)), model.blocks[0][1](randn(5, 64)), 0.03)

    loras.set_strengths([0.0])

    assert loras.clipped_share == 0.0


def test_stochastic_rounding_has_a_seed_for_each_layer_lora_and_run() -> None:
    def integers(seed: int, names: list[str]) -> list[torch.Tensor]:
        model = TinyModel()
        int8, _ = to_int8(model)
        loras = LoraStack(model, mode="stochastic", seed=seed)
        entries = [
            Entry(
                "a",
                lora_file(
                    {n: LoraChange(LoRA(torch.full((1, 64), 0.001), torch.ones(96, 1))) for n in names}
                ),
            )
        ]
        loras.install(entries, loras.match_entries(entries))
        loras.attach(int8)
        before = [int8.get_submodule(n).read_qdata() for n in names]
        loras.set_strengths([1.0])
        return [int8.get_submodule(n).read_qdata() - b for n, b in zip(names, before, strict=True)]

    first, again, other = (
        integers(0, ["blocks.0.1", "blocks.1.1"]),
        integers(0, ["blocks.0.1", "blocks.1.1"]),
        integers(1, ["blocks.0.1"]),
    )

    assert (
        all(map(torch.equal, first, again))
        and not torch.equal(first[0], first[1])
        and not torch.equal(first[0], other[0])
    )


def test_sizes_are_measured_in_steps_of_the_grid() -> None:
    model = TinyModel()
    int8, _ = to_int8(model)
    layer = int8.get_submodule("blocks.0.1")

    loras = on_int8(
        model, int8, [{"blocks.0.1": LoraChange(Diff(0.3 * layer.scale.mean() * torch.ones(96, 64)))}], "bake"
    )

    assert loras.sizes.compute_median_steps(0) == pytest.approx(0.3)
    assert loras.sizes.compute_median_steps(1) is None


def test_a_change_is_warned_of_at_the_strength_that_is_used() -> None:
    model = TinyModel()
    int8, _ = to_int8(model)
    half = LoraChange(Diff(0.5 * model.get_submodule("blocks.0.1").weight.detach()))

    loras = on_int8(model, int8, [{"blocks.0.1": half}, {"blocks.0.1": half}], "bake")

    assert loras.sizes.list_large_changes(loras.names, [1.0, -1.3]) == []
    assert loras.sizes.list_large_changes(loras.names, [1.0, -3.0]) == [
        "LoRA 'lora1' at strength -3 changes the model's weights by 150% of their own size (median of the "
        "INT8 layers); most LoRAs change them by a few percent, beyond 70% images break: take a strength of "
        "at most 1.4"
    ]


def test_a_large_change_is_as_it_was_made_up_to_strength_1() -> None:
    sizes = [ChangeSize(steps=1.0, share=0.8)]

    assert describe_large_change("edit", 1.0, sizes) is None
    assert describe_large_change("edit", -1.0, sizes) is None
    beyond = describe_large_change("edit", 1.2, sizes)
    assert beyond is not None
    assert beyond.endswith("beyond 80% images break: take a strength of at most 1")
    too_much = describe_large_change("loud", 1.0, [ChangeSize(steps=1.0, share=2.0)])
    assert too_much is not None
    assert too_much.endswith("beyond 100% images break: take a strength of at most 0.5")


def test_a_lora_that_changes_nothing_is_not_warned_of() -> None:
    assert describe_large_change("nothing", 20.0, [ChangeSize(steps=0.0, share=0.0)]) is None


def test_balanced_factors_have_the_same_product() -> None:
    lora_A, lora_B = randn(8, 64) * torch.logspace(0, 3, 8)[:, None], randn(48, 8, seed=1)
    a, b = balance_factors(lora_A, lora_B)

    assert a.shape == (8, 64) and b.shape == (48, 8)
    assert_close("product", b @ a, lora_B @ lora_A, 1e-5)

    norms = a.norm(dim=1)

    assert norms.max() < 50 * norms.min() and lora_A.norm(dim=1).max() > 500 * lora_A.norm(dim=1).min()


def test_integers_can_be_read_from_every_backend() -> None:
    model = TinyModel()
    expected, _ = to_int8(model)
    for backend in [b for b in shipped("backend").values() if usable(b, CPU)]:
        int8, _ = to_int8(model, backend)
        for name in LINEARS:
            layer = int8.get_submodule(name)
            assert torch.equal(layer.read_qdata(), expected.get_submodule(name).packed), (backend.name, name)


@pytest.mark.parametrize("mode", ["dynamic", "bake", "stochastic"])
def test_new_strength_does_not_recompile(mode: str) -> None:
    torch._dynamo.reset()
    model = TinyModel()
    int8, _ = to_int8(model, outlier=ConvRot())
    loras = on_int8(model, int8, [make_lora(model, LINEARS)], mode)
    compiled = torch.compile(int8, fullgraph=True, backend="aot_eager")
    compiled(X)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for strength in (1.0, 0.0, -0.5):
            loras.set_strengths([strength])
            assert_close(f"strength {strength}", compiled(X), int8(X), 1e-5)


# -- in a program of one's own -------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two LoRA files for the tiny model."""
    paths = []
    for seed, name in ((10, "style"), (30, "other")):
        tensors = {}
        for key, change in make_lora(TinyModel(), LINEARS, seed=seed).items():
            tensors |= {
                f"{key}.lora_A.weight": change.weight_delta.lora_A,
                f"{key}.lora_B.weight": 0.02 * change.weight_delta.lora_B,
            }
        save_file(tensors, tmp_path / f"{name}.safetensors")
        paths.append(tmp_path / f"{name}.safetensors")
    return paths


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "INT8"])
def test_stack_works_on_an_existing_model(files: list[Path], quantized: bool) -> None:
    model = TinyModel()
    target = to_int8(model, outlier=ConvRot())[0] if quantized else TinyModel()
    plain = target(X)
    stack = LoraStack(target).add(files[0], 0.8).add(files[1], -0.5, name="second")
    reference = merge_into(model, make_lora(model, LINEARS), make_lora(model, LINEARS, seed=30))

    reference.set_strengths([0.8, -0.5])

    assert stack.names == ["style", "second"]
    assert_close("both", target(X), model(X), 0.05 if quantized else 1e-5)

    stack.set_strength("style", 0.0)
    reference.set_strengths([0.0, -0.5])

    assert_close("one", target(X), model(X), 0.05 if quantized else 1e-5)

    stack.set_strength("second", 0.0)

    assert torch.equal(target(X), plain)


def test_lora_that_does_not_fit_leaves_the_stack_as_it_was(files: list[Path], tmp_path: Path) -> None:
    model = TinyModel()
    stack = LoraStack(model).add(files[0], 0.8)
    before = model(X)

    save_file(
        {"proj_in.lora_A.weight": randn(2, 9), "proj_in.lora_B.weight": randn(64, 2)},
        tmp_path / "wrong.safetensors",
    )

    with pytest.raises(
        LoraError, match=r"wrong\.safetensors: proj_in changes a 64x9 weight, the model's is 64x7"
    ):
        stack.add(tmp_path / "wrong.safetensors")
    assert stack.names == ["style"] and torch.equal(model(X), before)

    stack.set_strength("style", 0.0)

    assert torch.equal(model(X), TinyModel()(X))


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "INT8"])
def test_model_has_one_stack_until_it_is_cleared(files: list[Path], quantized: bool) -> None:
    target = to_int8(TinyModel())[0] if quantized else TinyModel()
    plain = target(X)
    first, second = LoraStack(target).add(files[0]), LoraStack(target)

    with_first = target(X)

    with pytest.raises(
        ConfigError,
        match=r"^this model has a LoraStack already, with 'style'; add the LoRA to that one, or clear\(\) it "
        r"first \(LoraStack\.of\(model\) returns it\)$",
    ):
        second.add(files[1])
    assert LoraStack.of(target) is first
    assert second.names == [] and torch.equal(target(X), with_first)

    first.clear()

    assert first.names == [] and torch.equal(target(X), plain)

    second.add(files[1])

    assert not torch.equal(target(X), plain) and not torch.equal(target(X), with_first)


def test_layer_gets_its_float_fallback_back() -> None:
    model = TinyModel()
    int8, _ = to_int8(model, settings=Int8Settings(max_rows=16, small_batch_fallback="always"))

    plain, layer = int8(X), int8.get_submodule("blocks.0.1")

    assert layer.float_weight is not None

    loras = on_int8(model, int8, [{"blocks.0.1": make_adapters(96, 64)["IA3"]}])
    loras.set_strengths([1.0])

    assert layer.float_weight is None, "it would not follow the strength"
    assert_close("INT8", int8(X), model(X), 0.04)

    loras.clear()

    assert layer.float_weight is not None and torch.equal(int8(X), plain)


def test_repr_shows_model_loras_and_strengths(files: list[Path]) -> None:
    stack = LoraStack(TinyModel())

    assert repr(stack) == "<LoraStack on TinyModel: no LoRAs>"

    stack.add(files[0], 0.8).add(files[1], -1, text_strength=0.5)

    assert repr(stack) == "<LoraStack on TinyModel: 'style' 0.8, 'other' -1 (text 0.5)>"


def test_missing_file_is_told_in_the_words_of_a_program() -> None:
    with pytest.raises(LoraError, match=r"LoraStack\(…, folder=FOLDER\) adds a folder of yours$"):
        LoraStack(TinyModel()).add("missing")


def test_what_is_no_model_is_rejected() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^a LoraStack takes a denoiser, such as pipe\.transformer or pipe\.unet, or its pipeline, "
        r"not a dict$",
    ):
        LoraStack({})


def test_names_and_strengths_are_checked(files: list[Path]) -> None:
    stack = LoraStack(TinyModel()).add(files[0])

    with pytest.raises(
        ConfigError,
        match=r"^the stack has a LoRA called 'style' already; "
        r"set_strength\('style', …\) changes its strength, or give",
    ):
        stack.add(files[0])
    with pytest.raises(ConfigError, match=r"^the stack has no LoRA called 'ink'; it has style$"):
        stack.set_strength("ink", 1.0)
    with pytest.raises(
        ConfigError, match=r"^strength of LoRA 'style' is 21; allowed is a number from -20 to 20$"
    ):
        stack.set_strength("style", 21)
    with pytest.raises(ConfigError, match=r"^lora\.mode is 'dynamik'; did you mean 'dynamic'\? "):
        LoraStack(TinyModel(), mode="dynamik")
