"""Metrics on CLIP's features, with random networks of the real classes: formulas, and weights that fail."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from support.tiny_clip import save_tiny_clip
from torch import nn

from int8run.errors import ConfigError
from int8run.metrics.base import SamplePair, UnavailableError
from int8run.metrics.catalog import load_measure_classes
from int8run.metrics.images import image_to_tensor
from int8run.metrics.measures.aesthetic_score import AestheticScore, load_head
from int8run.metrics.measures.clip_iqa import ClipIqa
from int8run.metrics.measures.clip_score import ClipScore
from int8run.metrics.measures.cmmd import Cmmd
from int8run.metrics.measures.fid import Fid
from int8run.metrics.measures.hps_v2 import HpsV2, load_weights
from int8run.metrics.measures.image_reward import ImageReward
from int8run.metrics.measures.kid import Kid
from int8run.metrics.measures.pick_score import PickScore
from int8run.metrics.measures.subject_consistency import SubjectConsistency
from int8run.metrics.weights import PINNED_REVISIONS, check_complete, find_file, log_commit

RED, BLUE = Image.new("RGB", (32, 32), (250, 40, 10)), Image.new("RGB", (32, 32), (10, 60, 240))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def embed_image(clip, image):
    """CLIP's features of an image by its own forward pass, of length 1."""
    model, processor, _ = clip
    pixels = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
    return F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output)[0], dim=0)


def embed_text(clip, text):
    """The same of a text."""
    model, processor, _ = clip
    tokens = processor.tokenizer(text, truncation=True, return_tensors="pt")
    return F.normalize(model.text_projection(model.text_model(**tokens).pooler_output)[0], dim=0)


def test_clip_iqa_is_the_chance_of_a_good_photo(clip):
    values = ClipIqa(clip[2]).load()(image_to_tensor(RED), image_to_tensor(BLUE), "")

    anchors = torch.stack([embed_text(clip, text) for text in ("Good photo.", "Bad photo.")])
    expected = [(100 * anchors @ embed_image(clip, image)).softmax(0)[0].item() for image in (RED, BLUE)]
    assert [values["clip_iqa"], values["float/clip_iqa"]] == pytest.approx(expected, abs=1e-4)


def test_pick_score_is_the_scaled_cosine_of_image_and_prompt(clip):
    model, _, folder = clip

    values = PickScore(folder, folder).load()(image_to_tensor(RED), image_to_tensor(BLUE), "a b")

    text = embed_text(clip, "a b")
    expected = [(model.logit_scale.exp() * embed_image(clip, image) @ text).item() for image in (RED, BLUE)]
    assert [values["pick_score"], values["float/pick_score"]] == pytest.approx(expected, abs=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-3


def save_head(file, width=8):
    """LAION's layers with the dropout between them, as they are published."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        ).eval()
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, file)
    return layers


def test_the_aesthetic_score_is_that_of_the_published_layers(clip, tmp_path):
    layers = save_head(tmp_path / "head.pth")

    measure = AestheticScore(clip[2], str(tmp_path / "head.pth")).load()
    values = measure(image_to_tensor(RED), image_to_tensor(BLUE), "")

    expected = [layers(embed_image(clip, image)).item() for image in (RED, BLUE)]
    assert [values["aesthetic_score"], values["float/aesthetic_score"]] == pytest.approx(expected, abs=1e-5)


def test_a_head_of_another_clip_leaves_the_aesthetic_score_out(tmp_path):
    save_head(tmp_path / "head.pth", width=7)

    with pytest.raises(UnavailableError, match=r"head\.pth is no aesthetic predictor \(RuntimeError: "):
        load_head(str(tmp_path / "head.pth"), 8)


@pytest.mark.parametrize("content", [[1.0], 3, torch.zeros(2)], ids=["list", "number", "tensor"])
def test_a_file_with_something_else_leaves_the_metric_out(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")

    with pytest.raises(UnavailableError, match=r"file\.pth is no aesthetic predictor"):
        load_head(str(tmp_path / "file.pth"), 8)
    with pytest.raises(UnavailableError, match=r"file\.pth has no weights of this network"):
        load_weights(torch.nn.Identity(), tmp_path / "file.pth")


def test_a_file_in_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "head.pth").write_bytes(b"")

    assert find_file("~/head.pth", "aesthetic-model.pth", size="4 MB") == tmp_path / "head.pth"


@pytest.mark.parametrize(
    ("location", "revision", "read"),
    [
        ("xswu/HPSv2", None, PINNED_REVISIONS["xswu/HPSv2"]),
        ("xswu/HPSv2", "main", "main"),
        ("somebody/else", None, "main"),
        ("somebody/else", "v2", "v2"),
    ],
)
def test_a_default_network_is_read_at_its_pinned_commit(monkeypatch, location, revision, read):
    asked = []

    def download(repository, name, *, local_files_only, revision):
        asked.append((repository, local_files_only, revision))
        return name

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

    find_file(location, "w.pt", size="1 MB", revision=revision)

    assert asked == [(location, True, read)]


@pytest.mark.parametrize(("revision", "lines"), [("main", 1), ("c" * 40, 0)])
def test_the_commit_of_a_branch_is_logged(monkeypatch, caplog, revision, lines):
    snapshot = f"/cache/models--some--clip/snapshots/{'c' * 40}/config.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: snapshot)

    with caplog.at_level("INFO"):
        log_commit("some/clip", "config.json", revision)

    assert [record.getMessage() for record in caplog.records] == [
        f"some/clip: read at commit {'c' * 40}, the main of now; revision= pins it"
    ][:lines]


def test_pinned_commits_are_whole_and_every_metric_takes_a_revision():
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in PINNED_REVISIONS.values())
    for name, measure in load_measure_classes().items():
        if isinstance(getattr(measure, "weights", None), str):
            with pytest.raises(ConfigError, match=rf"^metrics\.measures\.{name}\.revision is 3; "):
                measure(revision=3)


def test_a_head_cannot_run_code(tmp_path):
    torch.save(print, tmp_path / "head.pth")

    with pytest.raises(UnavailableError, match="UnpicklingError"):
        load_head(str(tmp_path / "head.pth"), 8)


def test_cmmd_is_0_for_one_set_twice_and_sees_another_one(clip):
    measure = Cmmd(weights=clip[2]).load()
    wide = Image.new("RGB", (64, 24), (250, 40, 10))

    alike = measure([SamplePair([RED], [RED], "a"), SamplePair([wide], [wide], "b")])
    different = measure([SamplePair([RED], [BLUE], "a"), SamplePair([RED], [BLUE], "b")])

    assert alike["cmmd"] == pytest.approx(0, abs=1e-6)
    distance = (embed_image(clip, RED) - embed_image(clip, BLUE)).square().sum().item()
    # two points, each twice: 1000 · 2 · (1 − exp(−d² / 200))
    assert different["cmmd"] == pytest.approx(
        2000 * (1 - torch.exp(torch.tensor(-distance / 200)).item()), rel=1e-2
    )


TINY_OPEN_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


def test_a_network_whose_weights_are_not_all_there_leaves_the_metric_out(tmp_path):
    _, _, folder = save_tiny_clip(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["visual_projection.weight"]
    save_file(weights, file, metadata={"format": "pt"})

    with pytest.raises(UnavailableError, match=r"has other weights than .* \(no visual_projection\."):
        ClipIqa(folder).load()


def test_weights_that_nothing_reads_may_be_missing():
    check_complete("dino", {"missing_keys": {"pooler.dense.weight"}}, ignored="pooler.")
    with pytest.raises(UnavailableError, match=r"^dino has other weights .* \(no encoder\.a\)"):
        check_complete("dino", {"missing_keys": {"pooler.dense.weight", "encoder.a"}}, ignored="pooler.")


def test_code_beside_weights_does_not_run(tmp_path):
    config = {"model_type": "own_network", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('own code ran')")

    with pytest.raises(UnavailableError, match="could not be loaded"):
        SubjectConsistency(str(tmp_path)).load()


@pytest.mark.parametrize(
    ("measure", "key"),
    [
        (AestheticScore, "weights"),
        (AestheticScore, "head"),
        (ClipIqa, "weights"),
        (ClipScore, "weights"),
        (Cmmd, "weights"),
        (Fid, "weights"),
        (HpsV2, "weights"),
        (ImageReward, "weights"),
        (ImageReward, "tokenizer"),
        (Kid, "weights"),
        (PickScore, "weights"),
        (PickScore, "processor"),
        (SubjectConsistency, "weights"),
    ],
)
def test_weights_that_are_no_text_are_refused_before_anything_is_generated(measure, key):
    with pytest.raises(
        ConfigError, match=rf"^metrics\.measures\.{measure.name}\.{key} is 5; it takes a file"
    ):
        measure(**{key: 5})


class TestHpsV2:
    """A random network of open_clip's own classes, where it is installed."""

    @pytest.fixture
    def open_clip(self, tmp_path):
        library = pytest.importorskip("open_clip")
        (tmp_path / "tiny_for_tests.json").write_text(json.dumps(TINY_OPEN_CLIP))
        library.add_model_config(tmp_path / "tiny_for_tests.json")
        return library

    def test_it_is_the_cosine_of_image_and_prompt(self, open_clip, tmp_path):
        model, _, prepare = open_clip.create_model_and_transforms("tiny_for_tests")
        model.eval()
        torch.save({"state_dict": model.state_dict()}, tmp_path / "hps.pt")

        measure = HpsV2(str(tmp_path / "hps.pt"), "tiny_for_tests").load()
        values = measure(image_to_tensor(RED), image_to_tensor(BLUE), "a red apple")

        text = model.encode_text(open_clip.get_tokenizer("tiny_for_tests")(["a red apple"]))
        expected = [
            F.cosine_similarity(model.encode_image(prepare(image)[None]), text).item()
            for image in (RED, BLUE)
        ]
        assert [values["hps_v2"], values["float/hps_v2"]] == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("name", ["hf-hub:somebody/clip", "ViT-H-41"])
    def test_it_takes_no_network_but_those_of_the_library(self, monkeypatch, name):
        library = SimpleNamespace(list_models=lambda: ["ViT-H-14"])
        monkeypatch.setitem(sys.modules, "open_clip", library)

        with pytest.raises(UnavailableError, match=rf"architecture={name} is none of open_clip's"):
            HpsV2(architecture=name).load()

    def test_weights_of_another_network_leave_it_out(self, open_clip, tmp_path):
        torch.save({"state_dict": {}}, tmp_path / "hps.pt")

        with pytest.raises(UnavailableError, match=r"hps\.pt has no weights of this network \(RuntimeE"):
            HpsV2(str(tmp_path / "hps.pt"), "tiny_for_tests").load()
