"""Further architectures with names of their own, and what diffusers' scripts make of their authors' files.

The library has no converter for them. What diffusers' scripts (`scripts/convert_*_to_diffusers.py`) do is
told here in short: names by regular expression, matrices cut into several, halves that change places.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from families import denoisers
from torch import Tensor

File = dict[str, Tensor]


@dataclass(frozen=True)
class Script:
    """What a script does to a file.

    Args:
        names: regular expression of the beginning of a key, and what takes its place; the first counts.
        cuts: the same for modules whose rows become those of several modules: replacements, in order; one
            that stands there several times has as many parts of the rows.
        joins: the same for modules whose rows are those of one module, `up_proj` before `gate_proj`.
        swapped: modules of the model whose halves change places.
    """

    names: Sequence[tuple[str, str]]
    cuts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    joins: Mapping[str, str] = field(default_factory=dict)
    swapped: Sequence[str] = ()

    def convert(self, file: File) -> File:
        """The model's state dict from the authors' file."""
        model: File = {}
        # `up_proj` comes before `gate_proj`, wherever they stand in the file
        for key in sorted(file, key=lambda key: "gate_proj" in key):
            for name, rows in self.convert_tensor(key, file[key]):
                model[name] = torch.cat([model[name], rows]) if name in model else rows
        return model

    def convert_tensor(self, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
        """What one tensor becomes: names and rows, one after the other."""
        for pattern, targets in self.cuts.items():
            found = re.match(pattern, key)
            if found:
                rest = key[found.end() :]
                parts = value.chunk(len(targets))
                names = [found.expand(target) + rest for target in targets]
                return list(zip(names, parts, strict=True))
        for pattern, target in [*self.joins.items(), *self.names]:
            found = re.match(pattern, key)
            if found:
                key = found.expand(target) + key[found.end() :]
                break
        if key.rpartition(".")[0] in self.swapped:
            first, second = value.chunk(2)
            value = torch.cat([second, first])
        return [(key, value)]


HUNYUAN_TEXT = [
    (r"byt5_in\.layernorm\.", "context_embedder_2.norm."),
    (r"byt5_in\.fc(\d)\.", r"context_embedder_2.linear_\1."),
    (r"txt_in\.input_embedder\.", "context_embedder.proj_in."),
    (r"txt_in\.t_embedder\.mlp\.0\.", "context_embedder.time_text_embed.timestep_embedder.linear_1."),
    (r"txt_in\.t_embedder\.mlp\.2\.", "context_embedder.time_text_embed.timestep_embedder.linear_2."),
    (r"txt_in\.c_embedder\.", "context_embedder.time_text_embed.text_embedder."),
]
REFINER = r"txt_in\.individual_token_refiner\.blocks\.(\d+)\."
REFINED = r"context_embedder.token_refiner.refiner_blocks.\1."
HUNYUAN_REFINER = [
    (REFINER + r"self_attn_proj\.", REFINED + "attn.to_out.0."),
    (REFINER + r"mlp\.fc1\.", REFINED + "ff.net.0.proj."),
    (REFINER + r"mlp\.fc2\.", REFINED + "ff.net.2."),
    (REFINER + r"adaLN_modulation\.1\.", REFINED + "norm_out.linear."),
    (REFINER, REFINED),
]
HUNYUAN_CUTS = {REFINER + r"self_attn_qkv\.": [f"{REFINED}attn.to_{name}." for name in "qkv"]}
DOUBLE, BLOCK = r"double_blocks\.(\d+)\.", r"transformer_blocks.\1."
HUNYUAN_BLOCKS = [
    (DOUBLE + r"img_mod\.", BLOCK + "norm1."),
    (DOUBLE + r"txt_mod\.", BLOCK + "norm1_context."),
    (DOUBLE + r"img_attn_([qk])_norm\.", BLOCK + r"attn.norm_\2."),
    (DOUBLE + r"txt_attn_([qk])_norm\.", BLOCK + r"attn.norm_added_\2."),
    (DOUBLE + r"img_attn_([qkv])\.", BLOCK + r"attn.to_\2."),
    (DOUBLE + r"txt_attn_([qkv])\.", BLOCK + r"attn.add_\2_proj."),
    (DOUBLE + r"img_attn_proj\.", BLOCK + "attn.to_out.0."),
    (DOUBLE + r"txt_attn_proj\.", BLOCK + "attn.to_add_out."),
    (DOUBLE + r"img_mlp\.fc1\.", BLOCK + "ff.net.0.proj."),
    (DOUBLE + r"img_mlp\.fc2\.", BLOCK + "ff.net.2."),
    (DOUBLE + r"txt_mlp\.fc1\.", BLOCK + "ff_context.net.0.proj."),
    (DOUBLE + r"txt_mlp\.fc2\.", BLOCK + "ff_context.net.2."),
]
LAST = [(r"final_layer\.adaLN_modulation\.1\.", "norm_out.linear."), (r"final_layer\.linear\.", "proj_out.")]
HUNYUAN_VIDEO15 = Script(
    names=[
        *HUNYUAN_TEXT,
        *HUNYUAN_REFINER,
        *HUNYUAN_BLOCKS,
        *LAST,
        (r"img_in\.", "x_embedder."),
        (r"time_in\.mlp\.0\.", "time_embed.timestep_embedder.linear_1."),
        (r"time_in\.mlp\.2\.", "time_embed.timestep_embedder.linear_2."),
        (r"cond_type_embedding\.", "cond_type_embed."),
        (r"vision_in\.proj\.0\.", "image_embedder.norm_in."),
        (r"vision_in\.proj\.1\.", "image_embedder.linear_1."),
        (r"vision_in\.proj\.3\.", "image_embedder.linear_2."),
        (r"vision_in\.proj\.4\.", "image_embedder.norm_out."),
    ],
    cuts=HUNYUAN_CUTS,
    swapped=["norm_out.linear"],
)
SINGLE, SINGLE_BLOCK = r"single_blocks\.(\d+)\.", r"single_transformer_blocks.\1."
TIME = "time_guidance_embed."
HUNYUAN_IMAGE = Script(
    names=[
        *HUNYUAN_TEXT,
        *HUNYUAN_REFINER,
        *HUNYUAN_BLOCKS,
        *LAST,
        (r"img_in\.", "x_embedder."),
        (r"time_in\.mlp\.0\.", TIME + "timestep_embedder.linear_1."),
        (r"time_in\.mlp\.2\.", TIME + "timestep_embedder.linear_2."),
        (r"time_r_in\.mlp\.0\.", TIME + "timestep_embedder_r.linear_1."),
        (r"time_r_in\.mlp\.2\.", TIME + "timestep_embedder_r.linear_2."),
        (r"guidance_in\.mlp\.0\.", TIME + "guidance_embedder.linear_1."),
        (r"guidance_in\.mlp\.2\.", TIME + "guidance_embedder.linear_2."),
        (SINGLE + r"modulation\.", SINGLE_BLOCK + "norm."),
        (SINGLE + r"linear1_([qkv])\.", SINGLE_BLOCK + r"attn.to_\2."),
        (SINGLE + r"linear1_mlp\.", SINGLE_BLOCK + "proj_mlp."),
        (SINGLE + r"linear2\.fc\.", SINGLE_BLOCK + "proj_out."),
        (SINGLE + r"([qk])_norm\.", SINGLE_BLOCK + r"attn.norm_\2."),
    ],
    cuts=HUNYUAN_CUTS,
    swapped=["norm_out.linear"],
)
# of the LoRA converter, `_convert_non_diffusers_ideogram4_lora_to_diffusers`
IDEOGRAM4 = Script(
    names=[(r"layers\.(\d+)\.attention\.o\.", r"layers.\1.attention.to_out.0.")],
    cuts={r"layers\.(\d+)\.attention\.qkv\.": [rf"layers.\1.attention.to_{name}." for name in "qkv"]},
)
FIBO2 = Script(
    names=[
        (r"all_x_embedder\.2-1\.", "x_embedder."),
        (r"all_final_layer\.2-1\.", "final_layer."),
        (r"(.*)cross_([qkv])\.", r"\1cross_attention.to_\2."),
        (r"(.*)cross_out\.", r"\1cross_attention.to_out.0."),
        (r"(.*)cross_norm_([qk])\.", r"\1cross_attention.norm_\2."),
        (r"(.*)self_([qkv])\.", r"\1self_attention.to_\2."),
        (r"(.*)self_out\.", r"\1self_attention.to_out.0."),
        (r"(.*)self_norm_([qk])\.", r"\1self_attention.norm_\2."),
    ]
)
LAYER = r"transformer\.layers\.(\d+)\."
COGVIEW4 = Script(
    names=[
        (r"mixins\.patch_embed\.", "patch_embed."),
        (r"time_embed\.0\.", "time_condition_embed.timestep_embedder.linear_1."),
        (r"time_embed\.2\.", "time_condition_embed.timestep_embedder.linear_2."),
        (r"label_emb\.0\.0\.", "time_condition_embed.condition_embedder.linear_1."),
        (r"label_emb\.0\.2\.", "time_condition_embed.condition_embedder.linear_2."),
        (r"mixins\.adaln\.adaln_modules\.(\d+)\.1\.", BLOCK + "norm1.linear."),
        (LAYER + r"attention\.dense\.", BLOCK + "attn1.to_out.0."),
        (LAYER + r"mlp\.dense_h_to_4h\.", BLOCK + "ff.net.0.proj."),
        (LAYER + r"mlp\.dense_4h_to_h\.", BLOCK + "ff.net.2."),
        (r"mixins\.final_layer\.adaln\.1\.", "norm_out.linear."),
        (r"mixins\.final_layer\.linear\.", "proj_out."),
    ],
    cuts={LAYER + r"attention\.query_key_value\.": [f"{BLOCK}attn1.to_{name}." for name in "qkv"]},
    swapped=["norm_out.linear"],
)
JOYIMAGE = Script(names=[(r"double_blocks\.(\d+)\.((img|txt)_attn_)", r"double_blocks.\1.attn.\2")])
PRX = Script(
    names=[
        (r"blocks\.(\d+)\.(img_qkv|txt_kv)_proj\.", r"blocks.\1.attention.\2_proj."),
        (r"blocks\.(\d+)\.qk_norm\.query_norm\.scale", r"blocks.\1.attention.norm_q.weight"),
        (r"blocks\.(\d+)\.qk_norm\.key_norm\.scale", r"blocks.\1.attention.norm_k.weight"),
        (r"blocks\.(\d+)\.k_norm\.scale", r"blocks.\1.attention.norm_added_k.weight"),
        (r"blocks\.(\d+)\.attn_out\.", r"blocks.\1.attention.to_out.0."),
    ]
)
ATTENTION = r"blocks\.(\d+)\.attn\."
CROSS = r"blocks\.(\d+)\.cross_attn\."
MLP = r"blocks\.(\d+)\.mlp\."
SANA_VIDEO = Script(
    names=[
        (r"x_embedder\.proj\.", "patch_embedding."),
        (r"y_embedder\.y_proj\.fc(\d)\.", r"caption_projection.linear_\1."),
        (r"t_embedder\.mlp\.0\.", "time_embed.emb.timestep_embedder.linear_1."),
        (r"t_embedder\.mlp\.2\.", "time_embed.emb.timestep_embedder.linear_2."),
        (r"t_block\.1\.", "time_embed.linear."),
        (r"attention_y_norm\.", "caption_norm."),
        (ATTENTION + r"([qk])_norm\.", BLOCK + r"attn1.norm_\2."),
        (ATTENTION + r"proj\.", BLOCK + "attn1.to_out.0."),
        (CROSS + r"([qk])_norm\.", BLOCK + r"attn2.norm_\2."),
        (CROSS + r"q_linear\.", BLOCK + "attn2.to_q."),
        (CROSS + r"proj\.", BLOCK + "attn2.to_out.0."),
        (MLP + r"inverted_conv\.conv\.", BLOCK + "ff.conv_inverted."),
        (MLP + r"depth_conv\.conv\.", BLOCK + "ff.conv_depth."),
        (MLP + r"point_conv\.conv\.", BLOCK + "ff.conv_point."),
        (MLP + r"t_conv\.", BLOCK + "ff.conv_temp."),
        (r"blocks\.(\d+)\.scale_shift_table", BLOCK + "scale_shift_table"),
        (r"final_layer\.linear\.", "proj_out."),
        (r"final_layer\.scale_shift_table", "scale_shift_table"),
    ],
    cuts={
        ATTENTION + r"qkv\.": [f"{BLOCK}attn1.to_{name}." for name in "qkv"],
        CROSS + r"kv_linear\.": [f"{BLOCK}attn2.to_{name}." for name in "kv"],
    },
)
FLUX_DOUBLE = [
    (DOUBLE + r"img_mod\.lin\.", BLOCK + "norm1.linear."),
    (DOUBLE + r"txt_mod\.lin\.", BLOCK + "norm1_context.linear."),
    (DOUBLE + r"img_attn\.norm\.query_norm\.", BLOCK + "attn.norm_q."),
    (DOUBLE + r"img_attn\.norm\.key_norm\.", BLOCK + "attn.norm_k."),
    (DOUBLE + r"txt_attn\.norm\.query_norm\.", BLOCK + "attn.norm_added_q."),
    (DOUBLE + r"txt_attn\.norm\.key_norm\.", BLOCK + "attn.norm_added_k."),
    (DOUBLE + r"img_attn\.proj\.", BLOCK + "attn.to_out.0."),
    (DOUBLE + r"txt_attn\.proj\.", BLOCK + "attn.to_add_out."),
]
FLUX_SINGLE = [
    (SINGLE + r"modulation\.lin\.", SINGLE_BLOCK + "norm.linear."),
    (SINGLE + r"norm\.query_norm\.", SINGLE_BLOCK + "attn.norm_q."),
    (SINGLE + r"norm\.key_norm\.", SINGLE_BLOCK + "attn.norm_k."),
    (SINGLE + r"linear2\.", SINGLE_BLOCK + "proj_out."),
]
FLUX_CUTS = {
    DOUBLE + r"img_attn\.qkv\.": [f"{BLOCK}attn.to_{name}." for name in "qkv"],
    DOUBLE + r"txt_attn\.qkv\.": [f"{BLOCK}attn.add_{name}_proj." for name in "qkv"],
}
LONGCAT_IMAGE = Script(
    names=[
        (r"img_in\.", "x_embedder."),
        (r"txt_in\.", "context_embedder."),
        (r"time_in\.in_layer\.", "time_embed.timestep_embedder.linear_1."),
        (r"time_in\.out_layer\.", "time_embed.timestep_embedder.linear_2."),
        # a weight is called scale there
        (DOUBLE + r"img_attn\.norm\.query_norm\.scale", BLOCK + "attn.norm_q.weight"),
        (DOUBLE + r"img_attn\.norm\.key_norm\.scale", BLOCK + "attn.norm_k.weight"),
        (DOUBLE + r"txt_attn\.norm\.query_norm\.scale", BLOCK + "attn.norm_added_q.weight"),
        (DOUBLE + r"txt_attn\.norm\.key_norm\.scale", BLOCK + "attn.norm_added_k.weight"),
        (SINGLE + r"norm\.query_norm\.scale", SINGLE_BLOCK + "attn.norm_q.weight"),
        (SINGLE + r"norm\.key_norm\.scale", SINGLE_BLOCK + "attn.norm_k.weight"),
        (DOUBLE + r"img_mlp\.0\.", BLOCK + "ff.net.0.proj."),
        (DOUBLE + r"img_mlp\.2\.", BLOCK + "ff.net.2."),
        (DOUBLE + r"txt_mlp\.0\.", BLOCK + "ff_context.net.0.proj."),
        (DOUBLE + r"txt_mlp\.2\.", BLOCK + "ff_context.net.2."),
        *FLUX_DOUBLE,
        *FLUX_SINGLE,
        *LAST,
    ],
    cuts={
        **FLUX_CUTS,
        # 3 of 7 equal parts are q, k and v; the rest is the feed-forward's
        SINGLE + r"linear1\.": [
            *(f"{SINGLE_BLOCK}attn.to_{name}." for name in "qkv"),
            *[f"{SINGLE_BLOCK}proj_mlp."] * 4,
        ],
    },
    swapped=["norm_out.linear"],
)
OVIS_IMAGE = Script(
    names=[
        (r"img_in\.", "x_embedder."),
        (r"semantic_txt_norm\.", "context_embedder_norm."),
        (r"semantic_txt_in\.", "context_embedder."),
        (r"time_in\.in_layer\.", "timestep_embedder.linear_1."),
        (r"time_in\.out_layer\.", "timestep_embedder.linear_2."),
        *FLUX_DOUBLE,
        (DOUBLE + r"img_mlp\.down_proj\.", BLOCK + "ff.net.2."),
        (DOUBLE + r"txt_mlp\.down_proj\.", BLOCK + "ff_context.net.2."),
        *FLUX_SINGLE,
        *LAST,
    ],
    cuts={
        **FLUX_CUTS,
        # 3 of 11 equal parts are q, k and v; the rest is the feed-forward's
        SINGLE + r"linear1\.": [
            *(f"{SINGLE_BLOCK}attn.to_{name}." for name in "qkv"),
            *[f"{SINGLE_BLOCK}proj_mlp."] * 8,
        ],
    },
    joins={
        DOUBLE + r"img_mlp\.(?:up|gate)_proj\.": BLOCK + "ff.net.0.proj.",
        DOUBLE + r"txt_mlp\.(?:up|gate)_proj\.": BLOCK + "ff_context.net.0.proj.",
    },
    swapped=["norm_out.linear"],
)
# by name: what makes the model, and the script
SCRIPTS: Mapping[str, tuple[Callable[[], torch.nn.Module], Script]] = {
    "hunyuan_video15": (denoisers.hunyuan_video15, HUNYUAN_VIDEO15),
    "hunyuan_image": (denoisers.hunyuan_image, HUNYUAN_IMAGE),
    "hunyuan_image_distilled": (denoisers.hunyuan_image_distilled, HUNYUAN_IMAGE),
    "ideogram4": (denoisers.ideogram4, IDEOGRAM4),
    "fibo2": (denoisers.fibo2, FIBO2),
    "longcat_image": (denoisers.longcat_image, LONGCAT_IMAGE),
    "ovis_image": (denoisers.ovis_image, OVIS_IMAGE),
    "cogview4": (denoisers.cogview4, COGVIEW4),
    "joyimage_edit": (denoisers.joyimage_edit, JOYIMAGE),
    "prx": (denoisers.prx, PRX),
    "sana_video": (denoisers.sana_video, SANA_VIDEO),
}
