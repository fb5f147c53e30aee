"""ImageReward: which image people would prefer for a prompt, by transformers' BLIP and published weights.

The publisher's library needs transformers 4. Its network is BLIP's image encoder, BLIP's text encoder looking
at the image, and five linear layers on the first token; their weights are given other names here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from int8run.metrics.base import MORE, FrameFunction, Metric, Needs, Scope, UnavailableError
from int8run.metrics.clip import to_pixels
from int8run.metrics.rating_head import build_head
from int8run.metrics.weights import (
    READING_ERRORS,
    check_location,
    check_revision,
    find_file,
    format_error,
    load_from_hub,
)

WEIGHTS, WEIGHTS_FILE, SIZE = "THUDM/ImageReward", "ImageReward.pt", "1.8 GB"
TOKENIZER = "google-bert/bert-base-uncased"
MAX_TOKENS = 35
# of the rewards in the publisher's data
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072
# names in the published file -> in transformers
IMAGE_NAMES = (
    (r"^visual_encoder\.cls_token$", "embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)
TEXT_PREFIX, HEAD_PREFIX, BLIP_PREFIX = "text_encoder.", "mlp.layers.", "blip."


@dataclass(frozen=True)
class ImageReward:
    """ImageReward v1.0 of Xu et al. 2023 (arXiv:2304.05977).

    0 is the average of the images that it was trained on, 1 is a standard deviation more.

    Args:
        weights: a file; or an id on the hub whose file is `ImageReward.pt`.
        tokenizer: of BERT, a folder or an id on the hub.
        revision: commit, branch or tag of an id on the hub; None: the pinned one, else the newest.
    """

    weights: str = WEIGHTS
    tokenizer: str = TOKENIZER
    revision: str | None = None
    name: ClassVar[str] = "image_reward"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/image_reward": Metric(
            MORE, "how much people would prefer the images for their prompts", label="ImageReward"
        ),
        "float/image_reward": Metric(MORE, "the same of the float model's images"),
    }
    needs: ClassVar[Needs] = Needs(weights="ImageReward v1.0, 1.8 GB, downloaded once", prompts=True)
    scope: ClassVar[Scope] = Scope.KEY_FRAMES

    def __post_init__(self) -> None:
        check_location("metrics.measures.image_reward.weights", self.weights)
        check_revision("metrics.measures.image_reward.revision", self.revision)
        check_location("metrics.measures.image_reward.tokenizer", self.tokenizer)

    def load(self) -> FrameFunction:
        """Load its network, once."""
        from transformers import AutoTokenizer, CLIPImageProcessor

        def load_tokenizer(*, is_local: bool, revision: str) -> Any:
            return AutoTokenizer.from_pretrained(
                self.tokenizer, local_files_only=is_local, trust_remote_code=False, revision=revision
            )

        tokenizer = load_from_hub(self.tokenizer, load_tokenizer, size="1 MB")
        file = find_file(self.weights, WEIGHTS_FILE, size=SIZE, revision=self.revision)
        network = read_network(file)
        side = network.image_encoder.config.image_size
        prepare = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

        def rate(image: Tensor, tokens: Mapping[str, Tensor]) -> float:
            pixels = prepare(images=to_pixels(image), return_tensors="pt")["pixel_values"]
            return network.rate(pixels, tokens["input_ids"], tokens["attention_mask"])

        def measure(a: Tensor, b: Tensor, prompt: str) -> dict[str, float]:
            tokens = tokenizer(
                prompt, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
            return {"image_reward": rate(a, tokens), "float/image_reward": rate(b, tokens)}

        return measure


class RewardNetwork(nn.Module):
    """Image encoder, text encoder and the layers on it.

    Args:
        image_encoder: transformers' BlipVisionModel.
        text_encoder: its BlipTextModel, which looks at the image.
        head: on the first token.
    """

    def __init__(self, image_encoder: Any, text_encoder: Any, head: nn.Module):
        super().__init__()
        self.image_encoder: Any = image_encoder
        self.text_encoder: Any = text_encoder
        self.head = head

    def rate(self, pixels: Tensor, tokens: Tensor, attention_mask: Tensor) -> float:
        """The reward of one image and one text.

        Args:
            pixels: normalized, [1, 3, S, S].
            tokens: of the text, [1, T].
            attention_mask: which tokens are no padding, [1, T].
        """
        seen = self.image_encoder(pixel_values=pixels).last_hidden_state  # [1, P, C]
        read = self.text_encoder(
            input_ids=tokens,
            attention_mask=attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
            return_dict=True,
        ).last_hidden_state
        reward: Tensor = (self.head(read[:, 0]) - REWARD_MEAN) / REWARD_STD
        return reward.item()


def read_network(file: Path) -> RewardNetwork:
    """The network of a published file.

    Args:
        file: its state dict.

    Raises:
        UnavailableError: for a damaged file, and one of another network.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        return build_network(state)
    except READING_ERRORS as error:
        raise UnavailableError(
            f"{file} has no weights of ImageReward ({format_error(error)}); name its file with "
            "metrics.measures.image_reward.weights"
        ) from error


def build_network(state: Mapping[str, Tensor]) -> RewardNetwork:
    """The network that a published state dict belongs to, with its weights; sizes are read from them.

    Raises:
        LookupError, RuntimeError: where it has no such network.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    blip = {
        name.removeprefix(BLIP_PREFIX): value for name, value in state.items() if name.startswith(BLIP_PREFIX)
    }
    patches = blip["visual_encoder.patch_embed.proj.weight"]  # [C, 3, P, P]
    words = blip["text_encoder.embeddings.word_embeddings.weight"]  # [vocabulary, W]
    grid = round((blip["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
    image_encoder = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=patches.shape[0],
            intermediate_size=blip["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=count_layers(blip, r"visual_encoder\.blocks\.(\d+)\."),
            num_attention_heads=max(1, patches.shape[0] // 64),
            image_size=grid * patches.shape[-1],
            patch_size=patches.shape[-1],
            layer_norm_eps=1e-6,
        )
    )
    text_encoder = BlipTextModel(
        BlipTextConfig(
            vocab_size=words.shape[0],
            hidden_size=words.shape[1],
            encoder_hidden_size=patches.shape[0],
            intermediate_size=blip["text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=count_layers(blip, r"text_encoder\.encoder\.layer\.(\d+)\."),
            num_attention_heads=max(1, words.shape[1] // 64),
            max_position_embeddings=blip["text_encoder.embeddings.position_embeddings.weight"].shape[0],
            layer_norm_eps=1e-12,
            is_decoder=True,
        ),
        add_pooling_layer=False,
    )
    load_renamed(image_encoder, {rename_image_weight(name): value for name, value in blip.items()})
    text_names = {name.removeprefix(TEXT_PREFIX): value for name, value in blip.items()}
    load_renamed(text_encoder, text_names)
    return RewardNetwork(image_encoder, text_encoder, build_head(state, HEAD_PREFIX, words.shape[1])).eval()


def count_layers(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many layers a state dict has: one more than the largest number in its names."""
    found = [re.match(pattern, name) for name in state]
    return 1 + max(int(match[1]) for match in found if match is not None)


def rename_image_weight(name: str) -> str:
    """The name that transformers gives to a weight of the image encoder; another one stays as it is."""
    for pattern, replacement in IMAGE_NAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def load_renamed(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network its part of a state dict.

    Args:
        model: of transformers.
        state: by its names, and others that are left out.

    Raises:
        LookupError: where a weight is missing.
    """
    own = model.state_dict()
    # which positions there are, which the published file has, too
    missing = [name for name in own if name not in state and not name.endswith("position_ids")]
    if missing:
        raise LookupError(f"it has no {missing[0]}")
    model.load_state_dict({name: state.get(name, value) for name, value in own.items()})
