"""Tiny random text encoders of every class that is supported: transformers' real ones, no download."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

WORDS, WIDE, FEED = 40, 32, 48
LLM = {
    "vocab_size": WORDS,
    "hidden_size": WIDE,
    "intermediate_size": FEED,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
CLIP = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": FEED,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": 16,
    "projection_dim": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
T5 = {
    "vocab_size": WORDS,
    "d_model": WIDE,
    "d_kv": 8,
    "d_ff": FEED,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
QWEN25 = {name: value for name, value in LLM.items() if name != "head_dim"} | {
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}
}
QWEN3 = LLM | {
    "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]}
}
# three layers with linear attention, then one with full attention
QWEN35 = LLM | {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 16,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
    },
}
# five layers with a sliding window, then one with full attention, whose heads are wider; then three
# times as many layers that share the keys and values of these
GEMMA4 = LLM | {"num_hidden_layers": 6, "global_head_dim": 32}
GEMMA4_E = GEMMA4 | {
    "num_hidden_layers": 24,
    "num_kv_shared_layers": 18,
    "vocab_size_per_layer_input": WORDS,
    "hidden_size_per_layer_input": 4,
}
GEMMA4_12B = GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
GEMMA4_MOE = GEMMA4_12B | {
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 16,
    "top_k_experts": 8,
    "moe_intermediate_size": 8,
}
EYES = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": WIDE,
    "patch_size": 2,
}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 4,
    "patch_size": 2,
}
PIXTRAL = {"model_type": "pixtral", **SIGLIP, "head_dim": 8}


@dataclass(frozen=True)
class Tiny:
    """A text encoder.

    Args:
        encoder: the name that its files are recognised as.
        cls: of transformers.
        config: of the class.
        comfy: how its names become those of a file of ComfyUI, as patterns and what takes their place.
        lacks: what such files do not have, a pattern of their names.
    """

    encoder: str
    cls: str
    config: Mapping[str, Any]
    comfy: Sequence[tuple[str, str]] = ()
    lacks: str = "^$"
    named: str = field(default="")

    def model(self, seed: int = 0) -> nn.Module:
        """The model, with random values everywhere."""
        cls = getattr(transformers, self.cls)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(cls.config_class.from_dict(dict(self.config)))
            for parameter in model.parameters():
                nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.2)
        return model.eval()

    def file(self, model: nn.Module) -> dict[str, Tensor]:
        """What ComfyUI's file of such a model holds."""
        named = {}
        for name, tensor in model.state_dict().items():
            for pattern, new in self.comfy:
                name = re.sub(pattern, new, name)
            if not re.search(self.lacks, name):
                named[name] = tensor.contiguous()
        return named


VLM = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
LLAVA = (
    (r"^model\.language_model\.", "model."),
    (r"^model\.vision_tower\.", "vision_tower."),
    (r"^model\.multi", "multi"),
)
GEMMA3 = (
    (r"^model\.language_model\.", "model."),
    (r"^model\.vision_tower\.(vision_model\.)?", "vision_model."),
    (r"^model\.multi", "multi"),
)
INNER = ((r"^language_model\.", "model."),)  # of classes without a head
ALONE = ((r"^", "model."),)  # of a language model alone
TIED = r"^encoder\.embed_tokens"
TINY: dict[str, Tiny] = {
    tiny.named or tiny.cls: tiny
    for tiny in (
        Tiny("clip", "CLIPTextModel", CLIP, ((r"^(?!text_model)", "text_model."),)),
        Tiny("clip", "CLIPTextModelWithProjection", CLIP),
        Tiny("t5", "T5EncoderModel", T5, lacks=TIED),
        Tiny(
            "t5_old",
            "T5EncoderModel",
            T5 | {"feed_forward_proj": "relu"},
            lacks=TIED,
            named="T5EncoderModel 1.0",
        ),
        Tiny("umt5", "UMT5EncoderModel", T5, lacks=TIED),
        Tiny(
            "qwen2_5_vl",
            "Qwen2_5_VLForConditionalGeneration",
            {"text_config": QWEN25, "vision_config": EYES},
            VLM,
        ),
        Tiny("qwen2_5_vl", "Qwen2_5_VLModel", {"text_config": QWEN25, "vision_config": EYES}, INNER),
        Tiny("qwen2_5", "Qwen2_5_VLTextModel", QWEN25, ALONE),
        Tiny("qwen2_5", "Qwen2Model", LLM | {"num_attention_heads": 2}, ALONE),
        Tiny(
            "qwen2_5",
            "Qwen2ForCausalLM",
            LLM | {"num_attention_heads": 2, "tie_word_embeddings": True},
            lacks=r"^lm_head",
        ),
        Tiny("qwen3", "Qwen3ForCausalLM", LLM | {"tie_word_embeddings": True}, lacks=r"^lm_head"),
        Tiny("qwen3", "Qwen3Model", LLM, ALONE),
        Tiny(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            {
                "text_config": QWEN3,
                "vision_config": EYES | {"deepstack_visual_indexes": [0], "num_position_embeddings": 4},
            },
        ),
        Tiny(
            "qwen3_vl",
            "Qwen3VLModel",
            {
                "text_config": QWEN3,
                "vision_config": EYES | {"deepstack_visual_indexes": [0], "num_position_embeddings": 4},
            },
            ((r"^", "model."),),
        ),
        Tiny("qwen3", "Qwen3VLTextModel", QWEN3, ALONE),
        Tiny(
            "qwen3_5",
            "Qwen3_5ForConditionalGeneration",
            {"text_config": QWEN35, "vision_config": EYES | {"num_position_embeddings": 4}},
        ),
        Tiny(
            "qwen3_5",
            "Qwen3_5Model",
            {"text_config": QWEN35, "vision_config": EYES | {"num_position_embeddings": 4}},
            ((r"^", "model."),),
        ),
        Tiny("qwen3_5", "Qwen3_5TextModel", QWEN35, ((r"^", "model.language_model."),)),
        Tiny("gemma4", "Gemma4TextModel", GEMMA4_E, ALONE),
        Tiny("gemma4", "Gemma4ForCausalLM", GEMMA4_E, lacks=r"^lm_head"),
        Tiny("gemma4_unified", "Gemma4UnifiedTextModel", GEMMA4_12B, ALONE),
        Tiny("gemma4_unified", "Gemma4UnifiedForCausalLM", GEMMA4_12B, lacks=r"^lm_head"),
        Tiny("gemma4_moe", "Gemma4TextModel", GEMMA4_MOE, ALONE, named="Gemma4TextModel of 26B"),
        Tiny(
            "gemma4_moe",
            "Gemma4ForCausalLM",
            GEMMA4_MOE,
            lacks=r"^lm_head",
            named="Gemma4ForCausalLM of 26B",
        ),
        Tiny("gemma2", "Gemma2Model", LLM, ALONE),
        Tiny("gemma2", "Gemma2ForCausalLM", LLM | {"tie_word_embeddings": True}, lacks=r"^lm_head"),
        Tiny(
            "gemma3",
            "Gemma3ForConditionalGeneration",
            {
                "text_config": LLM,
                "vision_config": SIGLIP,
                "mm_tokens_per_image": 1,
                "image_token_index": 7,
            },
            GEMMA3,
            r"^lm_head",
        ),
        Tiny(
            "gemma3",
            "Gemma3Model",
            {"text_config": LLM, "vision_config": SIGLIP, "mm_tokens_per_image": 1},
            (
                (r"^language_model\.", "model."),
                (r"^vision_tower\.(vision_model\.)?", "vision_model."),
            ),
        ),
        Tiny("gemma3", "Gemma3ForCausalLM", LLM, lacks=r"^lm_head"),
        Tiny("gemma3", "Gemma3TextModel", LLM, ALONE),
        Tiny(
            "mistral3",
            "Mistral3ForConditionalGeneration",
            {
                "text_config": LLM | {"model_type": "mistral"},
                "vision_config": PIXTRAL,
            },
            LLAVA,
        ),
        Tiny(
            "mistral3",
            "Mistral3Model",
            {"text_config": LLM | {"model_type": "mistral"}, "vision_config": PIXTRAL},
            INNER,
        ),
        Tiny(
            "mistral3",
            "Mistral3Model",
            {
                "text_config": LLM | {"model_type": "ministral3"},
                "vision_config": PIXTRAL,
            },
            INNER,
            named="Mistral3Model of Ministral",
        ),
        Tiny("llama", "MistralForCausalLM", LLM),
        Tiny("llama", "MistralModel", LLM, ALONE),
        Tiny("llama", "Ministral3ForCausalLM", LLM),
        Tiny("llama", "Ministral3Model", LLM, ALONE),
        Tiny("llama", "LlamaForCausalLM", LLM),
        Tiny("llama", "LlamaModel", LLM, ALONE),
    )
}


@cache
def tiny_model(name: str) -> nn.Module:
    """One of TINY; tests do not change it."""
    return TINY[name].model()


def run_model(model: nn.Module) -> list[Tensor]:
    """All that a pipeline may read of what a text encoder gives for a text."""
    words = torch.tensor([[3, 9, 27, 5, 39, 2], [4, 4, 11, 38, 2, 2]])
    with torch.inference_mode():
        out = model(words, attention_mask=torch.ones_like(words), output_hidden_states=True)
    named = {name: value for name, value in out.items() if name not in ("past_key_values", "logits")}
    return [
        x
        for value in named.values()
        for x in (value if isinstance(value, tuple) else (value,))
        if isinstance(x, Tensor)
    ]
