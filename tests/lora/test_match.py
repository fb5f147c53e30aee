"""Matching LoRA files with a model: components, text encoders by their names, cut rows, and the rest."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from lora.layouts.tiny_models import make_tiny_models
from support.compare import assert_close
from support.helpers import randn
from support.tiny_pipeline import random_pipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from int8run.errors import LoraError
from int8run.lora.adapters.change import LoraChange
from int8run.lora.adapters.diff import Diff
from int8run.lora.adapters.dora import DoRA
from int8run.lora.adapters.lora import LoRA
from int8run.lora.key_groups import PLAIN_WEIGHT
from int8run.lora.load import LoraFile
from int8run.lora.match import Matches, MatchRequest, match_loras

TO_Q, PROJ_OUT = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"
ADVICE = (
    "VeRA is not applied: merge it into its base model with PEFT (merge_and_unload) and give the merged "
    "model, or extract a LoRA from that"
)
CLIP_Q, CLIP_FC1 = "text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"
T5_Q, T5_O = "encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.o"


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    """Denoiser, CLIP and T5, each with the names of the real ones."""
    pipe = random_pipeline()
    return {
        "denoiser": pipe.transformer,
        "text_encoder": pipe.text_encoder,
        "text_encoder_2": pipe.text_encoder_2,
    }


@pytest.fixture(autouse=True)
def nothing_changes(parts: dict[str, nn.Module]) -> Iterator[None]:
    """Matching only looks: whatever a test does, every weight is as it was."""
    before = {(part, key): t.clone() for part, m in parts.items() for key, t in m.state_dict().items()}
    yield
    after = {(part, key): t for part, m in parts.items() for key, t in m.state_dict().items()}
    assert before.keys() == after.keys() and all(torch.equal(t, after[key]) for key, t in before.items())


def make_change(n: int, k: int, seed: int = 1) -> LoraChange:
    """A LoRA of rank 2 for an [n, k] weight."""
    return LoraChange(LoRA(randn(2, k, seed=seed), randn(n, 2, seed=seed + 1)))


def make_request(
    changes: Mapping[str, Mapping[str, LoraChange]], unknown: tuple[tuple[str, str], ...] = ()
) -> MatchRequest:
    """A LoRA file that lies nowhere."""
    return MatchRequest(LoraFile(Path("/loras/style.safetensors"), changes, unknown, {}))


def list_changed_modules(found: Matches) -> dict[str, list[str]]:
    """Modules by component, of the components that have some."""
    return {component: sorted(modules) for component, modules in found.by_component.items() if modules}


# -- parts ---------------------------------------------------------------------------------------------------


def test_each_component_of_a_file_changes_that_of_the_model(parts: dict[str, nn.Module]) -> None:
    wanted = make_request(
        {
            "denoiser": {TO_Q: make_change(32, 32)},
            "text_encoder": {CLIP_Q: make_change(16, 16)},
            "text_encoder_2": {T5_Q: make_change(16, 16)},
        }
    )
    found = match_loras(parts, [wanted], strict=True)

    clip = CLIP_Q.removeprefix("text_model.")  # as this transformers has it

    assert list_changed_modules(found) == {
        "denoiser": [TO_Q],
        "text_encoder": [clip],
        "text_encoder_2": [T5_Q],
    }
    assert list(found.denoiser) == [TO_Q] and found.n_matched == 3 and not found.unmatched


def test_changes_have_the_index_of_their_lora(parts: dict[str, nn.Module]) -> None:
    first, second = make_change(32, 32), make_change(32, 32, seed=5)
    found = match_loras(
        parts,
        [make_request({"denoiser": {TO_Q: first}}), make_request({"denoiser": {TO_Q: second}})],
        strict=True,
    )

    assert found.denoiser[TO_Q] == [(0, first), (1, second)] and found.n_matched == 2


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_text_encoder_number_in_the_file_is_only_a_hint(parts: dict[str, nn.Module], component: str) -> None:
    # T5 is the third for some trainers and the second for others; its names tell
    clip = CLIP_Q.removeprefix("text_model.")
    both = match_loras(
        parts,
        [make_request({component: {T5_Q: make_change(16, 16), CLIP_Q: make_change(16, 16)}})],
        strict=True,
    )

    assert list_changed_modules(both) == {"text_encoder": [clip], "text_encoder_2": [T5_Q]}


def test_text_encoder_is_found_by_its_shapes() -> None:
    # two CLIPs with the same names: only the second has 24 columns
    def clip(width: int) -> nn.Module:
        sizes = {
            "hidden_size": width,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        return CLIPTextModel(CLIPTextConfig(vocab_size=4, bos_token_id=0, eos_token_id=1, **sizes))

    encoders = {"text_encoder": clip(16), "text_encoder_2": clip(24)}
    for width, target in ((16, "text_encoder"), (24, "text_encoder_2")):
        found = match_loras(
            encoders, [make_request({"text_encoder_3": {CLIP_Q: make_change(width, width)}})], strict=True
        )
        assert list(list_changed_modules(found)) == [target]

    with pytest.raises(LoraError, match=r"none of its 1 modules and keys is in the model"):
        match_loras(encoders, [make_request({"text_encoder_3": {CLIP_Q: make_change(20, 20)}})], strict=True)
    # under the number that the file gives, a wrong shape is a wrong shape
    with pytest.raises(LoraError, match=r"changes a 20x20 weight, the model's is 16x16"):
        match_loras(encoders, [make_request({"text_encoder": {CLIP_Q: make_change(20, 20)}})], strict=True)


def test_denoiser_and_text_encoders_are_never_mixed(
    parts: dict[str, nn.Module],
) -> None:
    for component, name in (("text_encoder_3", TO_Q), ("denoiser", T5_Q)):
        size = 32 if name == TO_Q else 16
        with pytest.raises(LoraError, match="none of its 1 modules and keys is in the model"):
            match_loras(parts, [make_request({component: {name: make_change(size, size)}})], strict=True)


def test_components_that_are_not_requested_are_not_missed(parts: dict[str, nn.Module]) -> None:
    wanted = make_request(
        {
            "denoiser": {TO_Q: make_change(32, 32)},
            "text_encoder": {CLIP_Q: make_change(16, 16), "nowhere": make_change(3, 3)},
        }
    )
    found = match_loras(parts, [MatchRequest(wanted.file, ["denoiser"])], strict=True)

    assert list_changed_modules(found) == {"denoiser": [TO_Q]} and not found.unmatched

    found = match_loras(parts, [MatchRequest(wanted.file, ["denoiser", "text_encoder"])], strict=False)

    assert found.n_matched == 2 and found.unmatched == [(0, "text_encoder: nowhere", "no such module")]


def test_skipped_keys_of_other_components_are_not_missed(parts: dict[str, nn.Module]) -> None:
    keys = (("lora_te1_text_model_encoder_layers_0_mlp_fc1.vera_lambda_b", "unsupported adapter type: VeRA"),)
    wanted = make_request({"denoiser": {TO_Q: make_change(32, 32)}}, keys).file

    assert not match_loras(parts, [MatchRequest(wanted, ["denoiser"])], strict=True).unmatched
    for components in (None, ["denoiser", "text_encoder"]):
        with pytest.raises(
            LoraError,
            match="1 of 2 modules and keys do not match the model: 1 × unsupported adapter type: VeRA",
        ):
            match_loras(parts, [MatchRequest(wanted, components)], strict=True)


@pytest.mark.parametrize(
    "components", [["text_encoder_2"], ["text_encoder_2", "text_encoder_3"], []], ids=repr
)
@pytest.mark.parametrize("strict", [True, False])
def test_components_that_a_file_lacks_are_rejected(
    parts: dict[str, nn.Module], components: list[str], strict: bool
) -> None:
    wanted = make_request(
        {"denoiser": {TO_Q: make_change(32, 32)}, "text_encoder": {CLIP_Q: make_change(16, 16)}}
    ).file

    with pytest.raises(LoraError) as error:
        match_loras(parts, [MatchRequest(wanted, components)], strict=strict)
    assert (
        str(error.value)
        == f"style.safetensors: components={components} leaves nothing of it; it has denoiser, text_encoder"
    )


# -- what has no place ---------------------------------------------------------------------------------------

SKIPPED_KEYS = (
    ("a.vera_lambda_b", "unsupported adapter type: VeRA"),
    ("b.x", "unknown suffix"),
    ("c.x", "unknown suffix"),
)


def test_strict_rejects_and_counts_the_reasons(parts: dict[str, nn.Module]) -> None:
    wanted = make_request(
        {"denoiser": {TO_Q: make_change(32, 32), "transformer_blocks.9.attn.to_q": make_change(32, 32)}},
        SKIPPED_KEYS,
    )

    with pytest.raises(LoraError) as error:
        match_loras(parts, [wanted], strict=True)
    assert str(error.value) == (
        "style.safetensors: 4 of 5 modules and keys do not match the model: 1 × unsupported "
        "adapter type: VeRA; 2 × unknown suffix; "
        f"1 × no such module (first: a.vera_lambda_b); {ADVICE}; lora.strict=false applies the rest"
    )


def test_not_strict_applies_the_rest_and_warns(
    parts: dict[str, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    good, late = (
        make_request({"denoiser": {TO_Q: make_change(32, 32)}}),
        make_request({"denoiser": {TO_Q: make_change(32, 32), "x": make_change(2, 2)}}, SKIPPED_KEYS[:1]),
    )
    found = match_loras(parts, [good, late], strict=False)

    assert found.n_matched == 2
    assert found.unmatched == [
        (1, "a.vera_lambda_b", "unsupported adapter type: VeRA"),
        (1, "x", "no such module"),
    ]

    (said,) = caplog.records

    assert said.levelno == logging.WARNING and said.getMessage() == (
        "style.safetensors: 2 of 3 modules and keys do not match the model and are left out: 1 × "
        "unsupported adapter type: VeRA; "
        f"1 × no such module (first: a.vera_lambda_b); {ADVICE}"
    )


@pytest.mark.parametrize("strict", [True, False])
def test_file_without_a_match_is_always_rejected(parts: dict[str, nn.Module], strict: bool) -> None:
    with pytest.raises(LoraError) as error:
        match_loras(
            parts,
            [
                make_request(
                    {"denoiser": {"elsewhere.a": make_change(2, 2), "elsewhere.b": make_change(2, 2)}}
                )
            ],
            strict=strict,
        )
    assert str(error.value) == (
        "style.safetensors: none of its 2 modules and keys is in the model (first: elsewhere.a): 2 "
        "× no such module; the LoRA was "
        "made for another architecture, or its adapter type is not supported"
    )


@pytest.mark.parametrize(
    ("skipped", "words"),
    [
        ((("x.vera_lambda_b", "unsupported adapter type: VeRA"),), ADVICE),
        (
            (
                ("image_proj.x", "IP-Adapter, not a LoRA"),
                ("x.alpha", "an alpha without a change"),
            ),
            "IP-Adapter is not applied: load it with load_ip_adapter of a diffusers pipeline",
        ),
        (
            (("x.weight", PLAIN_WEIGHT), ("x.bias", "unknown suffix")),
            "the file holds weights of a model, and no LoRA; give it as the model (model.location=FILE) or "
            "the text encoder (clip.path=FILE) if it is one",
        ),
        ((("x.bias", "unknown suffix"),), "the LoRA was made for another architecture, or its"),
    ],
    ids=["adapter", "no LoRA", "weights", "unknown"],
)
def test_file_of_which_nothing_is_read_is_named(
    parts: dict[str, nn.Module], skipped: tuple[tuple[str, str], ...], words: str
) -> None:
    with pytest.raises(LoraError) as error:
        match_loras(parts, [make_request({}, skipped)], strict=False)
    assert f"; {words}" in str(error.value)
    assert ("another architecture" in str(error.value)) == words.startswith("the LoRA")


def test_one_lora_without_a_match_fails_the_stack(parts: dict[str, nn.Module]) -> None:
    with pytest.raises(LoraError, match="none of its 1 modules and keys"):
        match_loras(
            parts,
            [
                make_request({"denoiser": {TO_Q: make_change(32, 32)}}),
                make_request({"denoiser": {"x": make_change(2, 2)}}),
            ],
            strict=False,
        )


def test_missing_text_encoder_is_named(parts: dict[str, nn.Module]) -> None:
    wanted = make_request(
        {"denoiser": {TO_Q: make_change(32, 32)}, "text_encoder": {CLIP_Q: make_change(16, 16)}}
    )
    found = match_loras({"denoiser": parts["denoiser"]}, [wanted], strict=False)

    assert found.unmatched == [(0, f"text_encoder: {CLIP_Q}", "the model has no text_encoder")]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            make_change(32, 24),
            f"{TO_Q} changes a 32x24 weight, the model's is 32x32; the LoRA was made for another base model",
        ),
        (
            make_change(40, 32),
            f"{TO_Q} changes a 40x32 weight, the model's is 32x32; the LoRA was made for another base model",
        ),
        (
            LoraChange(Diff(torch.ones(32))),
            f"{TO_Q} changes a 32 weight, the model's is 32x32; the LoRA was made for another base model",
        ),
        (LoraChange(None, torch.ones(31)), "bias"),
    ],
    ids=["narrow", "tall", "a vector", "a bias"],
)
def test_wrong_shape_is_always_rejected_with_both_shapes(
    parts: dict[str, nn.Module], changed: LoraChange, reason: str, strict: bool
) -> None:
    with pytest.raises(LoraError) as error:
        match_loras(
            parts,
            [make_request({"denoiser": {PROJ_OUT: make_change(32, 160), TO_Q: changed}})],
            strict=strict,
        )
    assert str(error.value).startswith("style.safetensors: ") and reason in str(error.value)


# -- matrices that are cut -----------------------------------------------------------------------------------

FUSED = "single_blocks.0.linear1"  # q, k, v and the MLP, one after the other
PARTS_OF_FUSED = [
    f"single_transformer_blocks.0.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
]


def compute_delta(model: nn.Module, name: str, matches: Matches) -> torch.Tensor:
    """What a module's weight changes by."""
    ((_, changed),) = matches.denoiser[name]
    return changed.weight_delta.compute_delta(model.get_submodule(name).weight)


def test_fused_matrix_is_cut_by_the_models_own_rows(parts: dict[str, nn.Module]) -> None:
    model, whole = parts["denoiser"], make_change(3 * 32 + 128, 32)
    whole = LoraChange(whole.weight_delta, randn(3 * 32 + 128, seed=9))

    found = match_loras(parts, [make_request({"denoiser": {FUSED: whole}})], strict=True)

    assert sorted(found.denoiser) == sorted(PARTS_OF_FUSED) and found.n_matched == 4
    assert torch.equal(
        torch.cat([compute_delta(model, name, found) for name in PARTS_OF_FUSED]),
        whole.weight_delta.compute_delta(torch.zeros(224, 32)),
    )
    assert torch.equal(
        torch.cat([found.denoiser[name][0][1].bias_delta for name in PARTS_OF_FUSED]), whole.bias_delta
    )


@pytest.mark.parametrize("rows", [200, 256])
def test_fused_matrix_with_other_rows_is_rejected(parts: dict[str, nn.Module], rows: int) -> None:
    message = (
        rf"^style\.safetensors: single_blocks\.0\.linear1 has {rows} rows, .*proj_mlp have 224 "
        rf"together; the LoRA was made"
    )

    with pytest.raises(LoraError, match=message):
        match_loras(parts, [make_request({"denoiser": {FUSED: make_change(rows, 32)}})], strict=True)


def test_norms_of_columns_run_over_all_parts_of_a_fused_matrix(parts: dict[str, nn.Module]) -> None:
    model, lora = parts["denoiser"], make_change(224, 32).weight_delta
    magnitude = randn(32, seed=9).abs() + 1
    dora = LoraChange(DoRA(lora, magnitude, on_input=True))
    found = match_loras(parts, [make_request({"denoiser": {FUSED: dora}})], strict=True)
    joined = {id(found.denoiser[name][0][1].weight_delta.joined) for name in PARTS_OF_FUSED}
    columns = found.denoiser[PARTS_OF_FUSED[0]][0][1].weight_delta.joined
    columns.read(lambda name: model.get_submodule(name).weight)

    whole = torch.cat([model.get_submodule(name).weight for name in PARTS_OF_FUSED]).detach()
    changed = whole + lora.compute_delta(whole)
    expected = magnitude * changed / changed.norm(dim=0) - whole

    assert len(joined) == 1 and columns.modules == PARTS_OF_FUSED
    assert_close(
        "all parts", torch.cat([compute_delta(model, name, found) for name in PARTS_OF_FUSED]), expected, 1e-5
    )


# -- one module under two names ------------------------------------------------------------------------------

Q_K_V = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"]
QKV = "double_blocks.0.img_attn.qkv"


def make_split(whole: LoraChange, names: list[str] = Q_K_V) -> dict[str, LoraChange]:
    """The same change, a third for each name."""
    return {name: whole.take_rows(slice(32 * i, 32 * (i + 1))) for i, name in enumerate(names)}


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_copies_under_other_names_count_once(
    fuse: bool, order: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_pipeline().transformer
    if fuse:
        model.fuse_qkv_projections()
    whole = LoraChange(make_change(96, 32).weight_delta, randn(96))
    changes = {QKV: whole} | make_split(whole) | {"transformer_blocks.0.attn.to_qkv": whole}
    request = make_request({"denoiser": dict(list(changes.items())[::order])})

    with caplog.at_level(logging.INFO):
        found = match_loras({"denoiser": model}, [request], strict=True)

    expected = whole.weight_delta.compute_delta(torch.zeros(96, 32))
    if fuse:
        fused = found.denoiser["transformer_blocks.0.attn.to_qkv"]
        made = sum(change.weight_delta.compute_delta(torch.zeros(96, 32)) for _, change in fused)
        assert torch.equal(made, expected)
        assert torch.equal(sum(change.bias_delta for _, change in fused), whole.bias_delta)
    else:
        made = [compute_delta(model, name, found) for name in Q_K_V]  # one change of each
        assert torch.equal(torch.cat(made), expected)
        assert "6 modules are in the file under two names with the same values" in caplog.text


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        make_split(make_change(96, 32, seed=2)),
        {QKV: LoraChange(Diff(torch.ones(96, 32)))},
        {Q_K_V[2]: LoraChange(Diff(torch.ones(32, 32)))},
    ],
    ids=["split", "fused", "one of three"],
)
def test_two_names_with_different_changes_are_refused(fuse: bool, other: dict[str, LoraChange]) -> None:
    model = random_pipeline().transformer
    if fuse:
        model.fuse_qkv_projections()
    first = {"transformer_blocks.0.attn.to_qkv": make_change(96, 32)}
    with pytest.raises(
        LoraError,
        match=r"style\.safetensors: \S+ is in the file twice, as \S+ and \S+; which one is meant",
    ):
        match_loras({"denoiser": model}, [make_request({"denoiser": first | other})], strict=False)


def test_weight_and_bias_under_two_names_are_no_copies(parts: dict[str, nn.Module]) -> None:
    weight = make_change(96, 32)
    biases = {name: LoraChange(None, randn(32, seed=i)) for i, name in enumerate(Q_K_V)}
    found = match_loras(parts, [make_request({"denoiser": {QKV: weight} | biases})], strict=True)

    for name in Q_K_V:
        (_, first), (_, second) = found.denoiser[name]
        assert first.bias_delta is None and second.weight_delta is None


def test_swapped_halves_are_exchanged() -> None:
    models = make_tiny_models()["flux"]
    whole = make_change(32, 16)
    for name, swapped in (("final_layer.adaLN_modulation.1", True), ("norm_out.linear", False)):
        found = match_loras(models, [make_request({"denoiser": {name: whole}})], strict=True)
        expected = whole.weight_delta.compute_delta(torch.zeros(32, 16))
        assert torch.equal(
            compute_delta(models["denoiser"], "norm_out.linear", found),
            expected.roll(16, 0) if swapped else expected,
        )


def test_part_of_a_fused_module_changes_its_rows_only() -> None:
    models = make_tiny_models()["flux"]
    models["denoiser"].fuse_qkv_projections()
    found = match_loras(
        models,
        [make_request({"denoiser": {"transformer_blocks.0.attn.to_k": make_change(16, 16)}})],
        strict=True,
    )

    fused = "transformer_blocks.0.attn.to_qkv"

    assert list(found.denoiser) == [fused], "to_k is still there, and nobody calls it"

    made = compute_delta(models["denoiser"], fused, found)

    assert (
        torch.equal(made[16:32], make_change(16, 16).weight_delta.compute_delta(torch.zeros(16, 16)))
        and not made[:16].any()
        and not made[32:].any()
    )


# -- one matrix under two names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj"),
        ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_k"),
        ("transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv"),
        ("transformer_blocks.0.attn.to_k", "transformer_blocks_0_attn_to_k"),
    ],
)
@pytest.mark.parametrize("is_fused_in_model", [False, True])
def test_a_matrix_under_two_names_is_refused(first: str, second: str, is_fused_in_model: bool) -> None:
    models = make_tiny_models()["flux"]
    if is_fused_in_model:
        models["denoiser"].fuse_qkv_projections()
    rows = {name: 48 if "qkv" in name else 16 for name in (first, second)}
    changes = {name: make_change(rows[name], 16, seed) for seed, name in enumerate(rows)}

    with pytest.raises(
        LoraError, match=f" is in the file twice, as {first} and {second}; which one is meant"
    ):
        match_loras(models, [make_request({"denoiser": changes})], strict=False)


def test_other_rows_and_other_parameters_are_not_twice() -> None:
    models = make_tiny_models()["flux"]
    models["denoiser"].fuse_qkv_projections()
    bias = LoraChange(None, randn(16, seed=3))
    changes = {f"transformer_blocks.0.attn.to_{letter}": make_change(16, 16) for letter in "qkv"}
    changes |= {
        "transformer_blocks.0.attn.to_out.0": make_change(16, 16),
        "double_blocks.0.img_attn.proj": bias,
    }

    found = match_loras(models, [make_request({"denoiser": changes})], strict=True)

    assert len(found.denoiser["transformer_blocks.0.attn.to_qkv"]) == 3
    assert len(found.denoiser["transformer_blocks.0.attn.to_out.0"]) == 2


def test_two_files_may_change_the_same_matrix() -> None:
    models = make_tiny_models()["flux"]
    names = ("transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj")
    stack = [make_request({"denoiser": {name: make_change(16, 16)}}) for name in names]

    found = match_loras(models, stack, strict=True)

    assert [index for index, _ in found.denoiser["transformer_blocks.0.attn.to_out.0"]] == [0, 1]
