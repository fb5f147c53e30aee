"""task=inspect: what a file is, from its header alone."""

import json
import re
from pathlib import Path

import pytest
import torch
from cli_process import Command, command_in
from safetensors.torch import save_file


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    with command_in(tmp_path / "work", monkeypatch, capsys) as run:
        yield run


def inspect(command: Command, name: str) -> dict[str, str]:
    """The table as {left cell: right cell}."""
    outcome = command("task=inspect", f"task.path={name}")
    assert outcome.code == 0, outcome.err
    cells = re.findall(r"│ (.+?) +│ (.+?) +│", outcome.out)
    return dict(cells)


def test_a_lora(command: Command) -> None:
    tensors = {
        "transformer.blocks.0.to_q.lora_A.weight": torch.zeros(4, 8), "transformer.blocks.0.to_q.lora_B.weight": torch.zeros(8, 4),
        "transformer.blocks.0.to_k.lora_A.weight": torch.zeros(2, 8), "transformer.blocks.0.to_k.lora_B.weight": torch.zeros(8, 2),
    }  # fmt: skip
    header = {"modelspec.trigger_phrase": "oil [bold]paint", "modelspec.architecture": "flux-1-dev/lora", "long": "x" * 500}
    save_file(tensors, command.folder / "style.safetensors", metadata=header)
    shown = inspect(command, "style.safetensors")
    assert shown["kind"] == "LoRA" and shown["LoRA"] == "2 modules, rank 2, 4" and shown["dtypes"] == "4 × F32"
    assert shown["trigger words"] == "oil [bold]paint" and shown["base model"] == "flux-1-dev/lora"
    assert command.made() == ["style.safetensors"], "looking leaves nothing behind"


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"a.weight": torch.zeros(2, 2)}, "plain weights"),
        ({"a.weight": torch.zeros(2, 2, dtype=torch.int8), "a.weight_scale": torch.ones(2, 1)}, "quantized checkpoint (I8 with scales)"),
        (
            {"a.weight": torch.zeros(2, 2, dtype=torch.float8_e4m3fn), "a.scale_weight": torch.ones(1)},
            "quantized checkpoint (F8_E4M3 with scales)",
        ),
        ({"a.weight": torch.zeros(2, 2, dtype=torch.int8), "a.comfy_quant": torch.zeros(9, dtype=torch.uint8)},
         "quantized checkpoint with ComfyUI markers"),
    ],
    ids=["plain", "int8", "fp8", "comfy"],
)  # fmt: skip
def test_kinds(command: Command, tensors: dict[str, torch.Tensor], kind: str) -> None:
    save_file(tensors, command.folder / "m.safetensors")
    assert inspect(command, "m.safetensors")["kind"] == kind


def container(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


ENTRY = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
DAMAGED = {
    "empty": (b"", "its first 8 bytes give no possible header length"),
    "no header": (b"\x00" * 8, "its first 8 bytes give no possible header length"),
    "length beyond the end": (container(ENTRY, b"\x00" * 8, length=10_000), "its first 8 bytes give no possible header length"),
    "not json": (container(b"{not json}"), "its header is no JSON"),
    "truncated": (container(ENTRY, b"\x00" * 5), "is damaged: the header describes"),
    "longer than told": (container(ENTRY, b"\x00" * 9), "is damaged: the header describes"),
    "a list": (container(b"[1, 2]"), "its header is no JSON object of tensors"),
    "an entry without offsets": (container(b'{"a": {"dtype": "F32"}}'), "its header is no JSON object of tensors"),
    "a zip": (b"PK\x03\x04" + b"\x00" * 60, "not a safetensors file"),
}


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_named(command: Command, data: bytes, message: str) -> None:
    (command.folder / "m.safetensors").write_bytes(data)
    outcome = command("task=inspect", "task.path=m.safetensors")
    assert outcome.code == 3 and message in outcome.message


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.safetensors", "no such file"), ("model.ckpt", "is a pickled file"), ("model.PT", "is a pickled file")],
)
def test_files_that_are_not_opened(command: Command, name: str, message: str) -> None:
    outcome = command("task=inspect", f"task.path={name}")
    assert outcome.code == 3 and message in outcome.message
