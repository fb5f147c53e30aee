"""How a run calls the model that it built: its layers, methods, LoRAs and parts that stay float.

Called by `tasks.run_logs` before anything is generated. Nothing is measured here.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from int8run.config.run_spec import RunSpec
from int8run.layers.plan import ATTENTION, FLOAT, LayerPlan
from int8run.layers.step_precision import computes_in_float, describe_steps
from int8run.lora.stack import LoraStack
from int8run.metrics.layers import (
    compute_attention_metrics,
    compute_int8_shares,
    count_module_bytes,
    count_own_bytes,
)
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.controlnets import BuiltControlnet
from int8run.report.formatting import format_megabytes
from int8run.utils.plurals import count_noun
from int8run.utils.step_schedule import Schedule


def describe_build(spec: RunSpec, built: BuiltModel, *, is_reused: bool) -> list[tuple[str, object]]:
    """Describe what was built, as names and values for the line before the bars.

    Args:
        spec: the settings.
        built: the model.
        is_reused: whether an earlier job built it.
    """
    facts: list[tuple[str, object]] = [("family", built.family.name), ("device", built.device)]
    facts += describe_layers(built)
    if spec.int8.steps is not None:
        facts.append(("steps", describe_shared_steps(spec.int8.steps, built)))
    if spec.int8.attention != FLOAT:
        facts.append(("attention", describe_attention(built.plans)))
    if built.vae is not None:
        facts.append(("vae", describe_vae(built.vae.plans)))
    if spec.lora.adapters:
        facts.append(("lora", describe_loras(spec, built.loras)))
    for component, encoder in built.encoders.built.items():
        facts.append((component, list_counts(map(name_format, encoder.plans))))
    for controlnet in built.controlnets:
        facts.append((controlnet.component, describe_controlnet(controlnet)))
    preset = spec.lora.find_preset(spec.model.lora_base, spec.sampler.steps)
    if preset is not None:
        scheduler = type(built.pipe.scheduler).__name__
        steps = count_noun(spec.sampling.steps or 0, "step")
        facts.append(("few steps", f"{preset.name}: {steps}, {scheduler}"))
    if spec.compile != "none":
        facts.append(("compile", spec.compile))
    if is_reused:
        facts.append(("model", "reused"))
    return facts


def name_format(plan: LayerPlan) -> str:
    """The format of a text encoder's layer."""
    return "float" if plan.skip_reason is not None else plan.rounding


def name_backend(plan: LayerPlan) -> str:
    """`cpu (avx512_vnni)`: the backend of a layer, with the instruction set of its kernels."""
    return f"{plan.backend_used} ({plan.instructions})" if plan.instructions else plan.backend_used


def describe_layers(built: BuiltModel) -> list[tuple[str, object]]:
    """Describe how much of the denoiser is INT8, and by which methods."""
    layers = [plan for plan in built.plans if plan.kind != ATTENTION]
    by_choice = sum(plan.is_float_by_choice for plan in layers)
    backends = sorted({name_backend(plan) for plan in layers if plan.backend_used})
    if not backends:
        return [("layers", f"all float, {by_choice} by choice" if by_choice else "all float")]
    int8 = [plan for plan in layers if plan.skip_reason is None]
    shares = compute_int8_shares(built.plans, built.num_params)
    what = "Linears" if all(plan.is_linear for plan in layers) else "layers"
    num_int8 = f"{len(int8)} of {len(layers)} {what} INT8"
    macs_share = f"{shares['quant/macs_int8_share']:.1%} of the multiply-adds"
    if by_choice:
        macs_share += f", {by_choice} float by choice"
    weights: list[tuple[str, object]] = []
    if any(plan.bits < 8 for plan in int8):
        weights.append(("weights", format_counts(f"int{plan.bits}" for plan in int8)))
    return [
        ("layers", f"{num_int8}, {macs_share}"),
        *weights,
        # the method alone, without its parameters
        ("outlier", format_counts(plan.outlier.partition(" ")[0] for plan in int8)),
        ("rounding", format_counts(plan.rounding for plan in int8)),
        ("backend", "+".join(backends)),
    ]


def describe_shared_steps(steps: Schedule, built: BuiltModel) -> str:
    """Describe who computes which steps: `float, int8 from 10 % of the steps on (+ 42.5 MB)`.

    Args:
        steps: as `int8.steps` has it.
        built: the model.
    """
    described = describe_steps(steps)
    if not computes_in_float(steps):
        return described
    float_bytes = count_own_bytes(built.denoisers["float"], built.denoisers["int8"])
    return f"{described} (+ {format_megabytes(float_bytes)} of floats)"


def describe_attention(plans: Sequence[LayerPlan]) -> str:
    """Describe how many attentions are INT8, where and how exactly: `int8 12 of 12 on cpu, 41.2 dB mean`.

    Args:
        plans: of all layers; those of another kind are passed over.
    """
    int8 = [plan for plan in plans if plan.kind == ATTENTION and plan.skip_reason is None]
    metrics = compute_attention_metrics(plans)
    num_all = metrics["quant/attention_int8"] + metrics["quant/attention_float"]
    if not int8:
        return f"float, all {num_all:.0f}"
    backends = "+".join(sorted({name_backend(plan) for plan in int8}))
    described = f"int8 {len(int8)} of {num_all:.0f} on {backends}"
    if "quant/attention_sqnr_db_mean" in metrics:
        described += f", {metrics['quant/attention_sqnr_db_mean']:.1f} dB mean"
    return described


def describe_vae(plans: Sequence[LayerPlan]) -> str:
    """Describe how many layers of the INT8 VAE are INT8, and where: `int8 33 of 38 layers on cpu`.

    Args:
        plans: of the VAE's layers, one of which is INT8 at least.
    """
    int8 = [plan for plan in plans if plan.skip_reason is None]
    backends = "+".join(sorted({name_backend(plan) for plan in int8 if plan.backend_used}))
    return f"int8 {len(int8)} of {len(plans)} layers on {backends}"


def describe_controlnet(controlnet: BuiltControlnet) -> str:
    """Describe a ControlNet: `int8 33 of 40 layers on cpu, 97.1% of its multiply-adds, 6.1 MB`.

    Args:
        controlnet: of the pipeline.
    """
    size = format_megabytes(count_module_bytes(controlnet.module))
    int8 = [plan for plan in controlnet.plans if plan.skip_reason is None]
    if not int8:
        reasons = {plan.skip_reason for plan in controlnet.plans}
        reason = f" ({reasons.pop()})" if len(reasons) == 1 else ""
        return f"float, {size}{reason}"
    backends = "+".join(sorted({name_backend(plan) for plan in int8 if plan.backend_used}))
    share = sum(plan.macs_share or 0.0 for plan in int8)
    layers = f"{len(int8)} of {len(controlnet.plans)} layers"
    return f"int8 {layers} on {backends}, {share:.1%} of its multiply-adds, {size}"


def describe_loras(spec: RunSpec, loras: LoraStack) -> str:
    """Describe the LoRAs by their strengths, in order where one changes, and how they are applied."""
    strengths = []
    for adapter in spec.lora.adapters:
        scheduled = [f"{strength * spec.lora.strength:g}" for _, strength in adapter.schedule]
        strengths.append(f"{adapter.name} {'→'.join(scheduled)}")
    if spec.lora.is_baked:
        how = "baked"
    elif loras.layers_by_mode:
        how = format_counts(Counter(loras.layers_by_mode).elements())
    else:
        how = "merged"
    return f"{', '.join(strengths)} ({how})"


def format_counts(names: Iterable[str]) -> str:
    """Return the one name, or each name with its count: `convrot 20, none 12`."""
    counts = Counter(names)
    if len(counts) == 1:
        return next(iter(counts))
    return list_counts(counts.elements())


def list_counts(names: Iterable[str]) -> str:
    """Return each name with its count, the most frequent first: `nvfp4 96, float 3`."""
    return ", ".join(f"{name} {count}" for name, count in Counter(names).most_common())


def name_candidate(spec: RunSpec) -> str:
    """Return what the candidate is called beside the float model.

    With INT8 disabled and nothing else changed it is the float model itself.
    """
    int8 = f"INT8, {spec.cache_steps.name}" if spec.has_step_cache else "INT8"
    names = {"int8": int8, "clip": f"clip={spec.clip.format}", "float": "float (int8.enable=false)"}
    return names[spec.candidate]
