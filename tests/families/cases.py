"""What the tests of families share: tiny pipelines on disk, builds without a run, what a denoiser holds."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from families.instance_sets import INSTANCES
from families.instances import Instance
from safetensors.torch import load_file, save_file
from support.run_job import make_spec
from torch import Tensor, nn

from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.generate.generate import generate
from int8run.generate.prompts import Sample
from int8run.layers.int8_linear import Int8Linear, get_linear
from int8run.lora.config import Adapter, LoraSettings
from int8run.lora.header_info import read_lora_headers
from int8run.models.denoiser_components import DENOISER_COMPONENTS
from int8run.models.family import ModelSource, load_families
from int8run.models.original_names import to_original
from int8run.models.tensor_part import TensorPart
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier
from int8run.pipeline import load
from int8run.pipeline.build import build_model
from int8run.pipeline.built_model import BuiltModel
from int8run.report.console import Progress
from int8run.tasks.quantize_checkpoint import quantize_file

FAMILIES = load_families()
FILE = "diffusion_pytorch_model.safetensors"
# everything is exact and streamed, and nothing is kept from one build to the next
SETTINGS = [
    "backend=reference",
    "int8.small_batch_fallback=never",
    "metrics.baseline=none",
    "tracker=none",
    "cache.limit_gb=0",
    "device=cpu",
    "progress=false",
]
Tensors = dict[str, Tensor]


# what is saved: whether the authors' names are used, and how outliers are treated
SAVE_KINDS = {
    "folder": (False, NoOutlier()),
    "file": (True, NoOutlier()),
    "rotated file": (True, ConvRot(16)),
}


@dataclass(frozen=True)
class SavedBuild:
    """A denoiser that was streamed, drawn with and saved.

    Args:
        location: of the INT8 denoiser; of two a mapping.
    """

    built: BuiltModel
    contents: Tensors
    latents: Tensor
    location: Any


@dataclass(frozen=True)
class Case:
    """One tiny pipeline and its folder.

    Args:
        name: of the instance.
        pipe: float, as it was made.
        home: an empty folder.
    """

    name: str
    pipe: DiffusionPipeline
    home: Path
    spec: RunSpec

    @property
    def instance(self) -> Instance:
        """Family, sampling, prompt."""
        return INSTANCES[self.name]

    @property
    def folder(self) -> Path:
        """The diffusers folder."""
        return self.home / "pipeline"

    @cached_property
    def base(self) -> Path:
        """The folder without the denoisers' weights, as it is fetched for a single file."""
        folder = self.home / "base"
        if not folder.exists():
            shutil.copytree(self.folder, folder)
            for name in self.denoisers:
                (folder / name / FILE).unlink()
        return folder

    @cached_property
    def denoisers(self) -> dict[str, nn.Module]:
        """The denoisers by component name."""
        parts = {name: self.pipe.components.get(name) for name in DENOISER_COMPONENTS}
        return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}

    @property
    def denoiser(self) -> nn.Module:
        """The first."""
        return next(iter(self.denoisers.values()))

    def make_source(self, location: object = None, base: object = None) -> ModelSource:
        """The diffusers folder, or weights elsewhere."""
        place: Any = (
            {k: str(v) for k, v in location.items()}
            if isinstance(location, Mapping)
            else str(location or self.folder)
        )
        return ModelSource(
            place,
            "none",
            self.instance.sampling,
            dtype="float32",
            base=None if location is None else str(base or self.base),
            **self.instance.source,
        )

    def build(
        self,
        location: object = None,
        base: object = None,
        loras: Sequence[Adapter] = (),
        mode: str = "dynamic",
        strict: bool = True,
        **changes: Any,
    ) -> BuiltModel:
        """A build of these weights; streamed, if no change of the spec asks for the float model."""
        stack = LoraSettings(mode=mode, adapters=loras, strict=strict)
        spec = replace(self.spec, model=self.make_source(location, base), lora=stack, **changes)
        built = build_model(spec, self.samples, read_lora_headers(spec.lora, "none"), Progress(enabled=False))
        built.set_strengths(spec.lora.strengths, spec.lora.text_strengths)
        return built

    def quantize(self, location: object, save: Path, component: str | None = None) -> dict[str, Any]:
        """`task=quantize` of these weights; what its metrics.json says."""
        return run_quantize_task(
            replace(self.spec, model=self.make_source(location), save=str(save)), component, self.home
        )

    @property
    def samples(self) -> list[Sample]:
        """The one image that is drawn."""
        return [Sample(self.instance.prompt, 7, "0")]

    def generate_latents(self, built: BuiltModel) -> Tensor:
        """Of two steps. [steps, ...]"""
        (name,) = built.denoisers
        made = generate(built.pipe, built.component, built.denoisers, self.samples, self.instance.sampling)[
            name
        ]
        return made.trajectories[0]

    @cached_property
    def saved_builds(self) -> dict[str, SavedBuild]:
        return {}

    def get_saved(self, kind: str) -> SavedBuild:
        """One of SAVED."""
        if kind not in self.saved_builds:
            native, outlier = SAVE_KINDS[kind]
            save = (self.home / kind).with_suffix(".safetensors" if native else "")
            location: Any = save
            if len(self.denoisers) > 1:
                location = {
                    name: self.home / f"{kind}_{name}.safetensors" if native else save / name
                    for name in self.denoisers
                }
            built = self.build(save=str(save), outlier=outlier)
            self.saved_builds[kind] = SavedBuild(
                built, collect_contents(built), self.generate_latents(built), location
            )
        return self.saved_builds[kind]


def name_base_class(part: object) -> list[str]:
    """Library and name of the class that one of the tests is made from, as a pipeline's index has them."""
    base = next(cls for cls in type(part).__mro__ if not cls.__module__.startswith("families."))
    return [base.__module__.partition(".")[0], base.__name__]


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Write a pipeline to a folder; the index of a modular one says that everything is there."""
    if isinstance(pipe, ModularPipeline):
        pipe.save_pretrained(str(folder), overwrite_modular_index=True)
    else:
        pipe.save_pretrained(folder)


def make_case(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Build an instance and write it to a folder."""
    pipe, folder = INSTANCES[name].build(), home / "pipeline"
    # classes of the tests, which transformers cannot read again: in the folder stands what they are made from
    ours = {
        name: part for name, part in pipe.components.items() if type(part).__module__.startswith("families.")
    }
    for part in ours.values():
        monkeypatch.setattr(part, "save_pretrained", lambda *_, **__: None)
    save_pipeline(pipe, folder)
    if ours and isinstance(pipe, ModularPipeline):
        for component in ours:
            (folder / component).mkdir()
        read_modular = load.load_modular_pipeline
        monkeypatch.setattr(
            load,
            "load_modular_pipeline",
            lambda source, given, *more: read_modular(source, {**given, **ours}, *more),
        )
    elif ours:
        index, read = json.loads((folder / "model_index.json").read_text()), load.load_pipeline
        index |= {name: name_base_class(part) for name, part in ours.items()}
        (folder / "model_index.json").write_text(json.dumps(index))

        def load_with_ours(folder: Path, parts: Mapping[str, Any], *where: Any) -> DiffusionPipeline:
            # several cases may be open at once, each with classes of its own
            is_this_case = home in folder.parents
            return read(folder, {**parts, **ours} if is_this_case else parts, *where)

        monkeypatch.setattr(load, "load_pipeline", load_with_ours)
    return Case(name, pipe, home, make_spec(SETTINGS))


def run_quantize_task(spec: RunSpec, component: str | None, out: Path) -> dict[str, Any]:
    """`task=quantize`; what its metrics.json says."""
    quantize_file(spec, Job({}, {}, [], out), component)
    return json.loads((out / "metrics.json").read_text())


def quantize_alone(location: Path, save: Path, out: Path, *words: str) -> dict[str, Any]:
    """`task=quantize` of weights without a pipeline; with further words of a command line."""
    settings = [f"model.location={location}", "model.dtype=float32", f"save={save}", *words]
    return run_quantize_task(make_spec([*SETTINGS, *settings]), None, out)


def find_int8_layers(built: BuiltModel) -> dict[str, Int8Linear]:
    """Every INT8 layer by its name."""
    return {name: m for name, m in built.denoisers["int8"].named_modules() if isinstance(m, Int8Linear)}


def collect_contents(built: BuiltModel) -> Tensors:
    """All that an INT8 denoiser holds: integers, scales, outlier transforms, and every float tensor."""
    found: Tensors = {}
    layers = find_int8_layers(built)
    for name, layer in layers.items():
        weight, transform = layer.read_quantized_weight(), layer.transform
        found |= {f"{name}.q": weight.qdata, f"{name}.scale": weight.scale}
        if transform.rotation is not None:
            found[f"{name}.rotation"] = transform.rotation.matrix
        if transform.factor is not None:
            found[f"{name}.factor"] = transform.factor
        if layer.bias is not None:
            found[f"{name}.bias"] = layer.bias
    state = built.denoisers["int8"].state_dict()
    return found | {
        name: value
        for name, value in state.items()
        if not name.startswith(tuple(f"{layer}." for layer in layers))
    }


def assert_same_tensors(ours: Tensors, others: Tensors) -> None:
    """Bit for bit, dtypes included."""
    assert ours.keys() == others.keys()
    assert [
        name
        for name in ours
        if ours[name].dtype != others[name].dtype or not torch.equal(ours[name], others[name])
    ] == []


def make_original_state(model: nn.Module, prefix: str | None = None) -> Tensors:
    """The float weights under the names of the model's authors.

    Args:
        prefix: before each name, in the place of the family's own.
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    names = to_original({name: tuple(value.shape) for name, value in state.items()}, type(model).__name__)
    values = {
        key: torch.cat([p.extract(state[p.key]) for p in parts])
        if len(parts) > 1
        else parts[0].extract(state[parts[0].key])
        for key, parts in names.items()
    }
    own = next(
        (p for p in ("model.diffusion_model.", "net.") if all(key.startswith(p) for key in values)), ""
    )
    return {
        (own if prefix is None else prefix) + key.removeprefix(own): value.contiguous().clone()
        for key, value in values.items()
    }


def write_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """A file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata=dict(metadata or {}))
    return path


def write_shards(tensors: Tensors, folder: Path, count: int = 3) -> Path:
    """The same in several files with an index, dealt like cards. Returns the index."""
    names, shards = list(tensors), {}
    for i in range(count):
        shards[f"model-{i + 1:05}-of-{count:05}.safetensors"] = names[i::count]
    for file, held in shards.items():
        write_file({name: tensors[name] for name in held}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps(
            {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
        )
    )
    return index


def read_file(path: Path) -> Tensors:
    """A file's tensors as the safetensors library reads them."""
    return load_file(path)


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and one scale a row: absmax / 127, the nearest integer, ties to even. weight: [N, K] float32."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def collect_float_weights(case: Case) -> Tensors:
    """Every parameter and buffer of the float denoisers, by the names that they have in a build."""
    single = len(case.denoisers) == 1
    return {
        (key if single else f"{name}.{key}"): value
        for name, part in case.denoisers.items()
        for key, value in part.state_dict().items()
    }


def map_original_linears(model: nn.Module) -> dict[str, tuple[TensorPart, ...]]:
    """Authors' name of a layer -> the Linears that it is made of."""
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    linears = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = {}
    for key, parts in to_original(state, type(model).__name__).items():
        if (
            {part.key for part in parts} <= linears
            and key.endswith(".weight")
            and all(part.shape is None for part in parts)
        ):
            name = key.removeprefix("model.diffusion_model.").removesuffix(".weight")
            found[name] = tuple(replace(part, key=part.key.removesuffix(".weight")) for part in parts)
    return found


@dataclass(frozen=True)
class Lora:
    """Low-rank changes of every Linear; layers that are one to the authors share the matrix of the input."""

    down: Tensors
    up: Tensors
    original: dict[str, tuple[TensorPart, ...]]

    def change(self, name: str) -> Tensor:
        """What is added to a weight."""
        return self.up[name] @ self.down[name]

    def save_with_diffusers_names(self, path: Path, component: str = "transformer") -> Path:
        tensors = {f"{component}.{name}.lora_A.weight": value for name, value in self.down.items()}
        return write_file(
            tensors | {f"{component}.{name}.lora_B.weight": value for name, value in self.up.items()}, path
        )

    def save_with_original_names(self, path: Path) -> Path:
        tensors = {}
        for name, parts in self.original.items():
            tensors[f"diffusion_model.{name}.lora_A.weight"] = self.down[parts[0].key].clone()
            tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.cat(
                [part.extract(self.up[part.key]) for part in parts]
            )
        return write_file(tensors, path)


def make_lora(model: nn.Module, family: str) -> Lora:
    """Rank 4, on every Linear that has an original name.

    Those that stay float change less, so that they do not hide the others.
    """
    generator, native = torch.Generator().manual_seed(3), map_original_linears(model)
    down, up = {}, {}
    for parts in native.values():
        width = get_linear(model, parts[0].key).in_features
        shared = torch.randn(4, width, generator=generator) / width**0.5
        for part in parts:
            strength = 0.1 if FAMILIES[family].find_skip_reason(part.key) is None else 0.001
            down[part.key] = shared.clone()
            up[part.key] = strength * torch.randn(
                get_linear(model, part.key).out_features, 4, generator=generator
            )
    return Lora(down, up, native)
