"""Who holds a model: a stack that is dropped, refused, copied, or met by another program's changes."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig, LoraModel
from safetensors.torch import load_file, save_file
from support.compare import assert_close
from support.helpers import TinyModel, randn, to_int8
from torch import Tensor, nn

from int8run.errors import ConfigError, LoraError
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.low_rank_branch import LowRankBranch
from int8run.lora.float_merge import FloatMerge
from int8run.lora.installed import MARK
from int8run.lora.stack import LoraStack

X = randn(9, 7)
LAYER = "blocks.0.1"


def write(path: Path, **modules: dict[str, Tensor]) -> Path:
    """A LoRA file: part names have `__` for `.`, and so have modules."""
    tensors = {}
    for module, parts in modules.items():
        for part, tensor in parts.items():
            tensors[f"{module}.{part}".replace("__", ".")] = tensor
    save_file(tensors, path)
    return path


def pair(num_rows: int, num_columns: int, seed: int = 1) -> dict[str, Tensor]:
    lora_A, lora_B = randn(3, num_columns, seed=seed), 0.02 * randn(num_rows, 3, seed=seed + 1)
    return {"lora_A__weight": lora_A, "lora_B__weight": lora_B}


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """A pair on two layers; one of them also gets a bias, which it does not have."""
    with_bias = pair(12, 64) | {"lora_B__bias": randn(12, seed=5)}
    return write(tmp_path / "style.safetensors", blocks__0__1=pair(96, 64), proj_out=with_bias)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another pair on one of these layers, and one on a layer of its own."""
    return write(tmp_path / "other.safetensors", blocks__0__1=pair(96, 64, seed=7), blocks__1__3=pair(64, 96))


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A LoKr of full rank, which cannot be a branch."""
    factors = {"lokr_w1": randn(8, 8), "lokr_w2": 0.02 * randn(12, 8, seed=2)}
    return write(tmp_path / "wide.safetensors", proj_out=pair(12, 64), blocks__0__1=factors)


def describe(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that LoRAs could leave something in."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        found |= {f"{name}.{key}": value for key, value in tensors.items()}
        children = {key: child for key, child in module._modules.items() if child is not None}
        found[f"{name} children"] = list(children)
        found[f"{name} hooks"] = [*module._forward_hooks, *module._forward_pre_hooks]
        found[f"{name} mark"] = MARK in module.__dict__
        found[f"{name} adapter"] = getattr(module, "adapter", None) is not None
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in found.items()}


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = describe(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        if isinstance(value, Tensor):
            assert isinstance(after[key], Tensor) and after[key].dtype == value.dtype, key
            assert torch.equal(after[key], value), key
        else:
            assert after[key] == value, key


def make_model(kind: str) -> nn.Module:
    return to_int8(TinyModel())[0] if kind == "int8" else TinyModel()


def weight_change(model: nn.Module, plain: nn.Module, name: str = LAYER) -> Tensor:
    return model.get_submodule(name).weight - plain.get_submodule(name).weight


def product(path: Path, name: str = LAYER) -> Tensor:
    tensors = load_file(path)
    return tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]


# -- an add that fails ---------------------------------------------------------------------------------------


def fail(error: BaseException, after: int) -> Callable[..., Any]:
    """A function that raises at a later call, and calls the real one before."""
    calls = []

    def patch(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == after:
                raise error
            return real(*args, **kwargs)

        return call

    return patch


INTERRUPTIONS = {
    "memory runs out at a branch": (LowRankBranch, "__init__", MemoryError("none left"), 2),
    "interrupted while weights are read": (Int8Linear, "read_qdata", KeyboardInterrupt(), 2),
    "interrupted while integers are written": (Int8Linear, "set_weight", KeyboardInterrupt(), 2),
    "memory runs out at float weights": (FloatMerge, "set_strengths", MemoryError("none left"), 1),
}


@pytest.mark.parametrize("is_second", [False, True], ids=["the first LoRA", "the second"])
@pytest.mark.parametrize("case", INTERRUPTIONS)
def test_interrupted_add_changes_nothing(
    case: str, is_second: bool, style: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, method, error, after = INTERRUPTIONS[case]
    kind = "float" if owner is FloatMerge else "int8"
    mode = "dynamic" if owner is LowRankBranch else "stochastic"
    model = make_model(kind)
    stack = LoraStack(model, mode=mode)
    if is_second:
        stack.add(other, 0.7)
    before, names = describe(model), list(stack.names)

    with monkeypatch.context() as patched:
        patched.setattr(owner, method, fail(error, after)(getattr(owner, method)))
        with pytest.raises(type(error)):
            stack.add(style, 0.5)

    assert stack.names == names
    assert_same(model, before)
    stack.add(style, 0.5)
    stack.clear()
    assert_same(model, describe(make_model(kind)))


@pytest.mark.parametrize("is_second", [False, True], ids=["the first LoRA", "the second"])
def test_refused_mode_changes_nothing(wide: Path, other: Path, is_second: bool) -> None:
    model = make_model("int8")
    stack = LoraStack(model, mode="dynamic")
    if is_second:
        stack.add(other, 0.7)
    before = describe(model)

    with pytest.raises(LoraError, match="a LoKr that has no low-rank form"):
        stack.add(wide)

    assert_same(model, before)
    stack.clear()
    assert LoraStack(model, mode="auto").add(wide).layers_by_mode == {"dynamic": 1, "stochastic": 1}


def test_stack_that_was_refused_does_not_hold_the_model(style: Path) -> None:
    model = make_model("int8")
    before = describe(model)
    refused = LoraStack(model, mode="bake")

    with pytest.raises(LoraError, match=r"lora\.mode=bake needs the float weight of"):
        refused.add(style)

    assert LoraStack.of(model) is None
    assert_same(model, before)
    stack = LoraStack(model).add(style)
    assert LoraStack.of(model) is stack


# -- stacks that are gone ------------------------------------------------------------------------------------


def test_lora_of_a_dropped_stack_stays_until_the_next_one(
    style: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = TinyModel(), TinyModel()
    LoraStack(model).add(style, 0.5)

    assert_close("it stays", weight_change(model, plain), 0.5 * product(style), 1e-5)

    stack = LoraStack(model).add(other, 2.0)

    assert_close("the next", weight_change(model, plain), 2.0 * product(other), 1e-5)
    assert caplog.messages == [
        "taken off the model: 'style', of a LoraStack that is gone; keep the stack in a variable, and add to "
        "it, to have all of them"
    ]
    stack.clear()
    assert_same(model, describe(plain))


def test_repeated_calls_add_one_lora(style: Path) -> None:
    model = TinyModel()
    for _ in range(5):
        LoraStack(model).add(style, 1.0)

    assert_close("once", weight_change(model, TinyModel()), product(style), 1e-5)


@pytest.mark.parametrize("mode", ["dynamic", "stochastic"])
def test_int8_layers_know_of_a_dropped_stack(style: Path, other: Path, mode: str) -> None:
    model = make_model("int8")
    before = describe(model)
    gc.disable()  # the stack must go by itself
    try:
        LoraStack(model, mode=mode).add(style)
        stack = LoraStack(model, mode=mode).add(other)
    finally:
        gc.enable()
    stack.clear()
    assert_same(model, before)


def test_failed_add_brings_back_what_a_dropped_stack_left(style: Path, wide: Path) -> None:
    model = make_model("int8")
    LoraStack(model).add(style)
    before = describe(model)

    with pytest.raises(LoraError, match="a LoKr that has no low-rank form"):
        LoraStack(model, mode="dynamic").add(wide)

    assert_same(model, before)
    LoraStack(model).clear()
    assert_same(model, describe(make_model("int8")))


def test_clear_removes_what_a_dropped_stack_left(style: Path) -> None:
    model = TinyModel()
    LoraStack(model).add(style)
    LoraStack(model).clear()
    assert_same(model, describe(TinyModel()))


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_dropped_model_is_freed_at_once(style: Path, kind: str) -> None:
    model = make_model(kind)
    stack = LoraStack(model, mode="auto").add(style)
    freed = weakref.ref(model)
    gc.disable()
    try:
        del model, stack
        assert freed() is None, "a circle of references would keep its memory"
    finally:
        gc.enable()


# -- parts of a model ----------------------------------------------------------------------------------------


def test_part_of_a_model_has_the_same_holder(style: Path, other: Path, tmp_path: Path) -> None:
    model = TinyModel()
    block = model.blocks[0]
    own = write(tmp_path / "own.safetensors", **{"1": pair(96, 64)})
    stack = LoraStack(model).add(style)

    with pytest.raises(ConfigError, match=r"^this model has a LoraStack already, with 'style'; "):
        LoraStack(block).add(own)
    stack.clear()

    on_block = LoraStack(block).add(own)
    with pytest.raises(ConfigError, match=r"^this model has a LoraStack already, with 'own'; "):
        LoraStack(model).add(other)
    assert LoraStack.of(model) is on_block
    on_block.clear()
    assert_same(model, describe(TinyModel()))


def test_text_encoder_has_one_stack(tmp_path: Path) -> None:
    encoder = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    file = tmp_path / "text.safetensors"
    save_file({f"text_encoder.fc.{k.replace('__', '.')}": v for k, v in pair(4, 4).items()}, file)
    first = LoraStack(TinyModel(), {"text_encoder": encoder}).add(file)

    with pytest.raises(ConfigError, match=r"^this model has a LoraStack already, with 'text'; "):
        LoraStack(TinyModel(), {"text_encoder": encoder}).add(file)

    first.clear()
    LoraStack(TinyModel(), {"text_encoder": encoder}).add(file)


def test_clear_does_not_mind_another_stack_on_a_shared_text_encoder(style: Path, tmp_path: Path) -> None:
    model, encoder = TinyModel(), nn.ModuleDict({"fc": nn.Linear(4, 4)})
    file = tmp_path / "text.safetensors"
    save_file({f"text_encoder.fc.{k.replace('__', '.')}": v for k, v in pair(4, 4).items()}, file)
    stack = LoraStack(model, {"text_encoder": encoder}).add(style)
    other_stack = LoraStack(TinyModel(), {"text_encoder": encoder}).add(file)
    with_lora = describe(encoder)

    stack.clear()

    assert_same(model, describe(TinyModel()))
    assert_same(encoder, with_lora)
    with pytest.raises(ConfigError, match=r"^this model has a LoraStack already, with 'text'; "):
        stack.clear()
    other_stack.clear()


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_blocks_that_were_compiled_one_by_one(style: Path, kind: str) -> None:
    model, plain = make_model(kind), make_model(kind)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    stack, reference = LoraStack(model).add(style, 0.8), LoraStack(plain).add(style, 0.8)
    assert torch.equal(model(X), plain(X))
    stack.set_strength("style", 0.2)
    reference.set_strength("style", 0.2)
    assert torch.equal(model(X), plain(X))
    stack.clear()
    assert torch.equal(model(X), make_model(kind)(X))


# -- copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_of_a_model_with_loras_is_known_as_one(
    style: Path, make_copy: Callable[[nn.Module], nn.Module]
) -> None:
    model = TinyModel()
    stack = LoraStack(model).add(style)
    copied = make_copy(model)
    with_lora = copied(X)

    with pytest.raises(ConfigError, match=r"^this model is a copy of one with LoRAs on it \('style'\), "):
        LoraStack(copied).add(style)
    stack.clear()

    assert torch.equal(copied(X), with_lora), "the copy is a model of its own"
    assert_same(model, describe(TinyModel()))
    LoraStack(make_copy(model)).add(style)


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, pickle.dumps])
def test_stack_is_not_copied(style: Path, make_copy: Callable[[LoraStack], object]) -> None:
    stack = LoraStack(TinyModel()).add(style)
    with pytest.raises(
        ConfigError, match=r"^a LoraStack cannot be copied or saved, as it belongs to its model; "
    ):
        make_copy(stack)


# -- what other programs change ------------------------------------------------------------------------------


def replace_weight(model: nn.Module) -> None:
    model.get_submodule(LAYER).weight = nn.Parameter(torch.ones(96, 64))


def replace_module(model: nn.Module) -> None:
    model.blocks[0][1] = nn.Linear(64, 96)


def assign_weights(model: nn.Module) -> None:
    model.load_state_dict(TinyModel(seed=3).state_dict(), strict=False, assign=True)


def load_weights(model: nn.Module) -> None:
    model.load_state_dict(TinyModel(seed=3).state_dict(), strict=False)


def write_data(model: nn.Module) -> None:
    model.get_submodule(LAYER).weight.data.mul_(1.5)


@pytest.mark.parametrize("change", [replace_weight, replace_module, assign_weights, load_weights, write_data])
def test_weights_that_others_changed_are_left_to_them(
    change: Callable[[nn.Module], None], style: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = TinyModel()
    stack = LoraStack(model).add(style)
    change(model)
    theirs = describe(model.get_submodule(LAYER))

    for call in (lambda: stack.set_strength("style", 0.0), lambda: stack.add(other)):
        with pytest.raises(
            ConfigError, match=rf"^{LAYER}.*: replaced or written to by another .*; call clear\(\), then add"
        ):
            call()
    assert stack.entries[0].strength == 1.0

    stack.clear()
    assert any("put there is left as it is" in line for line in caplog.messages)
    cleared = describe(model.get_submodule(LAYER))
    assert torch.equal(cleared[".weight"], theirs[".weight"])
    LoraStack(model).add(style)


@pytest.mark.parametrize("load", ["original", "own"])
def test_loading_what_the_model_has_changes_nothing(style: Path, load: str) -> None:
    model, plain = TinyModel(), TinyModel()
    stack = LoraStack(model).add(style)
    state = plain.state_dict() if load == "original" else copy.deepcopy(model.state_dict())
    model.load_state_dict(state, strict=False)

    stack.set_strength("style", 0.25)

    assert_close("a quarter", weight_change(model, plain), 0.25 * product(style), 1e-5)
    stack.clear()
    assert_same(model, describe(plain))


def test_model_can_change_its_dtype(style: Path) -> None:
    model = TinyModel()
    stack = LoraStack(model).add(style)
    model.to(torch.bfloat16)
    expected = TinyModel().get_submodule(LAYER).weight + 0.5 * product(style)

    stack.set_strength("style", 0.5)

    assert torch.equal(model.get_submodule(LAYER).weight, expected.bfloat16())
    stack.clear()
    assert_same(model, describe(TinyModel().to(torch.bfloat16)))


def test_loras_of_peft_come_and_go(style: Path) -> None:
    """diffusers' load_lora_weights wraps the layers, and unload_lora_weights takes the wrappers off."""
    model, plain = TinyModel(), TinyModel()
    stack = LoraStack(model).add(style)
    tuner = LoraModel(model, LoraConfig(target_modules=[LAYER]), "theirs")

    with pytest.raises(
        ConfigError, match=rf"^{LAYER}: replaced or written to by another part of the program"
    ):
        stack.set_strength("style", 0.5)
    tuner.unload()
    stack.set_strength("style", 0.5)

    assert_close("half", weight_change(model, plain), 0.5 * product(style), 1e-5)
    tuner = LoraModel(model, LoraConfig(target_modules=[LAYER], init_lora_weights=False), "theirs")
    tuner.merge_and_unload()  # writes through .data
    with pytest.raises(
        ConfigError, match=rf"^{LAYER}: replaced or written to by another part of the program"
    ):
        stack.set_strength("style", 1.0)


def test_float8_weights_are_warned_of(style: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = TinyModel()
    model.get_submodule(LAYER).to(torch.float8_e4m3fn)
    LoraStack(model).add(style)
    assert [line for line in caplog.messages if "float8" in line] == [
        "1 of 2 weights that the LoRAs change are float8, which rounds away most of a small change; put "
        "LoRAs on a bfloat16 model (before enable_layerwise_casting), or on INT8 layers"
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_model_can_change_its_dtype_and_back(style: Path, dtype: torch.dtype) -> None:
    model = TinyModel()
    stack = LoraStack(model).add(style)
    model.to(dtype).to(torch.float32)

    stack.set_strength("style", 0.5)

    assert_close("half", weight_change(model, TinyModel()), 0.5 * product(style), 1e-5)
    model.to(dtype).to(torch.float32)
    stack.clear()
    assert torch.equal(model.get_submodule(LAYER).weight, TinyModel().get_submodule(LAYER).weight)
    assert "proj_out.bias" not in model.state_dict()


@pytest.mark.parametrize("mode", ["dynamic", "stochastic"])
def test_int8_model_can_move(style: Path, mode: str) -> None:
    """A move to another device gives every layer new tensors; so does a copy of each."""
    model, still = make_model("int8"), make_model("int8")
    before = describe(model)
    stack, reference = LoraStack(model, mode=mode).add(style), LoraStack(still, mode=mode).add(style)
    model._apply(lambda tensor: tensor.clone())

    for strength in (0.5, 0.0, 1.0):
        stack.set_strength("style", strength)
        reference.set_strength("style", strength)
        assert torch.equal(model(X), still(X)), strength

    stack.clear()
    assert_same(model, before)


def test_weights_on_the_meta_device_are_refused(style: Path) -> None:
    model = TinyModel()
    model.get_submodule(LAYER).to("meta")
    with pytest.raises(LoraError, match=rf"^{LAYER}: the weight is not in memory, but on the meta device; "):
        LoraStack(model).add(style)
    assert LoraStack.of(model) is None


def test_computed_weights_are_refused(style: Path) -> None:
    model = TinyModel()
    nn.utils.parametrizations.weight_norm(model.get_submodule(LAYER))
    with pytest.raises(LoraError, match=rf"^{LAYER}: the weight is no parameter of its module"):
        LoraStack(model).add(style)


def test_integers_of_other_programs_are_refused(style: Path) -> None:
    model = TinyModel()
    packed = torch.ones(96, 64, dtype=torch.int8)
    model.get_submodule(LAYER).weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(LoraError, match=rf"^the weight of {LAYER} is int8: another program has quantized"):
        LoraStack(model).add(style)


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    model = TinyModel()
    model.blocks[1][1].weight = model.blocks[0][1].weight
    file = write(tmp_path / "x.safetensors", blocks__0__1=pair(96, 64), blocks__1__1=pair(96, 64))
    before = describe(model)
    with pytest.raises(LoraError, match=r"^blocks\.0\.1 and blocks\.1\.1 share one weight, "):
        LoraStack(model).add(file)
    assert_same(model, before)


# -- clear and remove ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_cleared_model_loads_its_own_weights(style: Path, dtype: torch.dtype) -> None:
    model, plain = TinyModel().to(dtype), TinyModel().to(dtype)
    stack = LoraStack(model).add(style)
    assert "proj_out.bias" in model.state_dict()

    stack.clear()

    assert list(model.state_dict()) == list(plain.state_dict())
    assert_same(model, describe(plain))
    model.load_state_dict(plain.state_dict())


def test_cleared_int8_model_is_as_before(style: Path) -> None:
    model = make_model("int8")
    before = describe(model)
    stack = LoraStack(model).add(style)
    assert model.proj_out.bias is not None
    stack.clear()
    assert model.proj_out.bias is None
    assert_same(model, before)


def test_norm_without_a_bias_is_as_before(tmp_path: Path) -> None:
    model = nn.ModuleDict({"norm": RMSNorm(8, eps=1e-6), "plain": nn.RMSNorm(8)})
    before = dict(model["norm"].__dict__), describe(model)
    stack = LoraStack(model).add(write(tmp_path / "a.safetensors", norm={"diff_b": randn(8)}))
    assert_close("bias", model["norm"](torch.zeros(8)), randn(8), 1e-6)

    stack.clear()

    assert model["norm"].bias is None and "bias" in model["norm"].__dict__
    assert model["norm"].__dict__.keys() == before[0].keys()
    assert_same(model, before[1])
    with pytest.raises(LoraError, match=r"^plain gets a change of its bias, and a RMSNorm has no bias; "):
        LoraStack(model).add(write(tmp_path / "b.safetensors", plain={"diff_b": randn(8)}))


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_one_lora_is_removed(style: Path, other: Path, kind: str) -> None:
    model, alone = make_model(kind), make_model(kind)
    stack = LoraStack(model).add(style, 0.5).add(other, 2.0)
    LoraStack(alone).add(other, 2.0)

    stack.remove("style")

    assert stack.names == ["other"] and torch.equal(model(X), alone(X))
    stack.set_strength("other", 0.0)
    assert torch.equal(model(X), make_model(kind)(X))
    with pytest.raises(ConfigError, match=r"^the stack has no LoRA called 'style'; it has other$"):
        stack.remove("style")

    stack.remove("other")
    assert_same(model, describe(make_model(kind)))
    assert stack.names == [] and LoraStack.of(model) is None
    stack.add(style)
    assert LoraStack.of(model) is stack
