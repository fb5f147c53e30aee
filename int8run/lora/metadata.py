"""What a LoRA file says about itself: trigger words, trainer, rank, license. Everything here was written by a stranger.

Values are cut to a length before they are looked at, parsed only as JSON, and lose their control characters before
anybody sees them. Nothing in a header can make these functions fail.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_JSON_CHARS = 10_000_000  # characters; the tag counts of a large data set are a few million
MAX_SIDECAR_BYTES = 4_000_000  # bytes
MAX_WORDS = 20
MAX_WORD_CHARS = 100
MAX_TEXT_CHARS = 200
FREQUENT_TAG_SHARE = 0.9  # share of the captions
MAX_TAGS_PER_FOLDER = 3
EMPTY_VALUES = ("", "none", "null", "n/a", "false", "undefined")

TRIGGER_PHRASE_KEY = "modelspec.trigger_phrase"
FREE_TEXT_KEYS = ("modelspec.usage_hint", "modelspec.description")
COMMUNITY_KEYS = ("ss_trigger_words", "trigger_words", "trigger_phrase", "instance_prompt", "activation_text")
# suffix after the LoRA's stem -> where the words stand in it
SIDECARS = {
    ".json": (("activation text",),),
    ".civitai.info": (("trainedWords",),),
    ".metadata.json": (("trainedWords",), ("civitai", "trainedWords")),
}
# metadata key -> trainer; the first that is there counts
TRAINER_BY_KEY = {
    "ot_revision": "OneTrainer",
    "ot_branch": "OneTrainer",
    "ot_config": "OneTrainer",
    "lora_adapter_metadata": "diffusers / PEFT",
}
# part of a key -> layout, where the metadata names no trainer; the first that is there counts
LAYOUT_BY_KEY_PART = {
    "hada_w": "LyCORIS layout",
    "lokr_w": "LyCORIS layout",
    "lycoris_": "LyCORIS layout",
    "lora_transformer_": "OneTrainer layout",
    "lora_unet_": "kohya layout",
    "lora_te": "kohya layout",
    "processor.": "diffusers layout, old or xlabs",
    "diffusion_model.": "ComfyUI / ai-toolkit layout",
    "lora_A": "diffusers / PEFT layout",
}


@dataclass(frozen=True)
class TriggerWords:
    """Words that call up what a LoRA learned.

    Args:
        words: phrases to put into a prompt.
        source: where they stand.
        guessed: they are drawn from the training data, nobody named them as triggers.
    """

    words: tuple[str, ...]
    source: str
    is_guessed: bool = False


def find_trigger_words(path: Path, metadata: Mapping[str, str]) -> TriggerWords | None:
    """The trigger words of a LoRA from the first place that has any, or None."""
    return next(iter_trigger_words(path, metadata), None)


def iter_trigger_words(path: Path, metadata: Mapping[str, str]) -> Iterator[TriggerWords]:
    """Trigger words from every place that has some, the most reliable first: header, sidecar files, training data."""
    found: list[tuple[Sequence[str], str, bool]] = [
        (split_phrases(metadata.get(TRIGGER_PHRASE_KEY)), TRIGGER_PHRASE_KEY, False)
    ]
    found += [(find_quoted_words(metadata.get(key)), key, False) for key in FREE_TEXT_KEYS]
    found += [(split_phrases(metadata.get(key)), key, False) for key in COMMUNITY_KEYS]
    for suffix, places in SIDECARS.items():
        sidecar = path.with_name(path.stem + suffix)
        content = parse_json(read_optional_text(sidecar))
        found += [(split_phrases(get_nested(content, place)), sidecar.name, False) for place in places]
    found.append((split_phrases(read_front_matter(path).get("instance_prompt")), "README.md", False))
    found.append((read_class_tokens(parse_json(metadata.get("ss_datasets"))), "ss_datasets", True))
    found.append((parse_folder_tokens(parse_json(metadata.get("ss_dataset_dirs"))), "ss_dataset_dirs", True))
    tags = parse_json(metadata.get("ss_tag_frequency"))
    found.append(
        (find_common_tags(tags, parse_json(metadata.get("ss_dataset_dirs"))), "ss_tag_frequency", True)
    )
    for words, source, guessed in found:
        kept = tuple(
            dict.fromkeys(
                word
                for text in words
                if (word := sanitize_text(text, MAX_WORD_CHARS)).lower() not in EMPTY_VALUES
            )
        )[:MAX_WORDS]
        if kept:
            yield TriggerWords(kept, source, guessed)


def find_missing_triggers(prompt: str, words: Iterable[str]) -> tuple[str, ...]:
    """The words that a prompt lacks; letters may be large or small, only whole words count."""
    return tuple(
        word
        for word in words
        if word.strip() and not re.search(build_word_pattern(word), prompt, re.IGNORECASE)
    )


def append_triggers(prompt: str, words: Iterable[str]) -> str:
    """The prompt with the words that it lacks at its end."""
    lacking = find_missing_triggers(prompt, words)
    return ", ".join(filter(None, (prompt.rstrip(" ,"), *lacking))) if lacking else prompt


def build_word_pattern(phrase: str) -> str:
    """A regular expression for a whole word or phrase, whatever the spaces in it."""
    words = phrase.split()
    # Chinese, Japanese and others (letters without small and large ones) have no spaces between words
    before = "" if unicodedata.category(words[0][0]) == "Lo" else r"(?<!\w)"
    after = "" if unicodedata.category(words[-1][-1]) == "Lo" else r"(?!\w)"
    return before + r"\s+".join(map(re.escape, words)) + after


def describe_header(path: Path, metadata: Mapping[str, str], keys: Iterable[str]) -> dict[str, str]:
    """What is worth showing of a LoRA's header, as name -> text; what it does not say is left out.

    Args:
        keys: names of the tensors, which show the layout where no trainer is named.
    """
    said = {
        "title": metadata.get("modelspec.title"),
        "author": metadata.get("modelspec.author"),
        "trainer": detect_trainer(metadata, keys),
        "rank and alpha": format_rank_and_alpha(metadata),
        "resolution": metadata.get("modelspec.resolution") or metadata.get("ss_resolution"),
        "license": metadata.get("modelspec.license") or read_front_matter(path).get("license"),
        "usage hint": metadata.get("modelspec.usage_hint"),
        "tags": metadata.get("modelspec.tags"),
        "advised strength": get_nested(
            parse_json(read_optional_text(path.with_name(path.stem + ".json"))), ("preferred weight",)
        ),
    }
    texts = {name: sanitize_text(value, MAX_TEXT_CHARS) for name, value in said.items()}
    return {name: text for name, text in texts.items() if text.lower() not in EMPTY_VALUES}


def detect_trainer(metadata: Mapping[str, str], keys: Iterable[str]) -> str | None:
    """The program that made a file, else whose layout it has, or None."""
    software = get_nested(parse_json(metadata.get("software")), ("name",))
    if isinstance(software, str):
        return software
    module, algorithm = (
        metadata.get("ss_network_module"),
        get_nested(parse_json(metadata.get("ss_network_args")), ("algo",)),
    )
    if isinstance(module, str) and module.startswith("lycoris"):
        return f"LyCORIS ({algorithm})" if isinstance(algorithm, str) else "LyCORIS"
    if isinstance(module, str) and module:
        return f"kohya ({module})"
    named = next((name for key, name in TRAINER_BY_KEY.items() if key in metadata), None)
    keys = list(keys)
    return named or next(
        (name for part, name in LAYOUT_BY_KEY_PART.items() if any(part in key for key in keys)), None
    )


def format_rank_and_alpha(metadata: Mapping[str, str]) -> str | None:
    """`rank 16, alpha 8` as the header has it; ranks in the tensors may differ."""
    peft = parse_json(metadata.get("lora_adapter_metadata"))
    by_end = (
        {str(key).rpartition(".")[2]: value for key, value in peft.items()} if isinstance(peft, dict) else {}
    )
    rank = metadata.get("ss_network_dim") or by_end.get("r")
    alpha = metadata.get("ss_network_alpha") or by_end.get("lora_alpha")
    parts = [
        f"{name} {value}"
        for name, value in (("rank", rank), ("alpha", alpha))
        if sanitize_text(value, MAX_WORD_CHARS).lower() not in EMPTY_VALUES
    ]
    return ", ".join(parts) or None


# -- one place each ----------------------------------------------------------------------------------------------------


def split_phrases(value: object) -> list[str]:
    """Phrases in a text with commas, a list, or a JSON list."""
    if isinstance(value, str) and isinstance(
        several := parse_json(value) if value.lstrip().startswith("[") else None, list
    ):
        value = several
    texts = value if isinstance(value, list) else [value]
    return [
        part
        for text in texts[:MAX_WORDS]
        if isinstance(text, str)
        for part in re.split(r"[,\n;]", text[: MAX_WORDS * MAX_WORD_CHARS])
    ]


def find_quoted_words(text: object) -> list[str]:
    """Words in quotes in a text that speaks of triggers (`Use keyword 'example'`)."""
    if not isinstance(text, str) or not re.search(
        r"trigger|keyword|activat", text := text[:2000], re.IGNORECASE
    ):
        return []
    return [match[2] for match in re.finditer(r"(?<!\w)(['\"`])([^'\"`]{1,60})\1(?!\w)", text)]


def read_class_tokens(datasets: object) -> list[str]:
    """`class_tokens` and `caption_prefix` of kohya's data sets; pictures for regularization show what the LoRA is not about."""
    subsets = [
        s
        for d in as_list(datasets)
        if isinstance(d, dict)
        for s in as_list(d.get("subsets"))
        if isinstance(s, dict)
    ]
    return [
        part
        for s in subsets
        if not s.get("is_reg")
        for key in ("class_tokens", "caption_prefix")
        for part in split_phrases(s.get(key))
    ]


def parse_folder_tokens(folders: object) -> list[str]:
    """Class tokens in folder names, `<repeats>_<class tokens>`."""
    names = folders if isinstance(folders, dict) else {}
    return [
        part
        for name in names
        if (match := re.match(r"\d+_(.+)", str(name)[:MAX_TEXT_CHARS]))
        for part in split_phrases(match[1])
    ]


def find_common_tags(frequency: object, folders: object) -> list[str]:
    """Tags in almost every caption of a folder, at most `FEW_TAGS` each.

    Args:
        frequency: folder -> tag -> number of captions with it.
        folders: folder -> `img_count`; without it the most frequent tag counts as being in every caption.
    """
    tags: list[str] = []
    for folder, counts in (frequency if isinstance(frequency, dict) else {}).items():
        numbers = (
            {tag: n for tag, n in counts.items() if is_image_count(n)} if isinstance(counts, dict) else {}
        )
        total = get_nested(folders, (folder, "img_count"))
        total = total if is_image_count(total) else max(numbers.values(), default=0)
        if total > 1 or len(numbers) == 1:  # in one caption no tag is more frequent than another
            frequent = sorted(
                (tag for tag, n in numbers.items() if n >= FREQUENT_TAG_SHARE * total),
                key=lambda tag: -numbers[tag],
            )
            tags += frequent[:MAX_TAGS_PER_FOLDER]
    return tags


def is_image_count(value: object) -> bool:
    """Whether a value can be a number of pictures."""
    return type(value) is int and 0 < value < 10**9


# -- reading what nobody vouches for -----------------------------------------------------------------------------------


def sanitize_text(value: object, limit: int) -> str:
    """A value as one line of at most `limit` characters; control, direction and other invisible characters become spaces."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return ""
    text = (
        value
        if isinstance(value, str)
        else f"{value:.6g}"
        if isinstance(value, float)
        else str(value)
        if abs(value) < 10**18
        else ""
    )
    visible = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in text[: 4 * limit])
    line = " ".join(visible.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def parse_json(text: object) -> Any:
    """JSON, or None for anything else."""
    if not isinstance(text, str) or len(text) > MAX_JSON_CHARS:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def get_nested(content: object, place: Sequence[str]) -> Any:
    """The value under these keys, one inside the other, or None."""
    for key in place:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def as_list(value: object) -> list:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def read_optional_text(path: Path) -> str | None:
    """The text of a file that may be there, or None."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_SIDECAR_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):  # ValueError: not UTF-8, or a name that no file can have
        return None


def read_front_matter(path: Path) -> dict[str, str]:
    """`name: value` lines at the head of the README beside a LoRA, where the LoRA is the only one in its folder; else empty."""
    text = read_optional_text(path.with_name("README.md"))
    if text is None or not text.startswith("---\n") or len(list(path.parent.glob("*.safetensors"))) != 1:
        return {}
    head = text[4:].split("\n---", 1)[0]
    # no YAML loader: a few hundred bytes of nested references would fill the memory
    return {
        name: value.strip("'\"")
        for name, value in re.findall(r"^([a-z_]+):[ \t]+(\S.*?)[ \t]*$", head, re.MULTILINE)
    }
