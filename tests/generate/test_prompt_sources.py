"""Published prompt sets: their files, subsets of them, and what goes wrong."""

import json

import pytest
from support.helpers import CONF
from support.run_job import make_spec

from int8run.errors import ConfigError, FileError
from int8run.generate.prompt_row import PromptRow
from int8run.generate.prompt_sources import HubPrompts, read_column
from int8run.generate.prompts import PromptSet, take_subset
from int8run.metrics.measures.ocr import list_asked_texts

ROWS = [{"prompt": "a fox", "category": "animals"}, {"prompt": "an  owl\n", "category": "animals"}]
SHIPPED = {"parti": 1632, "geneval": 553, "ocr": 1018, "text": 50, "tiny100": 100}
PUBLISHED = ("drawbench", "mjhq", "sdci", "coco_captions")


def make_hub_prompts(**changes):
    settings = {
        "repository": "someone/prompts",
        "file": "prompts.json",
        "revision": "abc",
        "column": "prompt",
        "licence": "CC0",
    }
    return HubPrompts(**{**settings, **changes})


def write_parquet(file, columns):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), file)


FILES = {
    "rows.json": json.dumps(ROWS),
    "named.json": json.dumps({"0a": ROWS[0], "1b": ROWS[1]}),
    "texts.yaml": "first: a fox\nsecond: an  owl\n",
    "rows.jsonl": "\n".join(json.dumps(row) for row in ROWS),
    "rows.csv": "category,prompt\nanimals,a fox\nanimals,an  owl\n",
    "rows.tsv": "prompt\tcategory\na fox\tanimals\nan  owl\tanimals\n",
}


@pytest.mark.parametrize(("name", "text"), FILES.items(), ids=list(FILES))
def test_the_prompts_are_those_of_the_column(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)

    assert read_column(file, "prompt") == ["a fox", "an owl"]


def test_of_a_list_of_captions_the_first_counts(tmp_path):
    write_parquet(tmp_path / "rows.parquet", {"captions": [["a fox", "a red fox"], ["an owl"]]})

    assert read_column(tmp_path / "rows.parquet", "captions") == ["a fox", "an owl"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.json", "{", r"^rows\.json cannot be read as a file of prompts: .*is not JSON"),
        ("rows.json", "3", r"^rows\.json cannot be read as a file of prompts: it holds no rows"),
        (
            "rows.json",
            '[{"text": "a"}]',
            r"^rows\.json has no text in its column 'prompt'; name another one$",
        ),
        ("rows.yaml", "- &a x\n- *a\n", r"^rows\.yaml has the alias "),
        ("rows.bin", "", r"^rows\.bin is no file of prompts that can be read; allowed are \.json, "),
    ],
)
def test_a_file_that_is_no_set_of_prompts_is_an_error(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)

    with pytest.raises(FileError, match=message):
        read_column(file, "prompt")


def test_a_damaged_parquet_file_is_an_error(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing else")

    with pytest.raises(FileError, match=r"^rows\.parquet cannot be read as a file of prompts"):
        read_column(tmp_path / "rows.parquet", "prompt")


def test_a_copy_of_a_published_file_is_read_in_its_place(tmp_path):
    (tmp_path / "copy.json").write_text(json.dumps(ROWS))

    rows = PromptSet(path=str(tmp_path / "copy.json"), hub=make_hub_prompts()).read_rows()

    assert [row.prompt for row in rows] == ["a fox", "an owl"]


def test_without_network_the_error_has_the_command_that_fetches_the_file(monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError

    def find_nothing(*args, local_files_only=False, **kwargs):
        assert local_files_only, "the download would try for half a minute"
        raise LocalEntryNotFoundError("not there")

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", find_nothing)
    monkeypatch.setattr(HfApi, "dataset_info", fail)

    with pytest.raises(
        FileError,
        match=r"^prompts\.hub=someone/prompts is not on this machine and could not be downloaded "
        r"\(OSError: no network\); where there is a network \(licence: CC0\): hf download someone/prompts "
        r"prompts\.json --repo-type dataset --revision abc; or name a copy with prompts\.path=FILE$",
    ):
        PromptSet(hub=make_hub_prompts()).read_rows()


def test_a_file_outside_of_its_repository_is_an_error():
    hub = make_hub_prompts(file="../../../../secret.json", revision=40 * "a")

    with pytest.raises(FileError, match=r"could not be downloaded \(ValueError: Invalid "):
        hub.read(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column": None}, r"^prompts\.hub\.column is None, which is no text"),
        (
            {"file": "prompts.zip"},
            r"^prompts\.hub\.file is 'prompts\.zip'; a file of prompts ends ",
        ),
    ],
)
def test_settings_of_a_published_file_that_cannot_be_are_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_hub_prompts(**changes)


# -- the options that ship ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), SHIPPED.items(), ids=list(SHIPPED))
def test_a_set_in_the_package_has_all_its_prompts(name, count):
    prompts = [row.prompt for row in make_spec([f"prompts={name}"]).prompts.read_rows()]

    assert len(prompts) == len(set(prompts)) == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_set_names_commit_and_licence(name):
    hub = make_spec([f"prompts={name}"]).prompts.hub

    assert len(hub.revision) == 40 and set(hub.revision) <= set("0123456789abcdef")
    assert hub.licence in (CONF / "prompts" / f"{name}.yaml").read_text().splitlines()[0] or (
        hub.licence == "none stated"
    )


@pytest.mark.parametrize("name", ["text", "ocr"])
def test_every_prompt_of_the_sets_about_words_asks_for_some(name):
    silent = [
        row.prompt
        for row in make_spec([f"prompts={name}"]).prompts.read_rows()
        if not list_asked_texts(row.prompt)
    ]

    assert silent == []


# -- subsets -----------------------------------------------------------------------------------------


def make_rows(count):
    return [PromptRow(str(number)) for number in range(count)]


def test_a_subset_is_the_same_everywhere():
    # sha256 of "0 0", "0 1", ... decides
    assert [row.prompt for row in take_subset(make_rows(10), 3, 0)] == ["2", "4", "6"]


def test_a_smaller_subset_is_a_part_of_a_larger_one_and_keeps_the_order():
    small = [int(row.prompt) for row in take_subset(make_rows(100), 10, 5)]
    large = [int(row.prompt) for row in take_subset(make_rows(100), 30, 5)]

    assert set(small) < set(large) and len(large) == 30
    assert small == sorted(small) and large == sorted(large)
    assert small != [int(row.prompt) for row in take_subset(make_rows(100), 10, 6)]


def test_more_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match=r"^prompts\.take is 11, and the set has 10 prompts; take"):
        take_subset(make_rows(10), 11, 0)


@pytest.mark.parametrize("take", [0, -1, 1.5, "3"], ids=repr)
def test_a_number_that_cannot_be_taken_is_an_error(take):
    with pytest.raises(ConfigError, match=r"^prompts\.take is "):
        PromptSet(["a"], take=take)
