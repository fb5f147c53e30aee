"""The card beside `save=`: where it lies, what it says of a run and of `task=quantize`, and its grid."""

from pathlib import Path

import pytest
from PIL import Image
from support.run_job import make_spec

from int8run.config.job import Job
from int8run.tasks.model_card import Comparison, format_command, get_card_path, name_base, write_card

QUANTIZED = {"quant/layers_int8": 12.0, "quant/layers_float": 3.0}
MEASURED = {**QUANTIZED, "quality/psnr_db": 50.0, "quality/psnr_db_low": 48.0, "quality/psnr_db_high": 52.0}


def make_job(folder, overrides):
    """A job whose folder has a grid of images."""
    Image.new("RGB", (3000, 30)).save(folder / "grid.png")
    return Job({}, {"model": "tiny"}, overrides, folder)


def write(folder, save, metrics, **options):
    """The text of a card for a checkpoint of 1 kB."""
    saved = folder / save
    saved.parent.mkdir(parents=True, exist_ok=True)
    saved.write_bytes(bytes(1000))
    place = save if "/" not in save else save.rpartition("/")[0]
    overrides = ["outlier=convrot", f"save={folder / place}", "tracker.uri=http://me:secret@host"]
    spec = make_spec(overrides[:2])
    return write_card(spec, make_job(folder, overrides), [saved], metrics, **options)


def test_a_file_has_its_card_and_its_grid_beside_it(tmp_path):
    comparison = Comparison({"cpu": "EPYC", "threads": 2}, num_samples=6)

    card = write(tmp_path, "fox.safetensors", MEASURED, comparison=comparison)

    assert card == tmp_path / "fox.card.md"
    text = card.read_text()
    assert text.startswith("# fox, INT8\n")
    assert (
        "| outlier | convrot group\\_size=256 |" in text
        and "| INT8 layers, as diffusers counts them | 12 |" in text
    )
    assert "| PSNR dB |  | 50.0 | 48.0 to 52.0 |" in text and "EPYC, 2 threads" in text
    assert "| license of the base | apache-2.0 (README.md of tiny) |" in text
    assert "outlier=convrot" in text and "secret" not in text
    with Image.open(tmp_path / "fox.grid.png") as grid:
        assert grid.size == (2048, 20)


@pytest.mark.parametrize("bits", [4, 6])
def test_the_title_names_weights_of_fewer_bits(tmp_path, bits):
    saved = tmp_path / "fox.safetensors"
    saved.write_bytes(bytes(1000))
    overrides = ["outlier=convrot", f"save={saved}", f"int8.bits={bits}"]

    card = write_card(make_spec(overrides), make_job(tmp_path, overrides), [saved], MEASURED)

    assert card.read_text().startswith(f"# fox, W{bits}A8\n")


def test_the_card_of_a_video_model_says_video(tmp_path):
    comparison = Comparison({}, num_samples=2, sample_noun="video")

    text = write(tmp_path, "fox.safetensors", MEASURED, comparison=comparison).read_text()

    assert "seeds and settings: 2 videos, on" in text and "image" not in text.partition("## How")[0].replace(
        "fox.grid.png", ""
    )


def test_the_card_names_the_int8_vae_and_how_to_use_it(tmp_path):
    vae = tmp_path / "fox_vae" / "model.safetensors"
    vae.parent.mkdir()
    vae.write_bytes(bytes(2000))
    (vae.parent / "config.json").write_text('{"_class_name": "AutoencoderKL"}')

    text = write(tmp_path, "fox.safetensors", QUANTIZED, vae=vae).read_text()

    assert r"| file | fox\_vae/model.safetensors, 0.0 MB |" in text
    assert "model.location=fox.safetensors int8.vae=int8 'model.parts.vae=[AutoencoderKL, fox_vae]'" in text


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("x.token=abc", "'x.token=***'"),
        ("+tracker.api_key=abc", "'+tracker.api_key=***'"),
        ("tracker.password='a b'", "\"tracker.password='***'\""),
        ("prompts.prompts=[a token]", "'prompts.prompts=[a token]'"),
    ],
)
def test_the_command_of_a_card_has_no_secrets(tmp_path, override, shown):
    assert format_command(Job({}, {}, [override], tmp_path)) == f"int8run {shown}"


def test_a_folder_has_its_card_inside(tmp_path):
    card = write(tmp_path, "fox/diffusion_pytorch_model.safetensors", QUANTIZED)

    assert card == tmp_path / "fox" / "card.md"
    assert card.read_text().startswith("# fox, INT8\n")
    assert "model.location=." in card.read_text()


def test_what_was_made_from_file_to_file_has_no_numbers(tmp_path):
    text = write(tmp_path, "fox.safetensors", QUANTIZED).read_text()

    assert "Nothing was measured" in text and "dB" not in text
    assert "| float layers | 3 |" in text


def test_a_text_encoder_is_used_as_one(tmp_path):
    text = write(
        tmp_path, "t5.safetensors", {"clip/layers_quantized": 5.0, "clip/layers_float": 1.0}
    ).read_text()

    assert "clip=auto clip.path=t5.safetensors" in text and "model.location" not in text
    assert "| quantized layers | 5 |" in text


@pytest.mark.parametrize(
    ("save", "card"),
    [("a/x.safetensors", "a/x.card.md"), ("a/x", "a/x/card.md"), ("a/x.int8", "a/x.int8/card.md")],
)
def test_the_place_of_a_card(save, card):
    assert get_card_path(save) == Path(card).absolute()


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("org/fox", "org/fox"),
        ("shipped:tiny", "tiny"),
        ("/home/anna/fox.safetensors", "fox"),
        ("~/models/fox", "fox"),
        ("./models/fox", "fox"),
    ],
)
def test_a_base_is_named_without_folders_of_the_machine(location, name):
    assert name_base(location) == name
