"""The compiled Triton kernels, without a GPU: tensor cores used, no spills, memory that fits."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from support.static_gate import (
    ARCHITECTURES,
    MOST_PERMUTES,
    Counts,
    builds,
    count,
    failures,
    integer_loops,
    linear_build,
    unsupported,
)

from int8run.kernels.int8_linear.tile import Tile


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_tiles_compile_clean(architecture):
    if reason := unsupported(architecture):
        pytest.skip(reason)
    wrong = {str(build): failures(build, count(build)) for build in builds(architecture)}

    assert not {name: reasons for name, reasons in wrong.items() if reasons}


def test_gate_reports_what_is_wrong():
    build = linear_build(86, Tile(128, 128, 64))
    clean = {
        "registers": 128,
        "shared": 49152,
        "local_loads": 0,
        "local_stores": 0,
        "integer_mma": 32,
        "loop_permutes": 0,
    }

    assert failures(build, Counts(**clean)) == []
    for change, message in [
        ({"integer_mma": 0}, "no integer tensor-core instruction"),
        ({"local_loads": 3}, "spills: 3 LDL, 0 STL"),
        ({"local_stores": 1}, "spills: 0 LDL, 1 STL"),
        ({"loop_permutes": 168}, f"168 byte permutes in the k loop, more than {MOST_PERMUTES}"),
        ({"shared": 110000}, "110000 bytes of shared memory, 101376 there are"),
    ]:
        assert failures(build, Counts(**{**clean, **change})) == [message]


def test_only_loops_with_integer_products_are_searched():
    sass = """
.L_x_0:
        PRMT R1, R2, R3, R4 ;
        BRA `(.L_x_0) ;
.L_x_1:
        IMMA.16832.S8.S8 R4, R5, R6, R4 ;
        PRMT R7, R8, R9, R10 ;
    @P0 BRA `(.L_x_1) ;
        PRMT R11, R12, R13, R14 ;
        BRA `(.L_x_2) ;
.L_x_2:
"""
    assert [line.split()[1] for line in integer_loops(sass.splitlines()) if "PRMT" in line] == ["R7,"]
