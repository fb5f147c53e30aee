"""The Linears of one denoising step at 1024x1024, batch 1, with sizes from diffusers' default configs."""

import inspect
from dataclasses import dataclass, replace
from typing import Any

IMAGE_TOKENS = 4096  # 1024 / 8 (VAE) / 2 (patch), squared
TEXT_TOKENS = 512


@dataclass(frozen=True)
class LayerShape:
    """x: [m, k] times a weight [n, k], `calls` times in a step."""

    model: str
    name: str
    m: int
    k: int
    n: int
    calls: int

    @property
    def size(self) -> tuple[int, int, int]:
        """M, K, N; layers of equal size are measured once."""
        return self.m, self.k, self.n

    def shrink(self, factor: int) -> "LayerShape":
        """The layer with all lengths so much smaller, of a single row if it has one."""
        m, k, n = (max(length // factor, 1) for length in self.size)
        return replace(self, m=m, k=k, n=n)


def read_defaults(class_name: str) -> dict[str, Any]:
    """The default config of a diffusers transformer."""
    import diffusers

    signature = inspect.signature(getattr(diffusers, class_name).__init__)
    return {name: p.default for name, p in signature.parameters.items() if p.default is not p.empty}


def list_flux() -> list[LayerShape]:
    """FLUX.1-dev: 19 double and 38 single blocks, hidden 3072, feed-forward 4 x 3072."""
    c = read_defaults("FluxTransformer2DModel")
    d, double, single = (
        c["num_attention_heads"] * c["attention_head_dim"],
        c["num_layers"],
        c["num_single_layers"],
    )
    both = IMAGE_TOKENS + TEXT_TOKENS
    rows = [("image", IMAGE_TOKENS), ("text", TEXT_TOKENS)]
    found = [
        shape
        for stream, m in rows
        for shape in (
            LayerShape("FLUX.1-dev", f"double {stream} q, k, v, out", m, d, d, 4 * double),
            LayerShape("FLUX.1-dev", f"double {stream} ff up", m, d, 4 * d, double),
            LayerShape("FLUX.1-dev", f"double {stream} ff down", m, 4 * d, d, double),
        )
    ]
    return [
        *found,
        LayerShape("FLUX.1-dev", "double modulation", 1, d, 6 * d, 2 * double),
        LayerShape("FLUX.1-dev", "single q, k, v", both, d, d, 3 * single),
        LayerShape("FLUX.1-dev", "single mlp up", both, d, 4 * d, single),
        LayerShape("FLUX.1-dev", "single out", both, 5 * d, d, single),
        LayerShape("FLUX.1-dev", "single modulation", 1, d, 3 * d, single),
    ]


def z_image() -> list[LayerShape]:
    """Z-Image: hidden 3840, gated feed-forward of 8/3 x 3840 = 10240.

    30 layers over image and text tokens together.

    Two refiner layers per stream come before them. Its Linears have no bias, here they have one.
    """
    c = read_defaults("ZImageTransformer2DModel")
    d, layers, refiners = c["dim"], c["n_layers"], c["n_refiner_layers"]
    hidden = int(d / 3 * 8)
    found = []
    for stream, m, count in (
        ("joint", IMAGE_TOKENS + TEXT_TOKENS, layers),
        ("image refiner", IMAGE_TOKENS, refiners),
        ("text refiner", TEXT_TOKENS, refiners),
    ):
        found += [
            LayerShape("Z-Image", f"{stream} q, k, v, out", m, d, d, 4 * count),
            LayerShape("Z-Image", f"{stream} ff gate, up", m, d, hidden, 2 * count),
            LayerShape("Z-Image", f"{stream} ff down", m, hidden, d, count),
        ]
    return found


def qwen_image() -> list[LayerShape]:
    """Qwen-Image: 60 double-stream layers, hidden 24 x 128 = 3072.

    Feed-forward 4 x 3072, modulation 6 x 3072 per stream.
    """
    c = read_defaults("QwenImageTransformer2DModel")
    d, layers = c["num_attention_heads"] * c["attention_head_dim"], c["num_layers"]
    found = [LayerShape("Qwen-Image", "modulation", 1, d, 6 * d, 2 * layers)]
    for stream, m in (("image", IMAGE_TOKENS), ("text", TEXT_TOKENS)):
        found += [
            LayerShape("Qwen-Image", f"{stream} q, k, v, out", m, d, d, 4 * layers),
            LayerShape("Qwen-Image", f"{stream} mlp up", m, d, 4 * d, layers),
            LayerShape("Qwen-Image", f"{stream} mlp down", m, 4 * d, d, layers),
        ]
    return found


MODELS = {"flux": list_flux, "z-image": z_image, "qwen-image": qwen_image}
