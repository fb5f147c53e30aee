"""The card beside every `save=`: collects what a run or `task=quantize` knows, and writes it as Markdown.

`report.model_card` renders it, `tasks.publish` reads it again. Nothing is measured here.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from int8run import __version__
from int8run.checkpoints.checkpoint_files import read_file_content
from int8run.checkpoints.gguf_files import count_types
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.kernels.grouped_weight.reference import BITS
from int8run.models.resolve_weights import CONFIG_NAME
from int8run.report.model_card import CardFacts, CardFile, render_card
from int8run.report.runs import describe_environment
from int8run.tasks.base_license import find_base_license
from int8run.tasks.file_description import format_list_setting
from int8run.tasks.model_facts import describe_model, name_method, name_model
from int8run.tracking.secrets import mask_secret_settings
from int8run.utils.paths import GGUF, SAFETENSORS, expand_path, to_local_path
from int8run.utils.text import quote_for_shell

log = logging.getLogger(__name__)
CARD_NAME = "card.md"
GRID_NAME = "grid.png"
MAX_GRID_SIDE = 2048  # px; a larger grid is made smaller beside the card
# counts of a run and of `task=quantize`, with the words of a card
LAYER_COUNTS = {
    "quant/layers_int8": "INT8 layers",
    "quant/layers_float": "float layers",
    "clip/layers_quantized": "quantized layers",
    "clip/layers_float": "float layers",
}


@dataclass(frozen=True)
class Comparison:
    """What the numbers of a card come from.

    Args:
        environment: of the machine that measured.
        num_samples: that were compared.
        sample_noun: what one of them is: image or video.
    """

    environment: Mapping[str, object]
    num_samples: int
    sample_noun: str = "image"


NOTHING_COMPARED = Comparison(environment={}, num_samples=0)


def write_card(
    spec: RunSpec,
    job: Job,
    saved: Sequence[Path],
    metrics: Mapping[str, float],
    *,
    comparison: Comparison | None = None,
    vae: Path | None = None,
) -> Path:
    """Write the card of a checkpoint beside it.

    Args:
        spec: the settings; `save` is where the checkpoint is.
        job: where they came from; its folder may have a grid of images.
        saved: the files of weights; none where a VAE alone was saved.
        metrics: of the run, or of `task=quantize`.
        comparison: what the metrics come from; None: nothing was measured.
        vae: file of weights of the INT8 VAE; None: none was saved.

    Returns:
        The card.
    """
    card = get_card_path(str(spec.save))
    location = str(spec.model.location)
    found = find_base_license(location, spec.model.revision)
    is_measured = comparison is not None
    compared = comparison or NOTHING_COMPARED
    files = [*saved] if vae is None else [*saved, vae]
    facts = CardFacts(
        title=f"{name_checkpoint(card)}, {name_format(spec, metrics)}",
        version=__version__,
        base=name_base(location),
        license_name=found.name,
        license_origin=found.origin,
        files=[CardFile(name_saved(path, card), path.stat().st_size) for path in files],
        made=[*describe_gguf_base(spec.model.location), *describe_making(spec, metrics, is_run=is_measured)],
        command=format_command(job),
        metrics=metrics if is_measured else {},
        num_samples=compared.num_samples,
        sample_noun=compared.sample_noun,
        machine=describe_environment(compared.environment),
        grid=copy_grid(job.output_dir / GRID_NAME, card),
        usage=list_usage(job, saved, card, vae=vae, is_encoder=is_text_encoder(metrics)),
    )
    card.write_text(render_card(facts), encoding="utf-8")
    log.info("Card:     %s (license of the base: %s, %s)", card, found.name, found.origin)
    return card


def name_format(spec: RunSpec, metrics: Mapping[str, float]) -> str:
    """What the title calls the weights: INT8, or W4A8 and W6A8 where a denoiser's have 4 or 6 bits."""
    bits = spec.int8.bits
    if is_text_encoder(metrics) or bits not in BITS:
        return "INT8"
    return f"W{bits}A8"


def get_card_path(save: str) -> Path:
    """Where the card of `save=` is: `card.md` in a folder, `x.card.md` beside the file `x.safetensors`."""
    path = expand_path(save).absolute()
    if path.suffix != SAFETENSORS:
        return path / CARD_NAME
    return path.with_name(f"{path.stem}.{CARD_NAME}")


def name_checkpoint(card: Path) -> str:
    """What a card is about: its folder, or the file beside it."""
    return card.parent.name if card.name == CARD_NAME else card.name.removesuffix(f".{CARD_NAME}")


def name_saved(path: Path, card: Path) -> str:
    """A file of weights as it is called beside the card."""
    if path.is_relative_to(card.parent):
        return path.relative_to(card.parent).as_posix()
    return path.name


def name_base(location: str) -> str:
    """A base model as others know it: a hub id whole, of a path the name alone."""
    is_hub_id = location.count("/") == 1 and not location.startswith((".", "/", "~"))
    if is_hub_id and not expand_path(location).exists():
        return location
    return name_model(location)


def describe_gguf_base(location: str | Mapping[str, str] | None) -> list[tuple[str, str]]:
    """What a card says of a base that is a GGUF file, as name and text; nothing of another base.

    Args:
        location: as `model.location` names it.
    """
    locations = location.values() if isinstance(location, Mapping) else [location]
    described = []
    for path in map(to_local_path, map(str, locations)):
        if path.suffix.lower() != GGUF:
            continue
        types = ""
        if path.is_file():  # one on the hub is said without
            counts = count_types((info.dtype, info.form) for info in read_file_content(path).infos)
            types = f" ({', '.join(f'{count} × {name}' for name, count in counts.most_common())})"
        text = f"{path.name}{types}: what GGUF's rounding lost is not in the numbers below"
        described.append(("weights of the base", text))
    return described


def describe_making(spec: RunSpec, metrics: Mapping[str, float], *, is_run: bool) -> list[tuple[str, str]]:
    """How the checkpoint was made, as name and text.

    Args:
        spec: the settings.
        metrics: with the counts of layers.
        is_run: whether a run made it; `task=quantize` reads fewer settings.
    """
    made = []
    if is_text_encoder(metrics):
        made.append(("format of the text encoder", spec.clip.format))
    elif is_run:
        described = describe_model(spec, "int8")
        # what is not in the file: how it was run, and text encoders
        left_out = ("Backend", "Text encoders")
        made += [(name.lower(), text) for name, text in described.items() if name not in left_out]
    else:
        made += [("outlier", name_method(spec.outlier)), ("rounding", name_method(spec.rounding))]
    if spec.quality_db is not None and is_run:
        made.append(("quality asked for", f"{spec.quality_db:g} dB"))
    for name, label in LAYER_COUNTS.items():
        if name in metrics:
            # a file in ComfyUI's names joins some of them, such as q, k and v
            counted = f"{label}, as diffusers counts them" if is_run else label
            made.append((counted, f"{metrics[name]:.0f}"))
    return made


def is_text_encoder(metrics: Mapping[str, float]) -> bool:
    """Whether these are the counts of a text encoder alone."""
    return "clip/layers_quantized" in metrics and "quant/layers_int8" not in metrics


def format_command(job: Job) -> str:
    """The command that makes the checkpoint again, ready for a shell."""
    words = mask_secret_settings(list(job.overrides))
    return " ".join(["int8run", *map(quote_for_shell, words)])


def list_usage(
    job: Job, saved: Sequence[Path], card: Path, *, vae: Path | None, is_encoder: bool
) -> list[str]:
    """Commands that use the checkpoint.

    Args:
        job: where its settings came from.
        saved: the files of weights.
        card: beside them.
        vae: file of weights of the INT8 VAE; None: none was saved.
        is_encoder: whether it is a text encoder.
    """
    if vae is not None and not saved:
        line = f"int8run task=inspect task.path={quote_for_shell(name_saved(vae, card))}"
        model = f"model={job.choices.get('model', 'NAME')}"
        return [line, f"int8run {model} {format_vae_settings(vae, card)}"]
    names = [name_saved(path, card) for path in saved]
    location = "." if card.name == CARD_NAME else names[0]
    lines = [f"int8run task=inspect task.path={quote_for_shell(names[0])}"]
    model = f"model={job.choices.get('model', 'NAME')}"
    if is_encoder:
        lines.append(f"int8run {model} clip=auto clip.path={quote_for_shell(location)}")
    elif len(names) == 1:
        line = f"int8run {model} model.location={quote_for_shell(location)}"
        lines.append(line if vae is None else f"{line} {format_vae_settings(vae, card)}")
    return lines


def format_vae_settings(vae: Path, card: Path) -> str:
    """The settings that use an INT8 VAE, from the folder of the card.

    Args:
        vae: its file of weights, beside a config that names its class.
        card: of the checkpoint.
    """
    config = json.loads(vae.with_name(CONFIG_NAME).read_text(encoding="utf-8"))
    folder = PurePosixPath(name_saved(vae, card)).parent
    return f"int8.vae=int8 {format_list_setting('model.parts.vae', [config['_class_name'], folder])}"


def copy_grid(grid: Path, card: Path) -> str | None:
    """Copy the grid of a run beside the card, smaller where it is large.

    Args:
        grid: of the run.
        card: beside which it goes.

    Returns:
        The name of the copy; None where there is no grid.
    """
    if not grid.is_file():
        return None
    name = f"{card.name.removesuffix(CARD_NAME)}{GRID_NAME}"
    with Image.open(grid) as image:
        image.thumbnail((MAX_GRID_SIDE, MAX_GRID_SIDE))
        image.save(card.with_name(name))
    return name
