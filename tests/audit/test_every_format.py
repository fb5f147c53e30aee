"""Every kind of file that is read is audited: beside its real weight nothing is wrong with its numbers."""

from pathlib import Path

import pytest
import torch
from audit.audit_files import write_file
from checkpoints.checkpoint_files import DRAFTS
from checkpoints.drafts.floats import FLOAT_DRAFTS

from int8run.audit.file_audit import audit_file
from int8run.checkpoints.declared_format import UNDECLARED
from int8run.checkpoints.reader import TensorFiles
from int8run.models.family import AutoFamily
from int8run.tasks.audit_sources import plan_audit, read_checkpoint

# of the numbers, not of labels and the like, of which these drafts have every kind
OF_NUMBERS = {
    "other_weight",
    "other_model",
    "wrong_rotation",
    "wrong_scale",
    "low_rank_change",
    "changed_weight",
}


@pytest.mark.parametrize("name", DRAFTS)
def test_numbers_are_those_of_the_real_weight(name: str, tmp_path: Path) -> None:
    draft = DRAFTS[name]()
    base = {f"{layer}.weight": torch.from_numpy(weight).float() for layer, weight in draft.real.items()}
    path = draft.write(tmp_path / "file.safetensors")
    with TensorFiles.open(path) as files:
        read = read_checkpoint(files, UNDECLARED)
        with TensorFiles.open(write_file(base, tmp_path / "base.safetensors")) as base_files:
            found = audit_file(plan_audit(read, read_checkpoint(base_files, UNDECLARED), AutoFamily()))

    assert not OF_NUMBERS & {finding.code for finding in found.findings}
    if name in FLOAT_DRAFTS:
        assert found.num_floats_compared == len(draft.real)
        assert all(change < 1e-7 for change in found.changed_floats.values())  # the base is float32
        return
    assert {layer.name for layer in found.quantized} == draft.real.keys()
    for layer in found.quantized:
        assert layer.is_compared and layer.is_proven, layer.name
        assert layer.sqnr_db is not None and layer.sqnr_db > 60, layer.name
