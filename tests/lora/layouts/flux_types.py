"""Adapter types other than low-rank pairs, for the linear layers of Flux."""

import torch
from lora.layouts.flux_pairs import make_peft_settings
from lora.layouts.formulas import apply_dora, kron_by_blocks
from lora.layouts.names import SWAPPED, join_name
from lora.layouts.pairs import add_hadamard_pairs
from lora.layouts.sample import ALPHA, SCALE, Sample, layout


@layout("flux")
def diff(s: Sample) -> None:
    """Whole differences of weight and bias, native and fused; a bias alone; a bias beside a low-rank pair."""
    for native in ("double_blocks.0.img_attn.qkv", SWAPPED):
        weight, bias = s.randn(*s.native_shape(native)), s.randn(s.native_shape(native)[0])
        s.add(f"diffusion_model.{native}", diff=weight, diff_b=bias)
        s.expect_native(native, weight, bias)
    alone = s.randn(len(s.weight("x_embedder")))
    s.add("diffusion_model.img_in", diff_b=alone)
    s.expect("x_embedder", None, alone)
    a, b = s.pair(*s.weight("context_embedder").shape)
    beside = s.randn(len(b))
    s.add(
        "diffusion_model.txt_in",
        lora_down__weight=a,
        lora_up__weight=b,
        alpha=torch.tensor(ALPHA),
        diff_b=beside,
    )
    s.expect("context_embedder", SCALE * b @ a, beside)


@layout("flux")
def norm_differences(s: Sample) -> None:
    for module in ("transformer_blocks.0.attn.norm_q", "single_transformer_blocks.1.attn.norm_k"):
        weight = s.randn(len(s.weight(module)))
        s.add(join_name("lycoris_", module), w_norm=weight)
        s.expect(module, weight)


@layout("flux")
def loha(s: Sample) -> None:
    for module in ("transformer_blocks.0.attn.to_q", "proj_out", "transformer_blocks.1.ff.net.2"):
        s.expect(module, add_hadamard_pairs(s, join_name("lycoris_", module), *s.weight(module).shape))


@layout("flux")
def loha_native(s: Sample) -> None:
    for native in ("double_blocks.1.txt_attn.qkv", "single_blocks.0.linear1", SWAPPED):
        s.expect_native(
            native, add_hadamard_pairs(s, join_name("lora_unet_", native), *s.native_shape(native))
        )


@layout("flux")
def lokr_full(s: Sample) -> None:
    """Two full factors: the alpha in the file says nothing."""
    for module in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2"):
        out, columns = s.weight(module).shape
        w1, w2 = s.randn(4, 2), s.randn(out // 4, columns // 2)
        s.add(join_name("lycoris_", module), lokr_w1=w1, lokr_w2=w2, alpha=torch.tensor(ALPHA))
        s.expect(module, kron_by_blocks(w1, w2))


@layout("flux")
def lokr_one_low_rank(s: Sample) -> None:
    """The fused matrices among them cut a Kronecker product where it has no seam."""
    for native in (
        "double_blocks.0.img_attn.qkv",
        "single_blocks.0.linear1",
        "double_blocks.1.img_mlp.0",
        SWAPPED,
    ):
        out, columns = s.native_shape(native)
        w1, (w2_b, w2_a) = s.randn(8, 2), s.pair(out // 8, columns // 2)
        s.add(
            f"diffusion_model.{native}", lokr_w1=w1, lokr_w2_a=w2_a, lokr_w2_b=w2_b, alpha=torch.tensor(ALPHA)
        )
        s.expect_native(native, SCALE * kron_by_blocks(w1, w2_a @ w2_b))


@layout("flux")
def lokr_both_low_rank(s: Sample) -> None:
    for module in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"):
        out, columns = s.weight(module).shape
        (w1_b, w1_a), (w2_b, w2_a) = s.pair(4, 4), s.pair(out // 4, columns // 4)
        s.add(
            f"transformer.{module}",
            lokr_w1_a=w1_a,
            lokr_w1_b=w1_b,
            lokr_w2_a=w2_a,
            lokr_w2_b=w2_b,
            alpha=torch.tensor(ALPHA),
        )
        s.expect(module, SCALE * kron_by_blocks(w1_a @ w1_b, w2_a @ w2_b))


@layout("flux")
def ia3(s: Sample) -> None:
    for module, on_input in (
        ("transformer_blocks.0.attn.to_q", False),
        ("transformer_blocks.1.ff.net.2", True),
    ):
        w = s.weight(module)
        factor = s.randn(w.shape[1] if on_input else w.shape[0])
        s.add(join_name("lycoris_", module), weight=factor, on_input=torch.tensor(int(on_input)))
        s.expect(module, w * factor if on_input else w * factor[:, None])


@layout("flux")
def ia3_native(s: Sample) -> None:
    """Row factors of a fused matrix."""
    native = "double_blocks.0.img_attn.qkv"
    factor = s.randn(s.native_shape(native)[0])
    s.add(f"diffusion_model.{native}", weight=factor, on_input=torch.tensor(0))
    s.expect_native(native, s.native_weight(native) * factor[:, None])


@layout("flux")
def dora_rows(s: Sample) -> None:
    for native in ("double_blocks.0.img_attn.qkv", "double_blocks.1.img_mlp.2", SWAPPED):
        a, b = s.pair(*s.native_shape(native))
        magnitude = s.randn(len(b), 1).abs() + 0.5
        s.add(
            join_name("lora_unet_", native),
            lora_down__weight=a,
            lora_up__weight=b,
            alpha=torch.tensor(ALPHA),
            dora_scale=magnitude,
        )
        w = s.native_weight(native)
        s.expect_native(native, apply_dora(w, SCALE * b @ a, magnitude, (1,)))


@layout("flux")
def dora_columns(s: Sample) -> None:
    for module in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2"):
        w = s.weight(module)
        a, b = s.pair(*w.shape)
        magnitude = s.randn(1, w.shape[1]).abs() + 0.5
        s.add(
            join_name("lora_transformer_", module),
            lora_down__weight=a,
            lora_up__weight=b,
            alpha=torch.tensor(ALPHA),
        )
        s.add(join_name("lora_transformer_", module), dora_scale=magnitude)
        s.expect(module, apply_dora(w, SCALE * b @ a, magnitude, (0,)))


@layout("flux")
def dora_peft(s: Sample) -> None:
    s.metadata = make_peft_settings(**{"transformer.lora_alpha": ALPHA, "transformer.use_dora": True})
    for module, suffix in (("transformer_blocks.0.attn.to_q", ".weight"), ("x_embedder", "")):
        w = s.weight(module)
        a, b = s.pair(*w.shape)
        magnitude = s.randn(len(w)).abs() + 0.5
        s.add(f"transformer.{module}", lora_A__weight=a, lora_B__weight=b)
        s.tensors[f"transformer.{module}.lora_magnitude_vector{suffix}"] = magnitude
        s.expect(module, apply_dora(w, SCALE * b @ a, magnitude[:, None], (1,)))


@layout("flux")
def dora_of_lokr(s: Sample) -> None:
    native = "double_blocks.0.txt_attn.qkv"
    out, columns = s.native_shape(native)
    w1, w2 = s.randn(8, 2), s.randn(out // 8, columns // 2)
    magnitude = s.randn(out, 1).abs() + 0.5
    s.add(f"diffusion_model.{native}", lokr_w1=w1, lokr_w2=w2, dora_scale=magnitude)
    w = s.native_weight(native)
    s.expect_native(native, apply_dora(w, kron_by_blocks(w1, w2), magnitude, (1,)))
