"""Plug-ins: what an installed package may bring, and every way in which it may be wrong."""

import re
import shutil
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from support.plugins import EXAMPLE, install_package, installed_in

from int8run.config.compose import create_run_spec, int8run_options
from int8run.config.config_safety import check_targets
from int8run.config.error_messages import explain_error
from int8run.config.help import render_help
from int8run.config.plugins import (
    add_plugin_options,
    check_plugin_names,
    iter_installed_plugins,
    load_plugins,
    read_plugin_names,
)
from int8run.errors import ConfigError


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory):
    """A folder in which the example package is installed."""
    folder = tmp_path_factory.mktemp("site")
    install_package(EXAMPLE, folder)
    return folder


@pytest.fixture
def example(example_folder):
    with installed_in(example_folder):
        yield example_folder


@pytest.fixture
def make_plugin(tmp_path):
    """Installs a package with these options as the plug-in `mine`."""
    folder = tmp_path / "site"
    made = []

    def make(options=(), code="", entry_point='mine = "my_package"'):
        package = tmp_path / "source" / "my_package"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        for name in options:
            (package / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
            (package / "conf" / name).write_text("# mine\n_target_: my_package.Mine\n")
        points = f'[project.entry-points."int8run.plugins"]\n{entry_point}\n' if entry_point else ""
        (package.parent / "pyproject.toml").write_text(
            f'[project]\nname = "my-package"\nversion = "1"\n{points}'
        )
        install_package(package.parent, folder)
        context = installed_in(folder)
        context.__enter__()
        made.append(context)

    yield make
    for context in made:
        context.__exit__(None, None, None)


def compose_with(*overrides):
    overrides = add_plugin_options(["device=cpu", "cache.limit_gb=0", *overrides])
    with int8run_options(), initialize_config_module("int8run.conf", version_base="1.3"):
        config = compose("config", overrides, return_hydra_config=True)
    check_targets(config)
    return config


# -- what a plug-in brings ---------------------------------------------------------------------------


def test_the_options_of_a_plugin_are_chosen_as_others(example):
    config = compose_with(
        "plugins=[example]",
        "outlier=sign_flip",
        "outlier.start=-1",
        "backend=reference_copy",
        "model_type=float_attention",
        "prompts=fruit",
        "metrics=dark",
        "metrics.measures.darkest_pixel.factor=3",
    )

    spec = create_run_spec(config)

    assert (spec.outlier.name, spec.outlier.start) == ("sign_flip", -1)
    assert spec.backend.name == "reference_copy"
    assert spec.model_type.name == "float_attention"
    assert [row.prompt for row in spec.prompts.read_rows()] == ["red apple", "tangerine", "grapes"]
    assert spec.metrics.measures["darkest_pixel"].factor == 3
    assert spec.plugins == ["example"]


def test_a_metric_of_a_plugin_can_choose_the_best_job(example):
    spec = create_run_spec(
        compose_with("plugins=[example]", "metrics=dark", "metrics.objective=quality/darkest_pixel")
    )

    assert spec.metrics.objective == "quality/darkest_pixel"


def test_an_outlier_method_of_a_plugin_is_a_candidate(example):
    config = compose_with(
        "plugins=[example]", "outlier=auto", "+outlier@outlier.candidates.sign_flip=sign_flip"
    )

    assert create_run_spec(config).outlier.candidates["sign_flip"].name == "sign_flip"


def test_help_lists_what_is_installed_without_importing_it(example):
    page = render_help()

    rows = page.partition("Plug-ins that are installed")[2]
    assert re.search(r"\n  example +backend=reference_copy, .*outlier=sign_flip", rows, re.DOTALL)
    assert "example_plugin" not in sys.modules


# -- a config still cannot run code ------------------------------------------------------------------


def test_without_its_name_a_plugin_is_not_there_and_the_error_says_how_it_is_named(example):
    with pytest.raises(MissingConfigException) as error:
        compose_with("outlier=sign_flip")

    message, exit_code = explain_error(error.value)

    assert message.startswith("no outlier called 'sign_flip'; ")
    assert message.endswith("; the installed plug-in example has it: plugins=[example]")
    assert exit_code == 2


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("outlier", "example_plugin.sign_flip.torch.load"),
        ("outlier", "example_plugin.sign_flip.dataclass"),
        ("outlier", "os.system"),
        ("hydra.sweeper", "example_plugin.sign_flip.SignFlip"),
    ],
)
def test_a_config_names_only_the_classes_of_its_plugins_options(example, key, target):
    config = compose_with("plugins=[example]")
    OmegaConf.set_struct(config, False)
    OmegaConf.update(config, f"{key}._target_", target)

    with pytest.raises(ConfigError, match=re.escape(target)):
        check_targets(config)


def test_a_class_of_a_plugin_stands_only_in_its_group(example):
    config = compose_with("plugins=[example]")
    OmegaConf.set_struct(config, False)
    config.backend = {"_target_": "example_plugin.sign_flip.SignFlip"}

    with pytest.raises(ConfigError, match=r"^backend\._target_ is .*allowed here: .*ReferenceCopy"):
        create_run_spec(config)


# -- bad input ---------------------------------------------------------------------------------------


def test_a_plugin_that_is_not_installed_is_an_error(example):
    with pytest.raises(
        ConfigError,
        match=r"^plugins names 'exampel', which is not installed; did you mean 'example'\? installed "
        r"plug-ins: example; install it with pip, or leave it out$",
    ):
        load_plugins(["exampel"])


def test_a_package_without_the_entry_point_is_an_error(make_plugin):
    make_plugin(entry_point="")

    with pytest.raises(
        ConfigError,
        match=r"^plugins names 'my-package', and the package of that name is no plug-in: it has no entry "
        r"point in the group int8run\.plugins; see docs/plugins\.md$",
    ):
        load_plugins(["my-package"])


@pytest.mark.parametrize("code", ["import nothing_of_that_name", "1 / 0", "def broken(:"])
def test_a_plugin_that_fails_on_import_is_an_error(make_plugin, code):
    make_plugin(["outlier/mine.yaml"], code=code)

    with pytest.raises(
        ConfigError,
        match=r"^the plug-in mine cannot be imported \(\w+Error: .*\); mend its package, or leave it out of "
        r"plugins$",
    ):
        load_plugins(["mine"])


def test_a_plugin_without_options_is_an_error(make_plugin):
    make_plugin()

    with pytest.raises(
        ConfigError,
        match=r"^the plug-in mine has no options: there is no folder conf/ in my_package; see",
    ):
        load_plugins(["mine"])


def test_a_plugin_that_takes_an_option_of_int8run_is_an_error(make_plugin):
    make_plugin(["outlier/convrot.yaml"])

    with pytest.raises(
        ConfigError,
        match=r"^the plug-in mine brings outlier=convrot, which int8run has itself; it needs another name$",
    ):
        load_plugins(["mine"])


def test_two_plugins_with_one_option_are_an_error(example_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(EXAMPLE, other)
    text = (other / "pyproject.toml").read_text()
    text = text.replace('example = "example_plugin"', 'other = "other_plugin"')
    (other / "pyproject.toml").write_text(text.replace("example-plugin", "other-plugin"))
    (other / "example_plugin").rename(other / "other_plugin")
    install_package(other, tmp_path / "site")

    with installed_in(example_folder), installed_in(tmp_path / "site"):
        message = r"^the plug-ins example and other both bring backend=reference_copy; name one of them$"
        with pytest.raises(ConfigError, match=message):
            load_plugins(["example", "other"])


@pytest.mark.parametrize("option", ["tracker/mine.yaml", "hydra/launcher/mine.yaml", "config.yaml"])
def test_an_option_of_a_group_that_is_int8runs_own_is_an_error(make_plugin, option):
    make_plugin([option])

    with pytest.raises(
        ConfigError, match=r"^the plug-in mine brings \w+\.yaml in .*; a plug-in has options of "
    ):
        load_plugins(["mine"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plugins=mine", r"^plugins=mine is no list; give the names in brackets: plugins=\[mine\]$"),
        ("plugins=[a,a]", r"^plugins has 'a' twice; name each plug-in once$"),
        ("plugins=[a],[b]", r"^plugins has 'a\]', which is no name of a plug-in"),
        ("plugins=[../x]", r"^plugins has '\.\./x', which is no name of a plug-in"),
    ],
)
def test_a_list_of_plugins_that_cannot_be_is_an_error(override, message):
    with pytest.raises(ConfigError, match=message):
        read_plugin_names([override])


@pytest.mark.parametrize("names", ["example", 3, {"a": 1}, [3], [None]], ids=repr)
def test_what_is_no_list_of_names_is_an_error(names):
    with pytest.raises(ConfigError, match=r"^plugins (is|has) "):
        check_plugin_names(names)


def test_without_plugins_nothing_is_looked_for(monkeypatch):
    monkeypatch.setattr("int8run.config.plugins.entry_points", None)

    assert add_plugin_options(["seed=1", "plugins=[]"]) == ["seed=1", "plugins=[]"]


def test_a_plugin_in_a_folder_of_its_own_module_has_its_options_there(make_plugin):
    make_plugin(["outlier/mine.yaml"])

    (plugin,) = [plugin for plugin in iter_installed_plugins() if plugin.name == "mine"]

    assert [(group, file.stem) for group, file in plugin.list_options()] == [("outlier", "mine")]


@pytest.mark.slow
def test_a_run_with_a_plugin_measures_with_its_metric(example, tmp_path):
    words = ["plugins=[example]", "outlier=sign_flip", "metrics=dark", "sampler.steps=2", "prompts=fruit"]
    words += ["prompts.take=1", "tracker=none", "cache.limit_gb=0", f"hydra.run.dir={tmp_path / 'out'}"]
    program = f"import sys; sys.path.insert(0, {str(example)!r}); from int8run.cli import main; main()"

    ended = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)

    assert ended.returncode == 0, ended.stderr
    assert "quality/darkest_pixel" in (tmp_path / "out" / "metrics.json").read_text()
    assert "sign_flip" in (tmp_path / "out" / "layers.csv").read_text()
