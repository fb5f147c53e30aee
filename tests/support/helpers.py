"""What several tests share: a comparison, seeded tensors, a small model, and the classes that conf/ names."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from int8run.backends.base import Backend
from int8run.backends.float import Float
from int8run.backends.onednn import OneDnn
from int8run.backends.reference import Reference
from int8run.layers.assemble import assemble_int8_model
from int8run.layers.plan import Int8Settings, LayerPlan, plan_layers
from int8run.lora.adapters.change import LoraChange
from int8run.lora.entries import Entry
from int8run.lora.key_parsing import DENOISER
from int8run.lora.load import LoraFile
from int8run.lora.stack import LoraStack
from int8run.models.family import ModelFamily
from int8run.outlier.base import LayerStatistics, OutlierMethod
from int8run.outlier.none import NoOutlier
from int8run.ptq.bits import assign_bits
from int8run.ptq.quantize import build_int8_layers, check_backend, check_outlier_method, quantize_layers
from int8run.quant.grouped_rounding import GroupLayout
from int8run.quant.rounding import AbsMax, Rounding

CONF = Path(__file__).parents[2] / "conf"
CPU = torch.device("cpu")
NEVER_FLOAT = Int8Settings(small_batch_fallback="never")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def full_range(*shape: int, seed: int = 0) -> Tensor:
    """Seeded int8 codes, all of -127..127."""
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def shipped(group: str) -> dict[str, Any]:
    """Every option of a config group that stands alone, built: a new YAML is a new row in the tests."""
    return dict(build_shipped(group))


@cache
def build_shipped(group: str) -> dict[str, Any]:
    """What `shipped` returns; twenty modules ask for it while pytest collects them."""
    configs = {file.stem: OmegaConf.load(file) for file in sorted((CONF / group).glob("*.yaml"))}
    return {
        name: instantiate(config, _convert_="all")
        for name, config in configs.items()
        if "defaults" not in config
    }


def usable(backend: Backend, device: torch.device) -> bool:
    """Whether this is an INT8 backend whose limits allow the device."""
    return not isinstance(backend, Float) and not backend.limits.unsupported_reasons(device)


def without_vnni() -> bool:
    """Whether this CPU has none of the int8 instructions that the fast CPU backends need."""
    return bool(OneDnn.limits.unsupported_reasons(CPU))


class TinyModel(nn.Module):
    """Two blocks between two projections, named like a denoiser; one width is no multiple of 4."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.proj_in = nn.Linear(7, 64)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
                for _ in range(2)
            )
            self.proj_out = nn.Linear(64, 12, bias=False)
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(x)
        for block in self.blocks:
            x = x + block(x)
        return self.proj_out(x)


def to_int8(
    model: nn.Module,
    backend: Backend | None = None,
    outlier: OutlierMethod | None = None,
    settings: Int8Settings = NEVER_FLOAT,
    keep_float: tuple[str, ...] = (),
    rounding: Rounding | None = None,
    statistics: dict[str, LayerStatistics] | None = None,
    bits: int = 8,
) -> tuple[nn.Module, list[LayerPlan]]:
    """An INT8 copy of a model and its plan, by the same steps as a run whose calls have 8 rows."""
    plans = plan_layers(model, lambda name: "kept by the test" if name in keep_float else None)
    chosen = [p for p in plans if p.skip_reason is None]
    check_backend(backend or Reference(), CPU, chosen)
    method = outlier or NoOutlier()
    check_outlier_method(method, chosen)
    methods = {p.name: method for p in chosen if not p.outlier_skip_reason}
    assign_bits(chosen, None if bits == 8 else GroupLayout(bits))
    layers = quantize_layers(
        model, chosen, methods=methods, rounding=rounding or AbsMax(), statistics=statistics or {}
    )
    made = build_int8_layers(
        model, layers, backend=backend or Reference(), settings=settings, rows={p.name: 8 for p in chosen}
    )
    return assemble_int8_model(model, made, ModelFamily("test")), plans


def lora_file(
    changes: Mapping[str, LoraChange], name: str = "style", unknown: Sequence[tuple[str, str]] = ()
) -> LoraFile:
    """A LoRA file that lies nowhere, with these changes of the denoiser."""
    file = LoraFile(Path("/loras") / f"{name}.safetensors", {DENOISER: dict(changes)}, tuple(unknown), {})
    file.__dict__["identity"] = name  # the hash of its bytes, had it any
    return file


def on_int8(
    model: nn.Module,
    int8: nn.Module,
    stack: Sequence[Mapping[str, LoraChange]],
    mode: str = "dynamic",
    **options: Any,
) -> LoraStack:
    """LoRAs on a float model and on its INT8 copy, at strength 0; options are those of `LoraStack.attach`."""
    loras = LoraStack(model, mode=mode)
    entries = [Entry(f"lora{i}", lora_file(changes, f"lora{i}")) for i, changes in enumerate(stack)]
    loras.install(entries, loras.match_entries(entries))
    loras.attach(int8, **{"float_weights": True, **options})
    return loras
