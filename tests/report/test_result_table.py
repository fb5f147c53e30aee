"""The table that ends a run."""

import math

from int8run.report.result_table import build_result_table

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
    "quant/macs_int8_share": 0.98949,
    "quant/output_sqnr_db_mean": 33.3,
    "quant/output_sqnr_db_min": 21.1,
    "vae/psnr_db": 56.51,
    "vae/decode_ms": 12.0,
    "vae/decode_ratio": 2.5,
    "vae/memory_bytes": 2_000_000,
    "vae/memory_ratio": 4.0,
    "lora/modules_matched": 8,
    "lora/overhead_ratio": 1.07,
}


def read_result_rows(metrics, **facts):
    """The rows of a result table: first cell -> other cells."""
    table = build_result_table("tiny", metrics, "INT8", **facts)
    assert [column.header for column in table.columns] == ["", "float", "INT8", "ratio"]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return {label: cells for label, *cells in rows}


def test_the_result_table_has_a_row_for_every_measurement():
    assert read_result_rows(METRICS) == {
        "step, median": ["50.0 ms", "20.0 ms", "2.50×"],
        "step, 90 %": ["50.0 ms", "25.0 ms", "2.00×"],
        "images per second": ["2.00", "3.00", "1.50×"],
        "denoiser memory": ["38.0 MB", "10.0 MB", "3.80×"],
        "PSNR to float": ["", "31.2 dB", ""],
        "SSIM to float": ["", "0.9877", ""],
        "latent error": ["", "3.12 %", ""],
        "layers, float / INT8": ["", "14 / 32", ""],
        "multiply-adds in INT8": ["", "98.9 %", ""],
        "small-batch fallback": ["", "2", ""],
        "layer SQNR, mean / min": ["", "33.3 / 21.1 dB", ""],
        "VAE, PSNR to the float VAE": ["", "56.5 dB", ""],
        "VAE, decoding": ["30.0 ms", "12.0 ms", "2.50×"],
        "VAE memory": ["8.0 MB", "2.0 MB", "4.00×"],
        "LoRA modules matched": ["", "8", ""],
        "step time with LoRA branch": ["", "1.07×", ""],
    }


def test_what_was_not_measured_has_no_row():
    rows = read_result_rows(
        {"speed/step_ms_p50": 20.0, "memory/denoiser_bytes": 10_000_000, "float/denoiser_bytes": 38_000_000}
    )

    assert set(rows) == {"step, median", "denoiser memory"}
    assert rows["step, median"] == ["–", "20.0 ms", ""]


def test_int8_is_compared_with_the_fastest_float_of_the_machine():
    """Nobody is told 2 where bfloat16 alone gives 3."""
    rows = read_result_rows(METRICS | {"speed/ratio_vs_best_float": 0.8}, best_float="bfloat16")

    assert rows["step, fastest float: bfloat16"] == ["", "", "0.80×"]
    assert "step, fastest float" not in str(read_result_rows(METRICS, best_float="bfloat16"))


def test_layers_that_are_float_by_choice_and_backends_that_failed_are_counted():
    counts = {"quant/layers_float_by_choice": 3, "quant/layers_with_backends_left_out": 2}
    rows = read_result_rows(METRICS | counts)

    assert rows["float by choice"] == ["", "3", ""]
    assert rows["layers with a backend left out"] == ["", "2", ""]
    assert "float by choice" not in read_result_rows(METRICS | dict.fromkeys(counts, 0))


def test_a_baseline_of_the_same_file_is_said_beside_the_psnr():
    metrics = METRICS | {"quality/float_layers_from_same_file": 38}
    rows = read_result_rows(metrics)
    table = build_result_table("tiny", metrics, "INT8")

    assert list(rows)[list(rows).index("PSNR to float") + 1] == "float layers of the same file"
    assert rows["float layers of the same file"] == ["", "38", ""]
    assert "shows neither what the file lost when it was made, nor that it is read" in str(table.caption)
    assert build_result_table("tiny", METRICS, "INT8").caption is None


def test_the_psnr_of_identical_images_is_equal():
    rows = read_result_rows(METRICS | {"quality/psnr_db": math.inf})

    assert rows["PSNR to float"] == ["", "equal", ""]


def test_edits_and_videos_have_rows_of_their_own():
    rows = read_result_rows(
        METRICS
        | {
            "quality/masked_psnr_db": 28.04,
            "quality/unmasked_psnr_db": math.inf,
            "quality/masked_share": 0.125,
            "quality/frame_err": 0.0101,
            "quality/flicker_err": 0.0044,
            "quality/drift": 0.21,
            "float/drift": 0.2,
        }
    )

    assert list(rows.items())[7:13] == [
        ("PSNR inside the mask", ["", "28.0 dB", ""]),
        ("PSNR outside the mask", ["", "equal", ""]),
        ("share inside the mask", ["", "12.50 %", ""]),
        ("error of frames", ["", "1.01 %", ""]),
        ("error of flicker", ["", "0.44 %", ""]),
        ("drift from the first frame", ["20.00 %", "21.00 %", ""]),
    ]


def test_where_the_error_arises_is_said_with_the_number_of_steps():
    metrics = {"quality/psnr_db": 40.0, "quality/half_error_step": 9.0}

    assert read_result_rows(metrics, num_steps=16)["half of the error by step"] == ["", "9 of 16", ""]


def test_identical_samples_that_a_mean_leaves_out_are_counted():
    statistics = {"metrics": {"quality/noise_floor_db": {"infinite": 5, "samples": 1}}}

    rows = read_result_rows(METRICS | {"quality/noise_floor_db": 89.0}, statistics=statistics)

    assert rows["float to itself, PSNR"][1] == "89.0 dB, 5 of 6 identical"
    assert rows["PSNR to float"][1] == "31.2 dB"
