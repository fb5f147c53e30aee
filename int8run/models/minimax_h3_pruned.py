"""MiniMax-H3 as the pruned files hold it: a curve of few numbers in the place of the time embedder.

`denoiser_classes` knows the class; a file chooses it by its keys (`denoiser_variants.yaml`). diffusers has no
class for these files. Nothing is read or quantized here.
"""

from typing import Any, NamedTuple

import torch
from diffusers import MiniMaxH3Transformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_minimax_h3 import (
    MiniMaxH3AdaLayerNormModulation,
    MiniMaxH3AdaLayerNormOut,
    MiniMaxH3TransformerBlock,
)
from torch import Tensor, nn


class TimeCurve(nn.Module):
    """The activated time embedding at equally spaced times from 0 to 1, in a basis that all blocks share.

    Between two times it is interpolated linearly, as ComfyUI does.

    Args:
        points: number of times, at least 2; 1025 in the published files.
        width: numbers for each; 8 in the published files.
    """

    def __init__(self, points: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(points, width))

    def forward(self, time: Tensor) -> Tensor:
        """time: [T], from 0 to 1; others count as the nearer end -> [T, width]."""
        last = len(self.table) - 1
        position = time.clamp(0.0, 1.0) * last
        lower = position.floor().long().clamp(max=last - 1)
        weight = (position - lower).to(self.table.dtype).unsqueeze(-1)
        return torch.lerp(self.table[lower], self.table[lower + 1], weight)


class CurvePoint(NamedTuple):
    """What a block's modulation is computed from.

    Args:
        embedding: of each time. [T, width]
        dtype: of the tokens that are modulated.
    """

    embedding: Tensor
    dtype: torch.dtype


class PrunedModulation(MiniMaxH3AdaLayerNormModulation):
    """Modulation from a point of the curve: no activation, and in the projection's own float32."""

    def forward(self, point: CurvePoint) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention, then of the feed-forward layers, each [3 T, hidden_size]."""
        modulation = self.linear(point.embedding.to(self.linear.weight.dtype))
        modulation = modulation.view(-1, 6 * self.hidden_size).to(point.dtype)
        parts: tuple[Tensor, ...] = modulation.chunk(6, dim=-1)
        return parts


class PrunedNormOut(MiniMaxH3AdaLayerNormOut):
    """The last norm, modulated from a point of the curve."""

    def forward(self, hidden_states: Tensor, temb: Tensor, timestep_indices: Tensor) -> Tensor:
        """hidden_states: [B, S, hidden_size]; temb: [T, width]; timestep_indices: [S], rows of temb."""
        shift, scale = self.linear(temb.to(self.linear.weight.dtype)).chunk(2, dim=-1)
        normed: Tensor = self.norm(hidden_states)
        result: Tensor = normed * (1.0 + scale[timestep_indices]) + shift[timestep_indices]
        return result


class PrunedBlock(MiniMaxH3TransformerBlock):
    """A block of MiniMax-H3 with the modulation of the pruned files."""

    def __init__(self, *, hidden_size: int, time_embed_dim: int, **sizes: Any) -> None:
        super().__init__(hidden_size=hidden_size, time_embed_dim=time_embed_dim, **sizes)
        self.adaln_proj = PrunedModulation(time_embed_dim, hidden_size)

    def forward(self, hidden_states: Tensor, temb: Tensor, *more: Any, **named: Any) -> Tensor:
        """As diffusers' block. temb: [T, width] float32, whatever the dtype of the tokens."""
        point = CurvePoint(temb, hidden_states.dtype)
        result: Tensor = super().forward(hidden_states, point, *more, **named)
        return result


class MiniMaxH3PrunedTransformer3DModel(MiniMaxH3Transformer3DModel):
    """MiniMax-H3 whose time embedder and wide modulation became one small table and narrow projections.

    Everything else, the call included, is diffusers' class, and so are all settings but these.

    Args:
        time_embed_dim: columns of the table, the inputs of each modulation.
        curve_points: rows of the table.
        freq_dim, time_embed_hidden_dim: of the time embedder that is not there; they have no effect.
    """

    _no_split_modules = ["PrunedBlock", "MiniMaxH3TokenRefinerBlock", "PrunedNormOut"]  # noqa: RUF012
    _repeated_blocks = ["PrunedBlock", "MiniMaxH3TokenRefinerBlock"]  # noqa: RUF012
    # the projections of the modulation are called `linear`, and nothing else is
    _keep_in_fp32_modules = [*MiniMaxH3Transformer3DModel._keep_in_fp32_modules, "linear"]  # noqa: RUF012

    # diffusers reads the settings of a class from this list
    @register_to_config
    def __init__(  # noqa: PLR0913
        self,
        num_attention_heads: int = 56,
        attention_head_dim: int = 128,
        hidden_size: int = 5376,
        num_layers: int = 50,
        num_refiner_layers: int = 2,
        ffn_dim: int = 14336,
        in_channels: int = 24,
        audio_in_channels: int = 32,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        text_dim: int = 5120,
        freq_dim: int = 256,
        time_embed_hidden_dim: int = 5376,
        time_embed_dim: int = 8,
        rope_freq_dim: int = 16,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        qk_norm_eps: float = 1e-5,
        final_norm_eps: float = 1e-5,
        curve_points: int = 1025,
    ) -> None:
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_refiner_layers=num_refiner_layers,
            ffn_dim=ffn_dim,
            in_channels=in_channels,
            audio_in_channels=audio_in_channels,
            patch_size=patch_size,
            text_dim=text_dim,
            freq_dim=freq_dim,
            time_embed_hidden_dim=time_embed_hidden_dim,
            time_embed_dim=time_embed_dim,
            rope_freq_dim=rope_freq_dim,
            rope_theta=rope_theta,
            norm_eps=norm_eps,
            qk_norm_eps=qk_norm_eps,
            final_norm_eps=final_norm_eps,
        )
        self.time_proj = nn.Identity()
        self.time_embedder = TimeCurve(curve_points, time_embed_dim)
        blocks = []
        for _ in range(num_layers):
            block = PrunedBlock(
                hidden_size=hidden_size,
                time_embed_dim=time_embed_dim,
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
                ffn_dim=ffn_dim,
                norm_eps=norm_eps,
                qk_norm_eps=qk_norm_eps,
            )
            blocks.append(block)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = PrunedNormOut(hidden_size, time_embed_dim, final_norm_eps)
