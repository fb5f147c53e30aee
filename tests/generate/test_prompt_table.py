"""Prompt tables: what their rows ask for, and what is wrong with a row, by its number."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from int8run.errors import ConfigError, FileError
from int8run.generate.prompt_row import GivenFile, PromptRow
from int8run.generate.prompts import PromptSet, build_row_samples
from int8run.generate.sample_inputs import NO_INPUTS

ROWS: list[dict[str, Any]] = [
    {"prompt": "a cat, sleeping", "image": "cat.png", "strength": 0.5, "seed": 7},
    {"prompt": '1984 "quoted"\nand a second line', "negative_prompt": "blurry", "max_area": 65536},
    {"prompt": "two", "reference_images": ["a b.png", "sub/c.png"], "pose_video": "walk.gif"},
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format of the suffix, by a library that the reader does not use for it."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix in (".yaml", ".yml"):
        path.write_text(yaml.safe_dump(rows))
    else:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        delimiter = "\t" if path.suffix == ".tsv" else ","
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter=delimiter)
            writer.writeheader()
            for row in rows:
                cells = {name: "|".join(v) if isinstance(v, list) else v for name, v in row.items()}
                writer.writerow(cells)
    return path


def read(path: Path, text: str | bytes | None = None, **settings: Any) -> list[PromptRow]:
    """The rows of a table, which is written first where there is a text."""
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return PromptSet(path=str(path), **settings).read_rows()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".yaml", ".yml"])
def test_every_format_has_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"cats{suffix}", ROWS)

    first, second, third = read(path)

    assert (first.prompt, first.strength, first.seed) == ("a cat, sleeping", 0.5, 7)
    assert [file.path for file in first.files["image"]] == [tmp_path / "cat.png"]
    assert (second.prompt, second.negative_prompt) == ('1984 "quoted"\nand a second line', "blurry")
    assert (second.arguments, second.files, second.seed) == ({"max_area": 65536}, {}, None)
    references = [file.path for file in third.files["reference_images"]]
    assert references == [tmp_path / "a b.png", tmp_path / "sub/c.png"]
    assert third.files["pose_video"][0].path == tmp_path / "walk.gif"


def test_a_row_knows_its_number_and_its_line(tmp_path: Path) -> None:
    csv_rows = read(tmp_path / "a.csv", 'prompt,seed\n"one\ntwo",1\n\nthree,2\n')
    yaml_rows = read(tmp_path / "a.yaml", "# mine\n- prompt: one\n  seed: 1\n- {prompt: two}\n")
    json_rows = read(tmp_path / "a.jsonl", '\n{"prompt": "one"}\n\n{"prompt": "two"}\n')

    assert [row.place for row in csv_rows] == ["a.csv, row 1 (line 2)", "a.csv, row 2 (line 5)"]
    assert [row.place for row in yaml_rows] == ["a.yaml, row 1 (line 2)", "a.yaml, row 2 (line 4)"]
    assert [row.place for row in json_rows] == ["a.jsonl, row 1 (line 2)", "a.jsonl, row 2 (line 4)"]


def test_text_of_a_csv_stays_text_and_numbers_become_numbers(tmp_path: Path) -> None:
    (row,) = read(tmp_path / "a.csv", 'prompt,prompt_2,guidance,crop,name\n1984,7,3.5,"[1, 2]",low_vram\n')

    assert row.prompt == "1984"
    assert row.arguments == {"prompt_2": "7", "guidance": 3.5, "crop": [1, 2], "name": "low_vram"}


def test_a_csv_of_a_spreadsheet_may_have_semicolons_and_a_mark(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + "prompt;image\nBär, Fuchs;bär.png\n".encode()

    (row,) = read(tmp_path / "a.csv", text)

    assert row.prompt == "Bär, Fuchs"
    assert row.files["image"][0].path == tmp_path / "bär.png"


@pytest.mark.parametrize("name", ["a.jsonl", "a.yaml", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path, name: str) -> None:
    texts = {"a.jsonl": '{"prompt": "fox"}', "a.yaml": "- prompt: fox", "a.csv": "prompt\nfox"}

    (row,) = read(tmp_path / name, b"\xef\xbb\xbf" + texts[name].encode())

    assert row.prompt == "fox"


def test_a_row_wins_over_the_settings_of_the_set(tmp_path: Path) -> None:
    rows = [
        {"prompt": "own", "image": "own.png", "strength": 0.2, "negative_prompt": "dark"},
        {"prompt": "none"},
    ]
    path = write_table(tmp_path / "a.jsonl", rows)

    own, none = read(path, image="set.png", strength=0.9, negative_prompt="blurry", mask_image="mask.png")

    assert (own.strength, own.negative_prompt) == (0.2, "dark")
    assert (none.strength, none.negative_prompt) == (0.9, "blurry")
    assert own.files["image"][0].path == tmp_path / "own.png"
    # a setting is relative to the working folder, a table's path to the table
    assert none.files["image"] == (GivenFile("prompts.image", Path("set.png")),)
    assert list(own.files) == list(none.files) == ["image", "mask_image"]


def test_a_seed_of_a_row_wins_over_that_of_the_run() -> None:
    rows = [PromptRow("a", seed=100), PromptRow("b")]

    samples = build_row_samples(rows, [NO_INPUTS, NO_INPUTS], seeds_per_prompt=2, seed=7)

    assert [(sample.prompt, sample.seed) for sample in samples] == [
        ("a", 100),
        ("a", 101),
        ("b", 7),
        ("b", 8),
    ]
    assert [sample.key for sample in samples] == ["000_a_s100", "000_a_s101", "001_b_s7", "001_b_s8"]


def test_a_row_without_a_prompt_is_named_by_its_input() -> None:
    row = PromptRow("", files={"image": (GivenFile("", Path("My Cat.png")),)})

    (sample,) = build_row_samples([row], [NO_INPUTS], 1, 0)

    assert sample.key == "000_my-cat_s0"


WRONG = {
    "no rows": ("a.jsonl", "\n\n", r"prompts\.path=.*a\.jsonl has no rows; a row has a prompt"),
    "no rows below the names": ("a.csv", "prompt,image\n", r"a\.csv has no rows"),
    "no rows in YAML": ("a.yaml", "# nothing\n", r"a\.yaml has no rows"),
    "empty list": ("a.yaml", "[]", r"a\.yaml has no rows"),
    "duplicate key": (
        "a.jsonl",
        '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}',
        r"a\.jsonl, line 2 has 'prompt' twice",
    ),
    "duplicate key in YAML": (
        "a.yaml",
        "- prompt: a\n  seed: 1\n  seed: 2\n",
        r"a\.yaml, line 3 has 'seed' a second time",
    ),
    "duplicate key below": (
        "a.yaml",
        "- prompt: a\n  args: {x: 1, x: 2}\n",
        r"a\.yaml, line 2 has 'x' a second time",
    ),
    "duplicate column": (
        "a.csv",
        "prompt,image,image\na,b,c\n",
        r"a\.csv, line 1 has the column 'image' twice",
    ),
    "no name of a column": ("a.csv", "prompt,\na,b\n", r"a\.csv, line 1 has a column without a name"),
    "no column": (
        "a.csv",
        "a red fox\nan owl\n",
        r"a\.csv, line 1 has a column 'a red fox', which is no name of an argument; columns are prompt, ",
    ),
    "too many cells": (
        "a.csv",
        "prompt,seed\na,1\na cat, sleeping,1\n",
        r"a\.csv, line 3 has 3 cells and 2 columns; a text with a comma",
    ),
    "open quote": ("a.csv", 'prompt\n"a\nb\n', r"a\.csv, line 2 is no CSV"),
    "no object": ("a.jsonl", '{"prompt": "a"}\n["b"]', r"a\.jsonl, line 2 is no JSON object"),
    "no JSON": ("a.jsonl", '{"prompt": "a"}\n{prompt: b}', r"a\.jsonl, line 2 is not JSON"),
    "no list": ("a.yaml", "prompt: a\n", r"a\.yaml is no list of rows; a row begins with a dash"),
    "no mapping": ("a.yaml", "- prompt: a\n- an owl\n", r"a\.yaml, line 2 is no row"),
    "no YAML": ("a.yaml", "- prompt: a\n- {prompt: b\n- c", r"a\.yaml, line \d is not YAML"),
    "alias": ("a.yaml", "- &a {prompt: a}\n- *a\n", r"a\.yaml has the alias \*a; write the values out"),
    "tag": (
        "a.yaml",
        "- prompt: !!python/name:os.system\n",
        r"a\.yaml, line 1 is not YAML: could not determine",
    ),
    "deep": ("a.yaml", "- prompt: a\n  x: " + "[" * 50 + "]" * 50, r"more than 40 mappings and lists"),
    "number as a name": (
        "a.yaml",
        "- {prompt: a, 1: b}\n",
        r"a\.yaml, line 1 has 1 in the place of a name; quote it: '1'",
    ),
    "number as a prompt": (
        "a.yaml",
        "- prompt: a\n- prompt: 1984\n",
        r'a\.yaml, row 2 \(line 2\): prompt is 1984, which is no text; quote it: "1984"',
    ),
    "nothing to do": (
        "a.jsonl",
        '{"seed": 1}',
        r"a\.jsonl, row 1 \(line 1\) has neither a prompt nor an input",
    ),
    "seed": (
        "a.csv",
        "prompt,seed\na,-1\n",
        r"a\.csv, row 1 \(line 2\): seed is -1; allowed is a whole number from 0",
    ),
    "seed as text": ("a.csv", "prompt,seed\na,first\n", r'seed is "first"; allowed is a whole number'),
    "strength": (
        "a.csv",
        "prompt,strength\na,0.5\nb,1.5\n",
        r"row 2 \(line 3\): strength is 1\.5; allowed is a number above 0",
    ),
    "strength of nothing": ("a.csv", "prompt,strength\na,0\n", r"strength is 0; allowed is a number above 0"),
    "address": (
        "a.csv",
        "prompt,image\na,https://me:secret@example.com/cat.png?token=x\n",
        r"row 1 \(line 2\): image=https://example\.com/… is an address; download it first",
    ),
    "file in the table": (
        "a.jsonl",
        '{"image": "data:image/png;base64,aaaa"}',
        r"row 1 \(line 1\): image=data:… is an address",
    ),
    "no path": ("a.jsonl", '{"image": 3}', r"row 1 \(line 1\): image is 3; it takes the path of a file"),
    "no paths": ("a.jsonl", '{"image": []}', r"row 1 \(line 1\): image is an empty list"),
    "steps of a row": (
        "a.csv",
        "prompt,num_inference_steps\na,3\n",
        r"line 1 has a column num_inference_steps, which int8run gives the call itself; use sampler\.steps",
    ),
    "argument of int8run": (
        "a.jsonl",
        '{"prompt": "a", "output_type": "np"}',
        r"row 1 \(line 1\) has a column output_type, .* leave it out",
    ),
    "not UTF-8": ("a.csv", b"prompt\nB\xe4r\n", r"a\.csv is not UTF-8 text"),
}


@pytest.mark.parametrize(("name", "text", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_table_is_said_by_its_row(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    with pytest.raises(FileError, match=message) as raised:
        read(tmp_path / name, text)
    assert "secret" not in str(raised.value) and "\n" not in str(raised.value)


WRONG_SETTINGS = {
    "number": ({"image": 3}, r"prompts\.image is 3; it takes the path of a file"),
    "empty": ({"image": []}, r"prompts\.image is an empty list"),
    "address": (
        {"video": "https://example.com/a.mp4"},
        r"prompts\.video=https://example\.com/… is an address; download it first",
    ),
    "strength": ({"strength": 2}, r"prompts\.strength is 2; allowed is a number above 0"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_a_wrong_input_of_all_prompts_is_a_wrong_setting(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptSet(["a"], **settings)


def test_inputs_outside_of_the_folder_of_the_table_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "tables" / "a.csv"
    table.parent.mkdir()
    with caplog.at_level(logging.WARNING):
        rows = read(table, "prompt,image\na,../cat.png\nb,sub/../dog.png\nc,../cat.png\n")

    assert rows[0].files["image"][0].path.resolve() == tmp_path / "cat.png"
    assert caplog.messages == [
        "inputs outside of the table's folder: ../cat.png (a.csv, row 1 (line 2): image)"
    ]


def test_ten_thousand_rows_are_read_without_opening_an_input(tmp_path: Path) -> None:
    lines = [f'{{"prompt": "fox {number}", "image": "missing_{number}.png"}}' for number in range(10_000)]

    rows = read(tmp_path / "a.jsonl", "\n".join(lines))

    assert len(rows) == 10_000
    assert rows[-1].place == "a.jsonl, row 10000 (line 10000)"
