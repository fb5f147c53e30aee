"""The license of a base model: what a file or the hub says, and an honest `unknown`."""

import json
import struct
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from int8run.tasks import base_license
from int8run.tasks.base_license import find_base_license


def write_safetensors(path, metadata):
    header = json.dumps({"__metadata__": metadata}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return str(path)


class Hub:
    """Answers as the hub does."""

    def __init__(self, card=None, error=None, files=()):
        self.card, self.error, self.files = card, error, files

    def model_info(self, repository, **options):
        if self.error is not None:
            raise self.error
        data = None if self.card is None else SimpleNamespace(to_dict=lambda: self.card)
        return SimpleNamespace(
            card_data=data, siblings=[SimpleNamespace(rfilename=name) for name in self.files]
        )


@pytest.fixture
def answer(monkeypatch):
    """A function that sets what the hub answers; nothing is in its cache."""

    def set_answer(**answer):
        monkeypatch.setattr(base_license, "HfApi", lambda: Hub(**answer))

    monkeypatch.setattr(base_license, "try_to_load_from_cache", lambda *args, **options: None)
    return set_answer


def test_a_header_says_the_license(tmp_path):
    location = write_safetensors(tmp_path / "a.safetensors", {"modelspec.license": "MIT"})

    found = find_base_license(location, None)

    assert (found.name, found.origin) == ("MIT", "header of a.safetensors")


@pytest.mark.parametrize(
    ("front_matter", "name"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: other\nlicense_name: fox-community", "fox-community"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("tags: [fox]", "unknown"),
        ("license: {a: [", "unknown"),
    ],
)
def test_the_readme_of_a_folder_says_the_license(tmp_path, front_matter, name):
    (tmp_path / "README.md").write_text(f"---\n{front_matter}\n---\n# fox\n")

    assert find_base_license(str(tmp_path), None).name == name


def test_the_shipped_model_says_its_license():
    assert find_base_license("shipped:tiny", None).name == "apache-2.0"


def test_the_hub_says_the_license(answer):
    answer(card={"license": "other", "license_name": "fox-community"})

    found = find_base_license("fox/den", None)

    assert (found.name, found.origin) == ("fox-community", "of fox/den on the hub")


def test_a_file_of_a_repository_has_its_license(answer):
    answer(card={"license": "mit"}, files=["README.md", "split_files/den.safetensors"])

    assert find_base_license("fox/den/split_files/den.safetensors", None).name == "mit"
    assert find_base_license("fox/den/split_files", None).name == "mit"


def test_a_path_that_is_gone_does_not_get_the_license_of_a_stranger(answer):
    answer(card={"license": "mit"}, files=["y.safetensors"])

    found = find_base_license("models/flux/x.safetensors", None)

    assert found.name == "unknown"
    assert found.origin == "models/flux/x.safetensors is neither here nor on the hub"


@pytest.mark.parametrize("location", ["./fox/den", "../fox/den", "/gone/fox/den", "fox", "a b/c"])
def test_what_can_be_no_name_of_the_hub_is_not_asked_of_it(answer, location):
    answer(error=AssertionError("the hub is not asked"))

    assert "neither here nor a name of the hub" in find_base_license(location, None).origin


def test_what_is_known_of_a_repository_needs_no_hub(answer):
    answer(error=AssertionError("the hub is not asked"))

    assert find_base_license("black-forest-labs/FLUX.1-schnell", None).name == "apache-2.0"


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), OSError("no route")])
def test_without_the_hub_the_license_is_unknown_and_says_why(answer, error):
    answer(error=error)

    found = find_base_license("fox/den", None)

    assert not found.is_known and "the hub did not say it" in found.origin and str(error) in found.origin


def test_a_repository_without_a_license_is_said(answer):
    answer(card=None)

    found = find_base_license("fox/den", None)

    assert (found.name, found.origin) == ("unknown", "fox/den does not say it")


def test_a_refusal_of_the_hub_is_no_error():
    assert issubclass(HfHubHTTPError, tuple(base_license.list_hub_errors()))
