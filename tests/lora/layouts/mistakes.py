"""LoRA files with a mistake, and what reading or matching them must say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

QKV = "double_blocks_0_img_attn_qkv"  # the module in which most mistakes are made


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

    def spoil(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if word in key:
                tensors[key] = change(tensors[key]).contiguous()

    return spoil


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    """The tensor with its first number set."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.flatten()[0] = value
        return changed

    return change


def exchange_halves(tensors: dict[str, Tensor]) -> None:
    """A's tensor under the key of B, and the other way round."""
    down, up = find_key(tensors, QKV, "lora_down"), find_key(tensors, QKV, "lora_up")
    tensors[down], tensors[up] = tensors[up], tensors[down]


def transpose_halves(tensors: dict[str, Tensor]) -> None:
    """[in, rank] and [rank, out]."""
    for key in tensors:
        if QKV in key and tensors[key].dim() == 2:
            tensors[key] = tensors[key].T.contiguous()


def name_a_tenth_block(tensors: dict[str, Tensor]) -> None:
    """Tensors of a block that the model does not have."""
    for key in list(tensors):
        if "single_blocks_1" in key:
            tensors[key.replace("single_blocks_1", "single_blocks_9")] = tensors.pop(key)


def drop_low_rank_change(tensors: dict[str, Tensor]) -> None:
    """A DoRA's norms alone."""
    for part in ("lora_up", "lora_down", "alpha"):
        tensors.pop(find_key(tensors, QKV, part))


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
        transpose_halves,
        "reading",
        rf"{QKV} has lora_A \[16, 2\], lora_B \[2, 48\]; rank 16 and rank 48",
    ),
    "halves exchanged": Mistake(
        "kohya",
        exchange_halves,
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
        drop_low_rank_change,
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
        name_a_tenth_block,
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
