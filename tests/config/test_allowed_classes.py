"""Which class may stand where: a config that names classes of ours in the wrong place is one line."""

import pytest
from support.helpers import CONF

from int8run.config.allowed_classes import KEYS_OF_HYDRA, check_keys_of_hydra, list_option_classes
from int8run.config.compose import compose_jobs, create_run_spec
from int8run.errors import ConfigError

CONVROT = "int8run.outlier.convrot.ConvRot"
CPU_BACKEND = "int8run.backends.cpu.Cpu"
SAMPLING = "int8run.models.sampling.Sampling"
NONSENSE = {
    "a backend as an outlier method": (
        f"outlier._target_={CPU_BACKEND}",
        "outlier._target_ is .*allowed here: .*ConvRot",
    ),
    "an outlier method as a backend": (
        f"backend._target_={CONVROT}",
        "backend._target_ is .*allowed here: .*Cpu",
    ),
    "a sampler as the cache": (f"cache._target_={SAMPLING}", "cache._target_ is .*DiskCache"),
    "an option as the whole": (f"_target_={CONVROT}", "^_target_ is .*RunSpec"),
    "a class as a number": (
        f"+seed={{_target_: {CONVROT}}}",
        "seed._target_ is .*takes a value and no class",
    ),
    "a class in a list": (
        f"prompts.prompts=[{{_target_: {CONVROT}}}]",
        r"prompts.prompts.0._target_ is .*takes a value and no class",
    ),
    "a class in an argument": (f"sampler.extra.a={{_target_: {SAMPLING}}}", "sampler.extra.a._target_ is "),
    "a class of ours that is no option": ("lora._target_=int8run.lora.config.Adapter", "lora._target_ is "),
    "a misspelled one": (
        "outlier._target_=int8run.outlier.convrot.ConvRott",
        r"did you mean 'int8run.outlier.convrot.ConvRot'\?",
    ),
}


def make_spec(*words):
    (config,) = compose_jobs(["device=cpu", *words])[1]
    return create_run_spec(config)


@pytest.mark.parametrize(("word", "message"), NONSENSE.values(), ids=NONSENSE)
def test_a_class_in_the_wrong_place_is_refused(word, message):
    with pytest.raises(ConfigError, match=message):
        make_spec(word)


@pytest.mark.parametrize("place", ["", "outlier", "model.sampling", "sampler.extra.deep", "list.0"])
@pytest.mark.parametrize("key", KEYS_OF_HYDRA)
def test_what_else_hydra_does_with_a_class_is_refused_by_name(key, place):
    tree = {key: []}
    for part in reversed(place.split(".") if place else []):
        tree = [tree] if part == "0" else {part: tree}
    where = f"{place}.{key}".lstrip(".").replace(".", r"\.")
    with pytest.raises(ConfigError, match=rf"^{where} stands in the config; "):
        check_keys_of_hydra(tree)


def test_a_command_refuses_a_half_made_class():
    with pytest.raises(ConfigError, match=r"^outlier\._partial_ stands in the config; "):
        make_spec("+outlier._partial_=true")


def test_a_class_by_reference_is_that_of_its_place(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x.yaml").write_text("# @package _global_\noutlier: ${backend}\n")
    (config,) = compose_jobs(["device=cpu", "+x=x"], config_dir=str(tmp_path))[1]
    with pytest.raises(ConfigError, match=r"outlier\._target_ is .*AutoBackend"):
        create_run_spec(config)


def test_candidates_of_an_automatic_method_may_be_any_method():
    spec = make_spec("outlier=auto", f"outlier.candidates.mine={{_target_: {CONVROT}, group_size: 4}}")
    assert spec.outlier.candidates["mine"].group_size == 4
    with pytest.raises(ConfigError, match=r"outlier\.candidates\.mine\._target_ is "):
        make_spec("outlier=auto", f"outlier.candidates.mine={{_target_: {CPU_BACKEND}}}")


@pytest.mark.parametrize("group", sorted({file.parent.name for file in CONF.glob("*/*.yaml")} - {"hydra"}))
def test_a_group_takes_the_classes_that_its_files_name(group):
    classes = list_option_classes(group)
    assert classes
    for file in (CONF / group).glob("*.yaml"):
        first = next((line for line in file.read_text().splitlines() if "_target_" in line), None)
        assert first is None or first.split()[-1] in classes
