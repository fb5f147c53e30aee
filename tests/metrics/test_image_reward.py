"""ImageReward's network out of its published file: a random one of transformers under published names."""

import pytest
import torch
from torch import nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from int8run.metrics.base import UnavailableError
from int8run.metrics.measures.image_reward import (
    REWARD_MEAN,
    REWARD_STD,
    read_network,
    rename_image_weight,
)
from int8run.metrics.rating_head import LAYER_NUMBERS

# transformers' names -> those of the published file
PUBLISHED = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("post_layernorm", "norm"),
    ("encoder.layers", "blocks"),
    ("layer_norm", "norm"),
    ("self_attn.projection", "attn.proj"),
    ("self_attn", "attn"),
)


def publish(name):
    for own, published in PUBLISHED:
        name = name.replace(own, published)
    return f"blip.visual_encoder.{name}"


@pytest.fixture(scope="module")
def networks():
    """Random encoders of images and texts, and linear layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=1,
                image_size=32,
                patch_size=16,
                layer_norm_eps=1e-6,
            )
        )
        text = BlipTextModel(
            BlipTextConfig(
                vocab_size=50,
                hidden_size=64,
                encoder_hidden_size=64,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=1,
                max_position_embeddings=40,
                is_decoder=True,
            ),
            add_pooling_layer=False,
        )
        sizes = [(64, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]
        head = nn.Sequential(*(nn.Linear(*pair) for pair in sizes))
    return image.eval(), text.eval(), head


@pytest.fixture(scope="module")
def state(networks):
    """Their weights under the names of the published file."""
    image, text, head = networks
    found = {publish(name): value for name, value in image.state_dict().items()}
    found |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    for number, layer in zip(LAYER_NUMBERS, head, strict=True):
        for part in ("weight", "bias"):
            found[f"mlp.layers.{number}.{part}"] = getattr(layer, part).detach()
    return found


@torch.no_grad()
def test_the_reward_is_that_of_the_three_networks(networks, state, tmp_path):
    torch.save(state, tmp_path / "reward.pt")
    image, text, head = networks
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens, mask = torch.tensor([[2, 7, 30, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])

    reward = read_network(tmp_path / "reward.pt").rate(pixels, tokens, mask)

    seen = image(pixel_values=pixels).last_hidden_state
    read = text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen, return_dict=True)
    expected = (head(read.last_hidden_state[:, 0]) - REWARD_MEAN) / REWARD_STD
    assert reward == pytest.approx(expected.item(), abs=1e-5)


def test_names_of_the_image_encoder_become_those_of_transformers(networks):
    names = list(networks[0].state_dict())

    assert [rename_image_weight(publish(name).removeprefix("blip.")) for name in names] == names


@pytest.mark.parametrize("removed", ["blip.visual_encoder.norm.weight", "mlp.layers.7.bias"])
def test_a_file_without_a_weight_leaves_it_out(state, tmp_path, removed):
    torch.save({name: value for name, value in state.items() if name != removed}, tmp_path / "reward.pt")

    with pytest.raises(UnavailableError, match=r"reward\.pt has no weights of ImageReward \(\w*Error: "):
        read_network(tmp_path / "reward.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(99)], ids=["empty", "text", "zip"])
def test_a_damaged_file_leaves_it_out(tmp_path, content):
    (tmp_path / "reward.pt").write_bytes(content)

    with pytest.raises(UnavailableError, match=r"has no weights of ImageReward"):
        read_network(tmp_path / "reward.pt")
