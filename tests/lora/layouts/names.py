"""Names of modules in files and in models: those of Flux's authors, of XLabs, of Stability and of CLIP."""

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
FLUX_BLOCKS = 2  # of each kind, in the tiny model


def list_flux_names() -> dict[str, tuple[str, ...]]:
    """The authors' name of every matrix of the tiny model -> the modules that diffusers makes of it."""
    names = {}
    for number in range(FLUX_BLOCKS):
        for native, targets in FLUX_DOUBLE.items():
            block = f"transformer_blocks.{number}"
            names[f"double_blocks.{number}.{native}"] = tuple(f"{block}.{target}" for target in targets)
    for number in range(FLUX_BLOCKS):
        for native, targets in FLUX_SINGLE.items():
            block = f"single_transformer_blocks.{number}"
            names[f"single_blocks.{number}.{native}"] = tuple(f"{block}.{target}" for target in targets)
    return names | FLUX_REST


FLUX = list_flux_names()
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


def join_name(prefix: str, module: str) -> str:
    """A module's name as kohya and LyCORIS write it: with underscores."""
    return prefix + module.replace(".", "_")
