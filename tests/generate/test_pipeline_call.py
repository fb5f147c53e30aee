"""The arguments of one call, and what is said where a pipeline cannot be called."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.instances_b import wan
from families.instances_edit import make_image, reuse

from int8run.errors import ConfigError
from int8run.generate.pipeline_call import call_pipeline
from int8run.generate.prompts import Sample
from int8run.models import missing_library
from int8run.models.sampling import Sampling


class Recorder:
    """A pipeline that only keeps the arguments of its call."""

    device = torch.device("cpu")

    def __call__(
        self,
        prompt: Any,
        generator: Any,
        negative_prompt: Any = None,
        callback_on_step_end: Any = None,
        **rest: Any,
    ) -> Any:
        self.heard = {"prompt": prompt, "generator": generator, "negative_prompt": negative_prompt}
        return SimpleNamespace(images=[])


@pytest.mark.parametrize(("prompts", "heard"), [(["a"], ("a", "b")), (["a", "c"], (["a", "c"], ["b", "b"]))])
def test_one_sample_is_passed_without_a_list(prompts: list[str], heard: tuple[Any, Any]) -> None:
    pipe: Any = Recorder()
    samples = [Sample(prompt, 7 + i, str(i)) for i, prompt in enumerate(prompts)]
    sampling = Sampling(steps=2, extra={"negative_prompt": "b"})

    call_pipeline(pipe, samples, sampling, lambda *_: {})

    assert (pipe.heard["prompt"], pipe.heard["negative_prompt"]) == heard
    generators = pipe.heard["generator"]
    if isinstance(generators, torch.Generator):
        generators = [generators]
    assert [generator.initial_seed() for generator in generators] == [sample.seed for sample in samples]


def test_library_that_a_pipeline_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanImageToVideoPipeline
    from diffusers.pipelines.wan import pipeline_wan_i2v

    monkeypatch.delattr(pipeline_wan_i2v, "ftfy", raising=False)
    monkeypatch.setattr(missing_library, "is_installed", lambda _: False)
    pipe = reuse(wan(), WanImageToVideoPipeline)
    sampling = Sampling(steps=2, height=48, width=48, extra={"image": make_image(48), "num_frames": 5})

    with pytest.raises(ConfigError, match=r"needs the library ftfy.*pip install ftfy"):
        call_pipeline(pipe, [Sample("a", 7, "0")], sampling, lambda *_: {})


def test_library_that_a_pipeline_asks_for_itself_is_named() -> None:
    from diffusers import LTX2ImageToVideoPipeline
    from diffusers.utils import is_av_available
    from families.instances_b import ltx2

    if is_av_available():
        pytest.skip("PyAV is installed")
    pipe = reuse(ltx2(), LTX2ImageToVideoPipeline)
    extra = {"image": make_image(32), "num_frames": 9, "max_sequence_length": 12}

    with pytest.raises(ConfigError, match=r"cannot import what it needs: .*PyAV"):
        sampling = Sampling(steps=2, height=32, width=32, extra=extra)
        call_pipeline(pipe, [Sample("a", 7, "0")], sampling, lambda *_: {})
