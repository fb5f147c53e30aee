"""LoRA files of every layout, damaged at random, and the comparison of what int8run reads with the oracle."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from fuzzing import lora_oracle
from fuzzing import rotation_inputs as rotations
from fuzzing.lora_oracle import Module, flatten
from fuzzing.reading import Broken, Reading
from text_encoders import mutations as m
from text_encoders.files import File, Stored
from text_encoders.mutations import NUMBERS, Draft, is_whole
from text_encoders.oracle_file import Array, Unreadable, tensors_of

from int8run.errors import FileError
from int8run.lora.adapters.change import LoraChange
from int8run.lora.key_parsing import parse_key
from int8run.lora.load import LoraFile, read_lora
from int8run.tasks.inspect_file import inspect_file

Damage = Callable[[Draft, Random], None]
Shapes = Mapping[str, tuple[int, ...]]

RANK = 2
RELATIVE = ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "PiSSA")
MODULES = {
    "transformer_blocks.0.attn.to_q": (6, 4),
    "transformer_blocks.0.attn.to_out.0": (4, 6),
    "transformer_blocks.1.ff.net.2": (8, 4),
    "conv_in": (4, 6, 3, 3),
    "single_transformer_blocks.0.proj_out": (4, 4),
}
PEFT_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "", "base_model.model.transformer.")
KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_", "lora_te1_", "lora_te2_")
SUFFIXES = (
    *lora_oracle.SUFFIXES,
    ".lora_E",
    ".lora_A.other.weight_scale",
    ".scale",
    ".bias",
    ".oft_R.default.weight",
    ".boft_R.default",
    ".lora_A.default.weight",
    ".lora_B.default.weight",
)
CONFIG: dict[str, tuple[Any, ...]] = {
    "lora_alpha": (1, 4, 16, 2.5, 0, -1, "8", None, True, float("inf"), float("nan"), [8], 10**400),
    "r": (RANK, 4, 0, -2, 2.0, "2", None, False, {}),
    "use_rslora": (True, False, "yes", 0),
    "alpha_pattern": (
        {"to_q": 4},
        {"attn.to_q": 4, "to_q": 8},
        {r"^transformer_blocks\.0\.attn\.to_q$": 3},
        {r"transformer_blocks\.\d+\.attn\.to_q": 6},
        {r".*\.to_q": 2},
        {"(a+)+$": 1},
        {"(" * 500: 1},
        {"to_q": "x"},
        {"to_q": None},
        ["to_q"],
        "to_q",
        {"": 5},
        {"a" * 70_000: 2},
        {".*" * 40: 2},
    ),
    "rank_pattern": ({"to_q": 4}, {"to_out.0": RANK, "proj_out": 1}, {"to_q": 0}, 7),
    "use_dora": (True, False),
    "peft_type": ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "IA3", 3, None, "peftType.LORA"),
    **rotations.RARE_SETTINGS,
    "init_lora_weights": (True, "gaussian", "pissa", "olora", "new", ["eva"], None, "pissa_niter_4"),
    "alpha": (4, 16),
    "target_modules": (["to_q"], "all-linear", None),
    "x": ({"y": [1]}, 1),
}
HEADER: dict[str, tuple[str, ...]] = {
    "alpha": ("4", "x", "1e999", "0", "", "4 "),
    "lora_alpha": ("4", "16", "-1", "nan"),
    "network_alpha": ("2", "None"),
    "r": ("2", "4"),
    "modelspec.architecture": ("flux-1-dev/lora", "\0", "[red]x", "🦊" * 2000),
    "ss_tag_frequency": ("[" * 5000, "{}", '{"a": {"b": "c"}}', '{"a": 1}'),
    "ss_datasets": ("[{}]", '[{"subsets": [{"class_tokens": 3}]}]', "null", '{"subsets": null}'),
    "trigger_words": ("fox", "a, b", "\x1b[31m"),
    "ss_network_module": ("lycoris.kohya", "networks.lora"),
}


@dataclass
class LoraInput:
    """A file to be, and the settings beside it.

    Args:
        draft: of the file.
        config: of `adapter_config.json`; None: there is none.
        initial: where the initial factors are -> their file; several only in damaged inputs.
        initial_config: of the `adapter_config.json` beside these; None: there is none.
    """

    draft: Draft
    config: dict[str, Any] | None = None
    initial: dict[str, Draft] = field(default_factory=dict)
    initial_config: dict[str, Any] | None = None

    def write(self, folder: Path) -> Path:
        """Write all; what an earlier one left is removed."""
        for old in folder.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()
        if self.config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(self.config))
        for place, draft in self.initial.items():
            file = folder / place
            file.parent.mkdir(exist_ok=True)
            draft.write(file)
            if self.initial_config is not None and file.parent != folder:
                file.with_name("adapter_config.json").write_text(json.dumps(self.initial_config))
        name = "x" if self.config is None else "adapter_model"
        return self.draft.write(folder / f"{name}.safetensors")


# whole files


def put_parts(file: File, chance: Random, stem: str, shapes: Shapes) -> None:
    """Random numbers in each part of a module."""
    dtype = chance.choice(("F32", "F32", "BF16", "F16"))
    numbers = np.random.default_rng(chance.randrange(2**32))
    for suffix, shape in shapes.items():
        file.put(f"{stem}.{suffix}", dtype, numbers.normal(size=shape) * 0.5)


def get_pair_shapes(names: tuple[str, str, str], shape: tuple[int, ...], transposed: bool = False) -> Shapes:
    """Up, down and perhaps a core, of a weight."""
    up, down, core = names
    rows, columns, *kernel = shape
    if not kernel or not core:
        return {up: (rows, RANK, *[1] * len(kernel)), down: (RANK, columns, *kernel)}
    first = (RANK, rows) if transposed else (rows, RANK, 1, 1)
    second = (RANK, columns) if transposed else (RANK, columns, 1, 1)
    return {up: first, down: second, core: (RANK, RANK, *kernel)}


def choose_lycoris_shapes(chance: Random, shape: tuple[int, ...]) -> Shapes:
    """The parts of one of LyCORIS's kinds, for a weight."""
    rows, columns, *kernel = shape
    core = chance.choice((True, False))
    kind = chance.randrange(7)
    if kind == 0:
        first = get_pair_shapes(("hada_w1_a", "hada_w1_b", "hada_t1" if core else ""), shape, True)
        second = get_pair_shapes(("hada_w2_a", "hada_w2_b", "hada_t2" if core else ""), shape, True)
        if kernel and not core:  # as LyCORIS does without a core: the kernel is part of the columns
            return {
                f"hada_w{i}_{half}": size
                for i in (1, 2)
                for half, size in (("a", (rows, RANK)), ("b", (RANK, columns * 9)))
            }
        return {**first, **second}
    if kind == 1:
        return {"lokr_w1": (2, 2), "lokr_w2": (rows // 2, columns // 2, *kernel)}
    if kind == 2:
        inner = (rows // 2, columns // 2, *kernel)
        second = get_pair_shapes(("lokr_w2_a", "lokr_w2_b", "lokr_t2" if core else ""), inner, True)
        return {"lokr_w1_a": (2, RANK), "lokr_w1_b": (RANK, 2), **second}
    if kind == 3:
        return {"diff": shape, "diff_b": (rows,)}
    if kind == 4:
        return {"w_norm": (rows,), "b_norm": (rows,)}
    if kind == 5:
        names = ("lora_up.weight", "lora_down.weight", "lora_mid.weight")
        return get_pair_shapes(names, shape)
    return {"weight": (rows,)}


def make_lora(chance: Random) -> LoraInput:
    """One file as its writer would write it."""
    file = File(metadata={"format": "pt"})
    chosen = chance.sample([*MODULES], k=chance.randint(1, 3))
    kind = chance.random()
    if kind < 0.2:
        return make_rotation(file, chance, chosen)
    if kind < 0.3:
        return make_relative_lora(file, chance, chosen)
    if kind < 0.6:
        return make_peft_lora(file, chance, chosen)
    prefix = chance.choice(KOHYA_PREFIXES)
    is_lycoris = chance.random() < 0.6
    for name in chosen:
        stem, shape = prefix + flatten(name), MODULES[name]
        shapes = get_pair_shapes(("lora_up.weight", "lora_down.weight", ""), shape)
        shapes = choose_lycoris_shapes(chance, shape) if is_lycoris else shapes
        put_parts(file, chance, stem, shapes)
        if "weight" in shapes:
            file.tensors[f"{stem}.on_input"] = Stored("BOOL", (), bytes([chance.randrange(2)]))
        elif chance.random() < 0.7:
            file.put(f"{stem}.alpha", "F32", chance.choice((1.0, 4.0, 2.0, 0.0)))
        if "lora_up.weight" in shapes and chance.random() < 0.3:
            by_row = (shape[0], *[1] * (len(shape) - 1))
            norms = chance.choice((by_row, (1, shape[1], *[1] * (len(shape) - 2))))
            put_parts(file, chance, stem, {"dora_scale": norms})
    return LoraInput(Draft(file))


def make_peft_lora(file: File, chance: Random, chosen: Sequence[str]) -> LoraInput:
    """As PEFT or diffusers writes it, with settings beside it, in its header, or none."""
    prefix = chance.choice(PEFT_PREFIXES)
    has_norms = chance.random() < 0.2
    for name in chosen:
        shape = MODULES[name]
        shapes = dict(get_pair_shapes(("lora_B.weight", "lora_A.weight", ""), shape))
        if has_norms:
            shapes["lora_magnitude_vector"] = shape[:1] if len(shape) == 2 else (1, shape[0], 1, 1)
        put_parts(file, chance, prefix + name, shapes)
    settings = {"lora_alpha": chance.choice((1, 2, 8)), "r": RANK, "use_rslora": chance.random() < 0.3}
    place = chance.randrange(3)
    if place == 0:
        settings |= {"peft_type": "LORA", "use_dora": has_norms, "init_lora_weights": True}
        return LoraInput(Draft(file), settings)
    if place == 1:
        text = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
        file.metadata["lora_adapter_metadata"] = text
    return LoraInput(Draft(file))


def make_rotation(file: File, chance: Random, chosen: Sequence[str]) -> LoraInput:
    """An OFT or BOFT of one of three programs."""
    program = chance.choice(rotations.PROGRAMS)
    prefix = chance.choice(rotations.PREFIXES[program])
    is_peft = program.startswith("peft")
    for name in chosen:
        stem = prefix + (name if is_peft else flatten(name))
        put_parts(file, chance, stem, rotations.choose_rotation_shapes(chance, program, MODULES[name]))
        is_bounded = program.startswith("kohya") or chance.random() < 0.3
        if is_bounded and not is_peft:
            # times the rows: above and below the norm of the blocks
            file.put(f"{stem}.alpha", "F32", chance.choice((0.05, 0.3, 2.0, 0.0)))
    if not is_peft:
        return LoraInput(Draft(file))
    settings = rotations.choose_rotation_settings(chance, program)
    if chance.random() < 0.3:
        text = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
        file.metadata["lora_adapter_metadata"] = text
        return LoraInput(Draft(file), {**settings} if chance.random() < 0.3 else None)
    return LoraInput(Draft(file), settings)


def make_relative_lora(file: File, chance: Random, chosen: Sequence[str]) -> LoraInput:
    """PiSSA and its relatives: with the initial factors beside the file, in it, or nowhere."""
    has_norms = chance.random() < 0.2
    initial = File(metadata={"format": "pt"})
    place = chance.choice(
        ("initial/adapter_model.safetensors", "pissa_init.safetensors", "pissa_init/x.safetensors", "", None)
    )
    for name in chosen:
        rows, columns, *kernel = MODULES[name]
        shapes: dict[str, tuple[int, ...]] = {
            "lora_B.weight": (rows, RANK, *[1] * len(kernel)),
            "lora_A.weight": (RANK, columns, *kernel),
        }
        stem = f"base_model.model.{name}"
        if place == "":  # in the file itself, under an adapter's name
            put_parts(
                file,
                chance,
                stem,
                {key.replace(".", ".pissa_init."): shape for key, shape in shapes.items()},
            )
        put_parts(initial, chance, stem, shapes)
        if has_norms:
            shapes["lora_magnitude_vector"] = (rows,) if not kernel else (1, rows, *[1] * len(kernel))
        put_parts(file, chance, stem, shapes)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "lora_alpha": chance.choice((1, 2, 8)),
        "r": RANK,
        "use_rslora": chance.random() < 0.3,
        "use_dora": has_norms,
        "init_lora_weights": chance.choice(RELATIVE),
    }
    made = LoraInput(Draft(file), settings)
    if place:
        made.initial[place] = Draft(initial)
    if chance.random() < 0.5:
        made.initial_config = {**settings, "lora_alpha": chance.choice((1, 2, 4)), "init_lora_weights": True}
    return made


# damages


def rename_part(draft: Draft, chance: Random) -> None:
    """A tensor gets the name of another part, known or not."""
    if key := draft.key(chance):
        stem = lora_oracle.split_key(key)[2]
        renamed = stem + chance.choice(SUFFIXES)
        draft.file.tensors = {renamed if k == key else k: t for k, t in draft.file.tensors.items()}


def add_part(draft: Draft, chance: Random) -> None:
    """A module gets a further part."""
    if key := draft.key(chance):
        stem = lora_oracle.split_key(key)[2]
        sizes = chance.choice(((), (1,), (4,), (6, 1), (1, 4), (4, 6), (RANK, 4), (6,)))
        dtype = chance.choice(("F32", "F32", "BF16", "F16", "I8", "I32", "U8", "F64"))
        numbers = np.random.default_rng(chance.randrange(2**32)).normal(size=sizes)
        draft.file.put(
            stem + chance.choice(SUFFIXES), dtype, numbers if dtype[0] in "FB" else 1 + 0 * numbers
        )


def set_number(draft: Draft, chance: Random) -> None:
    """One number that no training ends at."""
    if key := draft.key(chance):
        stored = draft.file.tensors[key]
        word = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(stored.dtype)
        if word is None or not stored.data:
            return
        values = np.frombuffer(stored.data, word).copy()
        with np.errstate(over="ignore"):
            values[chance.randrange(len(values))] = np.array(chance.choice(NUMBERS)).astype(word)
        draft.file.tensors[key] = stored._replace(data=values.tobytes())


def change_prefix(draft: Draft, chance: Random) -> None:
    """Another wrapper around one name or all."""
    prefix, only = chance.choice(PEFT_PREFIXES), draft.key(chance)
    is_one = chance.random() < 0.3
    draft.file.tensors = {
        (prefix + key if key == only or not is_one else key): tensor
        for key, tensor in draft.file.tensors.items()
    }


def spell_again(draft: Draft, chance: Random) -> None:
    """A module, or one part of it, a second time under another spelling of its name."""
    key = draft.key(chance)
    if not key:
        return
    _, name, stem, _ = lora_oracle.split_key(key)
    prefix = chance.choice(("lora_unet_", "transformer.", "diffusion_model.", "lora_te1_"))
    spelt_name = flatten(name) if prefix.startswith("lora") else name
    is_whole = chance.random() < 0.7
    for old, tensor in list(draft.file.tensors.items()):
        is_of_module = old.startswith(f"{stem}.")
        if old == key or (is_whole and is_of_module):
            draft.file.tensors[prefix + spelt_name + old.removeprefix(stem)] = tensor


def name_adapter(draft: Draft, chance: Random) -> None:
    """PEFT's name of an adapter in one key or all."""
    only, is_one = draft.key(chance), chance.random() < 0.3
    word = chance.choice((".default", ".default", ".my_style", ".default_0.default"))

    def rename(key: str) -> str:
        if is_one and key != only:
            return key
        for part in (".lora_A", ".lora_B", ".lora_magnitude_vector", ".oft_R", ".boft_R", ".boft_s"):
            key = key.replace(part, part + word)
        return key

    draft.file.tensors = {rename(key): tensor for key, tensor in draft.file.tensors.items()}


def quantize_factor(draft: Draft, chance: Random) -> None:
    """A factor in int8, with its scales or without."""
    if key := draft.key(chance, "lora_down.weight", "lora_up.weight"):
        stored = draft.file.tensors[key]
        if not stored.shape or not is_whole(stored):
            return
        count = int(np.prod(stored.shape))
        codes = np.random.default_rng(chance.randrange(2**32)).integers(-128, 128, size=count)
        draft.file.tensors[key] = Stored("I8", stored.shape, codes.astype("i1").tobytes())
        sizes = chance.choice(((), (1,), (stored.shape[0],), (stored.shape[0], 1), (3,), None))
        if sizes is not None:
            scale_key = key.replace(".weight", ".scale_weight")
            draft.file.put(scale_key, chance.choice(("F32", "BF16", "I8")), np.full(sizes, 0.01))


def write_header(draft: Draft, chance: Random) -> None:
    """A word of a trainer in the header."""
    key = chance.choice([*HEADER])
    draft.file.metadata[key] = chance.choice(HEADER[key])


def write_header_settings(draft: Draft, chance: Random) -> None:
    """Settings of PEFT in the header."""
    key = chance.choice([*CONFIG])
    settings = {f"transformer.{key}": chance.choice(CONFIG[key]), "transformer.lora_alpha": 4}
    text = json.dumps(settings)
    draft.file.metadata["lora_adapter_metadata"] = chance.choice((text, text, text, text[:-3], "[]", "null"))


def flip_alpha(draft: Draft, chance: Random) -> None:
    """Another alpha, in another dtype or shape."""
    if key := draft.key(chance, ".alpha"):
        sizes = chance.choice(((), (1,), (1, 1), (2,), (0,)))
        value = chance.choice((0.0, 1.0, -2.0, 8.0, 100.0))
        draft.file.put(
            key, chance.choice(("F32", "F16", "I64", "I32", "U8", "BF16")), np.full(sizes, abs(value))
        )


DAMAGES: tuple[Damage, ...] = (
    *(rename_part, add_part, set_number, change_prefix, spell_again, name_adapter, quantize_factor),
    *(write_header, write_header_settings, flip_alpha),
    *(m.same_width, m.other_dtype, m.reshape, m.resize, m.empty, m.drop, m.twice, m.swap, m.swap_any),
    *(m.lying_entry, m.shifted, m.shared, m.unclaimed, m.file_bytes, m.numbers, m.other_metadata),
)


def make_damaged_lora(chance: Random) -> LoraInput:
    """A file with up to three things done to it and to the settings beside it."""
    made = make_lora(chance)
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        if made.initial and chance.random() < 0.4:
            chance.choice(DAMAGES)(chance.choice([*made.initial.values()]), chance)
        elif made.config is not None and chance.random() < 0.5:
            key = chance.choice([*CONFIG])
            made.config[key] = chance.choice(CONFIG[key])
            if chance.random() < 0.2:
                del made.config[chance.choice([*made.config])]
        else:
            chance.choice(DAMAGES)(made.draft, chance)
    return made


# comparison


def check_lora(chance: Random, folder: Path) -> bool:
    """Read a damaged file both ways.

    Returns:
        Whether it is read; False: some module was left out, and that is said.

    Raises:
        Int8RunError: when int8run refuses it.
        AssertionError: when int8run reads it otherwise than the oracle.
    """
    path = make_damaged_lora(chance).write(folder)
    try:
        found = read_lora(path)
    except FileError:
        inspect_or_refuse(path)
        raise
    inspect_file(str(path))
    try:
        expected = lora_oracle.read(path)
    except Unreadable as error:
        raise AssertionError(f"loaded, and there is no reading: {error}") from error
    compare(path, found, expected)
    return bool(found.all_changes)


def inspect_or_refuse(path: Path) -> None:
    """The table of a file that is not read: made or refused, and nothing else."""
    try:
        inspect_file(str(path))
    except FileError as error:
        assert "\n" not in str(error), error


def compare(path: Path, found: LoraFile, expected: Mapping[Module, Reading | Broken]) -> None:
    """Each key is applied as the oracle applies it, or named among those that are not."""
    skipped = dict(found.skipped_keys)
    applied = {
        (component, flatten(name)): change
        for component, changes in found.changes.items()
        for name, change in changes.items()
    }
    for key in tensors_of(path)[0]:
        parsed = parse_key(key)
        is_applied = (parsed.component, flatten(parsed.name)) in applied
        assert is_applied != (key in skipped), f"{key} is neither applied nor named, or both"
    for module, change in applied.items():
        reading = expected.get(module)
        if isinstance(reading, Broken) and reading.shape is not None:
            assert change.shape_mismatch(reading.shape) is not None, (
                f"{module} fits, and is broken: {reading}"
            )
            continue
        assert isinstance(reading, Reading), f"{module} is applied, and has no reading: {reading}"
        compare_change(module, change, reading)


def compare_change(module: Module, change: LoraChange, reading: Reading) -> None:
    """Compare the change of one weight and its bias."""
    delta = change.weight_delta
    assert (delta is None) == (reading.change is None), f"{module}: is its weight changed?"
    if reading.bias is not None or change.bias_delta is not None:
        assert reading.bias is not None and change.bias_delta is not None, f"{module}: is its bias changed?"
        assert_near(module, change.bias_delta.numpy(), reading.bias)
    if delta is None or reading.change is None:
        return
    assert reading.shape is not None
    if not reading.shape:
        assert delta.shape_mismatch((1,)) is not None, f"{module}: no weight has no dimensions"
        return
    mismatch = delta.shape_mismatch(reading.shape)
    assert mismatch is None, f"{module}: {mismatch}"
    weight = np.random.default_rng(0).normal(size=reading.shape).astype(np.float32)
    found = delta.compute_delta(torch.tensor(weight)).numpy()
    # the difference of two whole weights has the rounding of these
    lost = 2e-6 * np.abs(weight).max() if delta.needs_weight else 0.0
    assert_near(module, found, reading.change(weight.astype(float)), lost)


def assert_near(module: Module, found: Array, wanted: Array, lost: float = 0.0) -> None:
    """The same numbers but for the rounding of float32 sums, and what is `lost` anyway."""
    assert found.shape == wanted.shape, f"{module}: {found.shape}, {wanted.shape}"
    allowed = 1e-4 * max(np.abs(wanted).max(initial=0), 1e-3) + lost
    difference = np.abs(found - wanted).max(initial=0)
    assert difference <= allowed, f"{module}: {difference} away, of {np.abs(wanted).max(initial=0)}"
