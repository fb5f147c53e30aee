"""Trigger words and other facts from headers and sidecar files, whatever strangers wrote into them."""

import json
import random
import string

import pytest
from support.parameter_ids import name_parameter

from int8run.lora.metadata import describe_header, detect_trainer
from int8run.lora.trigger_words import (
    MAX_WORD_CHARS,
    MAX_WORDS,
    TriggerWords,
    append_triggers,
    find_missing_triggers,
    find_trigger_words,
    iter_trigger_words,
)
from int8run.lora.untrusted_text import MAX_JSON_CHARS, MAX_SIDECAR_BYTES, sanitize_text


@pytest.fixture
def lora(tmp_path):
    path = tmp_path / "style.v2.safetensors"
    path.write_bytes(b"")
    return path


# -- where trigger words stand -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "modelspec.trigger_phrase",
        "ss_trigger_words",
        "trigger_words",
        "trigger_phrase",
        "instance_prompt",
        "activation_text",
    ],
)
def test_trigger_words_are_found_under_every_header_key(lora, key):
    assert find_trigger_words(lora, {key: "stlz style, TOK"}) == TriggerWords(("stlz style", "TOK"), key)


def test_list_in_the_header_is_split(lora):
    assert find_trigger_words(lora, {"trigger_words": '["ink style", "a fox, drawn", 3, null]'}).words == (
        "ink style",
        "a fox",
        "drawn",
    )
    assert find_trigger_words(lora, {"trigger_words": "[broken"}).words == ("[broken",)


@pytest.mark.parametrize(
    "hint",
    [
        "Use keyword 'example'",
        'Trigger: "example".',
        "Use `example` to trigger the style",
        "Activate by 'example'",
    ],
)
def test_quoted_words_in_a_hint_are_found(lora, hint):
    assert find_trigger_words(lora, {"modelspec.usage_hint": hint}) == TriggerWords(
        ("example",), "modelspec.usage_hint"
    )
    assert find_trigger_words(lora, {"modelspec.description": hint}) == TriggerWords(
        ("example",), "modelspec.description"
    )


@pytest.mark.parametrize(
    "hint", ["Works 'best' at 0.8", "It's a trigger for many artists' work", "use strength 0.8"]
)
def test_hint_without_trigger_words_gives_none(lora, hint):
    assert find_trigger_words(lora, {"modelspec.usage_hint": hint}) is None


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".json", {"activation text": "ink style", "preferred weight": 0.8}),
        (".civitai.info", {"trainedWords": ["ink style"]}),
        (".metadata.json", {"trainedWords": ["ink style"]}),
        (".metadata.json", {"civitai": {"trainedWords": ["ink style"]}}),
    ],
    ids=name_parameter,
)
def test_trigger_words_are_found_in_sidecar_files(lora, suffix, content):
    lora.with_name(f"style.v2{suffix}").write_text(json.dumps(content))

    assert find_trigger_words(lora, {}) == TriggerWords(("ink style",), f"style.v2{suffix}")


@pytest.mark.parametrize(
    "line",
    [
        "instance_prompt: ink style",
        "instance_prompt: 'ink style'",
        'license: mit\ninstance_prompt:   "ink style"  ',
    ],
)
def test_trigger_words_are_found_in_the_readme(lora, line):
    lora.with_name("README.md").write_text(f"---\ntags:\n- lora\n{line}\n---\n# instance_prompt: not this\n")

    assert find_trigger_words(lora, {}) == TriggerWords(("ink style",), "README.md")


def test_readme_without_front_matter_gives_none(lora):
    readme = lora.with_name("README.md")
    for text in (
        "---\ninstance_prompt: null\n---\n",
        "# x\ninstance_prompt: ink\n",
        "---\ninstance_prompt:\n---\n",
        "---\ntags: []\n---\ninstance_prompt: ink\n",
    ):
        readme.write_text(text)
        assert find_trigger_words(lora, {}) is None
    readme.write_text("---\ninstance_prompt: ink\n---\n")

    lora.with_name("other.safetensors").write_bytes(b"")

    assert find_trigger_words(lora, {}) is None, "which of the two is meant?"


def test_class_tokens_of_data_sets_are_guesses(lora):
    subsets = [
        {"class_tokens": "sks dog", "is_reg": False, "caption_prefix": "photo of"},
        {"class_tokens": "dog", "is_reg": True},
        {"class_tokens": None},
        "no subset",
    ]
    value = json.dumps([{"subsets": subsets}, {"subsets": None}, 5])

    assert find_trigger_words(lora, {"ss_datasets": value}) == TriggerWords(
        ("sks dog", "photo of"), "ss_datasets", is_guessed=True
    )


def test_class_tokens_in_folder_names_are_guesses(lora):
    value = json.dumps({"10_sks dog": {"n_repeats": 10, "img_count": 5}, "images": {}, "5_ink_style": 1})

    assert find_trigger_words(lora, {"ss_dataset_dirs": value}) == TriggerWords(
        ("sks dog", "ink_style"), "ss_dataset_dirs", is_guessed=True
    )


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (
            {"tree": 18, "solo": 12, "inkstyle": 20, "fox": 19, "sun": 18, "sea": 17},
            ("inkstyle", "fox", "tree"),
        ),
        ({"inkstyle": 1}, ("inkstyle",)),  # ai-toolkit
        ({"a": 1, "b": 1}, None),
        ({"a": True, "b": "3", "c": 2.5, "d": None, "e": -1}, None),
        ([], None),
    ],
    ids=name_parameter,
)
def test_tags_of_almost_every_caption_are_guesses(lora, counts, words):
    found = find_trigger_words(lora, {"ss_tag_frequency": json.dumps({"10_x": counts})})

    assert found == (words and TriggerWords(words, "ss_tag_frequency", is_guessed=True))


def test_frequent_is_measured_by_the_number_of_images(lora):
    metadata = {
        "ss_tag_frequency": json.dumps({"x": {"fox": 8, "ink": 20}}),
        "ss_dataset_dirs": json.dumps({"x": {"img_count": 30}}),
    }

    assert find_trigger_words(lora, metadata) is None

    metadata["ss_dataset_dirs"] = json.dumps({"x": {"img_count": 21}})

    assert find_trigger_words(lora, metadata).words == ("ink",)


def test_first_source_wins_and_all_are_listed(lora):
    lora.with_name("style.v2.json").write_text('{"activation text": "from sidecar"}')
    metadata = {
        "ss_tag_frequency": '{"1_x": {"tag": 1}}',
        "ss_dataset_dirs": '{"1_folder": {}}',
        "ss_datasets": '[{"subsets": [{"class_tokens": "class"}]}]',
        "instance_prompt": "instance",
        "modelspec.usage_hint": "trigger 'hint'",
        "modelspec.trigger_phrase": "phrase",
    }

    words = [found.words[0] for found in iter_trigger_words(lora, metadata)]

    assert words == ["phrase", "hint", "instance", "from sidecar", "class", "folder", "tag"]
    assert find_trigger_words(lora, metadata).words == ("phrase",)


@pytest.mark.parametrize("value", ["", " ", "None", "null", ",,", "\n", "\x00", "False", "[]"])
def test_empty_source_is_skipped(lora, value):
    found = find_trigger_words(lora, {"modelspec.trigger_phrase": value, "trigger_words": "ink"})

    assert found == TriggerWords(("ink",), "trigger_words")


# -- what strangers write ------------------------------------------------------------------------------------


def test_text_is_sanitized_and_cut(lora):
    bad = "ink\x1b[31m\u202estyle\u2028now\ud800\r" + "x" * 1000
    (word,) = find_trigger_words(lora, {"trigger_words": bad}).words

    assert word.startswith("ink [31m style now xxx") and len(word) == MAX_WORD_CHARS and word.isprintable()

    many = find_trigger_words(lora, {"trigger_words": ",".join(f"w{i}" for i in range(1000))})

    assert len(many.words) == MAX_WORDS
    assert find_trigger_words(lora, {"trigger_words": "a, b, a"}).words == ("a", "b")
    assert sanitize_text(True, 10) == "" and sanitize_text(10**5000, 10) == "" and sanitize_text(3, 10) == "3"
    assert sanitize_text("x" * 50, 10) == "x" * 9 + "…" and sanitize_text("x" * 10, 10) == "x" * 10


KEYS = [
    "modelspec.trigger_phrase",
    "modelspec.usage_hint",
    "modelspec.description",
    "modelspec.title",
    "modelspec.license",
    "ss_trigger_words",
    "ss_datasets",
    "ss_dataset_dirs",
    "ss_tag_frequency",
    "software",
    "ss_network_args",
    "ss_network_module",
    "ss_network_dim",
    "lora_adapter_metadata",
    "instance_prompt",
]
EVIL = [
    "",
    "null",
    "true",
    "0",
    "[]",
    "{}",
    '""',
    "[" * 100_000,
    '{"a":' * 100_000,
    "9" * 10_000,
    "NaN",
    '{"x": Infinity}',
    "[[[[]]]]",
    '{"x": {"y": NaN}}',
    '[{"subsets": {"class_tokens": []}}]',
    '[{"subsets": [[], 1, {"class_tokens": {"a": 1}}]}]',
    '{"1_a": [1]}',
    '{"1_a": {"b": 1e400}}',
    '{"1_a": {"b": ' + "9" * 4000 + "}}",
    '{"name": {"name": "x"}}',
    '{"name": 5}',
    "\x00" * 100,
    "\ud800",
    '{"r": [1], "lora_alpha": {}}',
    '{"transformer.r": "' + "x" * 10_000 + '"}',
    '"\\ud800"',
    '["\\ud83d"]',
    "\u202e" * 300,
    "'" * 10_000,
    "trigger " + "'a" * 10_000,
    "🦊" * 5000,
    "a\n" * 10_000,
    "[" + "0," * 100_000 + "0]",
    "{" + ",".join(f'"{i}_t": {{"t": {i}}}' for i in range(5000)) + "}",
]


def check_shown_texts(lora, metadata):
    found = list(iter_trigger_words(lora, metadata))
    for triggers in found:
        assert 0 < len(triggers.words) <= MAX_WORDS
        assert all(
            0 < len(w) <= MAX_WORD_CHARS and w == " ".join(w.split()) and w.isprintable()
            for w in triggers.words
        )
        assert not find_missing_triggers(append_triggers("a fox", triggers.words), triggers.words)
    for name, text in describe_header(lora, metadata, ["x.lora_A.weight"]).items():
        assert name and 0 < len(text) <= 200 and "\n" not in text and text.isprintable()


@pytest.mark.parametrize("key", KEYS)
def test_hostile_values_are_harmless(lora, key):
    for value in EVIL:
        check_shown_texts(lora, {key: value})


@pytest.mark.parametrize("suffix", [".json", ".civitai.info", ".metadata.json"])
def test_hostile_sidecar_files_are_harmless(lora, suffix):
    for value in EVIL:
        lora.with_name(f"style.v2{suffix}").write_bytes(value.encode("utf-8", "surrogatepass"))
        check_shown_texts(lora, {})
    lora.with_name(f"style.v2{suffix}").write_bytes(random.Random(0).randbytes(1000))

    check_shown_texts(lora, {})

    for key in ("activation text", "trainedWords", "civitai", "preferred weight"):
        for value in EVIL:
            lora.with_name(f"style.v2{suffix}").write_text(json.dumps({key: value}))
            check_shown_texts(lora, {})


def test_hostile_readmes_are_harmless(lora):
    for value in EVIL:
        for text in (f"---\n{value}", f"---\ninstance_prompt: {value}\n---", f"---\nlicense: {value}\n"):
            lora.with_name("README.md").write_bytes(text.encode("utf-8", "surrogatepass"))
            check_shown_texts(lora, {})


def test_random_headers_are_harmless(lora):
    chance = random.Random(1)
    alphabet = string.printable + '{}[]",:' * 20 + "\u202e\x00é狐\ud800"

    def value(depth=0):
        kind = chance.randrange(7 if depth < 4 else 4)
        if kind == 4:
            return [value(depth + 1) for _ in range(chance.randrange(4))]
        if kind > 4:
            names = [
                "subsets",
                "class_tokens",
                "caption_prefix",
                "img_count",
                "10_fox",
                "name",
                "algo",
                "r",
                "is_reg",
            ]
            return {chance.choice(names): value(depth + 1) for _ in range(chance.randrange(4))}
        return [
            None,
            chance.choice([True, 10**30, -1, 2.5, float("nan")]),
            "".join(chance.choices(alphabet, k=9)),
            chance.randrange(9),
        ][kind]

    for _ in range(1500):
        raw = "".join(chance.choices(alphabet, k=chance.randrange(200)))
        check_shown_texts(
            lora,
            {key: json.dumps(value()) if chance.random() < 0.8 else raw for key in chance.sample(KEYS, 4)},
        )


def test_oversized_files_are_not_read(lora):
    words = json.dumps({"1_ink": {"ink": 1}})

    assert find_trigger_words(lora, {"ss_tag_frequency": words + " " * MAX_JSON_CHARS}) is None

    lora.with_name("style.v2.json").write_text(
        json.dumps({"activation text": "ink"}) + " " * MAX_SIDECAR_BYTES
    )

    assert find_trigger_words(lora, {}) is None


def test_folder_named_like_a_sidecar_is_ignored(lora):
    lora.with_name("style.v2.json").mkdir()

    assert find_trigger_words(lora, {}) is None


# -- in a prompt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a fox, ink style", "ink style"),
        ("A fox in INK  STYLE.", "ink style"),
        ("(sks:1.2) dog", "sks"),
        ("sks", "sks"),
        ("a fox <s0><s1>", "<s0><s1>"),
        ("水墨风格的狐狸", "水墨"),
        ("a.b", "a.b"),
        ("ink\nstyle", "ink style"),
        ("Écran", "écran"),
    ],
)
def test_present_word_is_not_missing(prompt, word):
    assert find_missing_triggers(prompt, [word]) == () and append_triggers(prompt, [word]) == prompt


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a pink styled fox", "ink style"),
        ("tasks", "sks"),
        ("sks2", "sks"),
        ("my_sks", "sks"),
        ("axb", "a.b"),
        ("", "sks"),
    ],
)
def test_absent_word_is_missing(prompt, word):
    assert find_missing_triggers(prompt, [word]) == (word,)


def test_missing_words_are_appended():
    assert append_triggers("a fox", ("ink style", "FOX", "TOK")) == "a fox, ink style, TOK"
    assert append_triggers("a fox, ", ("ink",)) == "a fox, ink"
    assert append_triggers("", ("ink", "TOK")) == "ink, TOK"
    assert append_triggers("a fox, ", ()) == "a fox, " and append_triggers("a fox", (" ", "")) == "a fox"


# -- other facts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "keys", "name"),
    [
        ({"ss_network_module": "networks.lora_flux"}, [], "kohya (networks.lora_flux)"),
        ({"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lokr"}'}, [], "LyCORIS (lokr)"),
        ({"ss_network_module": "lycoris.kohya"}, [], "LyCORIS"),
        ({"software": '{"name": "ai-toolkit", "version": "0.7"}', "ss_output_name": "x"}, [], "ai-toolkit"),
        ({"software": "broken", "ot_branch": "master"}, [], "OneTrainer"),
        ({"ot_config": "{}"}, [], "OneTrainer"),
        ({"lora_adapter_metadata": "{}"}, ["transformer.x.lora_A.weight"], "diffusers / PEFT"),
        ({}, ["transformer.x.lora_A.weight"], "diffusers / PEFT layout"),
        ({}, ["diffusion_model.x.lora_A.weight"], "ComfyUI / ai-toolkit layout"),
        ({}, ["lora_unet_x.lora_down.weight"], "kohya layout"),
        ({}, ["lora_te1_x.alpha"], "kohya layout"),
        ({}, ["lora_transformer_x.lora_down.weight"], "OneTrainer layout"),
        ({}, ["lora_unet_x.hada_w1_a"], "LyCORIS layout"),
        ({}, ["lycoris_x.lokr_w1"], "LyCORIS layout"),
        ({}, ["double_blocks.0.processor.qkv_lora1.down.weight"], "diffusers layout, old or xlabs"),
        ({}, ["x.weight"], None),
    ],
    ids=name_parameter,
)
def test_trainer_is_detected(metadata, keys, name):
    assert detect_trainer(metadata, iter(keys)) == name


def test_header_is_described(lora):
    lora.with_name("style.v2.json").write_text('{"preferred weight": 0.80}')
    facts = describe_header(
        lora,
        {
            "modelspec.title": "Ink\nstyle",
            "modelspec.author": "me",
            "modelspec.license": "MIT",
            "modelspec.resolution": "1024x1024",
            "ss_network_dim": "16",
            "ss_network_alpha": "8.0",
            "modelspec.usage_hint": "None",
            "modelspec.tags": "ink, line",
        },
        ["lora_unet_x.alpha"],
    )

    assert facts == {
        "title": "Ink style",
        "author": "me",
        "trainer": "kohya layout",
        "rank and alpha": "rank 16, alpha 8.0",
        "resolution": "1024x1024",
        "license": "MIT",
        "tags": "ink, line",
        "advised strength": "0.8",
    }
    assert describe_header(lora.with_name("bare.safetensors"), {}, []) == {}


def test_description_uses_sidecars_and_peft_settings(lora):
    lora.with_name("README.md").write_text("---\nlicense: apache-2.0\n---\n")
    peft = json.dumps({"transformer.r": 32, "transformer.lora_alpha": 16, "transformer.use_rslora": False})

    facts = describe_header(lora, {"lora_adapter_metadata": peft, "ss_resolution": "(512, 512)"}, [])

    assert facts == {
        "trainer": "diffusers / PEFT",
        "rank and alpha": "rank 32, alpha 16",
        "resolution": "(512, 512)",
        "license": "apache-2.0",
    }
