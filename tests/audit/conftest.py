"""Audits of small files, without a command line."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from audit.audit_files import write_file
from torch import Tensor

from int8run.audit.file_audit import FileAudit, audit_file
from int8run.checkpoints.declared_format import UNDECLARED
from int8run.checkpoints.reader import TensorFiles
from int8run.models.family import AutoFamily
from int8run.tasks.audit_sources import plan_audit, read_checkpoint

Tensors = dict[str, Tensor]
Note = Mapping[str, object] | None
Audit = Callable[..., FileAudit]


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    """Audit tensors beside those of a base, or alone."""

    def run(tensors: Tensors, base: Tensors | None = None, note: Note = None) -> FileAudit:
        with TensorFiles.open(write_file(tensors, tmp_path / "file.safetensors", note)) as files:
            read = read_checkpoint(files, UNDECLARED)
            if base is None:
                return audit_file(plan_audit(read, None, AutoFamily()))
            with TensorFiles.open(write_file(base, tmp_path / "base.safetensors")) as base_files:
                read_base = read_checkpoint(base_files, UNDECLARED)
                return audit_file(plan_audit(read, read_base, AutoFamily()))

    return run
