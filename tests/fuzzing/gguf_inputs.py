"""GGUF files of denoisers and text encoders, damaged at random, against llama.cpp's own reader.

Most damage is to what the header says: that is where a file can lie about sizes and places.
"""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import gguf
import numpy as np
from numpy.typing import NDArray
from support.gguf_files import TYPES, DraftTensor, GgufDraft, draw_blocks, pack_text

from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError
from int8run.tasks.inspect_file import inspect_file

# names and shapes of small models; blocks of K types need rows of 256
FLUX = {
    "double_blocks.0.img_attn.qkv.weight": (6, 256),
    "double_blocks.0.img_attn.norm.key_norm.scale": (8,),
    "img_in.weight": (4, 32),
    "img_in.bias": (4,),
    "vector_in.in_layer.weight": (3, 512),
}
UNET = {"input_blocks.1.0.in_layers.2.weight": (8, 4, 3, 3), "label_emb.0.0.weight": (4, 256)}
DECODER = {
    "token_embd.weight": (6, 256),
    "output_norm.weight": (256,),
    "blk.0.attn_norm.weight": (256,),
    "blk.0.attn_q.weight": (16, 256),
    "blk.0.attn_k.weight": (8, 256),
    "blk.0.ffn_norm.weight": (256,),
    "blk.0.ffn_down.weight": (256, 32),
}
T5 = {
    "token_embd.weight": (6, 256),
    "enc.blk.0.attn_q.weight": (8, 256),
    "enc.blk.0.attn_rel_b.weight": (32, 4),
    "enc.output_norm.weight": (256,),
}
MODELS = {"flux": FLUX, "sd1": UNET, "llama": DECODER, "qwen3": DECODER, "gemma2": DECODER, "t5encoder": T5}
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
ODD_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    31,
    33,
    255,
    256,
    2**16,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**62,
    2**63,
    2**64 - 1,
)
ROTATED = re.compile(r"blk\.\d+\.attn_([qk])\.")
Change = Callable[[GgufDraft, Random], None]


def make_tensor(name: str, shape: tuple[int, ...], chance: Random) -> DraftTensor:
    """A tensor of a type that its rows can have."""
    fitting = [kind for kind in BLOCKS if shape[-1] % gguf.GGML_QUANT_SIZES[TYPES[kind]][0] == 0]
    kind = (
        chance.choice(fitting) if fitting and chance.random() < 0.7 else chance.choice(("F32", "F16", "BF16"))
    )
    count = int(np.prod(shape))
    seed = chance.randrange(2**32)
    if kind in BLOCKS:
        data = draw_blocks(kind, 1, count, seed).tobytes()
    else:
        values = np.random.default_rng(seed).normal(size=count).astype(np.float32)
        data = gguf.quants.quantize(values, TYPES[kind]).tobytes()
    return DraftTensor(name, tuple(reversed(shape)), int(TYPES[kind]), data)


def make_draft(chance: Random) -> GgufDraft:
    """A valid file of one of the models."""
    architecture = chance.choice([*MODELS])
    draft = GgufDraft(alignment=chance.choice((32, 32, 64)))
    draft.add_text("general.architecture", architecture)
    if draft.alignment != 32:
        draft.add_uint32("general.alignment", draft.alignment)
    draft.add_uint32(f"{architecture}.attention.head_count", 4)
    draft.add_uint32(f"{architecture}.attention.head_count_kv", 2)
    words = b"".join(pack_text(f"w{i}") for i in range(20))
    draft.metadata.append(("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 20) + words))
    for name, shape in MODELS[architecture].items():
        tensor = make_tensor(name, shape, chance)
        if name.startswith("input_blocks"):  # as ComfyUI-GGUF's converter reshapes it
            shape_entry = struct.pack("<IQ4i", 5, 4, *shape)
            draft.metadata.append((f"comfy.gguf.orig_shape.{name}", 9, shape_entry))
            tensor.sizes = (32, 9)
        draft.tensors.append(tensor)
    return draft


def change_kind(draft: GgufDraft, chance: Random) -> None:
    """Another type, one that there is or not."""
    chance.choice(draft.tensors).kind = chance.choice((*range(45), 255, 2**31, 2**32 - 1))


def change_size(draft: GgufDraft, chance: Random) -> None:
    """Another size."""
    tensor = chance.choice(draft.tensors)
    sizes = list(tensor.sizes)
    if sizes:
        sizes[chance.randrange(len(sizes))] = chance.choice((*ODD_NUMBERS, 32, 64, 512))
    tensor.sizes = sizes


def change_dimensions(draft: GgufDraft, chance: Random) -> None:
    """More or fewer sizes, or another number of them than there are."""
    tensor = chance.choice(draft.tensors)
    kind = chance.randrange(4)
    if kind == 0:
        tensor.sizes = [*tensor.sizes, chance.choice((1, 1, 2))]
    elif kind == 1:
        tensor.sizes = list(tensor.sizes)[:-1]
    elif kind == 2:
        tensor.sizes = list(reversed(list(tensor.sizes)))
    else:
        tensor.num_sizes = chance.choice((0, 1, 3, 5, 17, 2**31, 2**32 - 1))


def change_place(draft: GgufDraft, chance: Random) -> None:
    """Another place in the data."""
    tensor = chance.choice(draft.tensors)
    tensor.offset = chance.choice((0, 0, 32, 64, 4096, 1, 31, *ODD_NUMBERS))


def change_name(draft: GgufDraft, chance: Random) -> None:
    """Another name: one that is there, one that is none, one that means something else."""
    names = [tensor.name for tensor in draft.tensors]
    odd = (
        b"\xff\xfe",
        "",
        "a\nb",
        "x" * 600,
        "blk.0.attn_q.weight",
        "model.embed_tokens.weight",
        "a.weight_scale",
    )
    chance.choice(draft.tensors).name = chance.choice((*names, *odd))


def change_beginning(draft: GgufDraft, chance: Random) -> None:
    """Another version, other letters, or other counts."""
    kind = chance.randrange(4)
    if kind == 0:
        draft.version = struct.pack(chance.choice("<>") + "I", chance.choice((0, 1, 2, 3, 4, 2**16)))
    elif kind == 1:
        draft.magic = chance.choice((b"GGUf", b"GGML", b"FUGG", b"\0\0\0\0"))
    elif kind == 2:
        draft.num_tensors = chance.choice((*ODD_NUMBERS, len(draft.tensors) + 1))
    else:
        draft.num_entries = chance.choice((*ODD_NUMBERS, len(draft.metadata) + 1))


def change_entry(draft: GgufDraft, chance: Random) -> None:
    """Another type or value of an entry of the metadata, one more, one less, or one twice."""
    kind = chance.randrange(5)
    at = chance.randrange(len(draft.metadata))
    key, type_number, value = draft.metadata[at]
    if kind == 0:
        draft.metadata[at] = (key, chance.choice((*range(14), 99)), value)
    elif kind == 1:
        draft.metadata[at] = (key, type_number, chance.choice((b"", value[:-1], value + b"\0", bytes(8))))
    elif kind == 2:
        draft.metadata.append(draft.metadata[at])
    elif kind == 3:
        del draft.metadata[at]
    else:
        add_entry(draft, chance)


def add_entry(draft: GgufDraft, chance: Random) -> None:
    """An entry that readers look at."""
    name = chance.choice(draft.tensors).name
    shape_key = b"comfy.gguf.orig_shape." + (name if isinstance(name, bytes) else name.encode())
    sizes = [chance.choice((-1, 0, 1, 2, 4, 256, 2**31 - 1)) for _ in range(chance.randrange(4))]
    shape = struct.pack(f"<IQ{len(sizes)}i", 5, len(sizes), *sizes)
    number = struct.pack("<I", chance.choice((0, 1, 3, 4, 24, 32, 128, 2**31, 2**32 - 1)))
    count = struct.pack("<Q", chance.choice(ODD_NUMBERS))
    entries = (
        ("general.alignment", 4, number),
        ("general.alignment", 10, number + number),
        ("split.count", 2, number[:2]),
        (shape_key, 9, shape),
        ("a", 9, struct.pack("<I", chance.choice((4, 8, 9, 12, 99))) + count),
        ("b", 8, count + b"abc"),
        ("int8run", 8, pack_text(chance.choice(("{}", "[", '{"format": 7}')))),
    )
    draft.metadata.append(chance.choice(entries))


def change_heads(draft: GgufDraft, chance: Random) -> None:
    """Another number of heads."""
    for at, (key, type_number, _) in enumerate(draft.metadata):
        if "head_count" in str(key):
            draft.metadata[at] = (
                key,
                type_number,
                struct.pack("<I", chance.choice((0, 1, 2, 3, 4, 8, 2**31))),
            )


def change_model(draft: GgufDraft, chance: Random) -> None:
    """Another architecture."""
    for at, (key, type_number, _) in enumerate(draft.metadata):
        if key == "general.architecture":
            name = chance.choice((*MODELS, "gemma3", "mistral3", "qwen35", "clip", "", "pig"))
            draft.metadata[at] = (key, type_number, pack_text(name))


def change_numbers(draft: GgufDraft, chance: Random) -> None:
    """Other bytes of a tensor: NaN and infinite scales among them."""
    tensor = chance.choice(draft.tensors)
    data = bytearray(tensor.data)
    for _ in range(chance.randrange(1, 20)):
        data[chance.randrange(len(data))] = chance.choice((0, 0x7C, 0xFC, 0xFF, chance.randrange(256)))
    tensor.data = bytes(data)


CHANGES: tuple[Change, ...] = (
    change_kind,
    change_size,
    change_size,
    change_dimensions,
    change_place,
    change_place,
    change_name,
    change_beginning,
    change_entry,
    change_entry,
    add_entry,
    change_heads,
    change_model,
    change_numbers,
    change_numbers,
    change_numbers,
)


def spoil_bytes(data: bytes, chance: Random) -> bytes:
    """Other bytes somewhere, mostly in the header, or a file that is cut off or longer."""
    at = min(int(chance.expovariate(1 / 600)), len(data) - 1)
    kind = chance.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[: chance.randrange(len(data))]
    if kind == 2:
        return data + bytes(chance.randrange(1, 100))
    if kind == 3:
        return data[:at] + data[at + chance.randrange(1, 9) :]
    return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]


def write_input(chance: Random, path: Path) -> None:
    """Write a file with up to three things done to it."""
    draft = make_draft(chance)
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        if draft.tensors:
            chance.choice(CHANGES)(draft, chance)
    data = draft.to_bytes()
    if chance.random() < 0.25:
        data = spoil_bytes(data, chance)
    path.write_bytes(data)


def read_again(reader: gguf.GGUFReader, tensor: gguf.ReaderTensor) -> NDArray[np.float32]:
    """A tensor as llama.cpp's reader has it, with the converter's work undone."""
    kind = tensor.tensor_type
    if not tensor.n_elements:
        values = np.empty(0, np.float32)
    elif kind.name not in (*BLOCKS, "BF16"):
        values = np.asarray(tensor.data)
    else:
        values = gguf.quants.dequantize(np.ascontiguousarray(tensor.data), kind)
    shape = tuple(reversed(tensor.shape.tolist()))
    original = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
    values = values.reshape(shape if original is None else tuple(original.contents()))
    field = reader.get_field("general.architecture")
    architecture = "" if field is None else field.contents()
    rotated = ROTATED.match(tensor.name)
    if architecture in ("llama", "mistral3") and rotated is not None:
        counts = reader.get_field(f"{architecture}.attention.head_count_kv") if rotated[1] == "k" else None
        counts = counts or reader.get_field(f"{architecture}.attention.head_count")
        heads = int(counts.contents())
        half = values.shape[0] // heads // 2
        values = values.reshape(heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    is_norm = re.search(r"_norm\.\w*$", tensor.name) is not None
    if architecture in ("gemma2", "gemma3") and is_norm:
        values = values.astype(np.float32) - np.float32(1)
    return values


def compare_numbers(path: Path, chance: Random) -> None:
    """Read every tensor, whole and in part, and compare it with what llama.cpp's reader finds."""
    with TensorFiles.open(path) as files, np.errstate(all="ignore"):
        types = [info.dtype if info.form is None else info.form.dtype for info in files.values()]
        has_shape = [bool(info.shape) for info in files.values()]
        if ("BF16", False) in zip(types, has_shape, strict=True):
            return  # a single number, which llama.cpp's reader takes in other types alone
        reader = gguf.GGUFReader(path)
        by_place = {(int(tensor.data_offset), int(tensor.n_bytes)): tensor for tensor in reader.tensors}
        assert len(files) == len(reader.tensors)
        for key, info in files.items():
            expected = read_again(reader, by_place[info.start, info.nbytes])
            found = files.read(key)
            assert tuple(found.shape) == expected.shape, key
            assert np.array_equal(found.double().numpy(), expected.astype(np.float64), equal_nan=True), key
            if not info.shape:
                continue
            start = chance.randrange(info.shape[0] + 1)
            rows = slice(start, chance.randrange(start, info.shape[0] + 1))
            part = files.read(key, rows).double().numpy()
            assert np.array_equal(part, expected[rows].astype(np.float64), equal_nan=True), (key, rows)
        for layer in read_layers(files).values():
            layer.read_weight(files)


def check_gguf(chance: Random, folder: Path) -> bool:
    """Read a GGUF file both ways. Returns whether it was read."""
    path = folder / "x.gguf"
    write_input(chance, path)
    was_read = False
    try:
        compare_numbers(path, chance)
        was_read = True
    except FileError as error:
        assert "\n" not in str(error), error
    try:
        inspect_file(str(path))
    except FileError as error:
        assert "\n" not in str(error), error
    return was_read
