"""MiniMax-H3's pruned denoiser against diffusers' full one, whose time embedder becomes a table by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families.instances_modular import MINIMAX_H3_SIZES, minimax_h3_transformer
from safetensors.torch import save_file
from torch import Tensor, nn

from int8run.models.denoiser_classes import choose_variant
from int8run.models.minimax_h3_pruned import MiniMaxH3PrunedTransformer3DModel, TimeCurve
from int8run.models.source import ResolvedDenoiser
from int8run.pipeline.denoiser_variants import choose_denoiser_class

pytestmark = pytest.mark.usefixtures("one_thread")
POINTS = 9
FULL = "MiniMaxH3Transformer3DModel"
PRUNED = "MiniMaxH3PrunedTransformer3DModel"


def make_full() -> nn.Module:
    """A random full model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return minimax_h3_transformer().eval().requires_grad_(False)


def prune(full: Any) -> MiniMaxH3PrunedTransformer3DModel:
    """The same model with its activated time embeddings as the table; its projections stay as they are.

    A published table has 8 columns. This one has all of the embedding's, so nothing is lost at its times.
    """
    times = torch.linspace(0, 1, POINTS)
    pruned = MiniMaxH3PrunedTransformer3DModel(**MINIMAX_H3_SIZES, curve_points=POINTS).eval()
    state = {name: value for name, value in full.state_dict().items() if "time_embedder" not in name}
    table = nn.functional.silu(full.time_embedder(full.time_proj(times)))
    pruned.load_state_dict(state | {"time_embedder.table": table})
    return pruned.requires_grad_(False)


def call(model: nn.Module, times: Tensor) -> tuple[Tensor, Tensor]:
    """Two video tokens, two of sound and three of text, at two times."""
    generator = torch.Generator().manual_seed(1)
    dtype = model.transformer_blocks[0].norm1.weight.dtype
    return model(
        hidden_states=torch.randn(1, 2, 16, generator=generator),
        audio_hidden_states=torch.randn(1, 2, 4, generator=generator),
        encoder_hidden_states=torch.randn(1, 3, 32, generator=generator).to(dtype),
        timestep=times,
        timestep_indices=torch.tensor([0, 0, 0, 1, 1, 0, 0]),
        token_tags=torch.tensor([1, 1, 1, 2, 2, 0, 0]),
        position_ids=torch.arange(21).view(7, 3),
        video_indices=torch.tensor([5, 6]),
        audio_indices=torch.tensor([3, 4]),
        text_indices=torch.tensor([0, 1, 2]),
        return_dict=False,
    )


@pytest.mark.parametrize("times", [(0.0, 1.0), (0.25, 0.875)])
def test_at_the_times_of_the_table_it_computes_what_the_full_model_does(times: tuple[float, ...]) -> None:
    full = make_full()

    ours, reference = call(prune(full), torch.tensor(times)), call(full, torch.tensor(times))

    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("time", "expected"), [(-0.1, 0.0), (0.0, 0.0), (0.125, 0.5), (0.75, 5.0), (1.0, 8.0), (1.5, 8.0)]
)
def test_between_two_times_the_table_is_interpolated_linearly(time: float, expected: float) -> None:
    curve = TimeCurve(5, 1)
    curve.table.data = torch.tensor([[0.0], [1.0], [2.0], [5.0], [8.0]])

    assert curve(torch.tensor([time])).tolist() == [[expected]]


def test_modulation_is_computed_in_float32_and_tokens_keep_their_dtype() -> None:
    full = make_full()
    pruned = prune(full)
    in_float32 = set(MiniMaxH3PrunedTransformer3DModel._keep_in_fp32_modules)
    for name, parameter in pruned.named_parameters():
        if not in_float32 & set(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    seen = []
    for block in pruned.transformer_blocks:
        block.attn.to_q.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))

    video, _ = call(pruned, torch.tensor([0.25, 0.875]))

    assert pruned.transformer_blocks[0].adaln_proj.linear.weight.dtype == torch.float32
    assert pruned.norm_out.linear.bias.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    assert video.isfinite().all()


@pytest.mark.parametrize("key", ["model.diffusion_model.adaln_t_table", "time_embedder.table"])
def test_a_file_with_the_table_is_of_our_class_and_says_its_sizes(key: str, tmp_path: Path) -> None:
    prefix = key.removesuffix("adaln_t_table") if "adaln" in key else ""
    names = [f"{prefix}blocks.{i}.norm1.weight" for i in range(6)]
    file = tmp_path / "a.safetensors"
    save_file({key: torch.zeros(7, 5), **{name: torch.zeros(2) for name in names}}, file)
    named = ResolvedDenoiser("transformer", FULL, {"hidden_size": 64, "time_embed_dim": 32}, file)

    found = choose_denoiser_class(named)

    assert found.class_name == PRUNED
    assert found.config == {"hidden_size": 64, "time_embed_dim": 5, "curve_points": 7}


def test_any_other_file_is_of_the_class_that_its_repository_names() -> None:
    shapes = {"adaln_t_table": (7, 5)}

    assert choose_variant(FULL, {"a": 1}, {"time_embedder.proj_in.weight": (4, 4)}) == (FULL, {"a": 1})
    assert choose_variant("FluxTransformer2DModel", {"a": 1}, shapes) == ("FluxTransformer2DModel", {"a": 1})
