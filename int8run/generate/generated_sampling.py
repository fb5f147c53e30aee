"""How images were generated, where that differs from what was asked.

Pipelines round: a size to a multiple of their patches, a number of frames to what their VAE decodes; some
schedulers take more steps than asked. What is recorded of a run is what came out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from int8run.generate.generate import Generation
from int8run.models.sampling import NUM_FRAMES, Sampling

BATCH, STEPS = "sampler.batch", "sampler.steps"
TILES = "tiles_"  # begin of an argument of pipelines that work on tiles


@dataclass(frozen=True)
class Rounded:
    """A setting that a pipeline did not take as it was asked.

    Args:
        name: of the setting.
        asked: its value.
        generated: what came out.
    """

    name: str
    asked: int
    generated: int


def read_generated_sampling(asked: Sampling, generation: Generation) -> Sampling:
    """The settings with size, number of frames, steps and batch as they were generated.

    Args:
        asked: the settings.
        generation: what they gave.
    """
    steps = max(map(len, generation.step_seconds), default=asked.steps)
    known = replace(asked, steps=steps, batch=min(asked.batch, len(generation.trajectories)) or asked.batch)
    if not generation.frames:
        return known
    frames = generation.frames[0]
    extra = dict(asked.extra)
    if len(frames) > 1 or NUM_FRAMES in extra:
        extra[NUM_FRAMES] = len(frames)
    return replace(known, width=frames[0].width, height=frames[0].height, extra=extra)


def list_rounded(asked: Sampling, generated: Sampling) -> list[Rounded]:
    """What was asked for and came out otherwise."""
    pairs = [
        ("sampler.width", asked.width, generated.width),
        ("sampler.height", asked.height, generated.height),
        (STEPS, asked.steps, generated.steps),
        (BATCH, asked.batch, generated.batch),
        (f"sampler.extra.{NUM_FRAMES}", asked.extra.get(NUM_FRAMES), generated.extra.get(NUM_FRAMES)),
    ]
    return [
        Rounded(name, before, after)
        for name, before, after in pairs
        if before is not None and after is not None and before != after
    ]


def is_skipped(change: Rounded, strength: float) -> bool:
    """Whether fewer steps are what a strength asks for: it leaves out the first ones."""
    return change.name == STEPS and strength < 1 and change.generated < change.asked


def is_tiled(change: Rounded, parameters: Iterable[str]) -> bool:
    """Whether more steps are those of several tiles, of which each has as many as were asked for.

    Args:
        change: of a setting.
        parameters: names of the arguments of the pipeline's call.
    """
    is_multiple = change.name == STEPS and change.generated % change.asked == 0
    return is_multiple and any(name.startswith(TILES) for name in parameters)


def describe_tiled(change: Rounded, pipeline: str) -> str:
    """One line: `Kandinsky6SRPipeline takes sampler.steps=2 for each of 4 tiles`."""
    num_tiles = change.generated // change.asked
    return f"{pipeline} takes {STEPS}={change.asked} for each of {num_tiles} tiles"


def describe_skipped(change: Rounded, pipeline: str, strength: float) -> str:
    """One line: `FluxImg2ImgPipeline takes the last 10 of sampler.steps=16: the strength is 0.6`.

    Args:
        change: of the steps.
        pipeline: name of its class.
        strength: of the samples; of several the smallest.
    """
    taken = f"the last {change.generated} of {STEPS}={change.asked}"
    return f"{pipeline} takes {taken}: the strength is {strength:g}"


def describe_rounded(rounded: Sequence[Rounded], pipeline: str) -> str:
    """One line: `FluxPipeline rounded sampler.width=100 to 96; …`.

    Args:
        rounded: at least one.
        pipeline: name of its class.
    """
    changes = [f"{c.name}={c.asked} to {c.generated}" for c in rounded if c.name != BATCH]
    batches = [c for c in rounded if c.name == BATCH]
    parts = [f"{pipeline} rounded {', '.join(changes)}"] if changes else []
    for change in batches:
        parts.append(
            f"there are fewer images than {BATCH}={change.asked}, and a call makes {change.generated}"
        )
    parts.append("what was generated is recorded")
    return "; ".join(parts)
