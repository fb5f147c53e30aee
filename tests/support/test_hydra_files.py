"""What spares the tests most of their time must not stop working unseen."""

import pytest
from omegaconf import OmegaConf
from support.run_job import make_spec


def test_no_file_of_a_package_is_read_for_a_second_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    load = OmegaConf.load
    monkeypatch.setattr(OmegaConf, "load", lambda file: read.append(file) or load(file))
    make_spec(["outlier=convrot"])
    read.clear()

    make_spec(["outlier=convrot"])

    assert read == []
