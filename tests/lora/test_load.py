"""Finding and reading LoRA files: parts, scales, and the errors. Layouts are in test_layouts.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.compare import assert_close
from support.helpers import randn

from int8run.errors import LoraError
from int8run.lora import find
from int8run.lora.adapters.dora import DoRA
from int8run.lora.adapters.lokr import LoKr
from int8run.lora.adapters.lora import LoRA
from int8run.lora.adapters.low_rank import LowRankPair
from int8run.lora.find import find_lora
from int8run.lora.load import read_lora

RANK, IN, OUT = 4, 6, 5
A, B = randn(RANK, IN), randn(OUT, RANK, seed=1)
PEFT = {"transformer.x.lora_A.weight": A, "transformer.x.lora_B.weight": B}


@pytest.fixture
def write(tmp_path):
    def write(tensors, metadata=None, name="style.safetensors"):
        save_file(tensors, tmp_path / name, metadata)
        return tmp_path / name

    return write


def get_only_change(file):
    """The one change of a file."""
    (change,) = file.all_changes
    return change


def make_peft_metadata(**settings):
    """Metadata as diffusers writes it."""
    return {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}


@pytest.mark.parametrize("dtype", [torch.float8_e5m2fnuz, torch.uint16, torch.float16], ids=str)
def test_a_second_spelling_in_another_dtype_is_refused(write, dtype):
    again = {
        "lora_unet_x.lora_down.weight": torch.ones(RANK, IN).to(dtype),
        "lora_unet_x.lora_up.weight": B.clone(),
    }
    ones = {**PEFT, "transformer.x.lora_A.weight": torch.ones(RANK, IN)}
    with pytest.raises(
        LoraError, match=r"x is in the file twice, as transformer\.x\.lora_A\.weight and lora_"
    ):
        read_lora(write({**ones, **again}))


def test_an_ia3_with_several_on_inputs_is_refused(write):
    parts = {"lycoris_x.weight": torch.ones(IN), "lycoris_x.on_input": torch.tensor([True, False])}
    with pytest.raises(LoraError, match=r"x has an on_input of shape \[2\]; it is one yes or no"):
        read_lora(write(parts))


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("transformer.x.lora_A.weight", "transformer.x.lora_B.weight"),
        ("transformer.x.lora_A.default.weight", "transformer.x.lora_B.default.weight"),
        ("diffusion_model.x.lora_down.weight", "diffusion_model.x.lora_up.weight"),
        ("unet.x.lora_A.weight", "unet.x.lora_B.weight"),
        ("base_model.model.transformer.x.lora_A.weight", "base_model.model.transformer.x.lora_B.weight"),
        ("base_model.model.x.lora_A.weight", "x.lora_B.weight"),
        ("x.lora_down.weight", "x.lora_up.weight"),
    ],
)
def test_pair_is_read_in_every_layout(write, down, up):
    file = read_lora(write({down: A, up: B}))

    assert (
        list(file.changes) == ["denoiser"]
        and file.skipped_keys == ()
        and file.ranks == {RANK: 1}
        and file.scales == {1.0: 1}
    )

    core = get_only_change(file).weight_delta

    assert (
        isinstance(core, LoRA)
        and torch.equal(core.lora_A, A)
        and torch.equal(core.lora_B, B)
        and core.scale == 1.0
    )
    assert file.notes == () and file.adapter_types == {"LoRA": 1} and get_only_change(file).bias_delta is None


def test_prefix_is_only_removed_at_the_front(write):
    name = "blocks.0.transformer.proj"
    file = read_lora(write({f"transformer.{name}.lora_A.weight": A, f"transformer.{name}.lora_B.weight": B}))

    assert list(file.changes["denoiser"]) == [name]


@pytest.mark.parametrize(
    "alpha",
    [torch.tensor(8.0), torch.tensor([8.0]), torch.tensor(8), torch.tensor(8.0, dtype=torch.bfloat16)],
    ids=str,
)
def test_alpha_tensor_gives_the_scale(write, alpha):
    file = read_lora(write({"x.lora_down.weight": A, "x.lora_up.weight": B, "x.alpha": alpha}))

    assert file.changes["denoiser"]["x"].weight_delta.scale == 8 / RANK and file.skipped_keys == ()


def test_each_module_has_its_own_alpha_and_rank(write):
    # safetensors refuses tensors that share memory
    tensors = {
        f"{n}.{half}.weight": t.clone() for n in "xyz" for half, t in (("lora_down", A), ("lora_up", B))
    }
    tensors |= {"y.lora_down.weight": A[:2].clone(), "y.lora_up.weight": B[:, :2].clone()}

    file = read_lora(write(tensors | {"x.alpha": torch.tensor(2.0), "y.alpha": torch.tensor(2.0)}))

    assert {name: change.weight_delta.scale for name, change in file.changes["denoiser"].items()} == {
        "x": 0.5,
        "y": 1.0,
        "z": 1.0,
    }
    assert file.ranks == {4: 2, 2: 1} and file.scales == {0.5: 1, 1.0: 2}


def test_alpha_0_means_rank(write):
    # kohya and LyCORIS write 0 where none was given
    assert (
        read_lora(write(PEFT | {"transformer.x.alpha": torch.tensor(0.0)}))
        .changes["denoiser"]["x"]
        .weight_delta.scale
        == 1.0
    )


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"transformer.lora_alpha": 8}, 2.0),
        ({"unet.lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "r": 4}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4.0),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": False}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"x": 2}}, 0.5),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"y": 2}}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {}}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": None}, 2.0),
        ({"transformer.r": 4}, 2.0),  # PEFT's default alpha is 8
        ({}, 1.0),
    ],
    ids=lambda v: json.dumps(v) if isinstance(v, dict) else None,
)
def test_scale_from_the_header(write, settings, scale):
    assert (
        read_lora(write(PEFT, make_peft_metadata(**settings))).changes["denoiser"]["x"].weight_delta.scale
        == scale
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 64, "text_encoder.use_rslora": True},
        {"text_encoder.lora_alpha": 64, "text_encoder.use_rslora": True, "transformer.lora_alpha": 8},
    ],
    ids=["text encoder last", "text encoder first"],
)
def test_alpha_of_the_text_encoder_is_not_that_of_the_denoiser(write, settings):
    assert (
        read_lora(write(PEFT, make_peft_metadata(**settings))).changes["denoiser"]["x"].weight_delta.scale
        == 2.0
    )


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("blocks.0.attn.to_q", True),
        ("to_q", True),
        ("attn.to_q", True),
        (r"blocks\.\d+\.attn\.to_q", True),
        ("o_q", False),
        ("blocks.0", False),
    ],
)
def test_alpha_pattern_matches_the_end_of_a_name_as_in_peft(write, pattern, matches):
    name = "blocks.0.attn.to_q"
    tensors = {f"transformer.{name}.lora_A.weight": A, f"transformer.{name}.lora_B.weight": B}

    settings = {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {pattern: 12}}

    assert read_lora(write(tensors, make_peft_metadata(**settings))).changes["denoiser"][
        name
    ].weight_delta.scale == (3.0 if matches else 1.0)


@pytest.mark.parametrize(
    "text",
    ["{not json", "[1, 2]", '"words"', "null", "[" * 100_000, '{"alpha_pattern": ["x"]}'],
    ids=lambda t: t[:20],
)
def test_useless_header_gives_scale_1(write, text):
    assert (
        read_lora(write(PEFT, {"lora_adapter_metadata": text})).changes["denoiser"]["x"].weight_delta.scale
        == 1.0
    )


def test_unknown_keys_are_listed_with_reasons(write):
    file = read_lora(
        write(
            PEFT
            | {
                "transformer.z.something": torch.ones(OUT),
                "bundle_emb.a": torch.ones(1),
                "y.alpha": torch.ones(1),
            }
        )
    )

    assert set(file.skipped_keys) == {
        ("transformer.z.something", "unknown suffix"),
        ("bundle_emb.a", "textual inversion, not a LoRA"),
        ("y.alpha", "an alpha without a change"),
    }
    assert list(file.changes["denoiser"]) == ["x"]


def test_plain_weights_are_skipped(write):
    file = read_lora(write({"x.weight": A, "x.bias": torch.ones(4), "x.norm_q.weight": torch.ones(4)}))

    assert set(file.skipped_keys) == {
        ("x.weight", "a weight of a model, not a change of one"),
        ("x.norm_q.weight", "a weight of a model, not a change of one"),
        ("x.bias", "unknown suffix"),
    }
    assert file.changes == {} and file.notes == ()


@pytest.mark.parametrize(
    "suffix",
    [
        "a1.weight",
        "oft_r",
        "bias_indices",
        "set_weight",
        "reshape_weight",
        "lora_embedding_A",
        "vera_lambda_b",
    ],
)
def test_module_with_an_unsupported_part_is_skipped_whole(write, suffix):
    # the rest alone would be another LoRA
    file = read_lora(
        write(
            PEFT
            | {
                f"transformer.x.{suffix}": torch.ones(3),
                "y.lora_down.weight": A.clone(),
                "y.lora_up.weight": B.clone(),
            }
        )
    )

    assert list(file.changes["denoiser"]) == ["y"]
    assert {key for key, _ in file.skipped_keys} == {*PEFT, f"transformer.x.{suffix}"}
    assert {reason.partition(":")[0] for _, reason in file.skipped_keys} == {"unsupported adapter type"}


@pytest.mark.parametrize("key", ["a.norm.query_norm.scale", "diffusion_model.a.norm.query_norm.scale"])
def test_whole_norm_beside_a_lora_takes_the_place_of_the_models(write, key):
    value, own = randn(IN, seed=3), randn(IN, seed=4)
    file = read_lora(write(PEFT | {key: value}))
    delta = file.changes["denoiser"]["a.norm.query_norm"].weight_delta

    assert_close("norm", own + delta.compute_delta(own), value, 1e-6)


UNKNOWN_PARTS = {
    "something": "something",
    "bias": "bias",
    "lora_A.bias": "lora_A.bias",
    "lora_A.default.something": "lora_A.default.something",
    "lora_C.weight": "lora_C",
    "gate.weight": "gate",
    "deep.down.below.something": "deep.down.below.something",
}


@pytest.mark.parametrize("spelling", ["transformer.x.y", "lora_unet_x_y", "base_model.model.x.y"])
@pytest.mark.parametrize(("suffix", "part"), UNKNOWN_PARTS.items())
def test_module_with_an_unknown_part_is_skipped_whole(write, suffix, part, spelling):
    module = {"transformer.x.y.lora_A.weight": A, "transformer.x.y.lora_B.weight": B}
    other = {"transformer.z.lora_A.weight": A.clone(), "transformer.z.lora_B.weight": B.clone()}
    file = read_lora(write(module | other | {f"{spelling}.{suffix}": torch.ones(3)}))

    assert list(file.changes["denoiser"]) == ["z"]
    assert dict(file.skipped_keys) == dict.fromkeys(
        [*module, f"{spelling}.{suffix}"], f"modules with a part that is not known ({part})"
    )


def test_hostile_name_of_an_unknown_part_is_cut(write):
    file = read_lora(write(PEFT | {"transformer.x.\x1b[31m" + "a" * 400: torch.ones(1)}))

    reasons = {reason for _, reason in file.skipped_keys}

    assert reasons == {f"modules with a part that is not known ([31m{'a' * 35}…)"}


def test_tensors_below_an_unsupported_part_have_its_reason(write):
    tlora = {
        "x.q_layer.weight": A,
        "x.p_layer.weight": B,
        "x.lambda_layer": torch.ones(1, RANK),
        "x.alpha": torch.tensor(1.0),
    }
    file = read_lora(write(tlora))

    assert dict(file.skipped_keys) == dict.fromkeys(tlora, "unsupported adapter type: T-LoRA")
    assert not file.changes


PDD = "unsupported adapter type: PDD of MiniMax-H3"
TRUNK = {
    "diffusion_model.blocks.0.mlp.fc2.lora_A.weight": A,
    "diffusion_model.blocks.0.mlp.fc2.lora_B.weight": B,
    "diffusion_model.blocks.0.mlp.fc2.alpha": torch.tensor(4.0),
}
HEADS = {
    "comfyui": {
        f"diffusion_model.final_layer.{stream}_out.set_{part}": torch.zeros(4)
        for stream in ("video", "audio")
        for part in ("weight", "bias")
    },
    "under diffusers' names": {
        f"{stream}proj_out.{part}": torch.zeros(4, 2, 2)
        for stream in ("", "audio_")
        for part in ("weight", "bias")
    },
}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_output_layers_of_pdd_beside_a_lora_are_named(write, heads):
    file = read_lora(write(TRUNK | heads))

    assert list(file.changes["denoiser"]) == ["blocks.0.mlp.fc2"]
    assert dict(file.skipped_keys) == dict.fromkeys(heads, PDD)


def test_the_same_names_in_a_model_are_no_pdd(write):
    file = read_lora(write(HEADS["under diffusers' names"]))

    assert PDD not in dict(file.skipped_keys).values()


def test_weights_above_and_beside_a_module_are_no_parts_of_it(write):
    pair = {"transformer.x.y.lora_A.weight": A, "transformer.x.y.lora_B.weight": B}
    file = read_lora(
        write(pair | {"x.weight": A.clone(), "x.z.weight": A.clone(), "x.something": A[0].clone()})
    )

    assert list(file.changes["denoiser"]) == ["x.y"]
    assert dict(file.skipped_keys) == {
        "x.weight": "a weight of a model, not a change of one",
        "x.z.weight": "a weight of a model, not a change of one",
        "x.something": "unknown suffix",
    }


@pytest.mark.parametrize("name", [".my_style", ".default_0.default", ".default"])
def test_pair_under_any_name_of_an_adapter(write, name):
    file = read_lora(write({f"x.lora_A{name}.weight": A, f"x.lora_B{name}.weight": B}))

    assert torch.equal(get_only_change(file).weight_delta.lora_A, A)
    assert torch.equal(get_only_change(file).weight_delta.lora_B, B)


def test_several_adapters_in_one_file_are_refused_by_name(write):
    tensors = {
        f"{module}.lora_{half}.{adapter}.weight": tensor.clone()
        for module, adapter in (("x", "style"), ("y", "person"))
        for half, tensor in (("A", A), ("B", B))
    }
    with pytest.raises(LoraError, match="holds 2 adapters: person, style; save each into a file of its own"):
        read_lora(write(tensors))

    # the text encoder of one LoRA may have its own
    other = {key.replace("y.", "text_encoder.y."): tensor for key, tensor in tensors.items()}
    assert set(read_lora(write(other)).changes) == {"denoiser", "text_encoder"}


# -- one module under two names ------------------------------------------------------------------------------

COPY = {
    "lora_unet_x_y.lora_down.weight": A,
    "lora_unet_x_y.lora_up.weight": B,
    "lora_unet_x_y.alpha": torch.tensor(2.0),
}
ORIGINAL = {"x.y.lora_A.weight": A, "x.y.lora_B.weight": B, "x.y.alpha": torch.tensor(2.0)}


def test_copy_under_another_name_counts_once(write):
    file = read_lora(write({key: tensor.clone() for key, tensor in (ORIGINAL | COPY).items()}))
    delta = get_only_change(file).weight_delta

    assert_close("one change", delta.compute_delta(torch.zeros(OUT, IN)), 2 / RANK * B @ A, 1e-6)
    assert file.notes[0] == ("1 module is in the file under two names with the same values; each counts once")


@pytest.mark.parametrize(
    "change",
    [
        {"lora_unet_x_y.lora_up.weight": 2 * B},
        {"lora_unet_x_y.lora_up.weight": B.half()},
        {"lora_unet_x_y.alpha": None},
        {"x.y.alpha": None},
        {"x.y.dora_scale": torch.ones(OUT, 1)},
    ],
    ids=["values", "precision", "no alpha", "no alpha first", "DoRA"],
)
def test_two_names_with_different_contents_are_refused(write, change):
    tensors = {k: t.clone() for k, t in (ORIGINAL | COPY | change).items() if t is not None}

    with pytest.raises(LoraError, match=r"is in the file twice, as .* and .*; which one is meant cannot be"):
        read_lora(write(tensors))


def test_components_are_kept_apart(write):
    tensors = {
        f"{p}x.{half}.weight": t.clone()
        for p in ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_")
        for half, t in (("lora_down", A), ("lora_up", B))
    }
    file = read_lora(write(tensors))

    components = ("denoiser", "text_encoder", "text_encoder_2", "text_encoder_3")

    assert {c: list(m) for c, m in file.changes.items()} == {c: ["x"] for c in components}
    assert file.ranks == {RANK: 4} and len(file.all_changes) == 4


class TestParts:
    """What a module's tensors make together; the numbers themselves are in test_layouts.py."""

    def test_bias_of_the_pair_is_scaled(self, write):
        bias = torch.ones(OUT)
        file = read_lora(
            write(PEFT | {"transformer.x.lora_B.bias": bias, "transformer.x.alpha": torch.tensor(8.0)})
        )

        assert torch.equal(get_only_change(file).bias_delta, 2 * bias)

    def test_bias_difference_is_not_scaled(self, write):
        bias = torch.ones(OUT, dtype=torch.bfloat16)
        change = get_only_change(
            read_lora(write(PEFT | {"transformer.x.diff_b": bias, "transformer.x.alpha": torch.tensor(8.0)}))
        )

        assert (
            torch.equal(change.bias_delta, torch.ones(OUT))
            and change.bias_delta.dtype == torch.float32
            and change.adapter_type == "LoRA"
        )

    def test_biases_add_up(self, write):
        both = {"transformer.x.lora_B.bias": torch.ones(OUT), "transformer.x.diff_b": torch.full((OUT,), 3.0)}

        assert torch.equal(
            get_only_change(
                read_lora(write(PEFT | both | {"transformer.x.alpha": torch.tensor(8.0)}))
            ).bias_delta,
            torch.full((OUT,), 5.0),
        )

    def test_bias_alone_is_a_change(self, write):
        file = read_lora(write({"x.diff_b": torch.ones(OUT)}))

        assert (
            get_only_change(file).weight_delta is None
            and file.adapter_types == {"bias": 1}
            and file.ranks == {}
            and file.scales == {}
        )

    def test_tensors_keep_their_dtype(self, write):
        core = get_only_change(read_lora(write({k: t.bfloat16() for k, t in PEFT.items()}))).weight_delta

        assert core.lora_A.dtype == core.lora_B.dtype == torch.bfloat16

    def test_float8_keeps_its_values(self, write):
        eight = {k: t.to(torch.float8_e5m2) for k, t in PEFT.items()}
        core = get_only_change(read_lora(write(eight))).weight_delta

        assert core.lora_A.dtype == torch.bfloat16 and torch.equal(
            core.lora_A.float(), eight["transformer.x.lora_A.weight"].float()
        )

    @pytest.mark.parametrize(
        "scale",
        [torch.tensor(0.5), torch.tensor([0.5]), torch.full((OUT,), 0.5), torch.full((OUT, 1), 0.5)],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
    def test_int8_factors_are_dequantized(self, write, scale, dtype):
        up = torch.arange(-10, 10).reshape(OUT, RANK).to(dtype)
        core = get_only_change(
            read_lora(
                write({"x.lora_down.weight": A, "x.lora_up.weight": up, "x.lora_up.scale_weight": scale})
            )
        ).weight_delta

        assert torch.equal(core.lora_B, up.float() / 2) and torch.equal(core.lora_A, A)

    @pytest.mark.parametrize(
        ("shape", "on_input"), [((OUT, 1), False), ((OUT,), False), ((1, IN), True), ((1, 1), None)], ids=str
    )
    def test_axis_of_dora_norms_follows_from_their_shape(self, write, shape, on_input):
        tensors = (
            PEFT
            if on_input is not None
            else {"transformer.x.lora_A.weight": A, "transformer.x.lora_B.weight": B[:1].clone()}
        )
        core = get_only_change(
            read_lora(write(tensors | {"transformer.x.dora_scale": torch.ones(shape)}))
        ).weight_delta

        assert (
            isinstance(core, DoRA)
            and core.on_input == bool(on_input)
            and core.magnitude.shape == (max(shape),)
        )

    def test_axis_of_dora_norms_of_a_square_matrix(self, write):
        square = {"x.lora_A.weight": A, "x.lora_B.weight": randn(IN, RANK)}

        for shape, on_input in (((IN, 1), False), ((1, IN), True)):
            assert (
                get_only_change(
                    read_lora(write(square | {"x.dora_scale": torch.ones(shape)}))
                ).weight_delta.on_input
                == on_input
            )

    def test_norms_of_peft_are_always_of_rows(self, write):
        norms = torch.ones(1, OUT, 1, 1)  # of a convolution
        core = get_only_change(
            read_lora(write(PEFT | {"transformer.x.lora_magnitude_vector.weight": norms}))
        ).weight_delta

        assert not core.on_input and core.magnitude.shape == (OUT,)

    @pytest.mark.parametrize(
        ("names", "rank", "scale"),
        [
            (("w1", "w2"), None, 1.0),
            (("w1", "w2_a", "w2_b"), 2, 4.0),
            (("w1_a", "w1_b", "w2"), 2, 4.0),
            (("w1_a", "w1_b", "w2_a", "w2_b"), 2, 4.0),
        ],
        ids=str,
    )
    def test_lokr_is_scaled_only_with_a_low_rank_factor(self, write, names, rank, scale):
        shapes = {"w1": (3, 4), "w2": (5, 6), "w1_a": (3, 2), "w1_b": (2, 4), "w2_a": (5, 2), "w2_b": (2, 6)}
        tensors = {f"x.lokr_{n}": randn(*shapes[n]) for n in names} | {"x.alpha": torch.tensor(8.0)}
        file = read_lora(write(tensors))

        core = get_only_change(file).weight_delta

        assert isinstance(core, LoKr) and core.rank == rank and core.scale == scale and core.shape == (15, 24)
        assert isinstance(core.w1, LowRankPair) == ("w1_a" in names) and file.ranks == (
            {rank: 1} if rank else {}
        )


REFUSED = {
    "no down": ({"x.lora_B.weight": B}, r"x has no lora_A \(down\); the file is incomplete"),
    "a bias of lora_B alone": ({"x.lora_B.bias": B[0]}, r"x has no lora_A \(down\); the file is incomplete"),
    "a scale alone": ({"x.lora_up.scale_weight": B[0]}, r"x has no lora_B \(up\); the file is incomplete"),
    "a core alone": (
        {"x.lora_mid.weight": randn(2, 2, 3, 3)},
        r"x has no lora_A \(down\); the file is incomplete",
    ),
    "on_input alone": ({"x.on_input": torch.tensor(1)}, "x has no weight; the file is incomplete"),
    "ranks": (
        {"x.lora_A.weight": A, "x.lora_B.weight": B[:, :3]},
        r"x has lora_A \[4, 6\], lora_B \[5, 3\]; rank 4 and rank 3: a pair is \[rank, in\] and "
        r"\[out, rank\], and the file is broken",
    ),
    "a vector": (
        {"x.lora_A.weight": A[0], "x.lora_B.weight": B},
        r"x has lora_A \[6\], lora_B \[5, 4\]; a pair is \[rank, in\] and \[out, rank\], and the "
        r"file is broken",
    ),
    "a number": (
        {"x.lora_A.weight": torch.tensor(1.0), "x.lora_B.weight": B},
        r"x has lora_A \[\], lora_B \[5, 4\]; a pair is",
    ),
    "a kernel above": (
        {"x.lora_A.weight": randn(4, 6, 3, 3), "x.lora_B.weight": randn(5, 4, 3, 3)},
        r"x has lora_A \[4, 6, 3, 3\], lora_B \[5, 4, 3, 3\]; a",
    ),
    "a core of another rank": (
        {"x.lora_A.weight": A, "x.lora_B.weight": B, "x.lora_mid.weight": randn(4, 3, 3, 3)},
        r"x has lora_A \[4, 6\], lora_B \[5, 4\], core \[4, 3, 3, 3\]; a pair is",
    ),
    "a kernel below a core": (
        {"x.lora_A.weight": randn(4, 6, 3, 3), "x.lora_B.weight": B, "x.lora_mid.weight": randn(4, 4, 3, 3)},
        r"x has lora_A \[4, 6, 3, 3\], lora_B \[5, 4\], core \[4, 4, 3, 3\]; a pair is",
    ),
    "empty": (
        {"x.lora_A.weight": torch.ones(0, 6), "x.lora_B.weight": torch.ones(5, 0)},
        r"x has an empty lora_A \(down\); the file is broken",
    ),
    "complex": (
        {"x.lora_A.weight": A.to(torch.complex64), "x.lora_B.weight": B},
        r"x has C64 numbers in its lora_A \(down\); they may be F32, F16, BF16, F64, F8",
    ),
    "NaN": (
        {"x.lora_A.weight": A, "x.lora_B.weight": B * float("nan")},
        r"x has values that are not finite numbers in its lora_B \(up\)",
    ),
    "infinite difference": (
        {"x.diff": torch.full((2, 2), float("inf"))},
        "x has values that are not finite numbers in its diff; the file is",
    ),
    "infinite scale": (
        {
            "x.lora_down.weight": A,
            "x.lora_up.weight": B.char(),
            "x.lora_up.scale_weight": torch.tensor(float("inf")),
        },
        "not finite numbers",
    ),
    "full-rank change as lora_A": (
        {"x.lora_A.weight": randn(5, 6)},
        r"x has no lora_B \(up\) beside its lora_A \[5, 6\]; either the file is incomplete, or this is a "
        "full-rank change .* rename each lora_A.weight to diff",
    ),
    "no up": (
        {"x.lora_A.weight": randn(2, 64)},
        r"x has no lora_B \(up\); the file is incomplete",
    ),
    "integers": (
        {"x.lora_A.weight": A, "x.lora_B.weight": torch.ones(5, 4, dtype=torch.int8)},
        r"x has a lora_B \(up\) of int8 without a scale \(scale_weight\); "
        r"the file was quantized and its scales are gone: take",
    ),
    "integer difference": (
        {"x.diff": torch.ones(5, 4, dtype=torch.int32)},
        r"x has a diff of int32 without a scale",
    ),
    "packed integers": (
        {
            "x.lora_down.weight": A,
            "x.lora_up.weight": B.abs().byte(),
            "x.lora_up.scale_weight": torch.ones(1),
        },
        r"x has a lora_B \(up\) of uint8; only int8 and floats are multiplied by a scale",
    ),
    "scales of blocks": (
        {"x.lora_down.weight": A, "x.lora_up.weight": B.char(), "x.lora_up.scale_weight": torch.ones(3)},
        r"x has 3 scales for the 5 rows of its lora_B \(up\); the file is broken",
    ),
    "alpha per row": (
        PEFT | {"transformer.x.alpha": torch.ones(4)},
        r"x has an alpha of shape \[4\]; it is one number, the file is broken",
    ),
    "LoRA and diff": (
        PEFT | {"x.diff": torch.ones(5, 6)},
        "x has parts of several adapter types: diff, down, up; a module can have one",
    ),
    "LoHa of two shapes": (
        {"x.hada_w1_a": B, "x.hada_w1_b": A, "x.hada_w2_a": B[:4], "x.hada_w2_b": A.clone()},
        r"x has LoHa factors of \[5, 6\] and \[4, 6\]; they must be equal, the file is broken",
    ),
    "LoHa ranks": (
        {"x.hada_w1_a": B, "x.hada_w1_b": A[:3], "x.hada_w2_a": B.clone(), "x.hada_w2_b": A.clone()},
        r"x has hada_w1_b \[3, 6\], hada_w1_a \[5, 4\]; rank 3 and rank 4: a pair is",
    ),
    "LoHa without a factor": (
        {"x.hada_w1_a": B, "x.hada_w1_b": A, "x.hada_w2_b": A.clone()},
        "x has no hada_w2_a; the file is incomplete",
    ),
    "LoKr without a factor": ({"x.lokr_w1": A}, "x has no lokr_w2; the file is incomplete"),
    "LoKr with half a factor": (
        {"x.lokr_w1": A, "x.lokr_w2_b": B},
        "x has no lokr_w2_a; the file is incomplete",
    ),
    "LoKr core alone": (
        {"x.lokr_w1": A, "x.lokr_t2": randn(2, 2, 3, 3)},
        "x has no lokr_w2; the file is incomplete",
    ),
    "LoKr twice": (
        {"x.lokr_w1": A, "x.lokr_w2": A.clone(), "x.lokr_w2_a": B, "x.lokr_w2_b": A.clone()},
        "x has lokr_w2 both whole and as lokr_w2_a and lokr_w2_b; the file is broken",
    ),
    "LoKr core beside a whole factor": (
        {"x.lokr_w1": A, "x.lokr_w2": B, "x.lokr_t2": randn(2, 2, 3, 3)},
        "x has lokr_t2, the core of the pair lokr_w2_a and lokr_w2_b, and lokr_w2 whole; the file is broken",
    ),
    "LoKr of vectors": (
        {"x.lokr_w1": A[0], "x.lokr_w2": B},
        r"x has LoKr factors of \[6\] and \[5, 4\]; two matrices are needed",
    ),
    "DoRA alone": (
        {"x.dora_scale": torch.ones(5, 1)},
        "x has DoRA norms without a low-rank change; the file is incomplete",
    ),
    "DoRA of a difference": (
        {"x.dora_scale": torch.ones(5, 1), "x.diff": torch.ones(5, 6)},
        "x has DoRA norms without a low-rank change",
    ),
    "DoRA of another length": (
        PEFT | {"x.dora_scale": torch.ones(6, 1)},
        "x has 6 DoRA norms for 5 rows; the file is broken",
    ),
    "DoRA norms for each number": (
        PEFT | {"x.dora_scale": torch.ones(5, 6)},
        r"x has DoRA norms of shape \[5, 6\]; they are \[out, 1\] or \[1, in\]",
    ),
    "DoRA and a bias of lora_B": (
        PEFT | {"x.dora_scale": torch.ones(5, 1), "x.lora_B.bias": torch.ones(5)},
        "x has DoRA norms and a bias of lora_B; PEFT trains no such",
    ),
    "bias twice": (
        {"x.diff_b": torch.ones(5), "x.b_norm": torch.ones(5)},
        "x has a change of its bias twice, as diff_b and as b_norm; the file is broken",
    ),
    "a scaled factor of one number": (
        {
            "x.lora_up.weight": B,
            "x.lora_down.weight": torch.tensor(1.0),
            "x.lora_down.scale_weight": torch.ones(1),
        },
        r"x has a lora_A \(down\) of one number, which has no rows to scale; the file is broken",
    ),
    "DoRA norms twice": (
        PEFT | {"x.dora_scale": torch.ones(5, 1), "x.lora_magnitude_vector": torch.ones(5)},
        "x has DoRA norms twice, as dora_scale and as magnitude; the file is broken",
    ),
    "biases of two lengths": (
        PEFT | {"x.diff_b": torch.ones(6), "x.lora_B.bias": torch.ones(5)},
        "x has biases of several lengths; the file is broken",
    ),
    "one name in two spellings": (
        PEFT | {"x.lora_down.weight": A.clone()},
        "x is in the file twice, as .*x.lora_.*; which one is meant cannot be told",
    ),
}


@pytest.mark.parametrize(("tensors", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_broken_module_is_rejected(write, tensors, words):
    path = write({k: t.clone() for k, t in tensors.items()})

    with pytest.raises(
        LoraError,
        match=rf"style\.safetensors: .*{words}"
        if words.startswith("not")
        else rf"style\.safetensors: {words}",
    ):
        read_lora(path)


class TestNotes:
    """What is told of a file that can be applied."""

    @staticmethod
    def modules(n, up=B, **parts):
        return {
            f"m{i}.{k.replace('__', '.')}": t.clone()
            for i in range(n)
            for k, t in ({"lora_A__weight": A, "lora_B__weight": up} | parts).items()
        }

    def test_untrained_file_is_noted(self, write):
        file = read_lora(write(self.modules(3, torch.zeros_like(B))))

        assert file.notes == (
            "the LoRA has no effect (B = 0 in 3/3 modules): untrained or zero-initialised file",
        )

    def test_untrained_modules_are_noted(self, write):
        file = read_lora(write(self.modules(3) | {"m2.lora_B.weight": torch.zeros_like(B)}))

        assert file.notes == ("1 of 3 modules have no effect (B = 0; first: m2)",)

    @pytest.mark.parametrize(
        "tensors",
        [
            {"x.lokr_w1": A, "x.lokr_w2": torch.zeros(3, 3)},
            {"x.diff": torch.zeros(3, 3)},
            {"x.diff": torch.zeros(3, 3), "x.diff_b": torch.zeros(3)},
            {"x.diff_b": torch.zeros(3)},
            {"x.weight": torch.zeros(3), "x.on_input": torch.tensor(1)},
        ],
        ids=lambda t: " ".join(t),
    )
    def test_untrained_adapters_of_other_types_are_noted(self, write, tensors):
        (note,) = read_lora(write(tensors)).notes

        assert note.startswith("the LoRA has no effect")

    @pytest.mark.parametrize("part", ["dora_scale", "diff_b"])
    def test_norms_and_biases_have_an_effect_without_a_pair(self, write, part):
        assert read_lora(write(self.modules(1, torch.zeros_like(B), **{part: torch.ones(OUT)}))).notes == ()

    @pytest.mark.parametrize(("alpha", "told"), [(0.1, True), (0.2, False), (16.0, False), (17.0, True)])
    def test_unusual_scale_is_noted(self, write, alpha, told):
        notes = read_lora(write(self.modules(2) | {"m1.alpha": torch.tensor(alpha)})).notes

        assert bool(notes) == told
        if told:
            assert notes[0].startswith(
                f"alpha / rank is {alpha / RANK:g} in m1 (unusual in 1 of 2 modules); usual is 0.05 to 4"
            )

    def test_large_values_are_noted(self, write):
        notes = read_lora(write(self.modules(2) | {"m1.lora_B.weight": B * 5000})).notes

        assert len(notes) == 1 and notes[0].startswith(
            f"values up to {(B * 5000).abs().max():.3g} in m1 (1 module above 1000)"
        )


def test_identity_is_that_of_the_tensors_and_their_scale(write):
    plain = read_lora(write(PEFT)).identity

    same_scale = write(PEFT, make_peft_metadata(lora_alpha=RANK), "other.safetensors")
    assert read_lora(same_scale).identity == plain and len(plain) == 64

    # layers with a LoRA baked in are kept in the cache by it
    identities = {plain}
    for alpha in (1, 2):
        path = write(PEFT, make_peft_metadata(lora_alpha=alpha), f"alpha{alpha}.safetensors")
        identities.add(read_lora(path).identity)
    identities.add(
        read_lora(write(PEFT | {"transformer.x.lora_A.weight": A + 1}, name="new.safetensors")).identity
    )
    assert len(identities) == 4


def test_settings_of_a_component_win_over_general_ones(write):
    settings = make_peft_metadata(**{"lora_alpha": 4, "text_encoder.lora_alpha": 8})
    tensors = {
        f"{c}.x.{half}.weight": t.clone()
        for c in ("transformer", "text_encoder")
        for half, t in (("lora_A", A), ("lora_B", B))
    }

    file = read_lora(write(tensors, settings))

    assert {c: m["x"].weight_delta.scale for c, m in file.changes.items()} == {
        "denoiser": 1.0,
        "text_encoder": 2.0,
    }


@pytest.mark.parametrize(
    "keep", [0, 4, 40, -1], ids=["nothing left", "in the length", "in the header", "in the last tensor"]
)
def test_truncated_file_is_rejected(write, keep):
    path = write(PEFT)
    path.write_bytes(path.read_bytes()[:keep])

    with pytest.raises(LoraError, match=r"style\.safetensors is not a readable safetensors file: ."):
        read_lora(path)


def test_other_file_is_rejected(tmp_path):
    path = tmp_path / "style.safetensors"
    path.write_text("<html>not found</html>")

    with pytest.raises(LoraError, match="is not a readable safetensors file"):
        read_lora(path)


def test_file_is_read_through_the_parser_of_all_headers(write):
    # the library reads such a name
    path = write({"n" * 501 + ".lora_A.weight": torch.ones(2, 3)})

    with pytest.raises(LoraError, match=r"cannot be read: its header has a name of 515 characters"):
        read_lora(path)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".PT"])
def test_pickled_files_are_refused_unopened(tmp_path, suffix):
    path = tmp_path / f"style{suffix}"
    path.write_bytes(b"x")

    with pytest.raises(
        LoraError,
        match=rf"style{suffix} is a pickled file, which can run code when opened; "
        rf"convert it to \.safetensors",
    ):
        find_lora(str(path), None)


def test_a_path_is_found_as_it_is(write, monkeypatch, tmp_path):
    path = write(PEFT)

    assert find_lora(str(path), None) == path

    monkeypatch.setenv("HOME", str(tmp_path))

    assert find_lora("~/style.safetensors", None) == path


def test_not_found_names_the_path_the_folder_and_the_nearest(write, tmp_path):
    for name in ("ink_v1", "ink_v2", "ink_v3", "something_else"):
        write(PEFT, name=f"{name}.safetensors")
    asked = tmp_path / "ink_v9.safetensors"

    with pytest.raises(LoraError, match="LoRA file not found") as caught:
        find_lora(str(asked), None)

    message, _, nearest = str(caught.value).partition("; nearest there: ")

    assert message == f"LoRA file not found: {asked}; searched {tmp_path}"
    assert sorted(nearest.split(", ")) == [f"ink_v{i}.safetensors" for i in (1, 2, 3)]


def test_not_found_names_files_that_are_not_near_as_what_they_are(write, tmp_path):
    for name in ("edit", "gloss", "pastel", "sketch"):
        write(PEFT, name=f"{name}.safetensors")

    with pytest.raises(LoraError, match=r"; there are edit, gloss, pastel, …$"):
        find_lora(str(tmp_path / "inkk"), None)


@pytest.mark.parametrize("folder", ["", "nowhere"], ids=["empty folder", "no such folder"])
def test_not_found_where_nothing_is(tmp_path, folder):
    with pytest.raises(LoraError, match=rf"searched {tmp_path / folder}; no \.safetensors file there$"):
        find_lora(str(tmp_path / folder / "ink.safetensors"), None)


def test_a_path_without_a_suffix_is_looked_for_in_its_own_folder(write, tmp_path, monkeypatch):
    (tmp_path / "loras").mkdir()
    write(PEFT, name="loras/ink.safetensors")

    monkeypatch.chdir(tmp_path)

    with pytest.raises(
        LoraError, match=rf"LoRA file not found: loras/inc; searched {tmp_path}/loras; nearest there: ink"
    ):
        find_lora("loras/inc", None)


class TestFolderOfPeft:
    """A folder with one LoRA stands for its file."""

    @pytest.mark.parametrize("name", ["adapter_model", "pytorch_lora_weights", "style"])
    def test_the_file_in_it_is_found(self, write, tmp_path, name):
        (tmp_path / "portrait").mkdir()
        path = write(PEFT, name=f"portrait/{name}.safetensors")

        assert find_lora(str(tmp_path / "portrait"), None) == path
        assert find_lora("portrait", None, tmp_path) == path

    def test_the_one_in_a_folder_of_it(self, write, tmp_path):
        (tmp_path / "my_adapter").mkdir()
        path = write(PEFT, name="my_adapter/adapter_model.safetensors")

        assert find_lora(str(tmp_path), None) == path

        (tmp_path / "other").mkdir()
        write(PEFT, name="other/adapter_model.safetensors")
        with pytest.raises(LoraError, match=r"is a folder with 2 LoRAs; name one of them: my_adapter/"):
            find_lora(str(tmp_path), None)

    def test_the_named_one_of_several(self, write, tmp_path):
        write(PEFT, name="initial.safetensors")
        path = write(PEFT, name="adapter_model.safetensors")

        assert find_lora(str(tmp_path), None) == path

    def test_a_folder_of_several_asks_for_one(self, write, tmp_path):
        for name in ("ink", "gloss"):
            write(PEFT, name=f"{name}.safetensors")

        with pytest.raises(
            LoraError, match=r"is a folder with 2 LoRAs; name one of them: gloss.safetensors, ink"
        ):
            find_lora(str(tmp_path), None)

    def test_a_pickled_one_is_refused(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        (tmp_path / "adapter_model.bin").write_bytes(b"x")

        with pytest.raises(
            LoraError, match=r"has adapter_config.json and no adapter_model.safetensors; a pickled"
        ):
            find_lora(str(tmp_path), None)

    def test_a_file_of_that_name_comes_first(self, write, tmp_path):
        (tmp_path / "ink").mkdir()
        write(PEFT, name="ink/adapter_model.safetensors")
        path = write(PEFT, name="ink.safetensors")

        assert find_lora("ink", None, tmp_path) == path

    @pytest.mark.parametrize(
        ("source", "weight_name", "name"),
        [
            ("runs/portrait", None, "portrait"),
            ("runs/portrait.v2/", None, "portrait.v2"),
            ("runs/portrait/adapter_model.safetensors", None, "portrait"),
            ("user/repo", "adapter_model.safetensors", "repo"),
            ("user/repo", "styles/ink.v2.safetensors", "ink.v2"),
            ("loras/ink.v2.safetensors", None, "ink.v2"),
            ("ink", None, "ink"),
            (".", None, "here"),
            ("below/..", None, "here"),
            ("adapter_model.safetensors", None, "here"),
            ("/", None, "/"),
        ],
    )
    def test_its_name_is_that_of_the_file_or_folder(self, source, weight_name, name, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")

        assert find.get_default_name(source, weight_name) == name

    @pytest.mark.parametrize(
        ("file", "title"),
        [
            ("runs/portrait/adapter_model.safetensors", "portrait/adapter_model.safetensors"),
            ("portrait/pytorch_lora_weights.safetensors", "portrait/pytorch_lora_weights.safetensors"),
            ("adapter_model.safetensors", "adapter_model.safetensors"),
            ("loras/ink.safetensors", "ink.safetensors"),
        ],
    )
    def test_messages_name_the_folder_where_all_files_have_one_name(self, file, title):
        assert find.get_file_title(Path(file)) == title


@pytest.mark.parametrize("name", [".", "/", ".."])
def test_a_folder_is_no_file(name, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    with pytest.raises(LoraError, match="LoRA file not found: "):
        find_lora(name, None)


@pytest.mark.parametrize("name", ["a" * 300, "~nobody_of_this_name/ink"])
def test_a_path_that_cannot_be_looked_for(name):
    with pytest.raises(LoraError, match=r"LoRA '(aaa|~nob).*' cannot be looked for: "):
        find_lora(name, None)


def test_shipped_names(write, monkeypatch, tmp_path):
    path = write(PEFT, name="ink.safetensors")
    monkeypatch.setattr(find, "SHIPPED_LORAS", tmp_path)

    assert find_lora("ink", None) == path
    with pytest.raises(
        LoraError,
        match=rf"LoRA file not found: inc; searched {tmp_path}; nearest there: ink; "
        rf"lora_dir=FOLDER adds a folder of yours$",
    ):
        find_lora("inc", None)


class TestFolder:
    """The user's own folder of LoRAs."""

    @pytest.fixture
    def folder(self, write, tmp_path, monkeypatch):
        (tmp_path / "mine" / "sub").mkdir(parents=True)
        (tmp_path / "cwd").mkdir()
        monkeypatch.chdir(tmp_path / "cwd")
        monkeypatch.setattr(find, "SHIPPED_LORAS", tmp_path / "shipped")
        for name in ("ink", "style.v1.5", "sub/deep"):
            write(PEFT, name=f"mine/{name}.safetensors")
        return tmp_path / "mine"

    @pytest.mark.parametrize("name", ["ink", "style.v1.5", "sub/deep"])
    def test_names_are_looked_up_there(self, folder, name):
        path = folder / f"{name}.safetensors"

        assert find_lora(name, None, folder) == find_lora(f"{name}.safetensors", None, folder) == path

    def test_a_path_comes_first(self, folder, write):
        there = write(PEFT, name="cwd/ink.safetensors")

        assert find_lora("ink.safetensors", None, folder).resolve() == there
        assert find_lora("ink", None, folder) == folder / "ink.safetensors"

    def test_it_comes_before_what_is_shipped(self, folder, write, tmp_path):
        (tmp_path / "shipped").mkdir()
        write(PEFT, name="shipped/ink.safetensors")

        assert find_lora("ink", None, folder) == folder / "ink.safetensors"
        assert (
            find_lora("ink", None)
            == find_lora("ink.safetensors", None)
            == tmp_path / "shipped" / "ink.safetensors"
        )

    def test_a_home_folder(self, folder, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))

        assert find_lora("ink", None, Path("~/mine")) == folder / "ink.safetensors"

    @pytest.mark.parametrize(
        ("name", "places", "nearest"),
        [
            ("inc", "{mine}, {shipped}", "ink"),
            ("inc.safetensors", "{cwd}, {mine}, {shipped}", "ink.safetensors"),
            ("sub/dep", "{cwd}/sub, {mine}/sub", "deep"),
        ],
    )
    def test_the_message_lists_every_place(self, folder, tmp_path, name, places, nearest):
        places = places.format(**{p: tmp_path / p for p in ("mine", "shipped", "cwd")})

        with pytest.raises(LoraError) as caught:
            find_lora(name, None, folder)
        assert str(caught.value).startswith(
            f"LoRA file not found: {name}; searched {places}; nearest there: {nearest}"
        )

    def test_a_whole_path_is_looked_for_nowhere_else(self, folder, tmp_path):
        with pytest.raises(LoraError, match=f"searched {tmp_path}/cwd; no .safetensors file there"):
            find_lora(str(tmp_path / "cwd" / "ink.safetensors"), None, folder)

    def test_pickled_files_are_refused_there(self, folder):
        (folder / "old.pt").write_bytes(b"x")

        with pytest.raises(LoraError, match=r"old\.pt is a pickled file"):
            find_lora("old.pt", None, folder)


class TestHub:
    """Sources with a `weight_name`; no test asks the network."""

    @pytest.fixture
    def download(self, monkeypatch):
        def answer(result):
            def fake(repo, name):
                if isinstance(result, BaseException):
                    raise result
                assert (repo, name) == ("user/style", "style.safetensors")
                return result

            monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)

        return answer

    def test_found(self, download):
        download("/cache/style.safetensors")

        assert find_lora("user/style", "style.safetensors") == Path("/cache/style.safetensors")

    @pytest.mark.parametrize(
        "error", [OSError("no route to host\nmore"), OSError()], ids=["with words", "without words"]
    )
    def test_not_to_be_had(self, download, error):
        download(error)

        with pytest.raises(
            LoraError,
            match=r"LoRA 'style\.safetensors' of 'user/style' could not be downloaded from the hub: ",
        ) as caught:
            find_lora("user/style", "style.safetensors")
        assert "\n" not in str(caught.value)

    def test_offline(self, download):
        from huggingface_hub.errors import LocalEntryNotFoundError

        download(LocalEntryNotFoundError("not in the cache, and outgoing traffic is off"))

        with pytest.raises(LoraError, match="could not be downloaded from the hub: not in the cache"):
            find_lora("user/style", "style.safetensors")

    def test_the_settings_of_peft_come_with_it(self, monkeypatch):
        asked = []

        def fake(repo, name):
            asked.append(name)
            return f"/cache/{name}"

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)

        assert find_lora("user/style", "v2/adapter_model.safetensors") == Path(
            "/cache/v2/adapter_model.safetensors"
        )
        assert asked == ["v2/adapter_model.safetensors", "v2/adapter_config.json"]

    def test_a_name_that_is_no_hub_id(self):
        # huggingface_hub refuses it before it asks the network
        with pytest.raises(LoraError, match="'not a hub id' could not be downloaded from the hub"):
            find_lora("not a hub id", "style.safetensors")

    def test_pickled_files_are_refused_before_the_download(self, download):
        download(AssertionError("downloaded"))

        with pytest.raises(LoraError, match=r"weights\.bin is a pickled file"):
            find_lora("user/style", "weights.bin")


def test_a_folder_of_links_that_lead_to_themselves_is_an_error(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)

    with pytest.raises(LoraError, match="LoRA file not found: "):
        find_lora(str(loop / "a.safetensors"), None)
