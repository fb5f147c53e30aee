"""The card of a checkpoint: numbers with their intervals, honest gaps, and text that stays text."""

from dataclasses import replace

from report.run_folders import make_metrics

from int8run.report.model_card import CardFacts, CardFile, render_card

FACTS = CardFacts(
    title="fox, INT8",
    version="1.2",
    base="org/fox",
    license_name="apache-2.0",
    license_origin="of org/fox on the hub",
    files=[CardFile("fox.safetensors", 12_300_000)],
    made=[("outlier", "convrot group_size=256"), ("INT8 layers", "12")],
    command="int8run model=fox save=fox.safetensors",
    metrics=make_metrics(10.0, 2.0, 50.0)
    | {"quality/psnr_db_low": 48.0, "quality/psnr_db_high": 52.0, "float/step_ms_p50": 20.0},
    num_samples=6,
    machine="EPYC, 2 threads",
    grid="fox.grid.png",
    usage=["int8run model=fox model.location=fox.safetensors"],
)


def find_line(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def test_the_card_says_what_it_is_and_how_it_was_made():
    text = render_card(FACTS)

    assert text.startswith("# fox, INT8\n")
    assert find_line(text, "| license") == "| license of the base | apache-2.0 (of org/fox on the hub) |"
    assert find_line(text, "| file") == "| file | fox.safetensors, 12.3 MB |"
    assert "```bash\nint8run model=fox save=fox.safetensors\n```" in text


def test_numbers_stand_beside_those_of_float_with_their_interval():
    text = render_card(FACTS)

    assert find_line(text, "| PSNR") == "| PSNR dB |  | 50.0 | 48.0 to 52.0 |"
    assert find_line(text, "| step ms") == "| step ms | 20.0 | 10.0 |  |"
    assert "6 images" in text and "EPYC, 2 threads" in text
    assert "![float, INT8 and their difference](fox.grid.png)" in text
    assert "No interval" not in text


def test_what_float_differs_from_itself_by_stands_below_the_psnr():
    text = render_card(replace(FACTS, metrics=FACTS.metrics | {"quality/noise_floor_db": 61.25}))

    lines = text.splitlines()
    line = find_line(text, "| PSNR dB of float, computed otherwise |")
    assert line.split("|")[3].strip() == "61.2"
    assert lines.index(line) == lines.index(find_line(text, "| PSNR dB |")) + 1


def test_numbers_without_an_interval_are_called_observations():
    text = render_card(replace(FACTS, metrics=make_metrics()))

    assert "No interval was measured" in text


def test_without_a_measurement_the_card_has_no_numbers():
    text = render_card(replace(FACTS, metrics={}, grid=None))

    assert "Nothing was measured" in text and "PSNR" not in text and "![" not in text


def test_names_of_users_cannot_leave_their_cell_or_their_block():
    facts = replace(FACTS, title="a | <b>\n# c", command="int8run 'prompt=```\nx'", grid="a b (c).png")

    text = render_card(facts)

    assert text.splitlines()[0] == r"# a \| \<b\>\\n\# c"
    assert "````bash\nint8run 'prompt=```\nx'\n````" in text
    assert "(<a b (c).png>)" in text


def test_times_that_scatter_are_said_below_the_numbers():
    scattered = replace(FACTS, metrics=FACTS.metrics | {"speed/step_ms_p90": 21.0})

    assert "the speeds say little" in render_card(scattered)
    assert "the speeds say little" not in render_card(FACTS)
