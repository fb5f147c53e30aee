"""What of an output folder becomes what of a run, without MLflow's store."""

import getpass
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from tracking.records import make_record

from int8run.tracking import mlflow_payload


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("lora.strength", "lora.strength"),
        ("series/step ms:1", "series/step ms:1"),
        ("a[0]=b,ü", "a_0__b__"),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_have_only_characters_that_mlflow_takes(name: str, allowed: str) -> None:
    assert mlflow_payload.sanitize_name(name) == allowed


def test_long_values_that_differ_anywhere_still_differ(tmp_path: Path) -> None:
    values = {"a": "y" * 4999 + "1", "b": "y" * 4999 + "2", "c": "1" + "y" * 4999, "short": "y" * 500}

    params = mlflow_payload.build_params(make_record(tmp_path, files=False, params=values))

    assert params["short"] == values["short"]
    assert re.fullmatch(r"y+… \(5,000 characters, [0-9a-f]{8}\)", params["a"])
    assert len(set(params.values())) == 4 and max(map(len, params.values())) == 500


def test_two_names_that_would_become_the_same_keep_their_values(tmp_path: Path) -> None:
    values = {"a[b": "1", "a]b": "2", "x" * 300: "3", "x" * 301: "4", "a_b": "5"}

    params = mlflow_payload.build_params(make_record(tmp_path, files=False, params=values))

    assert params["a_b"] == "1" and sorted(params.values()) == ["1", "2", "3", "4", "5"]
    assert max(map(len, params)) == 250


@pytest.mark.parametrize("text", ["not UTF-8 \udce4", "a zero \0", "\x1b[31m", "\u202e"])
def test_texts_that_no_database_keeps_are_spelled_out(tmp_path: Path, text: str) -> None:
    record = make_record(
        tmp_path, name=f"a={text}", params={"a": text, "prompts": text}, error=text, state="FAILED"
    )
    dataset = mlflow_payload.build_dataset(record)
    assert dataset is not None

    kept = [
        *mlflow_payload.build_params(record).values(),
        *mlflow_payload.build_end_tags(record).values(),
        mlflow_payload.name_run(record),
        dataset.dataset.name,
        dataset.dataset.source,
        dataset.dataset.profile,
    ]
    for value in kept:
        assert "\0" not in value
        value.encode()


@pytest.mark.parametrize("length", [10, 300, 7000])
def test_the_name_of_a_run_fits_every_store(tmp_path: Path, length: int) -> None:
    record = make_record(tmp_path, files=False, name=f"prompt={'y' * length}")

    name = mlflow_payload.name_run(record)

    assert name.startswith("prompt=yyy") and len(name) == min(length + len("prompt="), 250)


@pytest.mark.parametrize(
    ("described", "commit"),
    [("8664a31abcde-dirty", "8664a31abcde"), ("v1.0-5-g8664a31abcde", "8664a31abcde"), ("v1.0", "v1.0")],
)
def test_the_commit_is_taken_from_gits_description(tmp_path: Path, described: str, commit: str) -> None:
    record = make_record(tmp_path)
    (tmp_path / "environment.json").write_text(json.dumps({"git": described}))
    tags = mlflow_payload.build_end_tags(record)

    assert (tags["git"], tags["mlflow.source.git.commit"]) == (described, commit)


def test_a_user_without_a_name_has_no_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(getpass, "getuser", nobody)

    assert "mlflow.user" not in mlflow_payload.build_start_tags(make_record(tmp_path))


def test_each_job_has_its_own_identity(tmp_path: Path) -> None:
    different = [{}, {"number": 1}, {"started": 1.0}, {"pid": 1}, {"host": "elsewhere"}]
    made = [
        make_record(tmp_path / str(i), **status)  # type: ignore[arg-type]
        for i, status in enumerate(different)
    ]

    assert len({mlflow_payload.identify_record(record) for record in made}) == len(made)

    again = make_record(tmp_path / "moved")

    assert mlflow_payload.identify_record(again) == mlflow_payload.identify_record(made[0]), (
        "the folder may have been moved"
    )


def test_metrics_have_the_times_of_the_record(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    found = {(m.key, m.step): (m.value, m.timestamp) for m in mlflow_payload.build_metrics(record)}

    assert found["speed/step_ms_p50", 0] == (2.5, 1790000005500)
    assert found["quality/psnr_db", 0][0] == float("inf")
    assert [found["series/latent_rel_err", i][0] for i in range(3)] == [0.0, 0.5, 0.25]
    assert found["system/cpu_percent", 1] == (75.0, 1790000002500)
    assert not any(key == "system/gpu_percent" or step > 2 for key, step in found), "no GPU, and half a line"


def test_the_images_of_a_video_are_its_stills(tmp_path: Path) -> None:
    make_record(tmp_path)
    stills = ["images/000_fox_s0_first.png", "images/000_fox_s0_last.png"]
    for name in stills:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    drawn = [
        {"key": "000_fox_s0", "prompt": "fox", "seed": 0, "file": "images/000_fox_s0.webp", "stills": stills}
    ]
    (tmp_path / "metrics.json").write_text(json.dumps({"images": drawn}))
    record = make_record(tmp_path, files=False)

    assert list(mlflow_payload.find_image_files(record)) == [
        "sample/000_fox_s0_first",
        "sample/000_fox_s0_last",
    ]


def test_inputs_stand_above_the_samples_that_began_with_them_each_once(tmp_path: Path) -> None:
    make_record(tmp_path)
    cat = {"column": "image", "name": "cat.png", "sha256": "a", "images": ["images/input_cat.png"]}
    stills = ["images/input_clip_first.png", "images/input_clip_last.png"]
    clip = {"column": "video", "name": "clip.mp4", "sha256": "b", "images": stills}
    video = {"prompt": "z", "seed": 0, "file": "images/z.webp"}
    video["stills"] = ["images/z_first.png", "images/z_last.png"]
    samples = [
        {"prompt": "x", "seed": 0, "file": "images/x.png", "inputs": [cat]},
        {"prompt": "y", "seed": 0, "file": "images/y.png", "inputs": [cat]},
        {**video, "inputs": [clip, cat]},
    ]
    names = ["x.png", "y.png", "z_first.png", "z_last.png", "input_cat.png"]
    for name in [*names, "input_clip_first.png", "input_clip_last.png"]:
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    (tmp_path / "metrics.json").write_text(json.dumps({"images": samples}))

    keys = list(mlflow_payload.find_image_files(make_record(tmp_path, files=False)))

    assert keys == [
        "input/cat",
        "sample/x",
        "sample/y",
        "input/clip_first",
        "sample/z_first",
        "input/clip_last",
        "sample/z_last",
    ]


def test_a_damaged_image_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, half = tmp_path / "whole.png", tmp_path / "half.png"
    Image.effect_noise((64, 64), 50).save(whole)
    half.write_bytes(whole.read_bytes()[:2000])

    assert mlflow_payload.open_image(whole) is not None and mlflow_payload.open_image(half) is None
    assert "half.png is not an image and is not uploaded" in caplog.text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-1.5e-3", -0.0015),
        ("true", True),
        ("false", False),
        ("", None),
        ("to_q.0", "to_q.0"),
        ("1_0", "1_0"),
        ("inf", "inf"),
    ],
)
def test_cells_of_tables_become_numbers_and_booleans(text: str, value: object) -> None:
    found = mlflow_payload.parse_cell(text)

    assert found == value and type(found) is type(value)


def test_prompts_are_those_of_the_images_else_those_of_the_settings(tmp_path: Path) -> None:
    drawn, asked = (
        mlflow_payload.build_dataset(make_record(tmp_path / str(n), files=n == 0)) for n in range(2)
    )

    assert drawn is not None and asked is not None
    assert drawn.dataset.name == "tiny" and drawn.dataset.digest == asked.dataset.digest
    assert json.loads(drawn.dataset.profile) == {"num_rows": 2, "prompts": ["fox", "red apple"]}

    early = make_record(tmp_path / "early", files=False)
    (tmp_path / "early" / "config.yaml").write_text("prompts:\n  path: absent.txt\n")

    assert mlflow_payload.build_dataset(early) is None
