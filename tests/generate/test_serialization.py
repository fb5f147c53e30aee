"""What a model drew, there and back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.helpers import randn

from int8run.checkpoints.header import read_header
from int8run.checkpoints.provenance import read_provenance
from int8run.errors import FileError
from int8run.generate.generate import Generation
from int8run.generate.serialization import load_generation, save_generation


def make_image(seed: int, size: tuple[int, int] = (5, 3), mode: str = "RGB") -> Image.Image:
    count = size[0] * size[1] * 3
    data = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.frombytes("RGB", size, bytes(data.tolist())).convert(mode)


MADE = {
    "images": Generation(
        [[make_image(0)], [make_image(1)]],
        [randn(4, 2, 3), randn(4, 2, 3, seed=1)],
        [[0.1, 0.2], [0.3]],
        [1.5, 0.1 + 0.2],
    ),
    "videos": Generation(
        [[make_image(n) for n in range(3)], [make_image(9)] * 2],
        [randn(1, 2).T, randn(2, 1)],
        [[0.1]],
        [1.0, 2.0],
        True,
    ),
    "latents alone": Generation([], [randn(2, 2)], [[0.5]], [1.0]),
    "shared latents": Generation([[make_image(0)], [make_image(0)]], [*randn(2, 3, 4)], [[0.5]], [1.0, 1.0]),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_a_saved_generation_is_loaded_unchanged(made: Generation, tmp_path: Path) -> None:
    save_generation(made, tmp_path / "a.safetensors", {"model": "x"})
    back = load_generation(tmp_path / "a.safetensors")

    assert [[f.tobytes() for f in frames] for frames in back.frames] == [
        [f.tobytes() for f in frames] for frames in made.frames
    ]
    assert [[(f.size, f.mode) for f in frames] for frames in back.frames] == [
        [(f.size, f.mode) for f in frames] for frames in made.frames
    ]
    assert len(back.trajectories) == len(made.trajectories) and all(
        map(torch.equal, back.trajectories, made.trajectories)
    )
    assert (back.step_seconds, back.image_seconds, back.has_sound) == (
        made.step_seconds,
        made.image_seconds,
        made.has_sound,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_image_with_transparency_is_kept_as_rgb(tmp_path: Path) -> None:
    save_generation(
        Generation([[make_image(0, mode="RGBA")]], [randn(1)], [[1.0]], [1.0]), tmp_path / "a.safetensors", {}
    )

    assert load_generation(tmp_path / "a.safetensors").frames[0][0].tobytes() == make_image(0).tobytes()


def test_the_file_says_what_generated_it(tmp_path: Path) -> None:
    save_generation(MADE["images"], tmp_path / "a.safetensors", {"model": "tiny", "images": 2})

    assert read_provenance(tmp_path / "a.safetensors", read_header(tmp_path / "a.safetensors")[1]) == {
        "model": "tiny",
        "images": 2,
    }


FACTS = json.dumps({"samples": 1, "step_seconds": [], "image_seconds": [], "sound": False})
DAMAGED = {
    "gone": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "no facts": lambda path: save_file({"a": torch.zeros(1)}, path),
    "facts of another form": lambda path: save_file(
        {"a": torch.zeros(1)}, path, {"int8run_generation": "[]"}
    ),
    "facts that are no JSON": lambda path: save_file(
        {"a": torch.zeros(1)}, path, {"int8run_generation": "{"}
    ),
    "no frames": lambda path: save_file({"a": torch.zeros(1)}, path, {"int8run_generation": FACTS}),
    "frames of another form": lambda path: save_file(
        {"frames.0": torch.zeros(1, 2, 3, 7), "latents.0": torch.zeros(1)},
        path,
        {"int8run_generation": FACTS},
    ),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_an_error(damage: Callable[[Path], object], tmp_path: Path) -> None:
    save_generation(MADE["images"], tmp_path / "a.safetensors", {})
    damage(tmp_path / "a.safetensors")

    with pytest.raises(FileError, match=r"a\.safetensors is damaged: ") as raised:
        load_generation(tmp_path / "a.safetensors")
    assert "\n" not in str(raised.value)


def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    """It calls the number of images `pictures`."""
    path, made = tmp_path / "a.safetensors", MADE["images"]
    save_generation(made, path, {})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["int8run_generation"] = metadata["int8run_generation"].replace('"images"', '"pictures"')
    save_file(load_file(path), path, metadata)

    back = load_generation(path)

    assert [frames[0].tobytes() for frames in back.frames] == [frames[0].tobytes() for frames in made.frames]
