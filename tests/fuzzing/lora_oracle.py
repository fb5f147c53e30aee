"""A second reader of LoRA files, in numpy and float64, written from what the formats' writers publish.

Nothing of int8run is used here, and no tensor library. A module has one reading or none: where the writers
leave two open, or the file contradicts itself, it is `Broken`, and a reader that applies such a module
applies another LoRA than the file's.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import rotation_oracle
from fuzzing.reading import Broken, Reading
from text_encoders.oracle_file import FLOATS, Array, Tensor, Unreadable, fp8_table, need, numbers, tensors_of

Module = tuple[str, str]  # component, name with underscores for dots
Names = Sequence[str]  # of one module: as a pattern may mean it

SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_down.scale_weight": "down_scale",
    ".lora_up.scale_weight": "up_scale",
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{part}": part for part in ("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm")},
    ".on_input": "on_input",
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
    **{f".oft_blocks.{i}": f"kohya_blocks_{i}" for i in range(4)},
    ".oft_R.weight": "oft_R",
    ".boft_R": "boft_R",
    ".boft_s": "boft_s",
    ".weight": "weight",
}
ADAPTER_NAME = re.compile(
    r"\.(lora_A|lora_B|lora_magnitude_vector|oft_R|boft_R|boft_s)"
    # in front of `weight`; at the end what begins with `default`, and after a vector any name
    r"(?:(?:\.\w+){1,2}(?=\.weight$|\.bias$)|(?:\.default\w*){1,2}$|(?<=_vector)(?:\.\w+){1,2}$)"
)
FLAT_PREFIXES = {
    "lora_unet_": "denoiser",
    "lora_transformer_": "denoiser",
    "lycoris_": "denoiser",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "oft_unet_": "denoiser",
    "oft_te1_": "text_encoder",
}
KOHYA_OFT_PREFIXES = ("oft_unet_", "oft_te1_")
ENCODER_PREFIXES = {"text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2"}
WRAPPERS = ("base_model.model.", "transformer.", "diffusion_model.", "unet.")
MAGNITUDE_NAME = re.compile(r"\.(lora_magnitude_vector)\.(?!weight$)\w+$")
KINDS = (
    {"down", "up", "mid", "down_scale", "up_scale", "up_bias"},
    {f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    {f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    {"diff"},
    {"w_norm"},
    {"weight", "on_input"},
    rotation_oracle.PARTS,
)
LORA, LOHA, LOKR, DIFF, NORM, IA3, ROTATION = KINDS
PLAIN_INITIALIZATIONS = ("true", "false", "gaussian", "eva", "orthogonal", "none")
# the adapter starts at factors that were taken out of the base
RELATIVE_INITIALIZATIONS = ("pissa", "olora", "corda", "lora_ga", "loftq")
INITIAL_NAME = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]*(?i:init)[^.]*(?=\.weight$|$)")
PEFT_TYPES = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT")
ALPHA_KEYS = ("lora_alpha", "alpha", "network_alpha")
FLOAT8_BY_WRITER = {"F8_E4M3FNUZ": 4, "F8_E5M2FNUZ": 5}
INTEGERS = ("I64", "I32", "I16", "I8", "U8")


@dataclass
class Parts:
    """The tensors of a module."""

    names: list[str] = field(default_factory=list)
    keys: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


# names


def split_key(key: str) -> tuple[str, str, str, str]:
    """A key -> component, module, the module as the file spells it, part; an empty part: unknown."""
    plain = ADAPTER_NAME.sub(r".\1", MAGNITUDE_NAME.sub(r".\1", key))
    suffix = next((ending for ending in SUFFIXES if plain.endswith(ending)), "")
    spelled = plain.removesuffix(suffix)
    component, name = strip_prefixes(spelled)
    part = SUFFIXES.get(suffix, "")
    if part == "oft_blocks" and spelled.removesuffix(name).endswith(KOHYA_OFT_PREFIXES):
        part = "kohya_blocks_0"
    return component, name, spelled, part


def strip_prefixes(name: str) -> tuple[str, str]:
    """The component of a module and its own name: wrappers nest, a component's prefix is the last."""
    while True:
        for prefix, owner in {**FLAT_PREFIXES, **ENCODER_PREFIXES}.items():
            if name.startswith(prefix):
                return owner, name.removeprefix(prefix)
        wrapper = next((prefix for prefix in WRAPPERS if name.startswith(prefix)), None)
        if wrapper is None:
            return "denoiser", name
        name = name.removeprefix(wrapper)


def flatten(name: str) -> str:
    """A name with underscores for dots."""
    return name.replace(".", "_")


def group(tensors: Mapping[str, Tensor]) -> dict[Module, Parts]:
    """The keys by module; a key without a part belongs to the module that begins it."""
    modules: dict[Module, Parts] = {}
    unknown = []
    for key in tensors:
        component, name, spelled, part = split_key(key)
        if not part:
            unknown.append((component, name))
            continue
        module = modules.setdefault((component, flatten(name)), Parts())
        module.names += [name, spelled.removeprefix("base_model.model."), spelled]
        module.keys.setdefault(part, []).append(key)
    # a plain weight below a changed module is a further part of it
    unknown += [name for name, parts in modules.items() if parts.keys.keys() == {"weight"}]
    for component, other in unknown:
        above = [
            name
            for (owner, name), parts in modules.items()
            if owner == component
            and parts.keys.keys() != {"weight"}
            and f"{flatten(other)}_".startswith(f"{name}_")
        ]
        if above:  # the nearest
            modules[component, max(above, key=len)].unknown.append(other)
    return modules


# numbers


def to_numbers(part: str, tensor: Tensor) -> Array:
    """A part as float64, in a dtype that its meaning allows."""
    is_factor = part not in ("dora_scale", "magnitude", "down_scale", "up_scale")
    allowed = (*FLOATS, "F8_E4M3", "F8_E5M2", *FLOAT8_BY_WRITER, *(INTEGERS if is_factor else ()))
    if part == "on_input":
        allowed = (*allowed, "BOOL")
    if tensor.dtype not in allowed:
        raise Broken(f"{part} is {tensor.dtype}")
    if tensor.dtype in FLOAT8_BY_WRITER:
        # one more in the bias of the exponent, no infinities, and NaN in the place of -0
        table = fp8_table(FLOAT8_BY_WRITER[tensor.dtype], finite=True)
        values = make_fnuz_table(FLOAT8_BY_WRITER[tensor.dtype], table)[
            np.frombuffer(tensor.data, np.uint8)
        ].reshape(tensor.shape)
    else:
        values = numbers(tensor)
    if values.size == 0 or not np.isfinite(values).all():
        raise Broken(f"{part} is empty or not finite")
    return values


def make_fnuz_table(exponent_bits: int, plain: Array) -> Array:
    """The values of all bytes of a float without negative zero."""
    mantissa_bits = 7 - exponent_bits
    values = plain / 2
    top = 2**exponent_bits - 1
    for mantissa in range(2**mantissa_bits):
        byte = (top << mantissa_bits) + mantissa
        values[byte] = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (top - 2 ** (exponent_bits - 1))
        values[byte + 128] = -values[byte]
    values[128] = np.nan
    return values


# scales


@dataclass(frozen=True)
class Place:
    """Settings outside of the tensors, of one component."""

    settings: Mapping[str, Any]
    is_peft: bool


def read_places(path: Path, metadata: Mapping[str, str], component: str) -> list[Place]:
    """Every place with settings."""
    places = []
    config = path.with_name("adapter_config.json")
    if config.is_file():
        places.append(Place(parse_object(config.read_text()), is_peft=True))
    if "lora_adapter_metadata" in metadata:
        try:
            found = parse_object(metadata["lora_adapter_metadata"])
        except Unreadable:
            found = {}
        own = {"denoiser": ("transformer.", "unet.")}.get(component, (f"{component}.",))
        chosen = {
            key.removeprefix(p): value for key, value in found.items() for p in own if key.startswith(p)
        }
        places.append(Place(chosen, is_peft=True))
    plain = {key: float(metadata[key]) for key in ALPHA_KEYS if is_number(metadata.get(key))}
    if plain:
        rank = {"r": float(metadata["r"])} if is_number(metadata.get("r")) else {}
        places.append(Place({**plain, **rank}, is_peft=False))
    return places


def is_number(text: str | None) -> bool:
    """Whether a header's text is a finite number."""
    try:
        return text is not None and math.isfinite(float(text))
    except ValueError:
        return False


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable("settings are no JSON") from error
    need(isinstance(found, dict), "settings are no object")
    return found  # type: ignore[no-any-return]


def check_place(place: Place, parts: Mapping[str, object]) -> None:
    """Refuse settings that make another change of the tensors than the formulas here."""
    settings = place.settings
    if not place.is_peft:
        return
    kind = str(settings.get("peft_type", "LORA")).rpartition(".")[2]  # of an enum written as text
    need(kind.upper() in PEFT_TYPES, "a PEFT type")
    start = str(settings.get("init_lora_weights")).lower()
    is_known = start in PLAIN_INITIALIZATIONS or start.startswith(RELATIVE_INITIALIZATIONS)
    need(is_known, f"initialized by {start}")
    if "down" not in parts:
        return
    has_norms = bool({"magnitude", "dora_scale"} & parts.keys())
    if (settings.get("use_dora") and not has_norms) or (settings.get("use_dora") is False and has_norms):
        raise Broken("settings and tensors contradict about DoRA")


def check_setting(settings: Mapping[str, Any], key: str) -> float | None:
    """A number of the settings."""
    value = settings.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
        raise Broken(f"{key} is {value!r}")
    if key == "r" and value <= 0:
        raise Broken("a rank of 0")
    return float(value)


def find_pattern(patterns: object, names: Names) -> float | None:
    """PEFT's rule: the first pattern that fits a whole name, or its end from a dot on."""
    if not isinstance(patterns, dict):
        return None
    for pattern, value in patterns.items():
        if not re.fullmatch(r"[\w.\\^$*+?-]{0,100}|\w*", pattern):
            raise Broken("a pattern that nobody writes")
        number = check_setting({"lora_alpha": value}, "lora_alpha")
        try:
            fits = any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
        except re.error as error:
            raise Broken("a pattern that is none") from error
        if fits:
            return number
    return None


def claim_scales(place: Place, names: Names, rank: int | None) -> list[float]:
    """The scales that a place allows: of its own rank, and of that of the tensors; none: it says nothing."""
    settings = place.settings
    alpha = find_alpha(place, names)
    stated_rank = find_pattern(settings.get("rank_pattern"), names) or check_setting(settings, "r")
    if alpha is None:
        return []
    if not place.is_peft and (rank is None or alpha == 0):
        return [1.0]
    own_rank = rank or stated_rank or 8
    power = 0.5 if settings.get("use_rslora") else 1
    ranks = dict.fromkeys((stated_rank or own_rank, own_rank))  # each once
    return [alpha / r**power for r in ranks]


def find_alpha(place: Place, names: Names) -> float | None:
    """The alpha of a module in one place: its pattern's, the one for all, or PEFT's default."""
    settings = place.settings
    alphas = {check_setting(settings, key) for key in ALPHA_KEYS} - {None}
    if len(alphas) > 1:
        raise Broken("two alphas in one place")
    own_alpha = find_pattern(settings.get("alpha_pattern"), names)
    if own_alpha is not None:
        return own_alpha
    if alphas:
        return alphas.pop()
    is_lora_config = bool({"peft_type", "r", *ALPHA_KEYS, "use_rslora"} & settings.keys())
    return 8.0 if place.is_peft and is_lora_config else None


def find_scale(places: Sequence[Place], names: Names, alpha: Array | None, rank: int | None) -> float:
    """alpha / rank: what all places agree on."""
    claims = [claim_scales(place, names, rank) for place in places]
    claims = [scales for scales in claims if scales]
    if alpha is not None:
        claims.insert(0, [compute_scale(alpha, rank)])
    if not claims:
        return 1.0
    common, *others = claims
    for scales in others:
        common = [scale for scale in common if any(is_near(scale, other) for other in scales)]
    if len(common) != 1:
        raise Broken("places disagree about the scale")
    return common[0]


def compute_scale(alpha: Array, rank: int | None) -> float:
    """alpha / rank of a module's own tensors; an alpha of 0 is none."""
    if alpha.size != 1:
        raise Broken("alpha is not one number")
    if rank is None:
        return 1.0
    return (alpha.item() or rank) / rank


def is_near(first: float, second: float) -> bool:
    """Whether two scales are the same, up to what half a float loses."""
    return math.isclose(first, second, rel_tol=0.01)


# formulas


def multiply(up: Array, down: Array) -> Array:
    """A pair: [N, r, ...] and [r, K, kernel] -> [N, K, kernel]."""
    if up.ndim < 2 or down.ndim < 2 or math.prod(up.shape[2:]) != 1 or up.shape[1] != down.shape[0]:
        raise Broken("a pair that does not fit")
    product = up.reshape(up.shape[:2]) @ down.reshape(len(down), -1)
    return product.reshape(len(up), *down.shape[1:])


def multiply_core(core: Array, up: Array, down: Array) -> Array:
    """A Tucker core [m, n, kernel] between [N, m] and [n, K]."""
    is_fit = core.ndim >= 2 and up.ndim >= 2 and down.ndim >= 2
    is_flat = is_fit and math.prod(up.shape[2:]) == math.prod(down.shape[2:]) == 1
    if not is_flat or core.shape[:2] != (up.shape[1], down.shape[0]):
        raise Broken("a core that does not fit")
    first, second = up.reshape(up.shape[:2]), down.reshape(down.shape[:2])
    return np.asarray(np.einsum("mn...,im,nj->ij...", core, first, second))


def make_pair(parts: Mapping[str, Array], up: str, down: str, core: str) -> Array:
    """A factor of LoHa or LoKr; beside a core its first half is [r, N]."""
    if up not in parts or down not in parts:
        raise Broken(f"{up} without {down}")
    if core not in parts:
        return multiply(parts[up], parts[down])
    first = parts[up].T if parts[up].ndim == 2 else parts[up]
    return multiply_core(parts[core], first, parts[down])


def make_delta(parts: Mapping[str, Array], get_scale: Callable[[int | None], float]) -> tuple[Array, float]:
    """The weight's change, and its scale, of a kind that does not look at the weight."""
    kind = next(kind for kind in KINDS if kind & parts.keys())
    if kind is DIFF or kind is NORM:
        return parts["diff" if kind is DIFF else "w_norm"], 1.0
    if kind is LORA:
        if not {"down", "up"} <= parts.keys():
            raise Broken("half a pair")
        rank = parts["down"].shape[0] if parts["down"].ndim else 0
        if "mid" in parts:
            return multiply_core(parts["mid"], parts["up"], parts["down"]), get_scale(rank)
        return multiply(parts["up"], parts["down"]), get_scale(rank)
    if kind is LOHA:
        first = make_pair(parts, "hada_w1_a", "hada_w1_b", "hada_t1")
        second = make_pair(parts, "hada_w2_a", "hada_w2_b", "hada_t2")
        if first.shape != second.shape:
            raise Broken("factors of two shapes")
        return first * second, get_scale(parts["hada_w1_b"].shape[0])
    return make_kronecker(parts), get_scale(find_kronecker_rank(parts))


def find_kronecker_rank(parts: Mapping[str, Array]) -> int | None:
    """Of the second factor's pair, else of the first's; None: both are whole."""
    halves = [parts[key] for key in ("lokr_w2_b", "lokr_w1_b") if key in parts]
    return halves[0].shape[0] if halves else None


def make_kronecker(parts: Mapping[str, Array]) -> Array:
    """[a, b] x [c, d, kernel] -> [a c, b d, kernel]."""
    factors = []
    for name, core in (("lokr_w1", "lokr_t1"), ("lokr_w2", "lokr_t2")):
        is_split = bool({f"{name}_a", f"{name}_b"} & parts.keys())
        if is_split == (name in parts):
            raise Broken(f"{name} twice or not at all")
        factors.append(make_pair(parts, f"{name}_a", f"{name}_b", core) if is_split else parts[name])
    if "lokr_t2" in parts and "lokr_w2" in parts:
        raise Broken("a core without its pair")
    first, second = factors
    if first.ndim != 2 or second.ndim < 2:
        raise Broken("no matrices")
    return np.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)


def dequantize(parts: dict[str, Array], dtypes: Mapping[str, str]) -> None:
    """Multiply factors by their scales, and refuse integers without one."""
    for half in ("down", "up"):
        scale = parts.pop(f"{half}_scale", None)
        if scale is None:
            continue
        if half not in parts or dtypes[half] not in ("I8", *FLOATS, "F8_E4M3", "F8_E5M2", *FLOAT8_BY_WRITER):
            raise Broken("a scale without its factor")
        if parts[half].ndim == 0 or scale.size not in (1, len(parts[half])):
            raise Broken("scales of another length")
        parts[half] = parts[half] * scale.reshape(-1, *[1] * (parts[half].ndim - 1))
        dtypes = {**dtypes, half: "F32"}
    for part in parts:
        is_free = part in ("alpha", "on_input", "dora_scale", "magnitude")
        if dtypes[part] in INTEGERS and not is_free:
            raise Broken(f"{part} is of integers")


def read_module(
    parts: dict[str, Array],
    get_scale: Callable[[int | None], float],
    rotate: Callable[[Mapping[str, Array]], Reading],
    start: Array | None,
) -> Reading:
    """The change of a module.

    Args:
        parts: without the alpha.
        get_scale: rank -> alpha / rank.
        rotate: reads those of an OFT.
        start: what was taken out of the base before the training; None: nothing.
    """
    kinds = [kind for kind in KINDS if kind & parts.keys()]
    if len(kinds) > 1 or ({"weight", "on_input"} & parts.keys()) not in (set(), {"weight", "on_input"}):
        raise Broken("parts of several kinds")
    biases = [parts[key].reshape(-1) for key in ("diff_b", "b_norm") if key in parts]
    if len(biases) > 1:
        raise Broken("two biases")
    norms = [parts[key] for key in ("dora_scale", "magnitude") if key in parts]
    if len(norms) > 1 or (norms and kinds not in ([LORA], [LOHA], [LOKR])):
        raise Broken("norms of nothing")
    if start is not None and kinds != [LORA]:
        raise Broken("no low-rank pair, and its initial factors are to be subtracted")
    if not kinds:
        if len(biases) != 1:
            raise Broken("nothing")
        return Reading(None, None, biases[0])
    if kinds == [IA3]:
        return add_bias(read_ia3(parts), biases)
    if kinds == [ROTATION]:
        return add_bias(rotate({name: parts[name] for name in ROTATION & parts.keys()}), biases)
    return read_delta(parts, get_scale, start, norms, biases)


def read_delta(
    parts: Mapping[str, Array],
    get_scale: Callable[[int | None], float],
    start: Array | None,
    norms: Sequence[Array],
    biases: list[Array],
) -> Reading:
    """The change of a kind that does not look at the weight, or of one in DoRA's norms."""
    delta, scale = make_delta(parts, get_scale)
    change = scale * delta
    if start is not None:
        if start.shape != delta.shape or "mid" in parts:
            raise Broken("initial factors of another weight")
        change = change - start
    if "up_bias" in parts:
        if norms:
            raise Broken("norms and a bias")
        biases.append(scale * parts["up_bias"].reshape(-1))
    if norms:
        is_row = "magnitude" in parts
        return add_bias(read_dora(change, norms[0], is_row), biases)
    return add_bias(Reading(delta.shape, lambda weight: change), biases)


def add_bias(reading: Reading, biases: Sequence[Array]) -> Reading:
    """With the changes of the bias."""
    if len({len(bias) for bias in biases}) > 1:
        raise Broken("biases of two lengths")
    return Reading(reading.shape, reading.change, sum(biases[1:], biases[0]) if biases else None)


def read_ia3(parts: Mapping[str, Array]) -> Reading:
    """Rows or columns by a factor."""
    factor = parts["weight"].reshape(-1)
    if parts["on_input"].size != 1:
        raise Broken("on_input is not one word")
    if parts["on_input"].item():
        return Reading((5, len(factor)), lambda weight: weight * factor[None])
    return Reading((len(factor), 5), lambda weight: weight * factor[:, None])


def read_dora(delta: Array, norms: Array, is_row: bool) -> Reading:
    """The weight with its change, brought to norms of rows or columns."""
    if max(norms.shape, default=0) != norms.size:
        raise Broken("norms of no direction")
    is_column = not is_row and norms.ndim > 1 and norms.shape[0] == 1 and norms.size > 1
    if norms.size != delta.shape[1 if is_column else 0]:
        raise Broken("norms of another weight", delta.shape)

    def change(weight: Array) -> Array:
        merged = weight + delta
        kept = 1 if is_column else 0
        axes = tuple(axis for axis in range(merged.ndim) if axis != kept)
        length = np.sqrt((merged**2).sum(axis=axes, keepdims=True))
        wanted = norms.reshape([-1 if axis == kept else 1 for axis in range(merged.ndim)])
        return np.asarray(wanted * merged / length - weight)

    return Reading(delta.shape, change)


# a file


@dataclass(frozen=True)
class LoraText:
    """A file as it is written.

    Args:
        path: of the LoRA that settings are beside; of initial factors the LoRA's, where they have none.
        tensors: by key.
        metadata: of the header that has the settings.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def read(path: Path) -> dict[Module, Reading | Broken]:
    """What a file does to each of its modules.

    Raises:
        Unreadable: for a file without a reading.
    """
    tensors, metadata = tensors_of(path)
    text = LoraText(path, tensors, metadata)
    initial = None
    if is_relative(text):
        text, initial = find_initial(text)
    found: dict[Module, Reading | Broken] = {}
    for module, parts in group(text.tensors).items():
        try:
            start = None if initial is None else read_start(initial, module)
            found[module] = read_parts(text, module, parts, start)
        except Broken as error:
            found[module] = error
    return found


def is_relative(text: LoraText) -> bool:
    """Whether a place says that the tensors are no change of the model itself."""
    components = {component for component, _ in group(text.tensors)}
    for component in components:
        for place in read_places(text.path, text.metadata, component):
            start = str(place.settings.get("init_lora_weights")).lower()
            if place.is_peft and start.startswith(RELATIVE_INITIALIZATIONS):
                return True
    return False


def find_initial(text: LoraText) -> tuple[LoraText, LoraText]:
    """The file without its initial factors, and these: from the same file, or from the one beside it."""
    own: dict[str, Tensor] = {}
    initial: dict[str, Tensor] = {}
    for key, tensor in text.tensors.items():
        if INITIAL_NAME.search(key):
            initial[INITIAL_NAME.sub(r".\1", key).removesuffix(".weight") + ".weight"] = tensor
        else:
            own[key] = tensor
    if initial:
        return replace(text, tensors=own), replace(text, tensors=initial)
    files = [
        file
        for file in text.path.parent.glob("*.safetensors")
        if file != text.path and "init" in file.name.removesuffix(".safetensors").lower()
    ]
    for folder in text.path.parent.iterdir():
        if folder.is_dir() and "init" in folder.name.lower():
            named = folder / "adapter_model.safetensors"
            files += [named] if named.is_file() else list(folder.glob("*.safetensors"))
    need(len(files) == 1, "initial factors")
    tensors, metadata = tensors_of(files[0])
    found = LoraText(files[0], tensors, metadata)
    places = [place for module in group(tensors) for place in read_places(files[0], metadata, module[0])]
    if not any(place.settings for place in places):  # a bare file has those of the LoRA
        found = LoraText(text.path, tensors, text.metadata)
    return text, found


def read_start(initial: LoraText, module: Module) -> Array:
    """What was taken out of a module's weight: alpha / rank times its initial factors."""
    parts = group(initial.tensors).get(module)
    if parts is None or parts.unknown:
        raise Broken("no initial factors")
    values, alpha = read_values(initial, parts)
    if not {"down", "up"} <= values.keys() or "mid" in values:
        raise Broken("initial factors are no pair")
    places = read_places(initial.path, initial.metadata, module[0])
    delta, scale = make_delta(values, lambda rank: find_scale(places, parts.names, alpha, rank))
    return scale * delta


def read_values(text: LoraText, parts: Parts) -> tuple[dict[str, Array], Array | None]:
    """The numbers of a module's parts, and apart from them its alpha."""
    chosen = {part: keys[0] for part, keys in parts.keys.items()}
    for part, keys in parts.keys.items():
        for key in keys[1:]:
            same = text.tensors[key] == text.tensors[chosen[part]]
            if not same or split_key(key)[2] == split_key(chosen[part])[2]:
                raise Broken("in the file twice")
    values = {part: to_numbers(part, text.tensors[key]) for part, key in chosen.items()}
    dequantize(values, {part: text.tensors[key].dtype for part, key in chosen.items()})
    return values, values.pop("alpha", None)


def read_parts(text: LoraText, module: Module, parts: Parts, start: Array | None) -> Reading:
    """The change of a module, from its keys."""
    if parts.unknown or parts.keys.keys() in ({"weight"}, {"alpha"}):
        raise Broken("an unknown part, or nothing to apply")
    places = read_places(text.path, text.metadata, module[0])
    for place in places:
        check_place(place, parts.keys)
    values, alpha = read_values(text, parts)
    settings = [place.settings for place in places if place.is_peft]
    return read_module(
        values,
        get_scale=lambda rank: find_scale(places, parts.names, alpha, rank),
        rotate=lambda found: rotation_oracle.read_rotation(found, alpha, settings),
        start=start,
    )
