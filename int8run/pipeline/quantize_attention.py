"""INT8 attention of one model: planned from a traced step, measured on activations, put into the INT8 model.

build.py calls it around the quantization of the layers. What an attention is and how it is measured is known
in `ptq.attention`; nothing here sees the settings of a run as a whole.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from int8run.backends.attention import AttentionBackend, ReferenceAttention, list_attention_backends
from int8run.backends.autotune_cache import open_cache_of
from int8run.backends.base import Backend
from int8run.errors import BackendError
from int8run.generate.capture import capture_spread_calls
from int8run.generate.capture_attention import watch_attention
from int8run.generate.prompts import Sample
from int8run.layers.assemble import copy_sharing_tensors
from int8run.layers.int8_attention import Int8Attention, install_attention
from int8run.layers.plan import AUTO, FLOAT, Int8Settings, LayerPlan
from int8run.metrics.layers import count_macs
from int8run.models.dual_denoisers import set_denoiser
from int8run.pipeline.loaded_model import LoadedModel, computes_values, make_skip_rule
from int8run.pipeline.offload import set_offload
from int8run.ptq.attention import (
    PlannedAttention,
    TracedAttentions,
    give_backend,
    leave_inexact_float,
    list_int8_attentions,
    measure_attentions,
    plan_traced,
)
from int8run.ptq.attention_check import find_attention_fault
from int8run.ptq.attention_speed import AttentionSpeed, leave_slow_float

log = logging.getLogger(__name__)

Calls = Sequence[Mapping[str, Any]]  # arguments of the denoiser, by name


@dataclass(frozen=True)
class AttentionSettings:
    """What decides which attentions become INT8.

    Args:
        int8: has the mode, the least SQNR, and whether INT8 has to be faster.
        backend: of the config.
        float_attention: `attention=` of the config, which the float model computes with.
        dtype: of the float model.
    """

    int8: Int8Settings
    backend: Backend
    float_attention: str
    dtype: torch.dtype

    @property
    def is_auto(self) -> bool:
        """Whether each attention becomes INT8 only where it is exact and fast enough."""
        return self.int8.attention == AUTO

    @property
    def is_off(self) -> bool:
        """Whether all attentions stay float."""
        return self.int8.attention == FLOAT or not self.int8.enable


def count_step(denoiser: nn.Module, calls: Calls) -> tuple[dict[str, int], TracedAttentions]:
    """Run one step, and count the multiply-adds of every layer and every attention in it, by name.

    Args:
        denoiser: runs once for each call.
        calls: its arguments.

    Returns:
        The multiply-adds, and what each attention multiplied.
    """
    traced = TracedAttentions()
    with watch_attention(denoiser, traced.note_call, traced.note_softmax):
        macs = count_macs(denoiser, calls)
    return macs | traced.macs, traced


def plan_attentions(
    loaded: LoadedModel, traced: TracedAttentions, settings: AttentionSettings, probe: Sequence[Sample]
) -> "ModelAttentions":
    """A plan for every attention of a model, with its backend where it can be INT8.

    Args:
        loaded: the model.
        traced: what one step showed.
        settings: which attentions become INT8.
        probe: samples of one batch, on which INT8 attention is measured.

    Raises:
        BackendError: when no INT8 attention runs on the device.
    """
    planned = plan_traced(traced, make_skip_rule(loaded.family, loaded.denoiser))
    attentions = ModelAttentions(planned, settings, probe)
    if settings.is_off:
        leave_all_float(planned, "int8.attention=float")
        return attentions
    backend = choose_backend(planned, settings, loaded.device)
    if backend is None:
        leave_all_float(planned, f"only the slow reference computes INT8 attention on {loaded.device.type}")
    else:
        give_backend(planned, backend, asked=settings.backend.name)
    return attentions


def leave_all_float(planned: Sequence[PlannedAttention], reason: str) -> None:
    """Keep every attention float, for a reason that counts where there is no other."""
    for attention in planned:
        if attention.plan.skip_reason is None:
            attention.leave_float(reason)


def choose_backend(
    planned: Sequence[PlannedAttention], settings: AttentionSettings, device: torch.device
) -> AttentionBackend | None:
    """The fastest INT8 attention on a device; None: with `auto`, where only the slow reference is there.

    Args:
        planned: have the widths that it is tried with.
        settings: which attentions become INT8.
        device: where they run.

    Raises:
        BackendError: when there is none.
    """
    asked = settings.backend.name
    backend = find_right_backend(planned, settings, device)
    is_slow = isinstance(backend, ReferenceAttention) and asked != backend.name
    if is_slow and settings.is_auto:
        return None
    if is_slow:
        log.warning(
            "int8.attention=%s has none but reference, the slow definition, on %s",
            settings.int8.attention,
            device,
        )
    return backend


def find_right_backend(
    planned: Sequence[PlannedAttention], settings: AttentionSettings, device: torch.device
) -> AttentionBackend:
    """The first backend that computes attention rightly here; why others do not is logged.

    Args:
        planned: have the widths that it is tried with.
        settings: which backends come into question.
        device: where the model runs.

    Raises:
        BackendError: when there is none.
    """
    plans = [attention.plan for attention in planned if attention.plan.skip_reason is None]
    widths = dict.fromkeys((plan.in_features, plan.out_features) for plan in plans)
    faults = []
    for backend in list_attention_backends(settings.backend, device):
        fault = find_attention_fault(backend, widths, device, settings.dtype)
        if fault is None:
            return backend
        log.warning("INT8 attention leaves out %s: %s", backend.name, fault)
        faults.append(f" ({backend.name}: {fault})")
    raise BackendError(
        f"int8.attention={settings.int8.attention}: no INT8 attention runs on {device}{''.join(faults)}; set "
        "int8.attention=float"
    )


@dataclass
class ModelAttentions:
    """The attentions of one model on their way to INT8.

    Args:
        planned: changed by each step.
        settings: which of them become INT8.
        probe: samples of one batch, on which they are measured.
        is_chosen: whether they were measured.
    """

    planned: Sequence[PlannedAttention]
    settings: AttentionSettings
    probe: Sequence[Sample]
    is_chosen: bool = False

    @property
    def plans(self) -> list[LayerPlan]:
        """Their rows in `layers.csv`."""
        return [attention.plan for attention in self.planned]

    @property
    def layers(self) -> dict[str, Int8Attention]:
        """What computes those in INT8, by the name of the module."""
        return list_int8_attentions(self.planned)

    def choose_on_float_model(self, loaded: LoadedModel, denoiser: nn.Module) -> None:
        """Choose on the activations of the float model, where its weights are in memory.

        Args:
            loaded: the model.
            denoiser: that ran the traced step.

        Raises:
            ConfigError: where INT8 computes NaN or infinity and float does not.
        """
        if computes_values(denoiser):
            self.choose(loaded, denoiser)

    def choose_on_int8_model(self, loaded: LoadedModel, denoiser: nn.Module) -> None:
        """Choose on those of the INT8 model, where that was not done, and give it the INT8 attentions.

        Args:
            loaded: the model, whose pipeline moves the denoiser to a GPU where it is offloaded.
            denoiser: the INT8 one; its attention is float until now.

        Raises:
            ConfigError: where INT8 computes NaN or infinity and float does not.
        """
        if self.is_chosen:
            return
        if self.layers:
            # hooks that offload a module remember its forward of now
            trial = copy_sharing_tensors(denoiser)
            set_denoiser(loaded.pipe, trial, loaded.component)
            set_offload(loaded.pipe, loaded.offload, loaded.device)
            self.choose(loaded, trial)
        install_attention(denoiser, self.layers)

    def choose(self, loaded: LoadedModel, denoiser: nn.Module) -> None:
        """Measure, and with `auto` keep those float that are not exact or not fast enough.

        Args:
            loaded: says where they run.
            denoiser: whose activations are the inputs.
        """
        self.is_chosen = True
        if not self.layers:
            return
        settings = self.settings
        # one step may be kinder to a softmax than another: at first there is noise alone
        calls = capture_spread_calls(loaded.pipe, loaded.component, denoiser, self.probe, loaded.sampling)
        measure_attentions(denoiser, calls, self.planned)
        if not settings.is_auto:
            return
        leave_inexact_float(self.planned, settings.int8.attention_min_sqnr_db)
        if settings.int8.only_if_faster:
            cache = open_cache_of(settings.backend, loaded.device, settings.dtype)
            speed = AttentionSpeed(cache, loaded.device, settings.dtype, settings.float_attention)
            leave_slow_float(self.planned, speed)

    def report(self) -> None:
        """Log which stay float although INT8 was asked for, with the number for each reason."""
        mode = self.settings.int8.attention
        if self.settings.is_off:
            return
        if not self.planned:
            log.warning("int8.attention=%s: no attention was seen in a step of this denoiser", mode)
            return
        reasons = Counter(plan.skip_reason for plan in self.plans if plan.skip_reason is not None)
        if not reasons:
            return
        log.log(
            logging.INFO if self.settings.is_auto else logging.WARNING,
            "int8.attention=%s: %d of %d attentions stay float (%s)",
            mode,
            reasons.total(),
            len(self.planned),
            "; ".join(f"{count} × {reason}" for reason, count in reasons.items()),
        )
