"""What a run leaves in its folder and shows on the terminal."""

import csv
import json
import logging
import math
import subprocess

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from int8run.layers.plan import LayerPlan
from int8run.report import console
from int8run.report.run_files import (
    DIFFERENCE_GAIN,
    GRID_MIN_SIDE,
    LAYER_COLUMNS,
    collect_environment,
    make_difference_image,
    make_image_grid,
    read_git_revision,
    save_sample,
    shorten_caption,
    write_json,
    write_layers_csv,
    write_yaml,
)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def flat(color, side=64):
    return Image.new("RGB", (side, side), color)


def pixels_of(sheet, color):
    """How many pixels have this color, and the box around them."""
    mask = Image.fromarray((np.asarray(sheet) == color).all(axis=-1))
    return int(np.asarray(mask).sum()), mask.getbbox()


# -- pictures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"), [(9, 9, 0), (10, 20, 80), (20, 10, 80), (0, 31, 248), (0, 32, 255), (0, 255, 255)]
)
def test_a_difference_is_amplified_and_clipped(a, b, expected):
    made = make_difference_image(flat((a, 0, 0), 2), flat((b, 0, 0), 2))
    assert (DIFFERENCE_GAIN, made.getpixel((1, 1))) == (8, (expected, 0, 0))


def test_a_difference_takes_any_mode():
    assert make_difference_image(Image.new("L", (2, 2), 5), Image.new("RGBA", (2, 2), (5, 5, 6, 0))).getpixel(
        (0, 0)
    ) == (0, 0, 8)


def test_small_pictures_are_enlarged_by_a_whole_factor():
    sheet = make_image_grid(
        [("fox", [flat(RED), flat(GREEN)]), ("owl", [flat(BLUE), flat(RED)])], ["float", "INT8"]
    )
    assert pixels_of(sheet, GREEN)[0] == pixels_of(sheet, BLUE)[0] == GRID_MIN_SIDE**2
    assert pixels_of(sheet, RED)[0] == 2 * GRID_MIN_SIDE**2


@pytest.mark.parametrize(("side", "shown"), [(100, 200), (192, 192), (193, 193), (300, 300)])
def test_the_side_in_the_grid(side, shown):
    assert pixels_of(make_image_grid([("", [flat(RED, side)])], [""]), RED)[0] == shown**2


def test_enlarging_does_not_smooth():
    picture = Image.new("RGB", (2, 2), RED)
    picture.putpixel((0, 0), GREEN)
    sheet = make_image_grid([("", [picture])], [""])
    assert (
        pixels_of(sheet, GREEN)[0] == (GRID_MIN_SIDE // 2) ** 2
        and pixels_of(sheet, RED)[0] == 3 * (GRID_MIN_SIDE // 2) ** 2
    )


def test_rows_and_columns_are_where_they_belong():
    sheet = make_image_grid([("a", [flat(RED), flat(GREEN)]), ("b", [flat(BLUE), flat(RED)])], ["one", "two"])
    (_, green), (_, blue) = pixels_of(sheet, GREEN), pixels_of(sheet, BLUE)
    assert green[0] >= blue[2], "the second column is right of the first"
    assert blue[1] >= green[3], "the second row is below the first"
    assert green[2] <= sheet.width and blue[3] <= sheet.height


def test_wide_pictures_keep_their_shape():
    _, box = pixels_of(make_image_grid([("", [Image.new("RGB", (128, 64), RED)])], [""]), RED)
    assert (box[2] - box[0], box[3] - box[1]) == (256, 128)


@pytest.mark.parametrize("part", ["heading", "caption"])
def test_words_are_written_above(part):
    def sheet(word):
        return make_image_grid(
            [(word if part == "caption" else "", [flat(RED)])], [word if part == "heading" else ""]
        )

    (_, picture), empty, written = pixels_of(sheet(""), RED), sheet(""), sheet("difference x 8")
    above = (0, 0, empty.width, picture[1])
    assert empty.crop(above).getextrema() == ((255, 255),) * 3
    assert written.crop(above).getextrema()[0][0] < 128, "nothing dark above the picture"
    assert (
        written.crop((0, picture[1], *written.size)).tobytes()
        == empty.crop((0, picture[1], *empty.size)).tobytes()
    )


def test_a_row_without_pictures_is_a_caption_of_the_rows_below():
    plain = make_image_grid([("1", [flat(RED), flat(GREEN)])], ["float", "INT8"])
    sheet = make_image_grid(
        [("a fox", []), ("1", [flat(RED), flat(GREEN)]), ("2", [flat(BLUE), flat(RED)])], ["float", "INT8"]
    )
    (_, green), (_, blue), (_, alone) = (
        pixels_of(sheet, GREEN),
        pixels_of(sheet, BLUE),
        pixels_of(plain, GREEN),
    )
    line = green[1] - alone[1]  # the height of the one line
    assert (
        16 <= line <= 32 and blue[1] - green[3] > line and sheet.height - blue[3] == plain.height - alone[3]
    )
    above = sheet.crop((0, alone[1] - line, sheet.width, alone[1]))
    assert above.getextrema()[0][0] < 128 and pixels_of(sheet, RED)[0] == 2 * GRID_MIN_SIDE**2


@pytest.mark.parametrize(("side", "line"), [(64, 24), (384, 24), (480, 28), (960, 48)])
def test_words_grow_with_large_pictures(side, line):
    sheet = make_image_grid([("", [flat(RED, side)])], [""])
    _, box = pixels_of(sheet, RED)
    assert sheet.height - (box[3] - box[1]) - 2 * 12 == 2 * line, "a heading and a caption"


def test_a_picture_is_saved_as_it_is(tmp_path):
    assert save_sample([flat(RED)], {"first": 0}, tmp_path, "fox", 16) == ["fox.png"]
    assert [p.name for p in tmp_path.iterdir()] == ["fox.png"] and Image.open(
        tmp_path / "fox.png"
    ).tobytes() == flat(RED).tobytes()


def test_a_video_is_saved_as_an_animation_and_some_exact_frames(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    frames = [Image.fromarray(noise[i]).resize((64, 48), Image.Resampling.BICUBIC) for i in range(5)]
    names = save_sample(frames, {"first": 0, "middle": 2, "last": 4}, tmp_path, "fox", 16)
    assert names == ["fox.webp", "fox_first.png", "fox_middle.png", "fox_last.png"]
    assert {p.name for p in tmp_path.iterdir()} == set(names)
    for name, number in zip(names[1:], (0, 2, 4), strict=True):
        assert Image.open(tmp_path / name).tobytes() == frames[number].tobytes()
    animation = Image.open(tmp_path / "fox.webp")
    assert (animation.n_frames, animation.info["loop"]) == (5, 0)
    times = []
    for number in range(5):
        animation.seek(number)
        shown = np.asarray(animation.convert("RGB"), dtype=np.float32)
        times.append(animation.info["duration"])
        # lossy, but nearer to its own frame by far than to any other
        errors = [float(np.abs(shown - np.asarray(other, dtype=np.float32)).mean()) for other in frames]
        assert min(errors) == errors[number] < 8 < sorted(errors)[1] / 4, errors
    assert sum(times) == round(5000 / 16) and set(times) == {62, 63}, "16 frames a second are 62.5 ms each"


# -- tables and facts ---------------------------------------------------------------------------------------------------


def test_layers_csv_has_a_row_for_every_linear(tmp_path):
    measured = {"weight_sqnr_db": 41.23456789, "output_sqnr_db": math.inf, "saturated_share": 0.015625}
    write_layers_csv(
        [
            LayerPlan(
                "blocks.0.q", 96, 64, None, "convrot group_size=64", "", "gptq", "auto", "onednn", measured
            ),
            LayerPlan("x_embedder", 7, 64, "input embedder, tiny"),
            LayerPlan("blocks.0.k", 96, 7, None, "none", "in_features=7 is not a multiple of 4", "absmax"),
        ],
        tmp_path / "layers.csv",
    )
    with (tmp_path / "layers.csv").open(newline="") as file:
        first, second, third = csv.DictReader(file)
    assert tuple(first) == LAYER_COLUMNS == tuple(second)
    assert first == {
        "name": "blocks.0.q",
        "out_features": "64",
        "in_features": "96",
        "quantized": "true",
        "why_not": "",
        "outlier": "convrot group_size=64",
        "outlier_why_not": "",
        "rounding": "gptq",
        "backend_asked": "auto",
        "backend_used": "onednn",
        "weight_sqnr_db": "41.2346",
        "output_sqnr_db": "inf",
        "saturated_share": "0.015625",
    }
    assert (second["quantized"], second["why_not"], second["in_features"]) == (
        "false",
        "input embedder, tiny",
        "7",
    )
    assert {second[column] for column in LAYER_COLUMNS[5:]} == {""}
    assert (third["outlier"], third["outlier_why_not"]) == ("none", "in_features=7 is not a multiple of 4")


def test_a_measurement_without_a_column_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="sqnr_db_2"):
        write_layers_csv([LayerPlan("a", 1, 1, None, measured={"sqnr_db_2": 1.0})], tmp_path / "layers.csv")


def test_json_writes_what_it_has_no_number_for_as_words(tmp_path):
    data = {
        "psnr": math.inf,
        "list": [-math.inf, (math.nan, 1.5)],
        "count": 3,
        "none": None,
        "yes": True,
        1: "key",
    }
    write_json(data, tmp_path / "m.json")

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    read = json.loads((tmp_path / "m.json").read_text(), parse_constant=refuse)
    assert read == {
        "psnr": "inf",
        "list": ["-inf", ["nan", 1.5]],
        "count": 3,
        "none": None,
        "yes": True,
        "1": "key",
    }


def test_yaml_keeps_order_and_letters(tmp_path):
    data = {"z": 1, "a": {"prompts": ["狐", "über"]}, "n": None}
    write_yaml(data, tmp_path / "c.yaml")
    text = (tmp_path / "c.yaml").read_text()
    assert yaml.safe_load(text) == data and list(yaml.safe_load(text)) == ["z", "a", "n"] and "狐" in text


def test_the_environment_names_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = collect_environment(torch.device("cpu"), {"torch": "1"})
    assert set(facts) == {"python", "platform", "device", "threads", "versions", "git", "cpu"}
    assert (facts["device"], facts["threads"], facts["versions"], facts["git"]) == (
        "cpu",
        torch.get_num_threads(),
        {"torch": "1"},
        None,
    )
    assert facts["cpu"], "a number without the name of its CPU is worth nothing"


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_revision_is_that_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    clean = read_git_revision()
    assert len(clean) == 12 and set(clean) <= set("0123456789abcdef")
    (tmp_path / "a").write_text("2")
    assert read_git_revision() == f"{clean}-dirty"


def test_a_machine_without_git_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_git_revision() is None


# -- the terminal -------------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch):
    """A wide terminal that keeps what is printed."""
    made = Console(width=120, record=True, force_terminal=False)
    monkeypatch.setattr(console, "get_console", lambda: made)
    return made


METRICS = {
    "speed/step_ms_p50": 20.0,
    "float/step_ms_p50": 50.0,
    "speed/step_ms_p90": 25.0,
    "float/step_ms_p90": 50.0,
    "speed/images_per_s": 3.0,
    "float/images_per_s": 2.0,
    "memory/denoiser_bytes": 10_000_000,
    "float/denoiser_bytes": 38_000_000,
    "quality/psnr_db": 31.25,
    "quality/ssim": 0.98765,
    "quality/latent_rel_err": 0.0312,
    "quant/layers_int8": 32,
    "quant/layers_float": 14,
    "quant/fallback_layers": 2,
    "quant/output_sqnr_db_mean": 33.3,
    "quant/output_sqnr_db_min": 21.1,
    "lora/modules_matched": 8,
    "lora/overhead_ratio": 1.07,
}


def rows(metrics):
    """The result table as {first cell: other cells}."""
    table = console.build_result_table("tiny", metrics, "INT8")
    assert [column.header for column in table.columns] == ["", "float", "INT8", "ratio"]
    return {first: others for first, *others in zip(*(column.cells for column in table.columns), strict=True)}


def test_the_result_table():
    assert rows(METRICS) == {
        "step, median": ["50.0 ms", "20.0 ms", "2.50×"],
        "step, 90 %": ["50.0 ms", "25.0 ms", "2.00×"],
        "images per second": ["2.00", "3.00", "1.50×"],
        "denoiser memory": ["38.0 MB", "10.0 MB", "3.80×"],
        "PSNR to float": ["", "31.2 dB", ""],
        "SSIM to float": ["", "0.9877", ""],
        "latent error": ["", "3.12 %", ""],
        "Linears kept / INT8": ["", "14 / 32", ""],
        "of these in float, few rows": ["", "2", ""],
        "layer SQNR, mean / min": ["", "33.3 / 21.1 dB", ""],
        "LoRA modules matched": ["", "8", ""],
        "LoRA branch, step time": ["", "1.07×", ""],
    }


def test_the_result_table_without_a_baseline():
    shown = rows(
        {"speed/step_ms_p50": 20.0, "memory/denoiser_bytes": 10_000_000, "float/denoiser_bytes": 38_000_000}
    )
    assert shown["step, median"] == ["–", "20.0 ms", ""]
    assert set(shown) == {"step, median", "denoiser memory"}, "what was not measured has no row"


def test_equal_pictures_are_called_equal():
    assert rows(METRICS | {"quality/psnr_db": math.inf})["PSNR to float"] == ["", "equal", ""]


def test_lines_are_not_wrapped(terminal):
    console.print_lines("x" * 300, "[bold]y[/bold]")
    assert terminal.export_text() == "x" * 300 + "\ny\n"


def test_pairs_are_one_line():
    assert (
        console.format_pairs([("device", "cpu"), ("layers", 3)])
        == "device [bold]cpu[/bold] · layers [bold]3[/bold]"
    )


@pytest.mark.parametrize(
    ("enabled", "said"), [(True, ["quantize (3)", "load"]), (False, [])], ids=["on", "off"]
)
def test_elsewhere_than_on_a_terminal_there_is_a_line_per_step(terminal, caplog, enabled, said):
    progress = console.Progress(enabled)
    with caplog.at_level(logging.INFO, "int8run"):
        with progress.track_loop("quantize", 3) as advance:
            for _ in range(3):
                advance(1)
        with progress.track_step("load"):
            pass
    assert caplog.messages == said and terminal.export_text() == ""


def test_on_a_terminal_there_are_bars(monkeypatch, caplog):
    shown = Console(width=120, record=True, force_terminal=True)
    monkeypatch.setattr(console, "get_console", lambda: shown)
    progress = console.Progress(True)
    with caplog.at_level(logging.INFO, "int8run"):
        with progress.track_loop("quantize", 3) as advance:
            for _ in range(3):
                advance(1)
        with progress.track_step("load"):
            pass
    text = shown.export_text()
    assert "quantize" in text and "3/3" in text and "load" in text and caplog.messages == []


def test_switched_off_there_are_no_bars_on_a_terminal_either(monkeypatch):
    shown = Console(width=120, record=True, force_terminal=True)
    monkeypatch.setattr(console, "get_console", lambda: shown)
    with console.Progress(False).track_loop("quantize", 3) as advance:
        advance(1)
    assert shown.export_text() == ""


@pytest.mark.parametrize(
    ("text", "width", "found"),
    [
        ("a fox · seed 0", 14, "a fox · seed 0"),
        ("a very long prompt about a fox · seed 12", 24, "a very long p… · seed 12"),
        ("a very long prompt about a fox · seed 12", 11, "a… · seed 12"[-10:]),
    ],
)
def test_a_caption_keeps_its_beginning_and_its_seed(text: str, width: int, found: str) -> None:
    assert shorten_caption(text, width, len) == found and len(found) <= max(width, 10)
