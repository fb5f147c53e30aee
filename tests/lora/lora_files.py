"""Small LoRA files in every layout and of every adapter type, and what each does by plain formulas.

Nothing of int8run is imported: names and numbers are written down a second time. The models are tiny ones of
diffusers' and transformers' own classes. `python tests/lora/lora_files.py FOLDER` writes all files into a
folder and lists them.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK

# the names of Flux's authors -> diffusers' modules, whose rows are in the native matrix one after the other
FLUX_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
FLUX_REST = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
FLUX = (
    {
        f"double_blocks.{n}.{k}": tuple(f"transformer_blocks.{n}.{t}" for t in v)
        for n in range(2)
        for k, v in FLUX_DOUBLE.items()
    }
    | {
        f"single_blocks.{n}.{k}": tuple(f"single_transformer_blocks.{n}.{t}" for t in v)
        for n in range(2)
        for k, v in FLUX_SINGLE.items()
    }
    | FLUX_REST
)
FLUX_MODULES = tuple(target for targets in FLUX.values() for target in targets)
# shift and scale stand the other way round in diffusers
SWAPPED = "final_layer.adaLN_modulation.1"

XLABS = {
    "double_blocks.0.processor.qkv_lora1": FLUX["double_blocks.0.img_attn.qkv"],
    "double_blocks.0.processor.qkv_lora2": FLUX["double_blocks.0.txt_attn.qkv"],
    "double_blocks.0.processor.proj_lora1": FLUX["double_blocks.0.img_attn.proj"],
    "double_blocks.0.processor.proj_lora2": FLUX["double_blocks.0.txt_attn.proj"],
    "single_blocks.1.processor.qkv_lora": FLUX["single_blocks.1.linear1"][:3],
    "single_blocks.1.processor.proj_lora": FLUX["single_blocks.1.linear2"],
}

# Stability's names -> diffusers', of two levels with two resnets each
SDXL_LINEAR = {
    "input_blocks.4.0.emb_layers.1": "down_blocks.1.resnets.0.time_emb_proj",
    "input_blocks.4.1.proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks.5.1.transformer_blocks.0.attn2.to_k": (
        "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k"
    ),
    "middle_block.1.transformer_blocks.0.attn1.to_out.0": (
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    ),
    "output_blocks.2.1.transformer_blocks.0.ff.net.0.proj": (
        "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.0.proj"
    ),
    "time_embed.0": "time_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
SDXL_CONV = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "out.2": "conv_out",
}
SDXL_NORM = {
    "input_blocks.4.0.in_layers.0": "down_blocks.1.resnets.0.norm1",
    "middle_block.1.transformer_blocks.0.norm2": "mid_block.attentions.0.transformer_blocks.0.norm2",
    "out.0": "conv_norm_out",
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_LAYERS = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def make_tiny_models() -> dict[str, dict[str, nn.Module]]:
    """Base -> component -> model, with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flux, unet = make_tiny_flux(), make_tiny_unet()
        clip_config = make_clip_config()
        clip, clip_2 = CLIPTextModel(clip_config), CLIPTextModelWithProjection(clip_config)
    for model in (flux, unet, clip, clip_2):
        model.eval().requires_grad_(False)
    return {
        "flux": {"denoiser": flux, "text_encoder": clip},
        "sdxl": {"denoiser": unet, "text_encoder": clip, "text_encoder_2": clip_2},
    }


def make_tiny_flux() -> FluxTransformer2DModel:
    """FLUX.1 with two blocks of each kind."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def make_tiny_unet() -> UNet2DConditionModel:
    """SDXL's UNet with two levels."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


def make_clip_config() -> CLIPTextConfig:
    """CLIP's text encoder with two layers."""
    return CLIPTextConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=6,
        bos_token_id=0,
        eos_token_id=1,
    )


@dataclass
class Expected:
    """What becomes of one module at strength 1."""

    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass
class Sample:
    """One file, while it is made and after."""

    name: str
    base: str
    models: Mapping[str, nn.Module]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] | None = None
    expected: dict[str, dict[str, Expected]] = field(default_factory=dict)
    path: Path = Path()

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(sum(map(ord, self.name)))

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers, the same for the same file."""
        return torch.randn(shape, generator=self.generator)

    def weight(self, module: str, component: str = "denoiser") -> Tensor:
        """The weight of a module of the model."""
        return self.models[component].get_submodule(module).weight

    def add(self, prefix: str, **parts: Tensor) -> None:
        """Tensors under `prefix.part`; two underscores stand for a dot."""
        self.tensors |= {
            f"{prefix}.{part.replace('__', '.')}": t.clone().contiguous() for part, t in parts.items()
        }

    def expect(
        self,
        module: str,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        component: str = "denoiser",
    ) -> None:
        """The change of one module."""
        self.expected.setdefault(component, {})[module] = Expected(weight, bias)

    def expect_native(self, native: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """The change of a matrix with the names of Flux's authors: cut by the rows of diffusers' modules."""
        if native == SWAPPED:
            half = len(weight) // 2
            weight = torch.cat([weight[half:], weight[:half]])
            bias = None if bias is None else torch.cat([bias[half:], bias[:half]])
        first = 0
        for target in FLUX[native]:
            last = first + len(self.weight(target))
            self.expect(target, weight[first:last], None if bias is None else bias[first:last])
            first = last
        assert first == len(weight)

    def native_shape(self, native: str) -> tuple[int, int]:
        """[out, in] of a matrix with the names of Flux's authors."""
        weights = [self.weight(target) for target in FLUX[native]]
        return sum(len(w) for w in weights), weights[0].shape[1]

    def pair(self, out: int, columns: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
        """down [rank, in], up [out, rank]."""
        return self.randn(rank, columns), self.randn(out, rank)


def make_peft_settings(**settings: object) -> dict[str, str]:
    """Metadata as diffusers writes it."""
    return {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}


Layout = Callable[[Sample], None]
LAYOUTS: dict[str, tuple[str, Layout]] = {}


def layout(base: str) -> Callable[[Layout], Layout]:
    """A function that fills a sample, kept under its own name."""

    def keep(fill: Layout) -> Layout:
        LAYOUTS[fill.__name__] = base, fill
        return fill

    return keep


# -- low-rank pairs, Flux, authors' names


def add_flux_pairs(s: Sample, key: Callable[[str], str], down: str, up: str, alpha: bool) -> None:
    """Every native matrix of Flux as a low-rank pair."""
    for native in FLUX:
        a, b = s.pair(*s.native_shape(native))
        s.add(key(native), **{down: a, up: b} | ({"alpha": torch.tensor(ALPHA)} if alpha else {}))
        s.expect_native(native, (SCALE if alpha else 1.0) * b @ a)


def add_clip_pairs(s: Sample, prefix: str, component: str, level: str) -> None:
    """kohya's names for a CLIP text encoder; `level`: where the model has its layers."""
    for name in CLIP_LAYERS:
        module = f"{level}encoder.layers.1.{name}"
        a, b = s.pair(*s.weight(module, component).shape)
        s.add(
            f"{prefix}text_model_encoder_layers_1_{name.replace('.', '_')}",
            lora_down__weight=a,
            lora_up__weight=b,
            alpha=torch.tensor(1.0),
        )
        s.expect(module, b @ a / RANK, component=component)


@layout("flux")
def kohya(s: Sample) -> None:
    add_flux_pairs(
        s, lambda n: f"lora_unet_{n.replace('.', '_')}", "lora_down__weight", "lora_up__weight", True
    )


@layout("flux")
def kohya_without_alpha(s: Sample) -> None:
    add_flux_pairs(
        s, lambda n: f"lora_unet_{n.replace('.', '_')}", "lora_down__weight", "lora_up__weight", False
    )


@layout("flux")
def kohya_with_text_encoder(s: Sample) -> None:
    add_flux_pairs(
        s, lambda n: f"lora_unet_{n.replace('.', '_')}", "lora_down__weight", "lora_up__weight", True
    )
    add_clip_pairs(s, "lora_te1_", "text_encoder", "")


@layout("flux")
def kohya_alphas_and_ranks_differ(s: Sample) -> None:
    for i, native in enumerate(FLUX):
        rank, alpha = 1 + i % 3, float(i % 4)  # alpha 0 means the rank
        a, b = s.pair(*s.native_shape(native), rank)
        s.add(
            f"lora_unet_{native.replace('.', '_')}",
            lora_down__weight=a,
            lora_up__weight=b,
            alpha=torch.tensor(alpha),
        )
        s.expect_native(native, (alpha / rank if alpha else 1.0) * b @ a)


@layout("flux")
def kohya_split_qkv(s: Sample) -> None:
    """q, k and v trained apart, in one pair of rank 3r: up has a block for each and zeros elsewhere."""
    for native in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"):
        targets = FLUX[native]
        pairs = [s.pair(*s.weight(t).shape) for t in targets]
        a, b = torch.cat([a for a, _ in pairs]), torch.block_diag(*[b for _, b in pairs])
        s.add(
            f"lora_unet_{native.replace('.', '_')}",
            lora_down__weight=a,
            lora_up__weight=b,
            alpha=torch.tensor(ALPHA),
        )
        for target, (a, b) in zip(targets, pairs, strict=True):
            s.expect(target, ALPHA / (RANK * len(targets)) * b @ a)


@layout("flux")
def diffsynth_double_underscore(s: Sample) -> None:
    add_flux_pairs(
        s, lambda n: f"lora_unet__{n.replace('.', '_')}", "lora_down__weight", "lora_up__weight", True
    )


@layout("flux")
def bfl_native(s: Sample) -> None:
    add_flux_pairs(s, lambda n: n, "lora_A__weight", "lora_B__weight", False)


@layout("flux")
def ai_toolkit(s: Sample) -> None:
    add_flux_pairs(s, lambda n: f"diffusion_model.{n}", "lora_A__weight", "lora_B__weight", False)


@layout("flux")
def comfyui(s: Sample) -> None:
    add_flux_pairs(s, lambda n: f"diffusion_model.{n}", "lora_down__weight", "lora_up__weight", True)


@layout("flux")
def comfyui_model_prefix_and_text_encoder(s: Sample) -> None:
    add_flux_pairs(s, lambda n: f"model.diffusion_model.{n}", "lora_down__weight", "lora_up__weight", True)
    for name in CLIP_LAYERS:
        module = f"encoder.layers.0.{name}"
        a, b = s.pair(*s.weight(module, "text_encoder").shape)
        s.add(f"text_encoders.clip_l.transformer.text_model.{module}", lora_down__weight=a, lora_up__weight=b)
        s.expect(module, b @ a, component="text_encoder")


@layout("flux")
def peft_wrapped_native(s: Sample) -> None:
    add_flux_pairs(
        s, lambda n: f"base_model.model.{n}", "lora_A__default__weight", "lora_B__default__weight", False
    )


@layout("flux")
def xlabs(s: Sample) -> None:
    for name, targets in XLABS.items():
        weights = [s.weight(t) for t in targets]
        a, b = s.pair(sum(len(w) for w in weights), weights[0].shape[1])
        s.add(name, down__weight=a, up__weight=b)
        first = 0
        for target, w in zip(targets, weights, strict=True):
            s.expect(target, (b @ a)[first : first + len(w)])
            first += len(w)


# -- low-rank pairs, Flux, diffusers' names


def add_flux_diffusers_pairs(
    s: Sample, key: Callable[[str], str], down: str, up: str, scale: Callable[[str], float] = lambda m: 1.0
) -> None:
    """Every module of Flux as a low-rank pair."""
    for module in FLUX_MODULES:
        a, b = s.pair(*s.weight(module).shape)
        s.add(key(module), **{down: a, up: b})
        s.expect(module, scale(module) * b @ a)


@layout("flux")
def peft(s: Sample) -> None:
    add_flux_diffusers_pairs(s, lambda m: f"transformer.{m}", "lora_A__weight", "lora_B__weight")


@layout("flux")
def peft_adapter_name(s: Sample) -> None:
    add_flux_diffusers_pairs(
        s, lambda m: f"transformer.{m}", "lora_A__default__weight", "lora_B__default__weight"
    )


@layout("flux")
def peft_nested_prefixes(s: Sample) -> None:
    add_flux_diffusers_pairs(
        s, lambda m: f"transformer.base_model.model.{m}", "lora_A__weight", "lora_B__weight"
    )


@layout("flux")
def peft_folder(s: Sample) -> None:
    add_flux_diffusers_pairs(
        s, lambda m: f"base_model.model.transformer.{m}", "lora_A__weight", "lora_B__weight"
    )


@layout("flux")
def mochi_style(s: Sample) -> None:
    add_flux_diffusers_pairs(s, lambda m: m, "lora_A", "lora_B")


@layout("flux")
def alpha_in_the_header(s: Sample) -> None:
    patterns = {"attn.to_q": 5, "transformer_blocks.0.ff.net.2": 1}
    s.metadata = make_peft_settings(
        **{
            "transformer.lora_alpha": ALPHA,
            "transformer.alpha_pattern": patterns,
            "text_encoder.lora_alpha": 99,
        }
    )
    special = lambda m: 5 if m.endswith("attn.to_q") else 1 if m == "transformer_blocks.0.ff.net.2" else ALPHA  # noqa: E731
    add_flux_diffusers_pairs(
        s, lambda m: f"transformer.{m}", "lora_A__weight", "lora_B__weight", lambda m: special(m) / RANK
    )


@layout("flux")
def rs_lora(s: Sample) -> None:
    s.metadata = make_peft_settings(**{"transformer.lora_alpha": ALPHA, "transformer.use_rslora": True})
    add_flux_diffusers_pairs(
        s, lambda m: f"transformer.{m}", "lora_A__weight", "lora_B__weight", lambda m: ALPHA / math.sqrt(RANK)
    )


@layout("flux")
def rank_pattern(s: Sample) -> None:
    s.metadata = make_peft_settings(
        **{
            "transformer.lora_alpha": ALPHA,
            "transformer.r": RANK,
            "transformer.rank_pattern": {"proj_out": 3},
        }
    )
    for module in FLUX_MODULES:
        rank = 3 if module.endswith("proj_out") else RANK
        a, b = s.pair(*s.weight(module).shape, rank)
        s.add(f"transformer.{module}", lora_A__weight=a, lora_B__weight=b)
        s.expect(module, ALPHA / rank * b @ a)


@layout("flux")
def peft_with_bias(s: Sample) -> None:
    s.metadata = make_peft_settings(**{"transformer.lora_alpha": ALPHA})
    for module in ("x_embedder", "transformer_blocks.1.attn.to_k"):
        a, b = s.pair(*s.weight(module).shape)
        bias = s.randn(len(b))
        s.add(f"transformer.{module}", lora_A__weight=a, lora_B__weight=b, lora_B__bias=bias)
        s.expect(module, SCALE * b @ a, SCALE * bias)


@layout("flux")
def onetrainer(s: Sample) -> None:
    for module in FLUX_MODULES:
        a, b = s.pair(*s.weight(module).shape)
        s.add(
            f"lora_transformer_{module.replace('.', '_')}",
            lora_down__weight=a,
            lora_up__weight=b,
            alpha=torch.tensor(ALPHA),
        )
        s.expect(module, SCALE * b @ a)
    add_clip_pairs(s, "lora_te1_", "text_encoder", "")


@layout("flux")
def half_precision(s: Sample) -> None:
    add_flux_diffusers_pairs(s, lambda m: f"transformer.{m}", "lora_A__weight", "lora_B__weight")
    for i, module in enumerate(FLUX_MODULES):
        dtype = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)[i % 3]
        a, b = (s.tensors[f"transformer.{module}.lora_{half}.weight"].to(dtype) for half in "AB")
        s.add(f"transformer.{module}", lora_A__weight=a, lora_B__weight=b)
        s.expect(module, b.float() @ a.float())


@layout("flux")
def quantized(s: Sample) -> None:
    for i, native in enumerate(("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.2")):
        out, columns = s.native_shape(native)
        a, b = (
            torch.randint(-127, 128, shape, generator=s.generator).to(torch.int8)
            for shape in ((RANK, columns), (out, RANK))
        )
        scale_a, scale_b = torch.tensor(0.01), s.randn(out, 1).abs() / 100 if i else torch.tensor([0.02])
        s.add(f"diffusion_model.{native}", lora_down__weight=a, lora_up__weight=b, alpha=torch.tensor(ALPHA))
        s.add(f"diffusion_model.{native}", lora_down__scale_weight=scale_a, lora_up__scale_weight=scale_b)
        s.expect_native(native, SCALE * (b.float() * scale_b) @ (a.float() * scale_a))


# -- other kinds, Flux


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
        s.add(f"lycoris_{module.replace('.', '_')}", w_norm=weight)
        s.expect(module, weight)


def add_hadamard_pairs(s: Sample, prefix: str, out: int, columns: int) -> Tensor:
    """A LoHa's parts, and its dense change."""
    w1_b, w1_a = s.pair(out, columns)
    w2_b, w2_a = s.pair(out, columns)
    s.add(prefix, hada_w1_a=w1_a, hada_w1_b=w1_b, hada_w2_a=w2_a, hada_w2_b=w2_b, alpha=torch.tensor(ALPHA))
    return SCALE * (w1_a @ w1_b) * (w2_a @ w2_b)


@layout("flux")
def loha(s: Sample) -> None:
    for module in ("transformer_blocks.0.attn.to_q", "proj_out", "transformer_blocks.1.ff.net.2"):
        s.expect(
            module, add_hadamard_pairs(s, f"lycoris_{module.replace('.', '_')}", *s.weight(module).shape)
        )


@layout("flux")
def loha_native(s: Sample) -> None:
    for native in ("double_blocks.1.txt_attn.qkv", "single_blocks.0.linear1", SWAPPED):
        s.expect_native(
            native, add_hadamard_pairs(s, f"lora_unet_{native.replace('.', '_')}", *s.native_shape(native))
        )


def kron_by_blocks(w1: Tensor, w2: Tensor) -> Tensor:
    """[a, c] and [b, d] -> [a b, c d]."""
    return torch.einsum("ac,bd->abcd", w1, w2).reshape(len(w1) * len(w2), -1)


@layout("flux")
def lokr_full(s: Sample) -> None:
    """Two full factors: the alpha in the file says nothing."""
    for module in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2"):
        out, columns = s.weight(module).shape
        w1, w2 = s.randn(4, 2), s.randn(out // 4, columns // 2)
        s.add(f"lycoris_{module.replace('.', '_')}", lokr_w1=w1, lokr_w2=w2, alpha=torch.tensor(ALPHA))
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
        s.add(f"lycoris_{module.replace('.', '_')}", weight=factor, on_input=torch.tensor(int(on_input)))
        s.expect(module, w * factor if on_input else w * factor[:, None])


@layout("flux")
def ia3_native(s: Sample) -> None:
    """Row factors of a fused matrix."""
    native = "double_blocks.0.img_attn.qkv"
    factor = s.randn(s.native_shape(native)[0])
    s.add(f"diffusion_model.{native}", weight=factor, on_input=torch.tensor(0))
    s.expect_native(native, torch.cat([s.weight(t) for t in FLUX[native]]) * factor[:, None])


def apply_dora(w: Tensor, change: Tensor, magnitude: Tensor, dims: tuple[int, ...]) -> Tensor:
    """DoRA: `m (W + c) / ||W + c|| - W`, norms over `dims`."""
    return magnitude * (w + change) / (w + change).pow(2).sum(dims, keepdim=True).sqrt() - w


@layout("flux")
def dora_rows(s: Sample) -> None:
    for native in ("double_blocks.0.img_attn.qkv", "double_blocks.1.img_mlp.2", SWAPPED):
        a, b = s.pair(*s.native_shape(native))
        magnitude = s.randn(len(b), 1).abs() + 0.5
        s.add(
            f"lora_unet_{native.replace('.', '_')}",
            lora_down__weight=a,
            lora_up__weight=b,
            alpha=torch.tensor(ALPHA),
            dora_scale=magnitude,
        )
        w = torch.cat([s.weight(t) for t in FLUX[native]])
        if native == SWAPPED:  # the model's rows as the file has them
            w = torch.cat([w[len(w) // 2 :], w[: len(w) // 2]])
        s.expect_native(native, apply_dora(w, SCALE * b @ a, magnitude, (1,)))


@layout("flux")
def dora_columns(s: Sample) -> None:
    for module in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2"):
        w = s.weight(module)
        a, b = s.pair(*w.shape)
        magnitude = s.randn(1, w.shape[1]).abs() + 0.5
        s.add(
            f"lora_transformer_{module.replace('.', '_')}",
            lora_down__weight=a,
            lora_up__weight=b,
            alpha=torch.tensor(ALPHA),
        )
        s.add(f"lora_transformer_{module.replace('.', '_')}", dora_scale=magnitude)
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
    w = torch.cat([s.weight(t) for t in FLUX[native]])
    s.expect_native(native, apply_dora(w, kron_by_blocks(w1, w2), magnitude, (1,)))


# -- SDXL


def add_sdxl_pairs(
    s: Sample, key: Callable[[str, str], str], down: str, up: str, alpha: bool, convolutions: bool = True
) -> None:
    """Low-rank pairs of linear layers and convolutions."""
    scale = SCALE if alpha else 1.0
    for native, module in (SDXL_LINEAR | (SDXL_CONV if convolutions else {})).items():
        w = s.weight(module)
        a, b = s.randn(RANK, *w.shape[1:]), s.randn(len(w), RANK, *[1] * (w.dim() - 2))
        s.add(key(native, module), **{down: a, up: b} | ({"alpha": torch.tensor(ALPHA)} if alpha else {}))
        s.expect(module, scale * torch.einsum("or,r...->o...", b.flatten(1), a))


@layout("sdxl")
def sdxl_kohya(s: Sample) -> None:
    add_sdxl_pairs(
        s, lambda n, m: f"lora_unet_{n.replace('.', '_')}", "lora_down__weight", "lora_up__weight", True
    )
    add_clip_pairs(s, "lora_te1_", "text_encoder", "")
    add_clip_pairs(s, "lora_te2_", "text_encoder_2", "text_model.")


@layout("sdxl")
def sdxl_kohya_diffusers_names(s: Sample) -> None:
    add_sdxl_pairs(
        s, lambda n, m: f"lora_unet_{m.replace('.', '_')}", "lora_down__weight", "lora_up__weight", True
    )


@layout("sdxl")
def sdxl_comfyui(s: Sample) -> None:
    add_sdxl_pairs(s, lambda n, m: f"diffusion_model.{n}", "lora_down__weight", "lora_up__weight", True)


@layout("sdxl")
def sdxl_peft(s: Sample) -> None:
    add_sdxl_pairs(s, lambda n, m: f"unet.{m}", "lora_A__weight", "lora_B__weight", False)
    for component, level in (("text_encoder", ""), ("text_encoder_2", "text_model.")):
        for name in CLIP_LAYERS:
            module = f"{level}encoder.layers.0.{name}"
            a, b = s.pair(*s.weight(module, component).shape)
            s.add(f"{component}.text_model.encoder.layers.0.{name}", lora_A__weight=a, lora_B__weight=b)
            s.expect(module, b @ a, component=component)


@layout("sdxl")
def sdxl_peft_wrapped(s: Sample) -> None:
    add_sdxl_pairs(s, lambda n, m: f"unet.base_model.model.{m}", "lora_A__weight", "lora_B__weight", False)


@layout("sdxl")
def diffusers_old_processors(s: Sample) -> None:
    """Before PEFT: attention processors, with `_lora` after the name; text encoders have other names."""
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    for name in ATTENTION:
        a, b = s.pair(*s.weight(f"{block}.{name}").shape)
        old = f"unet.{block}.processor.{name.removesuffix('.0')}_lora"
        s.add(old, down__weight=a, up__weight=b)
        s.expect(f"{block}.{name}", b @ a)
    for old, name in (("to_q_lora", "q_proj"), ("to_out_lora", "out_proj")):
        module = f"encoder.layers.0.self_attn.{name}"
        a, b = s.pair(*s.weight(module, "text_encoder").shape)
        s.add(f"text_encoder.text_model.encoder.layers.0.self_attn.{old}", down__weight=a, up__weight=b)
        s.expect(module, b @ a, component="text_encoder")
    a, b = s.pair(*s.weight("encoder.layers.0.mlp.fc1", "text_encoder").shape)
    s.add("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer", down__weight=a, up__weight=b)
    s.expect("encoder.layers.0.mlp.fc1", b @ a, component="text_encoder")


@layout("sdxl")
def diffusers_old_layers(s: Sample) -> None:
    add_sdxl_pairs(s, lambda n, m: f"unet.{m}", "lora__down__weight", "lora__up__weight", False)


def multiply_tucker(mid: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """[r, r, kh, kw], [out, r], [r, in] -> [out, in, kh, kw]."""
    return torch.einsum("mnhw,om,ni->oihw", mid, up, down)


@layout("sdxl")
def locon_with_core(s: Sample) -> None:
    for native, module in SDXL_CONV.items():
        w = s.weight(module)
        down, up, mid = (
            s.randn(RANK, w.shape[1], 1, 1),
            s.randn(len(w), RANK, 1, 1),
            s.randn(RANK, RANK, *w.shape[2:]),
        )
        prefix = f"lora_unet_{native.replace('.', '_')}"
        s.add(
            prefix,
            lora_down__weight=down,
            lora_up__weight=up,
            lora_mid__weight=mid,
            alpha=torch.tensor(ALPHA),
        )
        s.expect(module, SCALE * multiply_tucker(mid, up.flatten(1), down.flatten(1)))


@layout("sdxl")
def loha_kernels(s: Sample) -> None:
    """With cores, and written flat without."""
    for i, (native, module) in enumerate(SDXL_CONV.items()):
        w = s.weight(module)
        prefix = f"lora_unet_{native.replace('.', '_')}"
        if i % 2:
            s.expect(module, add_hadamard_pairs(s, prefix, len(w), w.shape[1:].numel()).reshape(w.shape))
            continue
        a1, a2, b1, b2 = (
            s.randn(RANK, len(w)),
            s.randn(RANK, len(w)),
            s.randn(RANK, w.shape[1]),
            s.randn(RANK, w.shape[1]),
        )
        t1, t2 = s.randn(RANK, RANK, *w.shape[2:]), s.randn(RANK, RANK, *w.shape[2:])
        s.add(
            prefix,
            hada_w1_a=a1,
            hada_w1_b=b1,
            hada_t1=t1,
            hada_w2_a=a2,
            hada_w2_b=b2,
            hada_t2=t2,
            alpha=torch.tensor(ALPHA),
        )
        s.expect(module, SCALE * multiply_tucker(t1, a1.T, b1) * multiply_tucker(t2, a2.T, b2))


@layout("sdxl")
def lokr_kernels(s: Sample) -> None:
    """With a core, written flat, and with a full kernel."""
    for i, module in enumerate(
        ("down_blocks.0.resnets.0.conv1", "mid_block.resnets.1.conv2", "up_blocks.0.upsamplers.0.conv")
    ):
        w = s.weight(module)
        out, columns, kernel = len(w) // 4, w.shape[1] // 2, w.shape[2:]
        w1, alpha = s.randn(4, 2), torch.tensor(ALPHA)
        if i == 0:
            a, b, core = s.randn(RANK, out), s.randn(RANK, columns), s.randn(RANK, RANK, *kernel)
            parts, w2, scale = (
                {"lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b},
                multiply_tucker(core, a.T, b),
                SCALE,
            )
        elif i == 1:
            b, a = s.pair(out, columns * kernel.numel())
            parts, w2, scale = {"lokr_w2_a": a, "lokr_w2_b": b}, (a @ b).reshape(out, columns, *kernel), SCALE
        else:
            w2, scale = s.randn(out, columns, *kernel), 1.0
            parts = {"lokr_w2": w2}
        s.add(f"lycoris_{module.replace('.', '_')}", lokr_w1=w1, alpha=alpha, **parts)
        s.expect(module, scale * torch.einsum("ac,bdhw->abcdhw", w1, w2).reshape(w.shape))


@layout("sdxl")
def dora_kernels(s: Sample) -> None:
    """Norms [out, 1, 1, 1] and [1, in, 1, 1]; PEFT's [1, out, 1, 1] are of rows all the same."""
    for i, module in enumerate(
        ("down_blocks.0.resnets.0.conv1", "mid_block.resnets.1.conv2", "up_blocks.0.upsamplers.0.conv")
    ):
        w = s.weight(module)
        a, b = s.randn(RANK, *w.shape[1:]), s.randn(len(w), RANK, 1, 1)
        change = torch.einsum("or,rihw->oihw", b.flatten(1), a)
        size = w.shape[1] if i == 1 else len(w)
        magnitude = s.randn(size).abs() + 0.5
        if i == 2:
            s.add(
                f"unet.{module}",
                lora_A__weight=a,
                lora_B__weight=b,
                lora_magnitude_vector__weight=magnitude.reshape(1, size, 1, 1),
            )
        else:
            shaped = magnitude.reshape((1, size, 1, 1) if i == 1 else (size, 1, 1, 1))
            s.add(
                f"lora_unet_{module.replace('.', '_')}",
                lora_down__weight=a,
                lora_up__weight=b,
                dora_scale=shaped,
            )
        if i == 1:
            s.expect(module, apply_dora(w, change, magnitude.reshape(1, -1, 1, 1), (0, 2, 3)))
        else:
            s.expect(module, apply_dora(w, change, magnitude.reshape(-1, 1, 1, 1), (1, 2, 3)))


@layout("sdxl")
def ia3_kernels(s: Sample) -> None:
    for module, on_input in (("down_blocks.0.resnets.0.conv1", False), ("mid_block.resnets.1.conv2", True)):
        w = s.weight(module)
        factor = s.randn(1, w.shape[1] if on_input else len(w), 1, 1)
        s.add(f"lycoris_{module.replace('.', '_')}", weight=factor, on_input=torch.tensor(int(on_input)))
        s.expect(module, w * factor if on_input else w * factor.transpose(0, 1))


@layout("sdxl")
def sdxl_norm_differences(s: Sample) -> None:
    for native, module in SDXL_NORM.items():
        weight, bias = s.randn(len(s.weight(module))), s.randn(len(s.weight(module)))
        s.add(f"lora_unet_{native.replace('.', '_')}", w_norm=weight, b_norm=bias)
        s.expect(module, weight, bias)


@layout("sdxl")
def sdxl_diff_kernels(s: Sample) -> None:
    for native, module in SDXL_CONV.items():
        w = s.weight(module)
        weight, bias = s.randn(*w.shape), s.randn(len(w))
        s.add(f"diffusion_model.{native}", diff=weight, diff_b=bias)
        s.expect(module, weight, bias)


# -- files with a mistake


@dataclass(frozen=True)
class Mistake:
    """A change to a good file, and what reading or matching must say of it.

    Args:
        layout: the file that it starts from.
        spoil: changes the tensors in place.
        when: `reading`: refused by the reader; `matching`: only the model shows it; `note`: told, not
            refused.
        words: regular expression for the message.
    """

    layout: str
    spoil: Callable[[dict[str, Tensor]], object]
    when: str
    words: str


def find_key(tensors: Mapping[str, Tensor], *words: str) -> str:
    """The first key with all of the words in it."""
    return next(k for k in tensors if all(w in k for w in words))


def replace_tensor(*words: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """A mistake in one tensor."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        key = find_key(tensors, *words)
        tensors[key] = change(tensors[key]).contiguous()

    return spoil


def put_in_all(word: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """A mistake in every tensor with the word in its key."""
    return lambda tensors: tensors.update(
        {k: change(t).contiguous() for k, t in tensors.items() if word in k}
    )


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    """The tensor with one number set."""
    return lambda t: torch.cat([torch.tensor([value], dtype=t.dtype), t.flatten()[1:]]).reshape(t.shape)


QKV = "double_blocks_0_img_attn_qkv"
MISTAKES = {
    "half a pair": Mistake(
        "kohya",
        lambda t: t.pop(find_key(t, QKV, "lora_up")),
        "reading",
        rf"{QKV} has no lora_B \(up\); the file is incomplete",
    ),
    "ranks differ": Mistake(
        "kohya",
        replace_tensor(QKV, "lora_up", change=lambda t: torch.cat([t, t], 1)),
        "reading",
        rf"{QKV} has lora_A \[2, 16\], lora_B \[48, 4\]; "
        rf"rank 2 and rank 4: a pair is \[rank, in\] and \[out, rank\]",
    ),
    "both halves transposed": Mistake(
        "kohya",
        lambda t: t.update({k: v.T.contiguous() for k, v in t.items() if QKV in k and v.dim() == 2}),
        "reading",
        rf"{QKV} has lora_A \[16, 2\], lora_B \[2, 48\]; rank 16 and rank 48",
    ),
    "halves exchanged": Mistake(
        "kohya",
        lambda t: t.update(
            {
                find_key(t, QKV, "lora_down"): t[find_key(t, QKV, "lora_up")],
                find_key(t, QKV, "lora_up"): t[find_key(t, QKV, "lora_down")],
            }
        ),
        "reading",
        rf"{QKV} has lora_A \[48, 2\], lora_B \[2, 16\]; rank 48 and rank 16",
    ),
    "a NaN": Mistake(
        "kohya",
        replace_tensor(QKV, "lora_down", change=with_value(float("nan"))),
        "reading",
        rf"{QKV} has values that are not finite numbers in its lora_A \(down\)",
    ),
    "an infinity": Mistake(
        "peft",
        replace_tensor("to_out", "lora_B", change=with_value(float("-inf"))),
        "reading",
        r"transformer_blocks\.0\.attn\.to_out\.0 has values that are not finite numbers in its lora_B \(up\)",
    ),
    "an alpha that is NaN": Mistake(
        "kohya",
        replace_tensor(QKV, "alpha", change=lambda t: torch.tensor(float("nan"))),
        "reading",
        "not finite numbers in its alpha",
    ),
    "one module twice": Mistake(
        "peft",
        lambda t: t.update({"x_embedder.lora_down.weight": torch.ones(2, 4)}),
        "reading",
        r"x_embedder is in the file twice, as transformer\.x_embedder\.lora_A\.weight and "
        r"x_embedder\.lora_down\.weight"
        r"|x_embedder is in the file twice, as x_embedder\.lora_down\.weight and "
        r"transformer\.x_embedder\.lora_A\.weight",
    ),
    "integers without a scale": Mistake(
        "quantized",
        lambda t: t.pop(find_key(t, "lora_up.scale_weight")),
        "reading",
        r"has a lora_B \(up\) of int8 without a scale",
    ),
    "two kinds in one module": Mistake(
        "kohya",
        lambda t: t.update({f"lora_unet_{QKV}.diff": torch.ones(48, 16)}),
        "reading",
        "has parts of several adapter types: diff, down, up",
    ),
    "LoHa with a factor missing": Mistake(
        "loha",
        lambda t: t.pop(find_key(t, "hada_w2_b")),
        "reading",
        "has no hada_w2_b; the file is incomplete",
    ),
    "LoKr with a factor missing": Mistake(
        "lokr_full",
        lambda t: t.pop(find_key(t, "lokr_w1")),
        "reading",
        "has no lokr_w1; the file is incomplete",
    ),
    "DoRA norms alone": Mistake(
        "dora_rows",
        lambda t: [t.pop(find_key(t, QKV, half)) for half in ("lora_up", "lora_down", "alpha")],
        "reading",
        "has DoRA norms without a low-rank change",
    ),
    "DoRA norms of another length": Mistake(
        "dora_rows",
        replace_tensor(QKV, "dora_scale", change=lambda t: t[:40]),
        "reading",
        "has 40 DoRA norms for 48 rows",
    ),
    "zeros": Mistake(
        "kohya",
        put_in_all("lora_up", torch.zeros_like),
        "note",
        r"has no effect \(B = 0 in (\d+)/\1 modules\)",
    ),
    "an unusual alpha": Mistake(
        "kohya",
        put_in_all("alpha", lambda t: torch.tensor(0.001)),
        "note",
        r"alpha / rank is 0\.0005 in .* usual is 0\.05 to 4",
    ),
    "large values": Mistake(
        "kohya",
        replace_tensor(QKV, "lora_down", change=with_value(2e6)),
        "note",
        r"values up to 2e\+06 in .*damaged",
    ),
    "a module that no model has": Mistake(
        "kohya",
        lambda t: t.update(
            {
                k.replace("single_blocks_1", "single_blocks_9"): t.pop(k)
                for k in list(t)
                if "single_blocks_1" in k
            }
        ),
        "matching",
        "no such module",
    ),
    "a matrix too narrow": Mistake(
        "peft",
        replace_tensor("x_embedder", "lora_A", change=lambda t: t[:, :3]),
        "matching",
        r"x_embedder changes a 16x3 weight, the model's is 16x4; the LoRA was made for another base model",
    ),
    "a matrix too tall": Mistake(
        "peft",
        replace_tensor("x_embedder", "lora_B", change=lambda t: torch.cat([t, t])),
        "matching",
        r"x_embedder changes a 32x4 weight, the model's is 16x4; the LoRA was made for another base model",
    ),
    "a fused matrix too short": Mistake(
        "kohya",
        replace_tensor(QKV, "lora_up", change=lambda t: t[:40]),
        "matching",
        "40 rows",
    ),
    "a fused matrix too tall": Mistake(
        "kohya",
        replace_tensor(QKV, "lora_up", change=lambda t: torch.cat([t, t])),
        "matching",
        "96 rows",
    ),
    "a kind that is not applied": Mistake(
        "peft",
        lambda t: t.update({"transformer.x_embedder.reshape_weight": torch.tensor([16, 8])}),
        "matching",
        r"unsupported adapter type: whole replacement \(reshape_weight\)",
    ),
    "a foreign key": Mistake(
        "peft", lambda t: t.update({"something.else": torch.ones(1)}), "matching", "unknown suffix"
    ),
    "a bundled embedding": Mistake(
        "kohya",
        lambda t: t.update({"bundle_emb.word.string_to_param.*": torch.ones(2, 8)}),
        "matching",
        "textual inversion, not a LoRA",
    ),
}


def make_sample(name: str, models: Mapping[str, Mapping[str, nn.Module]]) -> Sample:
    """One file, not yet written."""
    base, fill = LAYOUTS[name]
    sample = Sample(name, base, models[base])
    fill(sample)
    return sample


def write_sample(sample: Sample, folder: Path) -> Sample:
    """The sample with its file in a folder."""
    sample.path = folder / f"{sample.name}.safetensors"
    save_file(sample.tensors, sample.path, sample.metadata)
    return sample


def main(folder: Path) -> None:
    """Write every file, good and bad, and list them."""
    folder.mkdir(parents=True, exist_ok=True)
    models = make_tiny_models()
    for name in LAYOUTS:
        sample = write_sample(make_sample(name, models), folder)
        num_modules = sum(map(len, sample.expected.values()))
        line = f"{sample.path.name}: {sample.base}, {len(sample.tensors)} tensors, {num_modules} modules"
        print(line)  # noqa: T201
    for name, mistake in MISTAKES.items():
        sample = make_sample(mistake.layout, models)
        mistake.spoil(sample.tensors)
        sample.name = f"bad_{name.replace(' ', '_')}"
        print(f"{write_sample(sample, folder).path.name}: {mistake.when}: {mistake.words}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
