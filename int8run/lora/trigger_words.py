"""Trigger words of a LoRA: found in its header, in files beside it or in what it tells about its training.

`lora/header_info.py` adds them to prompts or warns where prompts lack them; `task=inspect` lists them.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from int8run.lora.untrusted_text import (
    as_dict,
    as_list,
    get_nested,
    is_empty,
    parse_json,
    read_front_matter,
    read_optional_text,
    sanitize_text,
)

MAX_WORDS = 20
MAX_WORD_CHARS = 100
MAX_FREE_TEXT_CHARS = 2000
MAX_FOLDER_NAME_CHARS = 200
# a tag in this share of a folder's captions is taken for a trigger word
FREQUENT_TAG_SHARE = 0.9
MAX_TAGS_PER_FOLDER = 3
LARGEST_IMAGE_COUNT = 10**9

TRIGGER_PHRASE_KEY = "modelspec.trigger_phrase"
FREE_TEXT_KEYS = ("modelspec.usage_hint", "modelspec.description")
COMMUNITY_KEYS = ("ss_trigger_words", "trigger_words", "trigger_phrase", "instance_prompt", "activation_text")
# end of a file beside the LoRA, after the LoRA's stem -> where the words are in it
SIDECARS = {
    ".json": (("activation text",),),
    ".civitai.info": (("trainedWords",),),
    ".metadata.json": (("trainedWords",), ("civitai", "trainedWords")),
}


@dataclass(frozen=True)
class TriggerWords:
    """Words that call up what a LoRA learned.

    Args:
        words: phrases to put into a prompt.
        source: where they were found.
        is_guessed: they come from the training data, nobody named them as triggers.
    """

    words: tuple[str, ...]
    source: str
    is_guessed: bool = False


# -- in prompts ----------------------------------------------------------------------------------------------


def find_missing_triggers(prompt: str, words: Iterable[str]) -> tuple[str, ...]:
    """The words that a prompt lacks; upper and lower case are the same, only whole words count."""
    missing = []
    for word in words:
        if word.strip() and not re.search(build_word_pattern(word), prompt, re.IGNORECASE):
            missing.append(word)
    return tuple(missing)


def append_triggers(prompt: str, words: Iterable[str]) -> str:
    """The prompt with the words that it lacks at its end."""
    missing = find_missing_triggers(prompt, words)
    if not missing:
        return prompt
    phrases = [prompt.rstrip(" ,"), *missing]
    return ", ".join(phrase for phrase in phrases if phrase)


def build_word_pattern(phrase: str) -> str:
    """A regular expression for a whole word or phrase, whatever the spaces in it."""
    words = phrase.split()
    # Chinese, Japanese and others (letters without upper and lower case) have no spaces between words
    before = "" if unicodedata.category(words[0][0]) == "Lo" else r"(?<!\w)"
    after = "" if unicodedata.category(words[-1][-1]) == "Lo" else r"(?!\w)"
    return before + r"\s+".join(map(re.escape, words)) + after


# -- of a file -----------------------------------------------------------------------------------------------


def find_trigger_words(path: Path, metadata: Mapping[str, str]) -> TriggerWords | None:
    """The trigger words of a LoRA from the first source that has any, or None."""
    return next(iter_trigger_words(path, metadata), None)


def iter_trigger_words(path: Path, metadata: Mapping[str, str]) -> Iterator[TriggerWords]:
    """Trigger words from every source that has some, the most reliable first.

    Args:
        path: of the LoRA.
        metadata: of its header, untrusted.
    """
    for source, phrases in iter_named_phrases(path, metadata):
        words = clean_words(phrases)
        if words:
            yield TriggerWords(words, source)
    for source, phrases in iter_training_phrases(metadata):
        words = clean_words(phrases)
        if words:
            yield TriggerWords(words, source, is_guessed=True)


def clean_words(phrases: Iterable[str]) -> tuple[str, ...]:
    """The phrases as lines for people, without empty and repeated ones."""
    lines = [sanitize_text(phrase, MAX_WORD_CHARS) for phrase in phrases]
    unique = dict.fromkeys(line for line in lines if not is_empty(line))
    return tuple(unique)[:MAX_WORDS]


def iter_named_phrases(path: Path, metadata: Mapping[str, str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Sources in which somebody named trigger words, with their phrases: the header, then files beside it."""
    yield TRIGGER_PHRASE_KEY, split_phrases(metadata.get(TRIGGER_PHRASE_KEY))
    for key in FREE_TEXT_KEYS:
        yield key, find_quoted_words(metadata.get(key))
    for key in COMMUNITY_KEYS:
        yield key, split_phrases(metadata.get(key))
    for suffix, places in SIDECARS.items():
        sidecar = path.with_name(path.stem + suffix)
        content = parse_json(read_optional_text(sidecar))
        for keys in places:
            yield sidecar.name, split_phrases(get_nested(content, keys))
    yield "README.md", split_phrases(read_front_matter(path).get("instance_prompt"))


def iter_training_phrases(metadata: Mapping[str, str]) -> Iterator[tuple[str, Sequence[str]]]:
    """What kohya's trainer wrote about the training data, which tells what the LoRA learned."""
    folders = parse_json(metadata.get("ss_dataset_dirs"))
    yield "ss_datasets", read_class_tokens(parse_json(metadata.get("ss_datasets")))
    yield "ss_dataset_dirs", parse_folder_tokens(folders)
    yield "ss_tag_frequency", find_common_tags(parse_json(metadata.get("ss_tag_frequency")), folders)


def split_phrases(value: object) -> list[str]:
    """Phrases in a text with commas, a list, or a JSON list."""
    phrases = []
    for text in list_texts(value)[:MAX_WORDS]:
        if isinstance(text, str):
            phrases += re.split(r"[,\n;]", text[: MAX_WORDS * MAX_WORD_CHARS])
    return phrases


def list_texts(value: object) -> list[object]:
    """The items of a list or a JSON list; anything else is the only item."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        parsed = parse_json(value)
        if isinstance(parsed, list):
            return parsed
    if isinstance(value, list):
        return value
    return [value]


def find_quoted_words(text: object) -> list[str]:
    """Words in quotes in a text that speaks of triggers (`Use keyword 'example'`)."""
    if not isinstance(text, str):
        return []
    text = text[:MAX_FREE_TEXT_CHARS]
    if not re.search(r"trigger|keyword|activat", text, re.IGNORECASE):
        return []
    quotes = re.finditer(r"(?<!\w)(['\"`])([^'\"`]{1,60})\1(?!\w)", text)
    return [quote[2] for quote in quotes]


def read_class_tokens(datasets: object) -> list[str]:
    """`class_tokens` and `caption_prefix` of kohya's data sets.

    Those for regularization are skipped: they show what the LoRA is not about.
    """
    phrases = []
    for dataset in as_list(datasets):
        for subset in as_list(as_dict(dataset).get("subsets")):
            settings = as_dict(subset)
            if not settings.get("is_reg"):
                phrases += split_phrases(settings.get("class_tokens"))
                phrases += split_phrases(settings.get("caption_prefix"))
    return phrases


def parse_folder_tokens(folders: object) -> list[str]:
    """Class tokens in folder names, `<repeats>_<class tokens>`."""
    phrases = []
    for name in as_dict(folders):
        match = re.match(r"\d+_(.+)", str(name)[:MAX_FOLDER_NAME_CHARS])
        if match:
            phrases += split_phrases(match[1])
    return phrases


def find_common_tags(frequency: object, folders: object) -> list[str]:
    """Tags in almost every caption of a folder, at most `MAX_TAGS_PER_FOLDER` for each.

    Args:
        frequency: folder -> tag -> number of captions with it.
        folders: folder -> `img_count`; without it the most frequent tag counts as being in every caption.
    """
    common = []
    for folder, tags in as_dict(frequency).items():
        counts = {tag: count for tag, count in as_dict(tags).items() if is_image_count(count)}
        num_captions = get_nested(folders, (folder, "img_count"))
        if not is_image_count(num_captions):
            num_captions = max(counts.values(), default=0)
        # in one caption no tag is more frequent than another
        is_comparable = num_captions > 1 or len(counts) == 1
        if not is_comparable:
            continue
        frequent = [tag for tag, count in counts.items() if count >= FREQUENT_TAG_SHARE * num_captions]
        frequent.sort(key=lambda tag: -counts[tag])
        common += frequent[:MAX_TAGS_PER_FOLDER]
    return common


def is_image_count(value: object) -> bool:
    """Whether a value can be a number of images."""
    return type(value) is int and 0 < value < LARGEST_IMAGE_COUNT
