"""`task=publish`: what the hub folder holds, and that nothing else leaves this machine."""

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file
from support.cli_process import Command

from int8run.checkpoints.writer import StreamWriter, TensorEntry
from int8run.errors import ConfigError, FileError
from int8run.tasks import publish as module
from int8run.tasks.local_paths import hide_local_paths
from int8run.tasks.publish import Publication, publish
from int8run.tasks.quantize_common import merge_metadata

COMMAND = "int8run model.location=/home/anna/models/fox.safetensors save=fox.safetensors"
CARD = (
    "# fox, INT8\n\n| license of the base | unknown (nobody says it) |\n\n"
    f"![grid](fox.grid.png)\n\n```bash\n{COMMAND}\n```\n"
)


def write_checkpoint(path, model="shipped:tiny", rounding="absmax"):
    """A file as int8run writes one."""
    metadata = merge_metadata({}, {"int8run": "1.0", "model": model, "outlier": "none", "rounding": rounding})
    with StreamWriter(path, [TensorEntry("weight", "F32", (2, 2))], metadata) as writer:
        writer.write("weight", torch.ones(2, 2))
        writer.finish()
    return path


@pytest.fixture
def publication(tmp_path):
    """A file with its card and its grid, to be published by a dry run."""
    path = write_checkpoint(tmp_path / "fox.safetensors")
    (tmp_path / "fox.card.md").write_text(CARD)
    (tmp_path / "fox.grid.png").write_bytes(b"png")
    (tmp_path / "secret.txt").write_text("not for the hub")
    return Publication(path=str(path), repo="anna/fox-int8", folder=str(tmp_path / "hub"))


class Hub:
    """Remembers what was uploaded."""

    def __init__(self, error=None):
        self.error, self.uploaded, self.created = error, {}, {}

    def create_repo(self, repo, **options):
        if self.error is not None:
            raise self.error
        self.created[repo] = options

    def create_commit(self, repo, operations, commit_message):
        self.uploaded = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
        return SimpleNamespace(commit_url=f"https://hub/{repo}")


@pytest.fixture
def hub(monkeypatch):
    fake = Hub()
    monkeypatch.setattr(module, "HfApi", lambda: fake)
    return fake


def test_a_dry_run_puts_the_folder_together_and_uploads_nothing(publication, tmp_path, hub, capsys):
    files = publish(publication)

    folder = tmp_path / "hub"
    names = ["fox.safetensors", "fox.grid.png", "int8run.json", "README.md", "SHA256SUMS"]
    assert [file.name for file in files] == names
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert torch.equal(load_file(folder / "fox.safetensors")["weight"], torch.ones(2, 2))
    assert hub.created == {} and hub.uploaded == {}
    assert "dry run: nothing was uploaded" in capsys.readouterr().out


def test_a_checkpoint_may_be_named_from_its_folder(publication, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    files = publish(replace(publication, path="fox.safetensors", folder="hub"))

    assert [file.name for file in files][:2] == ["fox.safetensors", "fox.grid.png"]


def test_the_readme_is_the_card_below_its_front_matter(publication, tmp_path):
    publish(publication)

    _, front, text = (tmp_path / "hub" / "README.md").read_text().split("---\n", maxsplit=2)
    metadata = yaml.safe_load(front)
    assert metadata["license"] == "apache-2.0" and "int8" in metadata["tags"]
    assert "base_model" not in metadata, "the shipped model has no name on the hub"
    assert text.strip().startswith("# fox, INT8")
    assert "/home/anna" not in text and "model.location=fox.safetensors" in text


def test_the_config_of_a_folder_goes_without_the_folders_of_this_machine(publication, tmp_path):
    source, hub_config = tmp_path / "fox", tmp_path / "hub" / "config.json"
    source.mkdir()
    write_checkpoint(source / "model.safetensors")
    config = json.dumps({"_name_or_path": "/home/anna/models/fox", "layers": 2})
    (source / "config.json").write_text(config)
    hub_config.parent.mkdir()
    hub_config.hardlink_to(source / "config.json")

    files = publish(replace(publication, path=str(source)))

    assert "config.json" in [file.name for file in files]
    assert json.loads(hub_config.read_text()) == {"_name_or_path": "fox", "layers": 2}
    assert (source / "config.json").read_text() == config, "the checkpoint's own stays as it is"


@pytest.fixture
def vae(tmp_path):
    """The folder of the INT8 VAE that the card of the publication names."""
    folder = tmp_path / "fox_vae"
    folder.mkdir()
    write_checkpoint(folder / "diffusion_pytorch_model.safetensors", rounding="mse")
    (folder / "config.json").write_text('{"_name_or_path": "/home/anna/fox"}')
    (folder / "secret.txt").write_text("not for the hub")
    (tmp_path / "fox.card.md").write_text(CARD + r"| VAE | fox\_vae/diffusion\_pytorch\_model.safetensors |")
    return folder


def test_the_int8_vae_goes_with_its_checkpoint(publication, tmp_path, vae, hub):
    files = publish(replace(publication, upload=True))

    names = [file.name for file in files]
    weights = "fox_vae/diffusion_pytorch_model.safetensors"
    assert {weights, "fox_vae/config.json"} <= set(names) and "fox_vae/secret.txt" not in names
    assert list(hub.uploaded) == names
    assert json.loads((tmp_path / "hub/fox_vae/config.json").read_text()) == {"_name_or_path": "fox"}
    digest = hashlib.sha256((vae / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert f"{digest}  {weights}\n" in (tmp_path / "hub/SHA256SUMS").read_text()
    notes = json.loads((tmp_path / "hub/int8run.json").read_text())
    assert {name: note["rounding"] for name, note in notes.items()} == {
        "fox.safetensors": "absmax",
        weights: "mse",
    }


@pytest.mark.parametrize(
    ("row", "is_published"), [("| file | vae/x.safetensors |", True), ("int8.vae=", False)]
)
def test_a_vae_inside_a_folder_goes_where_the_card_names_it(publication, tmp_path, row, is_published):
    source = tmp_path / "fox"
    (source / "vae").mkdir(parents=True)
    write_checkpoint(source / "x.safetensors")
    write_checkpoint(source / "vae" / "x.safetensors")
    (source / "card.md").write_text(f"# fox\n\n{row}\n")

    names = [file.name for file in publish(replace(publication, path=str(source)))]

    assert ("vae/x.safetensors" in names) == is_published


def test_a_vae_that_the_card_does_not_name_stays_here_and_is_said(publication, tmp_path, vae, caplog):
    (tmp_path / "fox.card.md").write_text(CARD)

    names = [file.name for file in publish(publication)]

    assert not any(name.startswith("fox_vae") for name in names)
    assert "fox_vae is not published" in caplog.text


def test_files_of_different_models_are_refused(publication, vae):
    write_checkpoint(vae / "diffusion_pytorch_model.safetensors", model="org/other")

    with pytest.raises(FileError, match=r"made from different models \(org/other, shipped:tiny\)"):
        publish(publication)


def test_a_base_of_the_hub_is_named_with_its_license(publication, tmp_path):
    write_checkpoint(tmp_path / "fox.safetensors", model="black-forest-labs/FLUX.1-dev")

    publish(publication)

    metadata = yaml.safe_load((tmp_path / "hub" / "README.md").read_text().split("---\n")[1])
    assert metadata["base_model"] == "black-forest-labs/FLUX.1-dev"
    assert metadata["base_model_relation"] == "quantized"
    assert (metadata["license"], metadata["license_name"]) == ("other", "flux-1-dev-non-commercial-license")


def test_the_hashes_are_those_of_the_files(publication, tmp_path):
    publish(publication)

    lines = (tmp_path / "hub" / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == 4
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "hub" / name).read_bytes()).hexdigest() == digest


def test_an_upload_takes_the_listed_files_alone(publication, tmp_path, hub, caplog):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "notes.txt").write_text("mine")

    files = publish(replace(publication, upload=True))

    assert list(hub.uploaded) == [file.name for file in files]
    assert "notes.txt" not in hub.uploaded and "secret.txt" not in hub.uploaded
    assert hub.created == {"anna/fox-int8": {"private": True, "exist_ok": True}}
    assert "not uploaded, because this command did not put it there: notes.txt" in caplog.text


def test_an_upload_needs_a_license(publication, tmp_path, hub):
    write_checkpoint(tmp_path / "fox.safetensors", model=str(tmp_path))

    with pytest.raises(ConfigError, match=r"license of the base .* is not known .*task\.license=apache-2\.0"):
        publish(replace(publication, upload=True))
    assert hub.created == {}

    publish(replace(publication, upload=True, license="mit"))
    readme = (tmp_path / "hub" / "README.md").read_text()
    assert "license: mit" in readme and "| license of the base | mit (as task.license says) |" in readme
    assert "unknown" not in readme, "the card was written before anybody said it"


@pytest.mark.parametrize("license_name", ["unknown", " "])
def test_an_upload_needs_a_license_that_says_something(publication, tmp_path, hub, license_name):
    write_checkpoint(tmp_path / "fox.safetensors", model=str(tmp_path))

    with pytest.raises(ConfigError, match="is not known"):
        publish(replace(publication, upload=True, license=license_name))
    assert hub.created == {}


@pytest.mark.parametrize("repo", ["fox", "a/b/c", "anna/fox int8", "anna/..", "", "anna/fox;rm"])
def test_what_no_repository_can_be_called_is_refused(publication, repo):
    with pytest.raises(ConfigError, match="is no name of a repository; it is owner/name"):
        publish(replace(publication, repo=repo))


def test_a_grid_that_the_card_does_not_show_stays_here(publication, tmp_path):
    (tmp_path / "fox.card.md").write_text("# fox, INT8\n")

    files = publish(publication)

    assert "fox.grid.png" not in [file.name for file in files]


def test_a_file_of_another_program_is_refused(publication, tmp_path):
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "fox.safetensors")

    with pytest.raises(FileError, match="was not written by int8run"):
        publish(publication)


def test_a_damaged_file_is_refused(publication, tmp_path):
    path = tmp_path / "fox.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    with pytest.raises(FileError, match="does not hold the tensors that int8run wrote"):
        publish(publication)


def test_a_folder_without_weights_is_refused(publication, tmp_path):
    (tmp_path / "empty").mkdir()

    with pytest.raises(FileError, match=r"holds no \.safetensors file"):
        publish(replace(publication, path=str(tmp_path / "empty")))


def test_the_folder_of_the_checkpoint_is_not_the_hub_folder(publication, tmp_path):
    with pytest.raises(ConfigError, match="is where the checkpoint is"):
        publish(replace(publication, folder=str(tmp_path)))


def test_without_a_card_the_readme_says_what_the_header_says(publication, tmp_path, caplog):
    (tmp_path / "fox.card.md").unlink()

    publish(publication)

    text = (tmp_path / "hub" / "README.md").read_text()
    assert "Nothing was measured" in text and "absmax" in text
    assert "is missing: the README says what the header says" in caplog.text


def test_a_refusal_of_the_hub_says_what_to_do(publication, hub):
    response = SimpleNamespace(headers={}, request=None, status_code=401)
    hub.error = RepositoryNotFoundError("401", response=response)

    with pytest.raises(FileError, match=r"could not be uploaded to .*hf auth login"):
        publish(replace(publication, upload=True))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("save=/home/anna/a b", "save=a b"),
        ("model.location=~/models/fox.safetensors", "model.location=fox.safetensors"),
        ("[/data/a.png,/data/b.png]", "[a.png,b.png]"),
        (r"save=C:\Users\anna\fox.safetensors", "save=fox.safetensors"),
        ("model.location=file:///home/anna/fox.safetensors", "model.location=fox.safetensors"),
        ("file://localhost/data/a.png file:/data/b.png file:///C:/x/y", "a.png b.png y"),
        (r'{"a": "D:\\models\\fox", "b": "C:/x/y"}', '{"a": "fox", "b": "y"}'),
        (r"| base | /home/anna\_b/fox |", "| base | fox |"),
        ("model=org/fox https://hub/org/fox ./here/a 1/2", "model=org/fox https://hub/org/fox ./here/a 1/2"),
    ],
)
def test_paths_of_this_machine_are_shortened(text, shown):
    assert hide_local_paths(text) == shown


def test_a_command_without_a_repository_is_refused(command: Command):
    outcome = command("task=publish", "task.path=fox.safetensors")

    assert outcome.code == 2
    assert outcome.message.startswith("task=publish needs task.path=")


@pytest.mark.parametrize(
    "error",
    [HfHubHTTPError.__bases__[0]("no address"), OfflineModeIsEnabled("offline"), ConnectionError("refused")],
)
def test_without_a_network_nobody_is_asked_to_log_in(publication, hub, error):
    hub.error = error

    with pytest.raises(FileError, match="the hub cannot be reached") as caught:
        publish(replace(publication, upload=True))

    assert "auth login" not in str(caught.value)


def test_a_hub_that_is_out_of_order_is_no_refusal():
    response = SimpleNamespace(headers={}, request=None, status_code=503)

    assert module.name_remedy(HfHubHTTPError("503", response=response)) == "the same command tries again"
    assert "auth login" in module.name_remedy(LocalTokenNotFoundError("no token"))
