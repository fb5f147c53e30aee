"""What is asked of the hub before a download: each way in which it cannot succeed is one line, at once."""

import logging
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from int8run.errors import FileError
from int8run.models.hub import check_repository, make_download_error

REPOSITORY = "org/name"


def make_http_error(kind):
    return kind("no", response=SimpleNamespace(headers={}, request=None, status_code=401))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose answers a test may change, and an empty cache."""
    answers = SimpleNamespace(info=SimpleNamespace(gated=False, siblings=[]), access=None, asked=0)

    class Api:
        def model_info(self, repository, revision, timeout, files_metadata):
            answers.asked += 1
            if isinstance(answers.info, Exception):
                raise answers.info
            return answers.info

        def auth_check(self, repository):
            if answers.access is not None:
                raise answers.access

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return answers


FAILURES = {
    "no network": (
        OSError("[Errno -2] Name or service not known"),
        r"^model.location=org/name is not on this machine, and the hub cannot be reached "
        r"\(OSError: .* not known\); set model.location to a folder that you have, or fetch it .*: "
        r"hf download org/name \(its size is not known here\)$",
    ),
    "no network, as the library of this version says it": (
        HfHubHTTPError.__bases__[0]("All connection attempts failed"),
        "^model.location=org/name is not on this machine, and the hub cannot be reached",
    ),
    "unknown": (
        make_http_error(RepositoryNotFoundError),
        "the hub knows no repository of that name, or it is private",
    ),
    "no name of a repository": (
        HFValidationError("Repo id must use alphanumeric chars"),
        "^model.location=org/name is not on this machine, and no repository of the hub can be called so; set",
    ),
    "unknown revision": (
        make_http_error(RevisionNotFoundError),
        "model.location=org/name has no revision 'v9'",
    ),
}


@pytest.mark.parametrize(("error", "message"), FAILURES.values(), ids=FAILURES)
def test_a_download_that_cannot_succeed_is_refused_at_once(hub, error, message):
    hub.info = error

    with pytest.raises(FileError, match=message) as raised:
        check_repository(REPOSITORY, "model.location", "v9")

    assert "\n" not in str(raised.value)


def test_an_error_of_the_program_itself_is_not_taken_for_one_of_the_network(hub):
    hub.info = AttributeError("a mistake")

    with pytest.raises(AttributeError):
        check_repository(REPOSITORY, "model.location")


@pytest.mark.parametrize(
    ("repository", "size"),
    [
        (
            "black-forest-labs/FLUX.1-dev",
            "about 34 GB to download, about 34 GB of memory as bfloat16; gated: ",
        ),
        ("stabilityai/stable-diffusion-xl-base-1.0", "about 14 GB to download, about 7 GB of memory as bf"),
        (
            "Qwen/Qwen-Image",
            r"about 58 GB of memory as bfloat16; how much is to download is not known here\)$",
        ),
    ],
)
def test_without_a_network_the_size_of_a_known_model_is_told(hub, repository, size):
    hub.info = OSError("no network")

    with pytest.raises(FileError, match=rf"hf download {repository} \({size}"):
        check_repository(repository, "model.location")


def test_a_gated_repository_needs_access(hub, caplog):
    hub.info.gated = "manual"
    check_repository(REPOSITORY, "model.base")

    hub.access = make_http_error(GatedRepoError)
    with pytest.raises(FileError, match=r"^model.base=org/name is gated: accept its terms at https://"):
        check_repository(REPOSITORY, "model.base")


def test_what_will_be_downloaded_has_a_size(hub, caplog):
    hub.info.siblings = [
        SimpleNamespace(rfilename="transformer/a.safetensors", size=2_000_000_000),
        SimpleNamespace(rfilename="vae/b.safetensors", size=340_000_000),
        SimpleNamespace(rfilename="README.md", size=5_000_000_000),
    ]

    with caplog.at_level(logging.INFO):
        check_repository(REPOSITORY, "model.location")

    assert caplog.messages == ["Downloading org/name, whose weights are 2.3 GB in all variants"]


def test_what_is_in_the_cache_is_not_asked_for(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *words, **more: "/cache")

    check_repository(REPOSITORY, "model.location")

    assert hub.asked == 0


def test_a_long_reason_is_cut_between_words():
    error = make_download_error("org/name", "model.location", OSError("what " * 100))

    assert "what what …); set model.location to a folder" in str(error)
