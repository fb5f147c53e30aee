"""task=inspect: what a file or a folder is, from its header alone."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli_process import Command
from text_encoders.files import File, make_encoder_file

from int8run.backends.reference import Reference
from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.export.save_denoiser import keep_own_names, write_tensors
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.quant.weight import quantize_weight
from int8run.tasks.inspect_file import inspect_file
from int8run.utils.paths import ASSETS_FOLDER


def inspect(command: Command, name: str) -> dict[str, str]:
    """The table as {left cell: right cell}."""
    outcome = command("task=inspect", f"task.path={name}")
    assert outcome.code == 0, outcome.err
    cells = re.findall(r"│ (.+?) +│ (.+?) +│", outcome.out)
    return dict(cells)


def test_a_lora(command: Command) -> None:
    tensors = {
        "transformer.blocks.0.to_q.lora_A.weight": torch.zeros(4, 8),
        "transformer.blocks.0.to_q.lora_B.weight": torch.zeros(8, 4),
        "transformer.blocks.0.to_k.lora_A.weight": torch.zeros(2, 8),
        "transformer.blocks.0.to_k.lora_B.weight": torch.zeros(8, 2),
    }
    header = {
        "modelspec.trigger_phrase": "oil [bold]paint",
        "modelspec.architecture": "flux-1-dev/lora",
        "long": "x" * 500,
    }
    save_file(tensors, command.folder / "style.safetensors", metadata=header)
    shown = inspect(command, "style.safetensors")

    assert shown["kind"] == "LoRA"
    assert shown["LoRA"] == "denoiser 2 modules, rank 2, 4"
    assert shown["dtypes"] == "4 × F32"
    assert shown["trigger words"].startswith("oil [bold]paint")
    assert shown["base model"] == "FLUX.1 (by its tag)"
    assert command.made() == ["style.safetensors"], "looking leaves nothing behind"


def test_a_rotation(command: Command) -> None:
    blocks = {f"oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.{i}": torch.zeros(4, 8, 8) for i in range(3)}
    alpha = {"oft_unet_double_blocks_0_img_attn_qkv.alpha": torch.ones(())}
    save_file(blocks | alpha, command.folder / "oft.safetensors")
    shown = inspect(command, "oft.safetensors")

    assert (shown["kind"], shown["LoRA"]) == ("LoRA", "denoiser 1 module")
    assert (shown["adapter types"], shown.get("cannot be applied")) == ("1 × OFT", None)


def test_a_lora_whose_header_says_nothing(command: Command) -> None:
    pair = {
        "unet.x.lora_down.weight": torch.zeros(4, 8),
        "unet.x.lora_up.weight": torch.zeros(8, 4),
        "unet.x.alpha": torch.ones(()),
    }
    save_file(pair, command.folder / "a.safetensors")
    shown = inspect(command, "a.safetensors")

    assert (shown["LoRA"], shown["first module"]) == ("denoiser 1 module, rank 4", "x")
    assert (shown["base model"], shown["trigger words"]) == (
        "unknown from names, shapes and tags",
        "not named",
    )


def test_a_loras_older_header_names(command: Command) -> None:
    header = {"ss_base_model_version": "sdxl_base", "ss_trigger_words": "ohwx"}
    save_file(
        {"x.lora_A.weight": torch.zeros(1, 2), "x.lora_B.weight": torch.zeros(2, 1)},
        command.folder / "a.safetensors",
        metadata=header,
    )
    shown = inspect(command, "a.safetensors")

    assert (shown["base model"], shown["trigger words"]) == ("SDXL (by its tag)", "ohwx (ss_trigger_words)")


def test_a_long_header_value_is_cut_and_counted(tmp_path: Path) -> None:
    save_file(
        {"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"short": "s" * 200, "long": "x" * 500}
    )
    cells = dict(inspect_file(str(tmp_path / "a.safetensors")).rows)

    assert (cells["header: short"], cells["header: long"]) == ("s" * 200, "x" * 200 + "… (500 characters)")


def test_the_files_own_name_is_shown_as_it_is(command: Command) -> None:
    # square brackets are markup to the terminal
    save_file({"a": torch.zeros(1)}, command.folder / "style[bold].safetensors")
    outcome = command("task=inspect", "task.path='style[bold].safetensors'")

    assert outcome.code == 0
    assert "style[bold].safetensors" in outcome.out


def test_a_path_may_begin_with_the_home_folder(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(command.folder))
    save_file({"a": torch.zeros(1)}, command.folder / "a.safetensors")

    assert inspect(command, "'~/a.safetensors'")["kind"] == "plain weights"


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"a.weight": torch.zeros(2, 2)}, "plain weights"),
        (
            {"a.weight": torch.zeros(2, 2, dtype=torch.int8), "a.weight_scale": torch.ones(2, 1)},
            "quantized checkpoint (I8 with scales)",
        ),
        (
            {"a.weight": torch.zeros(2, 2, dtype=torch.float8_e4m3fn), "a.scale_weight": torch.ones(1)},
            "quantized checkpoint (F8_E4M3 with scales)",
        ),
        (
            {
                "a.weight": torch.zeros(2, 2, dtype=torch.int8),
                "a.comfy_quant": torch.zeros(9, dtype=torch.uint8),
            },
            "quantized checkpoint with ComfyUI markers",
        ),
    ],
    ids=["plain", "int8", "fp8", "comfy"],
)
def test_kinds(command: Command, tensors: dict[str, torch.Tensor], kind: str) -> None:
    save_file(tensors, command.folder / "m.safetensors")

    assert inspect(command, "m.safetensors")["kind"] == kind


def test_loras_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    pair = {"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(4, 2)}
    vera = {"y.vera_lambda_b": torch.ones(4), "y.vera_lambda_d": torch.ones(4)}
    save_file(pair | {"x.gate": torch.ones(4)} | vera, path)
    rows = read_table(path)

    assert rows["kind"] == "LoRA"
    assert rows["adapter types"] == "none that can be applied"
    assert "3 keys: modules with a part that is not known (gate)" in rows["cannot be applied"]
    assert "2 keys: unsupported adapter type: VeRA" in rows["cannot be applied"]
    assert rows["what to do"].startswith("VeRA is not applied: merge it into its base model with PEFT")


def test_other_files_for_a_model_are_named(tmp_path: Path) -> None:
    path = tmp_path / "ip.safetensors"
    save_file(
        {"image_proj.norm.weight": torch.ones(4), "ip_adapter.1.to_k_ip.weight": torch.ones(4, 4)}, path
    )
    rows = read_table(path)

    assert rows["kind"] == "plain weights"
    assert rows["looks like"].startswith("IP-Adapter is not applied: load it with load_ip_adapter")


def test_low_rank_halves_of_a_packed_checkpoint_are_no_lora(tmp_path: Path) -> None:
    path = tmp_path / "nunchaku.safetensors"
    halves = {"a.lora_down": torch.ones(4, 2), "a.lora_up": torch.ones(4, 2)}
    save_file(halves | {"a.qweight": torch.ones(4, 2, dtype=torch.int8)}, path)

    assert read_table(path)["kind"] != "LoRA"


def test_casts_and_lost_scales(tmp_path: Path) -> None:
    """448 is reached only by numbers that were divided by a scale."""
    path, cast = tmp_path / "m.safetensors", torch.full((8, 8), 0.75).to(torch.float8_e4m3fn)
    save_file({"a.weight": cast}, path)
    rows = read_table(path)
    assert rows["layers"] == "1 × float8_e4m3fn cast"
    assert rows["no scale"] == "1 fp8 weight, casts by their numbers: they reach 0.75"

    save_file({"a.weight": torch.full((8, 8), 448.0).to(torch.float8_e4m3fn)}, path)
    assert "a.weight, which reaches 448" in read_table(path)["cannot be read"]


def test_settings_say_what_a_file_leaves_open(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": torch.ones(8, 8, dtype=torch.int8), "a.scale": torch.full((8, 1), 0.1)}, path)
    assert "model.sdnq=none or model.sdnq=hadamard" in read_table(path)["cannot be read"]
    assert read_table(path, sdnq="none")["layers"] == "1 × int8, row"
    assert read_table(path, sdnq="hadamard")["layers"] == "1 × int8, row, quarot 8"
    assert "model.sdnq=x is none of none" in read_table(path, sdnq="x")["cannot be read"]


def read_table(path: Path, **declared: str) -> dict[str, str]:
    return dict(inspect_file(str(path), DeclaredFormat(**declared)).rows)


def test_a_file_that_save_wrote(command: Command) -> None:
    weight = torch.ones(4, 8)
    layers = {
        name: Int8Linear(
            QuantizedLayer(quantize_weight(weight), method.fit(weight), None), Reference(), torch.float32
        )
        for name, method in (("a", NoOutlier()), ("b", QuaRot(8)))
    }
    names = keep_own_names(["a.weight", "b.weight", "norm.weight"])
    write_tensors(
        command.folder / "m.safetensors",
        names,
        layers,
        {"norm.weight": torch.ones(3)},
        {"model": "shipped:tiny", "seed": 3},
    )
    shown = inspect(command, "m.safetensors")

    assert shown["kind"] == "quantized checkpoint with ComfyUI markers"
    assert shown["dtypes"] in ("3 × F32, 2 × I8, 2 × U8", "3 × F32, 2 × U8, 2 × I8")
    assert any("shipped:tiny" in value for value in shown.values())


def test_text_encoders(command: Command) -> None:
    path = (
        make_encoder_file("t5", words=["int8_convrot", "nvfp4"])
        .prefixed("text_encoders.t5xxl.transformer.")
        .write(command.folder / "t5.safetensors")
    )
    shown = command("task=inspect", f"task.path={path}").out
    cells = [
        tuple(cell.strip() for cell in line.split("│")[1:3])
        for line in shown.splitlines()
        if line.startswith("│")
    ]
    rows = dict(cells)

    assert rows["text encoder"] == "t5 (T5EncoderModel)"
    assert rows["prefix"] == "text_encoders.t5xxl.transformer."
    assert f"to use it:  clip=auto clip.path={path}\n" in shown, "on one line, however narrow the table is"
    assert "family" not in rows
    assert rows["kind"] == "quantized checkpoint with ComfyUI markers"

    layers = " ".join(text for name, text in cells if name in ("layers", ""))

    assert "4 × int8_tensorwise, row, convrot 16" in layers
    assert "3 × nvfp4" in layers


def test_a_checkpoint_with_two_text_encoders_and_a_file_with_none(command: Command) -> None:
    file = File()
    for prefix, name in (("clip_l", "clip_l"), ("t5xxl", "t5")):
        file.tensors |= make_encoder_file(name).prefixed(f"text_encoders.{prefix}.transformer.").tensors
    file.write(command.folder / "m.safetensors")

    assert command("task=inspect", "task.path=m.safetensors").code == 0

    save_file({"a.weight": torch.zeros(2, 2)}, command.folder / "n.safetensors")

    assert "text encoder" not in inspect(command, "n.safetensors")


def test_a_path_is_quoted_in_the_command(command: Command) -> None:
    path = make_encoder_file("t5").write(command.folder / "my t5, fp8.safetensors")

    (line,) = inspect_file(str(path)).list_commands()

    words = shlex.split(line.removeprefix("to use it:  "))
    assert words == ["clip=auto", f"clip.path='{path}'"]


def test_a_pipeline_lists_its_components(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path)
    shutil.rmtree(folder / "vae")
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if key.endswith("mlp.fc1.weight"))
    quantized = quantize_weight(tensors[key].float())
    tensors |= {key: quantized.qdata, f"{key}_scale": quantized.scale}
    save_file(tensors, weights)

    rows = read_table(folder)

    assert (rows["kind"], rows["class"]) == ("pipeline", "FluxPipeline")
    assert rows["scheduler"] == "FlowMatchEulerDiscreteScheduler, no weights"
    assert rows["vae"] == "AutoencoderKL, not in this folder"
    assert "image_encoder" not in rows, "the pipeline does without it"
    assert re.fullmatch(r"FluxTransformer2DModel, family flux, [\d.]+ MB, float", rows["transformer"])
    assert re.fullmatch(r"CLIPTextModel, encoder clip, [\d.]+ MB, 1 × int8, row", rows["text_encoder"])


def test_a_component_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = copy_tiny(tmp_path)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")

    assert "its first 8 bytes give no possible header length" in read_table(folder)["vae"]


def copy_tiny(folder: Path) -> Path:
    return Path(shutil.copytree(ASSETS_FOLDER / "tiny", folder / "tiny"))


def container(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


ENTRY = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
DAMAGED = {
    "empty": (b"", "its first 8 bytes give no possible header length"),
    "no header": (b"\x00" * 8, "its first 8 bytes give no possible header length"),
    "length beyond the end": (
        container(ENTRY, b"\x00" * 8, length=10_000),
        "its first 8 bytes give no possible header length",
    ),
    "not json": (container(b"{not json}"), "its header is not JSON"),
    "brackets without an end": (container(b"[" * 100_000), "its header is nested in more than 64 levels"),
    "a number without an end": (container(b"1" * 10_000), "its header is not JSON"),
    "truncated": (container(ENTRY, b"\x00" * 5), "is damaged: the header describes"),
    "longer than told": (container(ENTRY, b"\x00" * 9), "is damaged: the header describes"),
    "a list": (container(b"[1, 2]"), "its header is not a JSON object of tensors"),
    "an entry without offsets": (
        container(b'{"a": {"dtype": "F32"}}'),
        "its header is not a JSON object of tensors",
    ),
    "metadata that is no text": (
        container(b'{"__metadata__": {"steps": []}}'),
        "steps in __metadata__ of its header is an object",
    ),
    "a lora half without a shape": (
        container(b'{"a.lora_A.weight": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', b"\x00" * 4),
        "a.lora_A.weight has shape []",
    ),
    "a zip": (b"PK\x03\x04" + b"\x00" * 60, "not a safetensors file"),
}


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_named(command: Command, data: bytes, message: str) -> None:
    (command.folder / "m.safetensors").write_bytes(data)
    outcome = command("task=inspect", "task.path=m.safetensors")

    assert outcome.code == 3
    assert message in outcome.message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.safetensors", "no such file"),
        ("model.ckpt", "is a pickled file"),
        ("model.PT", "is a pickled file"),
    ],
)
def test_files_that_are_not_opened(command: Command, name: str, message: str) -> None:
    outcome = command("task=inspect", f"task.path={name}")

    assert outcome.code == 3
    assert message in outcome.message
