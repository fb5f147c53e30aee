"""Finding and reading LoRA files: layouts, scales, and what is refused with which words."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_close, randn
from safetensors.torch import save_file
from torch import nn

from int8run.errors import LoraError
from int8run.lora import files
from int8run.lora.files import find_lora, read_lora, trigger_words

RANK, IN, OUT = 4, 6, 5
A, B = randn(RANK, IN), randn(OUT, RANK, seed=1)
PEFT = {"transformer.x.lora_A.weight": A, "transformer.x.lora_B.weight": B}


@pytest.fixture
def write(tmp_path):
    def write(tensors, metadata=None, name="style.safetensors"):
        save_file(tensors, tmp_path / name, metadata)
        return tmp_path / name

    return write


def header(**settings):
    """Metadata as diffusers writes it."""
    return {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("transformer.x.lora_A.weight", "transformer.x.lora_B.weight"),
        ("transformer.x.lora_A.default.weight", "transformer.x.lora_B.default.weight"),
        ("diffusion_model.x.lora_down.weight", "diffusion_model.x.lora_up.weight"),
        ("unet.x.lora_A.weight", "unet.x.lora_B.weight"),
        ("base_model.model.transformer.x.lora_A.weight", "base_model.model.transformer.x.lora_B.weight"),
        ("base_model.model.x.lora_A.weight", "x.lora_B.weight"),
        ("x.lora_down.weight", "x.lora_up.weight"),
    ],
)
def test_layouts(write, down, up):
    file = read_lora(write({down: A, up: B}))
    assert list(file.pairs) == ["x"] and file.unknown == () and file.ranks == [RANK]
    assert torch.equal(file.pairs["x"].lora_A, A) and torch.equal(file.pairs["x"].lora_B, B)
    assert file.pairs["x"].scale == 1.0


def test_a_prefix_is_only_removed_at_the_front(write):
    name = "blocks.0.transformer.proj"
    file = read_lora(write({f"transformer.{name}.lora_A.weight": A, f"transformer.{name}.lora_B.weight": B}))
    assert list(file.pairs) == [name]


@pytest.mark.parametrize(
    "alpha", [torch.tensor(8.0), torch.tensor([8.0]), torch.tensor(8), torch.tensor(8.0, dtype=torch.bfloat16)], ids=str
)
def test_alpha_tensor(write, alpha):
    file = read_lora(write({"x.lora_down.weight": A, "x.lora_up.weight": B, "x.alpha": alpha}))
    assert file.pairs["x"].scale == 8 / RANK and file.unknown == ()


def test_each_module_has_its_own_alpha_and_rank(write):
    # safetensors refuses tensors that share memory
    tensors = {f"{n}.{half}.weight": t.clone() for n in "xyz" for half, t in (("lora_down", A), ("lora_up", B))}
    tensors |= {"y.lora_down.weight": A[:2].clone(), "y.lora_up.weight": B[:, :2].clone()}
    file = read_lora(write(tensors | {"x.alpha": torch.tensor(2.0), "y.alpha": torch.tensor(2.0)}))
    assert {name: pair.scale for name, pair in file.pairs.items()} == {"x": 0.5, "y": 1.0, "z": 1.0}
    assert file.ranks == [2, 4]


def test_alpha_0_means_rank(write):
    # kohya and LyCORIS write 0 where none was given
    assert read_lora(write(PEFT | {"transformer.x.alpha": torch.tensor(0.0)})).pairs["x"].scale == 1.0


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"transformer.lora_alpha": 8}, 2.0),
        ({"unet.lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "r": 4}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4.0),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": False}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"x": 2}}, 0.5),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"y": 2}}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {}}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": None}, 2.0),
        ({"transformer.r": 4}, 1.0),
        ({}, 1.0),
    ],
    ids=lambda v: json.dumps(v) if isinstance(v, dict) else None,
)
def test_scale_from_the_header(write, settings, scale):
    assert read_lora(write(PEFT, header(**settings))).pairs["x"].scale == scale


@pytest.mark.parametrize(
    "settings",
    [
        {"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 64, "text_encoder.use_rslora": True},
        {"text_encoder.lora_alpha": 64, "text_encoder.use_rslora": True, "transformer.lora_alpha": 8},
    ],
    ids=["text encoder last", "text encoder first"],
)
def test_the_text_encoders_alpha_is_not_the_denoisers(write, settings):
    assert read_lora(write(PEFT, header(**settings))).pairs["x"].scale == 2.0


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("blocks.0.attn.to_q", True),
        ("to_q", True),
        ("attn.to_q", True),
        (r"blocks\.\d+\.attn\.to_q", True),
        ("o_q", False),
        ("blocks.0", False),
    ],
)
def test_alpha_pattern_matches_the_end_of_a_name_as_in_peft(write, pattern, matches):
    name = "blocks.0.attn.to_q"
    tensors = {f"transformer.{name}.lora_A.weight": A, f"transformer.{name}.lora_B.weight": B}
    settings = {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {pattern: 12}}
    assert read_lora(write(tensors, header(**settings))).pairs[name].scale == (3.0 if matches else 1.0)


def test_an_alpha_tensor_wins_over_the_header(write):
    assert read_lora(write(PEFT | {"transformer.x.alpha": torch.tensor(2.0)}, header(lora_alpha=8))).pairs["x"].scale == 0.5


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", '"words"', "null"])
def test_a_header_that_says_nothing_is_no_alpha(write, text):
    assert read_lora(write(PEFT, {"lora_adapter_metadata": text})).pairs["x"].scale == 1.0


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_alpha": 6}, {"use_rslora": True}, {"alpha_pattern": {"0.to_q": 1, "to_k": 2}, "rank_pattern": {"to_q": 2}}],
    ids=["defaults", "alpha", "rslora", "patterns"],
)
def test_deltas_are_those_of_peft(write, settings):
    peft = pytest.importorskip("peft")
    blocks = nn.ModuleList(nn.ModuleDict({"to_q": nn.Linear(IN, OUT), "to_k": nn.Linear(IN, OUT)}) for _ in range(2))
    config = peft.LoraConfig(r=RANK, target_modules=["to_q", "to_k"], init_lora_weights=False, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(nn.ModuleDict({"blocks": blocks}), config)
    tensors = {k.removeprefix("base_model.model."): v.contiguous() for k, v in peft.get_peft_model_state_dict(model).items()}
    # sets are not JSON; diffusers turns them into lists as well
    plain = {f"transformer.{k}": list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    file = read_lora(write({f"transformer.{k}": v for k, v in tensors.items()}, header(**plain)))
    layers = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert file.pairs.keys() == layers.keys() and len(layers) == 4
    for name, layer in layers.items():
        assert_close(name, file.pairs[name].delta(), layer.get_delta_weight("default").detach(), 1e-6)


def test_keys_of_no_known_kind_are_listed(write):
    file = read_lora(write(PEFT | {"transformer.x.dora_scale": torch.ones(OUT), "transformer.x.lora_B.bias": torch.ones(OUT)}))
    assert sorted(file.unknown) == ["transformer.x.dora_scale", "transformer.x.lora_B.bias"] and list(file.pairs) == ["x"]


@pytest.mark.parametrize(
    ("left", "missing"),
    [("lora_A", r"lora_B \(up\)"), ("lora_B", r"lora_A \(down\)")],
)
def test_half_a_pair(write, left, missing):
    path = write({f"transformer.x.{left}.weight": A if left == "lora_A" else B})
    with pytest.raises(LoraError, match=rf"style\.safetensors: x has no {missing}; the file is incomplete"):
        read_lora(path)


@pytest.mark.parametrize(
    ("down", "up", "shapes"),
    [
        (A, B[:, :3].clone(), r"lora_A \[4, 6\], lora_B \[5, 3\]"),
        (A[..., None, None].clone(), B[..., None, None].clone(), r"lora_A \[4, 6, 1, 1\], lora_B \[5, 4, 1, 1\]"),
        (A[0].clone(), B, r"lora_A \[6\], lora_B \[5, 4\]"),
    ],
    ids=["ranks differ", "convolution", "vector"],
)
def test_halves_that_do_not_fit(write, down, up, shapes):
    path = write({"x.lora_A.weight": down, "x.lora_B.weight": up})
    with pytest.raises(LoraError, match=rf"x has {shapes}; a pair is \[rank, in\] and \[out, rank\]"):
        read_lora(path)


@pytest.mark.parametrize("keep", [0, 4, 40, -1], ids=["nothing left", "in the length", "in the header", "in the last tensor"])
def test_truncated_file(write, keep):
    path = write(PEFT)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LoraError, match=r"style\.safetensors is not a readable safetensors file: ."):
        read_lora(path)


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "style.safetensors"
    path.write_text("<html>not found</html>")
    with pytest.raises(LoraError, match="is not a readable safetensors file"):
        read_lora(path)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".PT"])
def test_pickled_files_are_refused_unopened(tmp_path, suffix):
    path = tmp_path / f"style{suffix}"
    path.write_bytes(b"x")
    with pytest.raises(LoraError, match=rf"style{suffix} is a pickled file, which can run code when opened; convert it to \.safetensors"):
        find_lora(str(path), None)


def test_a_path_is_found_as_it_is(write, monkeypatch, tmp_path):
    path = write(PEFT)
    assert find_lora(str(path), None) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_lora("~/style.safetensors", None) == path


def test_not_found_names_the_path_the_folder_and_the_nearest(write, tmp_path):
    for name in ("ink_v1", "ink_v2", "ink_v3", "something_else"):
        write(PEFT, name=f"{name}.safetensors")
    asked = tmp_path / "ink_v9.safetensors"
    with pytest.raises(LoraError, match="LoRA file not found") as caught:
        find_lora(str(asked), None)
    message, _, nearest = str(caught.value).partition("; nearest there: ")
    assert message == f"LoRA file not found: {asked}; searched {tmp_path}"
    assert sorted(nearest.split(", ")) == [f"ink_v{i}.safetensors" for i in (1, 2, 3)]


@pytest.mark.parametrize("folder", ["", "nowhere"], ids=["empty folder", "no such folder"])
def test_not_found_where_nothing_is(tmp_path, folder):
    with pytest.raises(LoraError, match=rf"searched {tmp_path / folder}; no \.safetensors file there$"):
        find_lora(str(tmp_path / folder / "ink.safetensors"), None)


def test_a_path_without_a_suffix_is_looked_for_in_its_own_folder(write, tmp_path, monkeypatch):
    (tmp_path / "loras").mkdir()
    write(PEFT, name="loras/ink.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoraError, match=rf"LoRA file not found: loras/inc; searched {tmp_path}/loras; nearest there: ink"):
        find_lora("loras/inc", None)


def test_shipped_names(write, monkeypatch, tmp_path):
    path = write(PEFT, name="ink.safetensors")
    monkeypatch.setattr(files, "SHIPPED", tmp_path)
    assert find_lora("ink", None) == path
    with pytest.raises(LoraError, match=rf"LoRA file not found: inc; searched {tmp_path}; nearest there: ink$"):
        find_lora("inc", None)


class TestHub:
    """Sources with a `weight_name`; no test asks the network."""

    @pytest.fixture
    def download(self, monkeypatch):
        def answer(result):
            def fake(repo, name):
                if isinstance(result, BaseException):
                    raise result
                assert (repo, name) == ("user/style", "style.safetensors")
                return result

            monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)

        return answer

    def test_found(self, download):
        download("/cache/style.safetensors")
        assert find_lora("user/style", "style.safetensors") == Path("/cache/style.safetensors")

    @pytest.mark.parametrize("error", [OSError("no route to host\nmore"), OSError()], ids=["with words", "without words"])
    def test_not_to_be_had(self, download, error):
        download(error)
        with pytest.raises(LoraError, match=r"LoRA 'style\.safetensors' of 'user/style' could not be had from the hub: ") as caught:
            find_lora("user/style", "style.safetensors")
        assert "\n" not in str(caught.value)

    def test_offline(self, download):
        from huggingface_hub.errors import LocalEntryNotFoundError

        download(LocalEntryNotFoundError("not in the cache, and outgoing traffic is off"))
        with pytest.raises(LoraError, match="could not be had from the hub: not in the cache"):
            find_lora("user/style", "style.safetensors")

    def test_a_name_that_is_no_hub_id(self):
        # huggingface_hub refuses it before it asks the network
        with pytest.raises(LoraError, match="'not a hub id' could not be had from the hub"):
            find_lora("not a hub id", "style.safetensors")

    def test_pickled_files_are_refused_before_the_download(self, download):
        download(AssertionError("downloaded"))
        with pytest.raises(LoraError, match=r"weights\.bin is a pickled file"):
            find_lora("user/style", "weights.bin")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": "ink drawing", "trigger_words": "other"}, "ink drawing"),
        ({"modelspec.trigger_phrase": "", "instance_prompt": "a photo of sks"}, "a photo of sks"),
        ({"ss_trigger_words": "x" * 300}, "x" * 200),
        ({"ss_tag_frequency": "{}"}, None),
    ],
    ids=["first key wins", "empty is none", "cut", "none"],
)
def test_trigger_words(metadata, words):
    assert trigger_words(metadata) == words
