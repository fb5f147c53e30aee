"""The compiled Triton kernels, without a GPU: tensor cores used, no spills, memory that fits."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from support.static_builds import AMD, NVIDIA, builds, hopper_build, hopper_builds, linear_build
from support.static_gate import (
    AMD_ASSEMBLY,
    MOST_PERMUTES,
    NVIDIA_ASSEMBLY,
    Counts,
    count,
    count_products,
    failures,
    integer_loops,
    unsupported,
)

from int8run.kernels.int8_linear.tile import (
    HOPPER,
    Tile,
    count_hopper_bytes,
    count_shared_bytes,
    find_architecture,
)

HOPPER_TILE = Tile(128, 128, 128, 8, 4, 3, HOPPER)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*NVIDIA, *AMD])
def test_default_tiles_compile_clean(architecture):
    if reason := unsupported(architecture):
        pytest.skip(reason)
    wrong = {str(build): failures(build, count(build)) for build in builds(architecture)}

    assert not {name: reasons for name, reasons in wrong.items() if reasons}


def test_the_hopper_kernel_starts_a_product_before_the_last_is_done():
    build = hopper_build(HOPPER_TILE)
    counts = count(build)

    assert failures(build, counts) == []
    assert counts.instruction == "wgmma m64n128k32"
    assert counts.loop_waits == (1,)


@pytest.mark.slow
def test_the_portable_kernel_waits_for_each_product_on_hopper():
    # why there is a kernel for Hopper; where this fails, Triton has learned it
    counts = count(linear_build("sm_90", Tile(128, 128, 128, 8, 4, 3)))

    assert counts.instruction == "wgmma m64n128k32"
    assert not counts.is_asynchronous


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*NVIDIA, "gfx942"])
@pytest.mark.parametrize(
    "tile", [Tile(128, 128, 128, 8, 8, 3), Tile(64, 128, 64, 8, 4, 4), Tile(128, 64, 64, 8, 4, 2)], ids=str
)
def test_no_tile_takes_more_shared_memory_than_is_counted(tile, architecture):
    counted = count_shared_bytes(tile, find_architecture(architecture))

    assert count(linear_build(architecture, tile)).shared <= counted


@pytest.mark.slow
@pytest.mark.parametrize("out", ["bf16", "fp32"])
def test_no_hopper_tile_takes_more_shared_memory_than_is_counted(out):
    for tile in (HOPPER_TILE, Tile(256, 128, 128, 8, 8, 4, HOPPER)):
        counted = count_hopper_bytes(tile, out_bytes=2 if out == "bf16" else 4)
        assert count(hopper_build(tile, rank=64, out=out)).shared <= counted


def test_gate_reports_what_is_wrong():
    build = linear_build("sm_86", Tile(128, 128, 64))
    clean = {"registers": 128, "shared": 49152, "spills": 0, "integer_mma": 32, "loop_permutes": 0}

    assert failures(build, Counts(**clean)) == []
    for change, message in [
        ({"integer_mma": 0}, "no integer tensor-core instruction"),
        ({"spills": 3}, "3 spills"),
        ({"loop_permutes": 168}, f"168 byte permutes in the k loop, more than {MOST_PERMUTES}"),
        ({"shared": 110000}, "110000 bytes of shared memory, 101376 there are"),
    ]:
        assert failures(build, Counts(**{**clean, **change})) == [message]


def test_gate_reports_products_that_wait():
    clean = {"registers": 176, "shared": 106520, "spills": 0, "integer_mma": 8, "loop_permutes": 0}
    build = hopper_build(HOPPER_TILE)

    assert failures(build, Counts(**clean, loop_waits=(1,))) == []
    for waits in ((), (0,), (1, 0)):
        assert failures(build, Counts(**clean, loop_waits=waits)) == [
            "waits for each product before it starts the next"
        ]


def test_every_hopper_tile_is_gated():
    names = {build.name for build in hopper_builds()}
    assert {"hopper 128x256x128 w8 s4", "hopper 128x128x128 w4 s3 rank 64"} <= names


def test_only_innermost_loops_with_integer_products_are_searched():
    sass = """
.L_x_0:
        PRMT R1, R2, R3, R4 ;
        BRA `(.L_x_0) ;
.L_x_3:
.L_x_1:
        IMMA.16832.S8.S8 R4, R5, R6, R4 ;
        PRMT R7, R8, R9, R10 ;
    @P0 BRA `(.L_x_1) ;
        PRMT R11, R12, R13, R14 ;
    @P0 BRA `(.L_x_3) ;
        BRA `(.L_x_2) ;
.L_x_2:
        PRMT R15, R16, R17, R18 ;
        BRA `(.L_x_1) ;
"""
    assert [line.split()[1] for line in integer_loops(sass.splitlines()) if "PRMT" in line] == ["R7,"]


def test_waits_are_read_from_the_k_loop():
    sass = """
.L_x_1:
.L_x_0:
        IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24, gsb0 ;
        WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
    @P0 BRA `(.L_x_0) ;
        WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    @P1 BRA `(.L_x_1) ;
"""
    assert count_products(sass.splitlines(), NVIDIA_ASSEMBLY)["loop_waits"] == (1,)


def test_integer_products_of_amd_are_found():
    text = """
.LBB0_1:
        v_perm_b32 v1, v2, v3, s4
        v_wmma_i32_16x16x16_iu8 v[1:8], v[9:12], v[13:16], v[1:8]
        s_cbranch_scc1 .LBB0_1
        v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
        v_mfma_i32_32x32x16_i8 v[0:15], v[16:17], v[18:19], v[0:15]
"""
    found = count_products(text.splitlines(), AMD_ASSEMBLY)
    assert found == {"integer_mma": 2, "loop_permutes": 1, "loop_waits": ()}
