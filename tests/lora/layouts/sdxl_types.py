"""Adapter types other than low-rank pairs, for the convolutions and norms of SDXL."""

import torch
from lora.layouts.formulas import apply_dora, multiply_tucker
from lora.layouts.names import SDXL_CONV, SDXL_NORM, join_name
from lora.layouts.pairs import add_hadamard_pairs
from lora.layouts.sample import ALPHA, RANK, SCALE, Sample, layout
from torch import Tensor

KERNELS = (
    "down_blocks.0.resnets.0.conv1",
    "mid_block.resnets.1.conv2",
    "up_blocks.0.upsamplers.0.conv",
)


@layout("sdxl")
def locon_with_core(s: Sample) -> None:
    for native, module in SDXL_CONV.items():
        w = s.weight(module)
        down = s.randn(RANK, w.shape[1], 1, 1)
        up = s.randn(len(w), RANK, 1, 1)
        mid = s.randn(RANK, RANK, *w.shape[2:])
        s.add(
            join_name("lora_unet_", native),
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
        out, columns, kernel = w.shape[0], w.shape[1], w.shape[2:]
        prefix = join_name("lora_unet_", native)
        if i % 2:
            flat = add_hadamard_pairs(s, prefix, out, columns * kernel.numel())
            s.expect(module, flat.reshape(w.shape))
            continue
        a1, a2 = s.randn(RANK, out), s.randn(RANK, out)
        b1, b2 = s.randn(RANK, columns), s.randn(RANK, columns)
        t1, t2 = s.randn(RANK, RANK, *kernel), s.randn(RANK, RANK, *kernel)
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
    for written, module in zip(("with a core", "flat", "full"), KERNELS, strict=True):
        w = s.weight(module)
        out, columns, kernel = len(w) // 4, w.shape[1] // 2, w.shape[2:]
        w1 = s.randn(4, 2)
        if written == "with a core":
            a, b, core = s.randn(RANK, out), s.randn(RANK, columns), s.randn(RANK, RANK, *kernel)
            parts = {"lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
            w2 = SCALE * multiply_tucker(core, a.T, b)
        elif written == "flat":
            b, a = s.pair(out, columns * kernel.numel())
            parts = {"lokr_w2_a": a, "lokr_w2_b": b}
            w2 = SCALE * (a @ b).reshape(out, columns, *kernel)
        else:  # the alpha in the file says nothing
            w2 = s.randn(out, columns, *kernel)
            parts = {"lokr_w2": w2}
        s.add(join_name("lycoris_", module), lokr_w1=w1, alpha=torch.tensor(ALPHA), **parts)
        s.expect(module, torch.einsum("ac,bdhw->abcdhw", w1, w2).reshape(w.shape))


@layout("sdxl")
def dora_kernels(s: Sample) -> None:
    """Norms [out, 1, 1, 1] and [1, in, 1, 1]; PEFT's [1, out, 1, 1] are of rows all the same."""
    of_rows, of_columns, by_peft = KERNELS

    w, a, b, change = make_kernel_pair(s, of_rows)
    magnitude = make_magnitude(s, len(w)).reshape(-1, 1, 1, 1)
    s.add(join_name("lora_unet_", of_rows), lora_down__weight=a, lora_up__weight=b, dora_scale=magnitude)
    s.expect(of_rows, apply_dora(w, change, magnitude, (1, 2, 3)))

    w, a, b, change = make_kernel_pair(s, of_columns)
    magnitude = make_magnitude(s, w.shape[1]).reshape(1, -1, 1, 1)
    s.add(join_name("lora_unet_", of_columns), lora_down__weight=a, lora_up__weight=b, dora_scale=magnitude)
    s.expect(of_columns, apply_dora(w, change, magnitude, (0, 2, 3)))

    w, a, b, change = make_kernel_pair(s, by_peft)
    magnitude = make_magnitude(s, len(w))
    s.add(f"unet.{by_peft}", lora_A__weight=a, lora_B__weight=b)
    s.add(f"unet.{by_peft}", lora_magnitude_vector__weight=magnitude.reshape(1, -1, 1, 1))
    s.expect(by_peft, apply_dora(w, change, magnitude.reshape(-1, 1, 1, 1), (1, 2, 3)))


def make_kernel_pair(s: Sample, module: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weight of a convolution, a low-rank pair for it, and the pair's change."""
    w = s.weight(module)
    a, b = s.randn(RANK, *w.shape[1:]), s.randn(len(w), RANK, 1, 1)
    return w, a, b, torch.einsum("or,rihw->oihw", b.flatten(1), a)


def make_magnitude(s: Sample, size: int) -> Tensor:
    """Norms of DoRA."""
    return s.randn(size).abs() + 0.5


@layout("sdxl")
def ia3_kernels(s: Sample) -> None:
    of_rows, of_columns, _ = KERNELS

    w = s.weight(of_rows)
    factor = s.randn(1, len(w), 1, 1)
    s.add(join_name("lycoris_", of_rows), weight=factor, on_input=torch.tensor(0))
    s.expect(of_rows, w * factor.transpose(0, 1))

    w = s.weight(of_columns)
    factor = s.randn(1, w.shape[1], 1, 1)
    s.add(join_name("lycoris_", of_columns), weight=factor, on_input=torch.tensor(1))
    s.expect(of_columns, w * factor)


@layout("sdxl")
def sdxl_norm_differences(s: Sample) -> None:
    for native, module in SDXL_NORM.items():
        weight, bias = s.randn(len(s.weight(module))), s.randn(len(s.weight(module)))
        s.add(join_name("lora_unet_", native), w_norm=weight, b_norm=bias)
        s.expect(module, weight, bias)


@layout("sdxl")
def sdxl_diff_kernels(s: Sample) -> None:
    for native, module in SDXL_CONV.items():
        w = s.weight(module)
        weight, bias = s.randn(*w.shape), s.randn(len(w))
        s.add(f"diffusion_model.{native}", diff=weight, diff_b=bias)
        s.expect(module, weight, bias)
