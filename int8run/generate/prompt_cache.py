"""A cache of encoded prompts: equal prompts are encoded once, for both denoisers and all jobs of a sweep."""

from collections.abc import Callable, Iterator
from types import NoneType
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

from int8run.generate.pipeline_call import get_execution_device
from int8run.utils.timing import read_clock

MAX_CACHED_PROMPTS = 64  # for each set of text encoders; of FLUX, each takes 4 MB on the device

# Prompts are cached by their arguments where all are of these types, or lists of them: equal ones mean equal
# text.
PLAIN_TYPES = (str, int, float, NoneType, torch.device, torch.dtype)


class EncodedPrompt(NamedTuple):
    """What one call of `encode_prompt` returned.

    Args:
        embeddings: the result.
        seconds: that it took.
        args, kwargs: its arguments.
    """

    embeddings: Any
    seconds: float
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class PromptCache:
    """Takes the place of a pipeline's `encode_prompt` and remembers its results.

    The time that it saves is counted, so that speeds remain those of a pipeline that encodes every time.

    Args:
        encode: the pipeline's own `encode_prompt`.
        device: where the pipeline computes.
    """

    def __init__(self, encode: Callable[..., Any], device: torch.device):
        self.encode = encode
        self.device = device
        self.encoder_key = ""  # which text encoders the pipeline has now, where it has several sets in turn
        self.entries: dict[str, dict[str, EncodedPrompt]] = {}  # by text encoders, by arguments
        self.requested: set[str] = set()  # arguments, since somebody emptied it
        self.saved_seconds = 0.0

    @staticmethod
    def for_pipeline(pipe: DiffusionPipeline) -> "PromptCache":
        """The pipeline's cache, installed at the first call.

        A pipeline without `encode_prompt` is left as it is.
        """
        encode = getattr(pipe, "encode_prompt", None)
        if isinstance(encode, PromptCache):
            return encode
        cache = PromptCache(encode or (lambda: None), get_execution_device(pipe))
        if encode is not None:
            pipe.encode_prompt = cache
        return cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`encode_prompt` itself; a call with tensors or images of its own is not cached."""
        if not all(map(is_plain, [*args, *kwargs.values()])):
            return self.encode(*args, **kwargs)

        key = repr((args, sorted(kwargs.items())))
        self.requested.add(key)
        entries = self.entries.setdefault(self.encoder_key, {})
        if key in entries:
            self.saved_seconds += entries[key].seconds
            return entries[key].embeddings

        started = read_clock(self.device)
        embeddings = self.encode(*args, **kwargs)
        entries[key] = EncodedPrompt(embeddings, read_clock(self.device) - started, args, kwargs)
        if len(entries) > MAX_CACHED_PROMPTS:
            oldest = next(iter(entries))
            del entries[oldest]
        return embeddings

    def iter_pairs(self, encoder_key: str) -> Iterator[tuple[Any, Any]]:
        """The embeddings of the current text encoders and of others, for each prompt that was requested.

        Args:
            encoder_key: of the other text encoders.
        """
        others = self.entries.get(encoder_key, {})
        for entry in [entry for key, entry in others.items() if key in self.requested]:
            yield self(*entry.args, **entry.kwargs), entry.embeddings

    def clear(self) -> None:
        """Forget all results: the text encoders have changed."""
        self.entries.clear()


def is_plain(value: object) -> bool:
    """Whether the text of a value tells all about it."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return isinstance(value, PLAIN_TYPES)
