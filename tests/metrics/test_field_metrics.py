"""Metrics of the field: by their libraries where these are installed, by their formulas, and their errors."""

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from int8run.generate.generate import Generation
from int8run.metrics.base import NEITHER, Needs, SamplePair, Scope, UnavailableError
from int8run.metrics.catalog import build_measure
from int8run.metrics.image_sets import ImageFolder, make_set_function, open_reference
from int8run.metrics.images import image_to_tensor
from int8run.metrics.loading import load_measures, warn_of_missing_packages
from int8run.metrics.measures.cmmd import compute_mmd
from int8run.metrics.measures.cvvdp import Cvvdp
from int8run.metrics.measures.fid import Fid
from int8run.metrics.measures.flip import Flip
from int8run.metrics.measures.kid import Kid
from int8run.metrics.measures.ocr import compute_nearest_distance, list_asked_texts, rate_reading
from int8run.metrics.measures.subject_consistency import SubjectConsistency, rate_consistency
from int8run.metrics.measures.temporal_flicker import TemporalFlicker
from int8run.metrics.quality import compare_sets, load_measures_for


def make_flat_image(level, side=16):
    return Image.new("RGB", (side, side), (level,) * 3)


def make_noise_image(side, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def add_noise(image, sigma, seed=0):
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels + np.random.default_rng(seed).normal(0, sigma, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def make_generation(*samples):
    return Generation(
        frames=[list(frames) for frames in samples], trajectories=[torch.ones(1)] * len(samples)
    )


# -- FLIP and ColorVideoVDP --------------------------------------------------------------------------


class TestRealFlip:
    """The library itself, where the extra is installed."""

    @pytest.fixture
    def flip(self):
        pytest.importorskip("flip_evaluator")
        compare = Flip().load()
        return lambda a, b: compare(image_to_tensor(a), image_to_tensor(b), "")["flip"]

    def test_it_is_0_for_identical_images_and_grows_with_noise(self, flip):
        image = make_noise_image(64)

        values = [flip(add_noise(image, sigma), image) for sigma in (0, 4, 16, 64)]

        assert values[0] == 0 and values == sorted(values) and 0.02 < values[-1] < 1

    def test_black_and_white_are_as_far_apart_as_can_be(self, flip):
        assert flip(make_flat_image(0), make_flat_image(255)) == pytest.approx(1, abs=0.05)

    def test_the_size_on_the_screen_counts(self):
        pytest.importorskip("flip_evaluator")
        image = make_noise_image(64)
        pair = image_to_tensor(add_noise(image, 32)), image_to_tensor(image), ""

        near, far = (Flip(pixels_per_degree=value).load()(*pair)["flip"] for value in (20, 200))

        assert near > 1.2 * far


class TestRealCvvdp:
    """The library itself, where the extra is installed."""

    @pytest.fixture(scope="class")
    def compare(self):
        pytest.importorskip("pycvvdp")
        return Cvvdp().load()

    def test_it_is_10_for_identical_images_and_falls_with_noise(self, compare):
        image = make_noise_image(64)

        values = [
            compare(SamplePair([add_noise(image, sigma)], [image], ""))["cvvdp_jod"] for sigma in (0, 8, 64)
        ]

        assert values[0] == pytest.approx(10) and values == sorted(values, reverse=True) and values[-1] < 9.9

    def test_a_video_is_compared_as_a_whole(self, compare):
        frames = [make_noise_image(48, seed=0)] * 8
        still = [add_noise(frame, 24, seed=0) for frame in frames]
        flickering = [add_noise(frame, 24, seed=number) for number, frame in enumerate(frames)]

        values = [compare(SamplePair(own, frames, ""))["cvvdp_jod"] for own in (still, flickering)]

        assert all(0 < value < 10 for value in values) and values[0] != values[1]

    def test_an_unknown_screen_leaves_it_out(self):
        pytest.importorskip("pycvvdp")

        with pytest.raises(
            UnavailableError, match=r"display=cinema is no screen that the library knows; set"
        ):
            Cvvdp(display="cinema").load()


@pytest.mark.parametrize(
    ("name", "module", "remedy"),
    [
        ("flip", "flip_evaluator", r"pip install flip-evaluator \(int8run's extra 'perceptual'\)"),
        ("cvvdp", "pycvvdp", r"pip install cvvdp \(int8run's extra 'cvvdp'\)"),
        ("ocr", "rapidocr", r"pip install rapidocr onnxruntime \(int8run's extra 'ocr'\)"),
        ("fid", "torch_fidelity.feature_extractor_inceptionv3", r"pip install torch-fidelity .*'sets'\)"),
        ("hps_v2", "open_clip", r"pip install open-clip-torch \(int8run's extra 'preference'\)"),
    ],
)
def test_without_its_package_a_metric_is_left_out(monkeypatch, caplog, name, module, remedy):
    monkeypatch.setitem(__import__("sys").modules, module, None)

    loaded = load_measures([build_measure(name)], 64)

    assert loaded.left_out == [name]
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "is left out because a package cannot be imported (ModuleNotFoundError: " in record.getMessage()
    assert __import__("re").search(remedy, record.getMessage())


# -- words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign "OPEN" and "Closed now"', ["OPEN", "Closed now"]),
        ("“Bonjour” et «Au revoir»", ["Bonjour", "Au revoir"]),
        ("it's the dog's bowl", []),
        ('an empty "" and a dash "-"', []),
    ],
)
def test_what_a_prompt_asks_for_stands_in_double_quotes(prompt, texts):
    assert list_asked_texts(prompt) == texts


@pytest.mark.parametrize(
    ("text", "read", "distance"),
    [
        ("kitten", "sitting", 2),
        ("open", "xxopenxx", 0),
        ("open", "", 4),
        ("abc", "xyz", 3),
        ("open", "opn", 1),
    ],
)
def test_the_distance_is_that_to_the_nearest_part(text, read, distance):
    # by trying every part, with Levenshtein's definition
    def measure(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(measure(a[1:], b) + 1, measure(a, b[1:]) + 1, measure(a[1:], b[1:]) + (a[0] != b[0]))

    parts = {read[i:j] for i in range(len(read) + 1) for j in range(i, len(read) + 1)}

    assert compute_nearest_distance(text, read) == distance == min(measure(text, part) for part in parts)


def test_words_are_rated_by_their_letters_and_averaged():
    assert rate_reading("Fresh BREAD, daily!", ["fresh bread daily"]) == 1
    # of BREAD the letters R and E stand in FRESH: three of five are missing
    assert rate_reading("FRESH", ["FRESH", "BREAD"]) == pytest.approx((1 + 0.4) / 2)
    assert rate_reading("", ["STOP"]) == 0
    assert rate_reading("ST0P", ["STOP"]) == 0.75


class TestRealOcr:
    """rapidocr with the models of its package, where the extra is installed."""

    @pytest.fixture(scope="class")
    def compare(self):
        pytest.importorskip("rapidocr")
        pytest.importorskip("onnxruntime")
        return build_measure("ocr").load()

    @pytest.mark.slow
    def test_it_reads_what_is_written_and_not_what_is_not(self, compare):
        from PIL import ImageDraw, ImageFont

        written = Image.new("RGB", (320, 96), "white")
        font = ImageFont.load_default(48)
        ImageDraw.Draw(written).text((20, 20), "OPEN DAILY", fill="black", font=font)
        empty = Image.new("RGB", (320, 96), "white")

        values = compare(image_to_tensor(written), image_to_tensor(empty), 'a sign "Open Daily"')

        assert values == {"ocr_accuracy": 1.0, "float/ocr_accuracy": 0.0}
        assert compare(image_to_tensor(written), image_to_tensor(empty), "a sign") == {}


# -- videos ------------------------------------------------------------------------------------------


def test_flickering_is_the_mean_change_between_frames():
    pair = SamplePair(
        [make_flat_image(level) for level in (0, 51, 0)], [make_flat_image(9)] * 3, "a still scene"
    )

    values = TemporalFlicker().load()(pair)

    assert values == {"temporal_flickering": pytest.approx(0.8), "float/temporal_flickering": 1.0}
    directions = {metric.direction for metric in TemporalFlicker.metrics.values()}
    assert directions == {NEITHER}, "a video that stands still has the largest number"


def test_an_image_has_no_flickering():
    pair = SamplePair([make_flat_image(0)], [make_flat_image(9)], "")

    assert TemporalFlicker().load()(pair) == {}


def test_subject_consistency_is_vbenchs_formula():
    vectors = {0: [1.0, 0.0], 1: [0.6, 0.8], 2: [-1.0, 0.0]}
    frames = [make_flat_image(level) for level in vectors]

    value = rate_consistency(frames, lambda image: torch.tensor(vectors[image.getpixel((0, 0))[0]]))

    # frame 1: 0.6 to the first and to the one before; frame 2: both are negative and count as 0
    assert value == pytest.approx((0.6 + 0) / 2)


# -- sets --------------------------------------------------------------------------------------------


def test_mmd_is_1000_times_the_squared_distance_of_means_in_the_kernels_space():
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[-1.0, 0.0], [0.0, -1.0], [0.6, 0.8]])

    def kernel(a, b):
        return math.exp(-sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)) / 200)

    def average(a, b):
        return sum(kernel(p, q) for p in a for q in b) / (len(a) * len(b))

    expected = 1000 * (average(x, x) + average(y, y) - 2 * average(x, y))

    assert compute_mmd(x, y) == pytest.approx(expected)
    assert compute_mmd(x, x) == pytest.approx(0, abs=1e-9)


def count_dark(images, others):
    """A distance for tests: how many more dark images one set has."""
    return float(sum(int(i.max()) < 100 for i in images) - sum(int(i.max()) < 100 for i in others))


def test_a_set_is_compared_with_the_float_set_and_with_the_reference(tmp_path):
    for number in range(3):
        make_flat_image(10).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    own, floats = [make_flat_image(50)], [make_flat_image(200)]
    pairs = [SamplePair(own, floats, "a"), SamplePair(own, own, "b")]

    values = make_set_function("dark", open_reference(str(tmp_path)), count_dark)(pairs)

    assert values == {"dark": 1, "dark_reference": -1, "float/dark_reference": -2}


def test_of_a_video_its_key_frames_are_in_the_set():
    frames = [make_flat_image(level) for level in range(0, 250, 50)]
    seen = []
    measure = make_set_function("x", ImageFolder([]), lambda own, floats: float(seen.extend(own) or 0))

    measure([SamplePair(frames, frames, "a")])

    assert [int(image.max()) for image in seen] == [0, 100, 200]


def test_one_image_is_no_set(caplog):
    images = make_generation([make_flat_image(1)])

    class OneSet:
        name, scope, needs = "dark", build_measure("fid").scope, build_measure("ms_ssim").needs.__class__()
        metrics = build_measure("fid").metrics

        def load(self):
            return make_set_function("dark", ImageFolder([]), count_dark)

    loaded = load_measures_for(images, images, [OneSet()])

    assert compare_sets(images, images, ["a"], loaded) == {}
    assert loaded.left_out == ["dark"]
    assert "quality/dark is left out because a set has at least 2 images, and this run one" in caplog.text


@pytest.mark.parametrize("content", ["missing", "empty"])
def test_a_reference_without_images_leaves_the_metric_out(tmp_path, content):
    folder = tmp_path / content
    if content == "empty":
        folder.mkdir()

    with pytest.raises(UnavailableError, match=r"^its reference=.* (is no folder|holds 0 images)"):
        open_reference(str(folder))


def test_a_damaged_image_of_a_reference_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG and no more")
    (tmp_path / "b.png").write_bytes(b"")

    with pytest.raises(UnavailableError, match=r"a\.png of its reference cannot be read"):
        open_reference(str(tmp_path))[0]


class MeanColors(nn.Module):
    """Stands for Inception: three features of an image, its mean colors."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.num_described = 0

    def forward(self, images):
        self.num_described += len(images)
        return images.float().mean((2, 3)) / 255


@pytest.fixture
def mean_colors(monkeypatch):
    networks = []

    def load(weights):
        networks.append(MeanColors())
        return networks[-1]

    monkeypatch.setattr("int8run.metrics.inception.load_inception", load)
    return networks


def make_colors(seed, count=6):
    """Flat images of random colors, and the colors in 0..1."""
    colors = np.random.default_rng(seed).integers(0, 256, (count, 3))
    images = [Image.new("RGB", (8, 8), tuple(int(value) for value in color)) for color in colors]
    return images, colors / 255


def pair_images(images, float_images):
    return [SamplePair([own], [other], "") for own, other in zip(images, float_images, strict=True)]


def test_fid_is_the_distance_of_two_normal_distributions(mean_colors):
    (own, a), (floats, b) = make_colors(0), make_colors(1)

    values = Fid().load()(pair_images(own, floats))

    covariances = np.cov(a.T), np.cov(b.T)
    root_trace = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real).sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root_trace
    assert values == {"fid": pytest.approx(expected, rel=1e-4)}


def test_kid_is_the_unbiased_distance_in_the_cubic_kernels_space(mean_colors):
    (own, a), (floats, b) = make_colors(0), make_colors(1)

    values = Kid(subsets=1, subset_size=1000).load()(pair_images(own, floats))

    def kernel(x, y):
        return (x @ y.T / 3 + 1) ** 3

    def average_others(x):
        products = kernel(x, x)
        return (products.sum() - np.trace(products)) / (len(x) * (len(x) - 1))

    expected = average_others(a) + average_others(b) - 2 * kernel(a, b).mean()
    assert values == {"kid": pytest.approx(expected, rel=1e-3)}


def test_fid_and_kid_share_inception_and_describe_each_image_once(mean_colors, tmp_path):
    (own, _), (floats, _), (real, _) = make_colors(0), make_colors(1), make_colors(2)
    for number, image in enumerate(real):
        image.save(tmp_path / f"{number}.png")
    folder = str(tmp_path)
    pairs = pair_images(own, floats)
    alone = Fid(reference=folder).load()(pairs)
    mean_colors.clear()

    loaded = load_measures([Fid(reference=folder), Kid(reference=folder, subsets=1)], 64)
    values = {name: function(pairs) for name, function in loaded.functions[Scope.SET].items()}

    (network,) = mean_colors
    num_probes = 1  # torchmetrics asks once for the number of features, with an image of its own
    assert network.num_described <= len(own) + len(floats) + len(real) + num_probes
    assert values["fid"] == alone
    assert values["kid"].keys() == {"kid", "kid_reference", "float/kid_reference"}


def test_a_second_run_loads_a_network_of_its_own(mean_colors):
    for _ in range(2):
        load_measures([Fid(), Kid()], 64)

    assert len(mean_colors) == 2


def test_kid_draws_the_same_subsets_each_time(mean_colors):
    pairs = pair_images(make_colors(0)[0], make_colors(1)[0])
    measure = Kid(subsets=3, subset_size=4).load()

    assert measure(pairs) == measure(pairs)


@dataclass(frozen=True)
class Uninstalled:
    """A metric whose packages are a known one and one that nobody has."""

    metrics: ClassVar = {"quality/dots": None}
    needs: ClassVar = Needs(packages=("numpy>=1", "no-such-package-of-dots"), extra="dots")


def test_a_metric_that_is_not_installed_is_named_before_the_run(caplog):
    warn_of_missing_packages([Uninstalled(), build_measure("ms_ssim")])

    (line,) = caplog.messages
    assert line.startswith(
        "quality/dots will be left out of this run: not installed: no-such-package-of-dots; "
    )
    assert line.endswith("pip install numpy>=1 no-such-package-of-dots (int8run's extra 'dots')")


def test_another_network_needs_no_package_of_the_default_one():
    assert build_measure("subject_consistency").needs.packages
    assert SubjectConsistency(weights="facebook/dino-vitb16").needs.packages == ()
