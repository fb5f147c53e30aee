"""Beside a base, too, a file of int8run that does not hold what was written is damaged, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
from audit.audit_files import NAMES, make_base, make_int8, quantize_rows, write_file
from audit.conftest import Audit, Tensors

from int8run.audit.file_audit import FileAudit
from int8run.checkpoints.data_hash import hash_tensors
from int8run.checkpoints.reader import TensorFiles

FIRST = NAMES[0]
WRONG = "0" * 64
Change = Callable[[Tensors, Tensors], None]


def list_codes(found: FileAudit) -> list[str]:
    return [finding.code for finding in found.findings]


def hash_file(tensors: Tensors, folder: Path) -> str:
    path = write_file(tensors, folder / "hashed.safetensors")
    with TensorFiles.open(path) as files:
        return hash_tensors(files, path)


def change_weight(tensors: Tensors, base: Tensors) -> None:
    noise = make_base(seed=5)[f"{FIRST}.weight"]
    changed = base[f"{FIRST}.weight"] + 0.3 * noise
    tensors[f"{FIRST}.weight"], tensors[f"{FIRST}.weight_scale"] = quantize_rows(changed)


def change_norm(tensors: Tensors, base: Tensors) -> None:
    base["norm.weight"] = base[f"{FIRST}.bias"].clone()
    tensors["norm.weight"] = base["norm.weight"].clone()
    tensors["norm.weight"][3] = 1e31


CHANGES = pytest.mark.parametrize(
    ("change", "code", "name"),
    [(change_weight, "changed_weight", FIRST), (change_norm, "changed_float", "norm.weight")],
)


@CHANGES
def test_a_wrong_hash_is_damage_and_no_training(audit: Audit, change: Change, code: str, name: str) -> None:
    base = make_base()
    tensors = make_int8(base)
    change(tensors, base)

    found = audit(tensors, base, {"loras": [], "rounding": "absmax", "data_blake2b": WRONG})

    (finding,) = found.findings
    assert (found.grade, finding.code) == ("F", "changed_tensors")
    assert "it is damaged" in finding.detail
    assert finding.detail.endswith(f"what differs from the base by more than rounding: {name}")
    assert all(code not in layer.codes for layer in found.layers)


@CHANGES
def test_the_same_with_its_true_hash_was_written_so(
    audit: Audit, tmp_path: Path, change: Change, code: str, name: str
) -> None:
    base = make_base()
    tensors = make_int8(base)
    change(tensors, base)

    found = audit(tensors, base, {"data_blake2b": hash_file(tensors, tmp_path)})

    (finding,) = found.findings
    assert (found.grade, finding.code, finding.names) == ("D", code, (name,))


def test_a_number_of_any_size_is_short(audit: Audit) -> None:
    base = make_base()
    tensors = make_int8(base)
    change_norm(tensors, base)

    (finding,) = audit(tensors, base).findings

    assert finding.detail.startswith("by up to 7")
    assert finding.detail.endswith("e+29 times their size: 1 × norm.weight")


def test_a_file_that_is_reproduced_is_not_read_twice(audit: Audit) -> None:
    base = make_base()

    found = audit(make_int8(base), base, {"data_blake2b": WRONG})

    assert (found.grade, list_codes(found)) == ("A", [])


def test_a_wrong_base_says_nothing_of_the_note(audit: Audit) -> None:
    found = audit(make_int8(make_base()), make_base(seed=9), {"loras": [], "rounding": "absmax"})

    assert "other_model" in list_codes(found)
    assert "wrong_provenance" not in list_codes(found)


def test_a_float_layer_has_no_rotation_that_a_marker_says(audit: Audit) -> None:
    base = make_base()
    tensors = make_int8(base)
    for suffix in ("weight_scale", "comfy_quant"):
        del tensors[f"{FIRST}.{suffix}"]
    tensors[f"{FIRST}.weight"] = base[f"{FIRST}.weight"]

    layers = {layer.name: layer for layer in audit(tensors, base).layers}

    assert layers[FIRST].declared_rotation == ""
    assert layers[NAMES[1]].declared_rotation == "not rotated"
