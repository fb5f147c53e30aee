"""`int8run` as `make demo` runs it, on CPUs that lack instruction sets: the best that is left is chosen and
named, and draws the same image to the last bit. The sets are hidden where int8run asks for them.
"""

import csv
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from support.cli_process import Command
from support.helpers import CPU

from int8run.backends.cpu import Cpu
from int8run.kernels.cpu import library
from int8run.kernels.cpu.features import read_cpu_capabilities
from int8run.kernels.cpu.instructions import list_instruction_sets, request_tiles
from int8run.pipeline import process_cache

REFUSED = Cpu().limits.unsupported_reasons(CPU)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}"),
]
DEMO = (
    "sampler.height=64",
    "sampler.width=64",
    "sampler.steps=2",
    "prompts.prompts=[fox]",
    "metrics.baseline=none",
    "tracker=none",
    "progress=false",
    "cache.limit_gb=0",
)
X86_SETS = ("amx", "avx512_vnni", "avx_vnni", "avx2")
# what a CPU lacks whose best set this is
HIDDEN = {
    "avx512_vnni": ("amx_tile", "amx_int8"),
    "avx_vnni": ("amx_tile", "amx_int8", "avx512_vnni"),
    "avx2": ("amx_tile", "amx_int8", "avx512_vnni", "avx_vnni"),
    "none": ("amx_tile", "amx_int8", "avx512_f", "avx512_vnni", "avx_vnni", "avx2", "fma3", "f16c"),
}
Hide = Callable[[str], None]


def forget_answers() -> None:
    for remembered in (request_tiles, library.try_to_load, library.load_linear_library):
        remembered.cache_clear()


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hide]:
    """Leave of this CPU what one has whose best set is the given one."""
    found = read_cpu_capabilities()

    def hide_above(best: str) -> None:
        left = {name: value for name, value in found.items() if name not in HIDDEN[best]}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: left, raising=False)
        forget_answers()

    yield hide_above
    forget_answers()


MIN_PSNR_DB = 45  # flipped integers cost far less, wrong ones far more


class Demo:
    """What a run printed and left."""

    def __init__(self, command: Command, name: str, *overrides: str):
        process_cache.clear()
        outcome = command(*DEMO, *overrides, f"hydra.run.dir={name}")
        assert outcome.code == 0, outcome.err
        self.printed = outcome.out + outcome.err
        folder = command.folder / name
        with (folder / "layers.csv").open() as file:
            self.layers = [row for row in csv.DictReader(file) if row["quantized"] == "true"]
        (image,) = (folder / "images").iterdir()
        self.image = np.asarray(Image.open(image)).astype(int)

    def list_kernels(self) -> set[tuple[str, str]]:
        return {(row["backend_used"], row["instructions"]) for row in self.layers}


def test_the_best_set_that_is_left_runs_and_draws_the_same_image(command: Command, hide: Hide) -> None:
    found = [name for name in X86_SETS if name in list_instruction_sets()]
    best = Demo(command, "best", "backend=cpu")
    kernels = [best.list_kernels()]
    images = [best.image]
    for name in found[1:]:
        asked = Demo(command, f"asked_{name}", "backend=cpu", f"backend.instructions={name}")
        hide(name)
        left = Demo(command, f"left_{name}", "backend=cpu")

        assert asked.list_kernels() == left.list_kernels() == {("cpu", name)}
        assert f"cpu ({name})" in left.printed
        images += [asked.image, left.image]

    assert len(best.layers) == 32
    assert len(kernels[0]) == 1
    for image in images[1:]:
        assert np.array_equal(image, images[0])


def test_a_set_that_is_hidden_is_refused_with_what_there_is(command: Command, hide: Hide) -> None:
    hide("avx2")

    outcome = command(*DEMO, "backend=cpu", "backend.instructions=avx512_vnni")

    assert outcome.code == 4
    assert outcome.message.startswith(
        "backend 'cpu' cannot run here: needs a CPU with avx512_vnni; this one has avx2"
    )


def test_without_any_set_the_definition_runs_and_says_so(command: Command, hide: Hide) -> None:
    exact = Demo(command, "best", "backend=cpu")
    hide("none")

    demo = Demo(command, "none")

    assert demo.list_kernels() == {("reference", "")}
    assert "backend=auto has none but reference, the slow definition: " in demo.printed
    assert "cpu: needs a CPU with " in demo.printed
    # the same formulas; norms and sums of float32 are rounded in another order, so that some integers flip
    error = np.square(demo.image - exact.image).mean()
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > MIN_PSNR_DB
