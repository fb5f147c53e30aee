"""Draft the YAML of a family from a diffusers class, so that next month's model takes an afternoon.

    python experiments/families/draft.py Kandinsky5Transformer3DModel > my_conf/model_type/kandinsky5.yaml
    python experiments/families/draft.py FluxTransformer2DModel --config config.json --file flux1.safetensors

The model is built on torch's meta device, without weights. What the module tree shows is filled in; what it
cannot show (why a layer is sensitive, what hardware is enough) says CHECK. With a file in the authors'
spelling, the names that no key mapping knows are listed with the parameters of the same shape.
"""

import argparse
import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import yaml
from diffusers.models.activations import GELU
from torch import nn

from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.detect import get_logical_shapes, read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.models.denoiser_classes import get_denoiser_class
from int8run.models.family import DeferredGelu, IgnoreRule
from int8run.models.loader import list_block_prefixes
from int8run.models.state_dict_adapter import find_prefix, to_model
from int8run.models.tensor_part import Shape

HERE = Path(__file__).parent
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
# names of Linears inside of blocks that compute shifts and scales from the time: one row per image
MODULATION = re.compile(r"modulation|adaln|(^|\.)mod(_|\.|$)|norm\w*\.linear", re.IGNORECASE)
# what a part outside of the blocks is, by its name; the first that fits
OUTSIDE_REASONS = (
    (re.compile(r"out"), "final projection"),
    (re.compile(r"time|vector|guidance|condition"), "embedder of time or conditions"),
    (re.compile(r"context|text|caption|txt|cap_|y_"), "text embedder"),
    (re.compile(r"x_|img|patch|image|proj_in"), "input embedder"),
)
# projections of one attention that read the same tensor: query, key and value
ATTENTION_NAMES = (
    ("to_q", "to_k", "to_v"),
    ("q_proj", "k_proj", "v_proj"),
    ("to_query", "to_key", "to_value"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
)
# an attention whose query reads the image, and whose key and value read the text
CROSS_ATTENTION = re.compile(r"attn2|cross|attention2")
LORA_PREFIXES = ("transformer", "diffusion_model", "lora_unet", "lora_transformer")


@dataclass(frozen=True)
class FamilyDraft:
    """What a module tree shows of a family.

    Args:
        class_name: of the denoiser.
        blocks: names of the lists of repeated blocks.
        ignore: Linears that probably stay float.
        same_input: groups of Linears of a block that read the same tensor.
        deferred_gelu: GELUs (tanh) between two Linears of a block.
        required: keys that together only this class has.
        forbidden: keys of classes that have all of `required`, too.
    """

    class_name: str
    blocks: Sequence[str]
    ignore: Sequence[IgnoreRule]
    same_input: Sequence[Sequence[str]]
    deferred_gelu: Sequence[DeferredGelu]
    required: Sequence[str]
    forbidden: Sequence[str]


def build_on_meta(class_name: str, config: Mapping[str, object]) -> nn.Module:
    """Build a class of diffusers without weights."""
    with torch.device("meta"):
        model: nn.Module = get_denoiser_class(class_name)(**config)
    return model


def draft_family(class_name: str, model: nn.Module, others: Mapping[str, Collection[str]]) -> FamilyDraft:
    """Draft a family.

    Args:
        class_name: of the denoiser.
        model: of this class.
        others: the keys of other classes, by name.
    """
    prefixes = list_block_prefixes(model)
    blocks = list(dict.fromkeys(prefix.split(".")[0] for prefix in prefixes))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    required, forbidden = choose_fingerprint(list(model.state_dict()), others)
    return FamilyDraft(
        class_name=class_name,
        blocks=blocks,
        ignore=propose_ignored(linears, prefixes),
        same_input=find_shared_inputs(linears, prefixes),
        deferred_gelu=find_gelus(model, prefixes),
        required=required,
        forbidden=forbidden,
    )


# -- layers ------------------------------------------------------------------------------------------


def get_block_name(name: str, prefixes: Iterable[str]) -> str | None:
    """The name of a layer relative to its block; None outside of the blocks."""
    for prefix in prefixes:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return None


def propose_ignored(linears: Mapping[str, nn.Linear], prefixes: Sequence[str]) -> list[IgnoreRule]:
    """Everything outside of the blocks, and the modulation inside."""
    rules: dict[str, str] = {}
    for name in linears:
        in_block = get_block_name(name, prefixes)
        if in_block is None:
            top, dot, _ = name.partition(".")
            rules[f"{top}.*" if dot else top] = explain_outside(top)
        elif MODULATION.search(in_block):
            rules[f"*.{NUMBER.sub('*', in_block)}"] = "modulation from the time: one row per image"
    return [IgnoreRule(pattern, reason) for pattern, reason in rules.items()]


def explain_outside(part: str) -> str:
    """Why a part outside of the blocks stays float, by its name."""
    for pattern, reason in OUTSIDE_REASONS:
        if pattern.search(part):
            return reason
    return "outside of the blocks"


def find_shared_inputs(linears: Mapping[str, nn.Linear], prefixes: Sequence[str]) -> list[list[str]]:
    """Groups of projections that read the same tensor, by their names and widths, relative to a block."""
    groups: dict[tuple[str, ...], None] = {}
    for name, linear in linears.items():
        in_block = get_block_name(name, prefixes)
        if in_block is None:
            continue
        block = name.removesuffix(in_block)
        parent, _, child = in_block.rpartition(".")
        for names in ATTENTION_NAMES:
            # the middle one is in both kinds of groups
            if child != names[1]:
                continue
            shared = names[1:] if CROSS_ATTENTION.search(parent) else names
            members = tuple(f"{parent}.{member}".lstrip(".") for member in shared)
            found = [linears.get(f"{block}{member}") for member in members]
            if all(other is not None and other.in_features == linear.in_features for other in found):
                groups[members] = None
    return [list(group) for group in groups]


def find_gelus(model: nn.Module, prefixes: Sequence[str]) -> list[DeferredGelu]:
    """The tanh GELUs of diffusers' feed-forwards, which the quantization of the next layer can compute."""
    found: dict[DeferredGelu, None] = {}
    for name, module in model.named_modules():
        in_block = get_block_name(name, prefixes)
        if in_block is None or not isinstance(module, GELU) or module.approximate != "tanh":
            continue
        parent, _, number = in_block.rpartition(".")
        next_layer = f"{parent}.{int(number) + 2}" if number.isdigit() else "CHECK"
        found[DeferredGelu(activation=in_block, source=f"{in_block}.proj", into=next_layer)] = None
    return list(found)


# -- fingerprint -------------------------------------------------------------------------------------


def choose_fingerprint(
    keys: Sequence[str], others: Mapping[str, Collection[str]]
) -> tuple[list[str], list[str]]:
    """A few keys that together no other class has.

    Args:
        keys: of the class.
        others: keys of other classes, by name.

    Returns:
        Keys that a file must have, and keys that it must not have, because a class that has all of the
        class's own has them besides.
    """
    candidates = [
        key for key in keys if not re.search(r"\.[1-9]\d*\.", key)
    ]  # of the first block, or of none
    required: list[str] = []
    left = {name: set(other) for name, other in others.items()}
    while left:
        key = max(candidates, key=lambda key: sum(key not in other for other in left.values()))
        still_left = {name: other for name, other in left.items() if key in other}
        if len(still_left) == len(left):
            break
        required.append(key)
        left = still_left
    forbidden: list[str] = []
    for other in left.values():
        more = sorted(other - set(keys))
        if more and not set(forbidden) & other:
            forbidden.append(more[0])
    return required or candidates[:1], forbidden


def read_known_keys(class_name: str) -> dict[str, Collection[str]]:
    """The keys of every model of `models.yaml` that is of another class, by its name."""
    keys = {}
    for entry in yaml.safe_load((HERE / "models.yaml").read_text(encoding="utf-8")):
        if entry["class"] != class_name:
            keys[entry["model"]] = set(build_on_meta(entry["class"], entry["config"]).state_dict())
    return keys


# -- a file of the authors -----------------------------------------------------------------------------


def list_unknown_names(path: Path, class_name: str, model: nn.Module) -> list[str]:
    """Say what the names in a file may be that no key mapping knows, one line for all blocks together."""
    with TensorFiles.open(path) as files:
        prefix = find_prefix(files)
        layers = read_layers(files, prefix, DeclaredFormat("auto", None))
        siblings = {key for layer in layers.values() for key in layer.sibling_keys}
        shapes = {
            key.removeprefix(prefix): tuple(shape)
            for key, shape in get_logical_shapes(files, layers).items()
            if key.startswith(prefix) and key not in siblings
        }
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layout = to_model(shapes, parameters, class_name)
    missing = {name: parameters[name] for name in layout.missing}
    lines = []
    for template, key in group_by_template(layout.unused).items():
        guesses = guess_targets(key, shapes[key], missing)
        shape = "x".join(map(str, shapes[key]))
        lines.append(f"{template} [{shape}]: {' or '.join(guesses) or 'CHECK: no parameter of this shape'}")
    return lines


def group_by_template(names: Iterable[str]) -> dict[str, str]:
    """The first name of each template: `blocks.3.q.weight` is one of `blocks.*.q.weight`."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(NUMBER.sub("*", name), name)
    return first


def guess_targets(key: str, shape: Shape, missing: Mapping[str, Shape]) -> list[str]:
    """Templates of the parameters of the same shape without a tensor, the most similar names first."""
    templates = [NUMBER.sub("*", name) for name, other in missing.items() if other == shape]
    return difflib.get_close_matches(key, list(dict.fromkeys(templates)), n=3, cutoff=0.2)


# -- the page ------------------------------------------------------------------------------------------


def format_draft(draft: FamilyDraft, name: str, notes: Sequence[str]) -> str:
    """The draft as YAML.

    Args:
        draft: of the family.
        name: of the family.
        notes: lines about a file, as comments at the end.
    """
    lines = [
        f"# {name}: drafted from {draft.class_name} of diffusers {diffusers.__version__}; CHECK every line",
        "_target_: int8run.models.family.ModelFamily",
        f"name: {name} # name of the family",
        f"denoisers: [{draft.class_name}] # diffusers classes that belong to it",
        "mixed_precision: none # none: the layers below stay float; auto: and the most sensitive ones, "
        "until quality_db is met",
        "ignore: # layers that stay float: fnmatch patterns on module names; the first match counts",
    ]
    for rule in draft.ignore:
        lines.append(f'  - {{ pattern: "{rule.pattern}", reason: "{rule.reason}" }} # CHECK')
    lines.append("same_input: # layers of one block that read the same tensor: quantized once for all")
    for group in draft.same_input:
        lines.append(f"  - [{', '.join(group)}]")
    lines.append("deferred_gelu: # tanh GELUs that the quantization of the next layer computes on the way")
    for gelu in draft.deferred_gelu:
        lines.append(f"  - {{ activation: {gelu.activation}, source: {gelu.source}, into: {gelu.into} }}")
    lines += [
        "fingerprints: # key patterns that identify a file: all must match, none must not",
        f"  - denoiser: {draft.class_name} # saved by diffusers",
        f"    all: {json.dumps(list(draft.required))}",
    ]
    if draft.forbidden:
        lines.append(f"    none: {json.dumps(list(draft.forbidden))}")
    lines += [
        f"blocks: [{', '.join(draft.blocks)}] # lists of repeated blocks",
        f"lora_prefixes: [{', '.join(LORA_PREFIXES)}] # prefixes of the layer names in LoRA files",
        'hardware: "CHECK" # the smallest hardware that it makes sense on',
    ]
    text = fill_empty_lists("\n".join(lines))
    if notes:
        text += "\n# names in the file that no key mapping knows, and what they may be:\n"
        text += "\n".join(f"#   {note}" for note in notes)
    return text + "\n"


def fill_empty_lists(text: str) -> str:
    """`[]` for a list without items, which YAML would read as null."""
    lines = text.split("\n")
    filled = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        key, separator, comment = line.partition(": #")
        is_empty = separator and not line.startswith(" ") and not following.startswith("  ")
        filled.append(f"{key}: [] #{comment}" if is_empty else line)
    return "\n".join(filled)


def main() -> None:
    """Print the draft."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("denoiser", help="the class in diffusers")
    parser.add_argument("--name", help="of the family; else made of the class")
    parser.add_argument("--config", type=Path, help="config.json of the checkpoint; else the defaults")
    parser.add_argument("--file", type=Path, help="a .safetensors file in the authors' spelling")
    options = parser.parse_args()
    config = json.loads(options.config.read_text()) if options.config else {}
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    model = build_on_meta(options.denoiser, config)
    draft = draft_family(options.denoiser, model, read_known_keys(options.denoiser))
    name = options.name or re.sub(r"(transformer|unet).*", "", options.denoiser, flags=re.IGNORECASE).lower()
    notes: list[str] = []
    if options.file is not None:
        notes = list_unknown_names(options.file, options.denoiser, model)
    print(format_draft(draft, name, notes), end="")


if __name__ == "__main__":
    main()
