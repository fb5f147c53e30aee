"""Old names of settings and classes: they work as the new ones do, and each is reported once."""

import logging
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from int8run.config.allowed_classes import list_own_classes
from int8run.config.compose import check_command, compose_jobs, create_run_spec, int8run_options
from int8run.config.renamed import RENAMED_KEYS, RENAMED_TARGETS, rename_override, report_once
from int8run.errors import ConfigError

# every class that the YAML of release 0.1 names
RELEASED_TARGETS = [
    "int8run.backends.auto.AutoBackend",
    "int8run.backends.comfy_kitchen.ComfyKitchen",
    "int8run.backends.onednn.OneDnn",
    "int8run.backends.reference.Reference",
    "int8run.backends.torch_int_mm.TorchIntMM",
    "int8run.backends.triton.Triton",
    "int8run.backends.triton.tile",
    "int8run.backends.vnni.Vnni",
    "int8run.generate.calibration.Calibration",
    "int8run.generate.prompts.PromptSet",
    "int8run.lora.settings.Adapter",
    "int8run.lora.settings.LoraSettings",
    "int8run.metrics.base.Metrics",
    "int8run.models.family.AutoFamily",
    "int8run.models.family.ModelFamily",
    "int8run.models.family.ModelSource",
    "int8run.models.family.Sampling",
    "int8run.outlier.auto.AutoOutlier",
    "int8run.outlier.convrot.ConvRot",
    "int8run.outlier.hadanorm.HadaNorm",
    "int8run.outlier.none.NoOutlier",
    "int8run.outlier.quarot.QuaRot",
    "int8run.outlier.smoothquant.SmoothQuant",
    "int8run.quant.rounding.AbsMax",
    "int8run.quant.rounding.Gptq",
    "int8run.quant.rounding.Mse",
    "int8run.quantize.Int8Settings",
    "int8run.spec.RunSpec",
    "int8run.store.Store",
    "int8run.tasks.Bench",
    "int8run.tasks.Inspect",
    "int8run.tasks.Quantize",
    "int8run.tasks.Report",
    "int8run.tasks.Run",
    "int8run.text_encoders.base.TextEncoders",
    "int8run.tracking.base.NoTracker",
    "int8run.tracking.mlflow_tracker.MlflowTracker",
]


def rename(override: str) -> str:
    return rename_override(override, report_once())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# -- the tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", RELEASED_TARGETS)
def test_a_released_class_is_known_by_its_name_or_is_renamed(target):
    own = list_own_classes()

    assert target in own or RENAMED_TARGETS[target] in own


def test_no_class_of_today_is_taken_for_an_old_one():
    assert not set(RENAMED_TARGETS) & list_own_classes()


def test_a_rule_renames_the_last_part_of_a_path():
    for rule in RENAMED_KEYS:
        assert rule.old.rpartition(".")[0] == rule.new.rpartition(".")[0] and rule.old != rule.new


# -- overrides -------------------------------------------------------------------------------------

OVERRIDES = {
    "model_type.keep_float=auto": "model_type.mixed_precision=auto",
    "model_type.keep_float=listed": "model_type.mixed_precision=none",
    "model_type.keep_float='listed'": "model_type.mixed_precision='none'",
    "+model_type.keep_float=listed": "+model_type.mixed_precision=none",
    "++model_type.keep_float=auto": "++model_type.mixed_precision=auto",
    "~model_type.keep_float": "~model_type.mixed_precision",
    # sweeps
    "model_type.keep_float=listed,auto": "model_type.mixed_precision=none,auto",
    "model_type.keep_float=choice(auto,listed)": "model_type.mixed_precision=choice(auto,none)",
    "model_type.keep_float=shuffle(listed,auto)": "model_type.mixed_precision=shuffle(none,auto)",
    "calibration.moments=1,2": "calibration.num_timesteps=1,2",
    "calibration.rows=range(1,4)": "calibration.max_tokens_per_layer=range(1,4)",
    # items and mappings
    "model_type.float_layers=[]": "model_type.ignore=[]",
    "model_type.float_layers=[{pattern: '*', why: so}]": "model_type.ignore=[{pattern:'*',reason:so}]",
    "model_type.float_layers=[],[{pattern: a, why: b}]": "model_type.ignore=[],[{pattern:a,reason:b}]",
    "model_type.float_layers.0.why=so": "model_type.ignore.0.reason=so",
    "model_type.ignore=[{pattern: a, why: a b}]": r"model_type.ignore=[{pattern:a,reason:a\ b}]",
    "calibration={moments: 2, rows: 9}": "calibration={num_timesteps:2,max_tokens_per_layer:9}",
    "+model_type.families={x: {keep_float: listed}}": "+model_type.families={x:{mixed_precision:none}}",
    # classes
    "lora.adapters=[{_target_: int8run.lora.settings.Adapter, path: 'a, b'}]": (
        "lora.adapters=[{_target_:int8run.lora.config.Adapter,path:'a, b'}]"
    ),
    "cache._target_=int8run.store.Store": "cache._target_=int8run.utils.disk_cache.DiskCache",
    # options and values
    "backend=vnni": "backend=cpu",
    "backend=onednn,vnni": "backend=onednn,cpu",
    "clip.kernel_backend=vnni": "clip.kernel_backend=cpu",
    "~backend.candidates.vnni": "~backend.candidates.cpu",
    "backend.candidates.vnni.int8_branch=false": "backend.candidates.cpu.int8_branch=false",
    # references to other settings
    "sampler.steps=${calibration.moments}": "sampler.steps=${calibration.num_timesteps}",
}


@pytest.mark.parametrize(("old", "new"), OVERRIDES.items())
def test_an_override_with_an_old_name_is_translated(old, new):
    assert rename(old) == new


UNCHANGED = [
    "model_type.mixed_precision=none",
    "model_type.mixed_precision=listed",  # no value of this name, and the check of values says so
    "model_type=flux",
    "sampler.steps=4",
    "save=keep_float.safetensors",
    "lora.adapters.0.name=rows",
    "prompts.path=why rows.txt",
    "other.moments=3",
    "note=vnni",
    "note=int8run.store.Store",  # a text, not the name of a class to make
    "calibration.moments=[",  # hydra says what is wrong with it
    "--config-dir",
    "my/rows",
    "-m",
]


@pytest.mark.parametrize("argument", UNCHANGED)
def test_other_arguments_stay_as_they_are(argument, caplog):
    assert rename(argument) == argument
    assert warnings_of(caplog) == []


def test_both_names_of_a_setting_are_refused():
    with pytest.raises(ConfigError, match=r"^calibration\.rows and calibration\.max_tokens_per_layer are"):
        rename("calibration={rows: 1, max_tokens_per_layer: 2}")


def test_an_old_name_is_reported_once_with_the_new_one(caplog):
    report = report_once()

    for _ in range(2):
        rename_override("model_type.keep_float=listed", report)

    assert warnings_of(caplog) == [
        "model_type.keep_float is now model_type.mixed_precision; the old name works until 0.3"
    ]


# -- files -----------------------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


OLD_FAMILY = """\
_target_: int8run.models.family.ModelFamily
name: mine
keep_float: listed
float_layers:
  - { pattern: head, why: final projection }
  - { pattern: "*.gate", why: a gate }
"""


def test_an_option_of_the_user_with_old_keys_and_items(tmp_path, caplog):
    write(tmp_path, "model_type/mine.yaml", OLD_FAMILY)

    _, (config,) = compose_jobs(["device=cpu", "model_type=mine"], config_dir=str(tmp_path))

    family = create_run_spec(config).model_type
    assert (family.mixed_precision, [(rule.pattern, rule.reason) for rule in family.ignore]) == (
        "none",
        [("head", "final projection"), ("*.gate", "a gate")],
    )
    assert warnings_of(caplog) == [
        "model_type.keep_float is now model_type.mixed_precision; the old name works until 0.3",
        "model_type.float_layers is now model_type.ignore; the old name works until 0.3",
        "model_type.ignore.*.why is now model_type.ignore.*.reason; the old name works until 0.3",
    ]


def test_an_option_of_the_user_with_an_old_class(tmp_path, caplog):
    write(tmp_path, "sampler/mine.yaml", "_target_: int8run.models.family.Sampling\nsteps: 3\n")

    _, (config,) = compose_jobs(["device=cpu", "sampler=mine"], config_dir=str(tmp_path))

    assert create_run_spec(config).sampler.steps == 3
    (warning,) = warnings_of(caplog)
    assert warning.startswith("int8run.models.family.Sampling is now int8run.models.sampling.Sampling; ")


def test_settings_of_a_file_for_the_whole_config(tmp_path):
    write(tmp_path, "extra/mine.yaml", "# @package _global_\ncalibration:\n  moments: 3\n  rows: 9\n")

    _, (config,) = compose_jobs(["device=cpu", "+extra=mine"], config_dir=str(tmp_path))

    calibration = create_run_spec(config).calibration
    assert (calibration.num_timesteps, calibration.max_tokens_per_layer) == (3, 9)


def test_a_sweep_that_is_written_in_a_file(tmp_path):
    sweep = "hydra: {sweeper: {params: {calibration.moments: '1,2', seed: 1}}}\n"
    write(tmp_path, "sweep/mine.yaml", "# @package _global_\n" + sweep)

    jobs, configs = compose_jobs(["device=cpu", "+sweep=mine"], config_dir=str(tmp_path), multirun=True)

    assert [job[:2] for job in jobs] == [
        ["calibration.num_timesteps=1", "seed=1"],
        ["calibration.num_timesteps=2", "seed=1"],
    ]
    assert [create_run_spec(config).calibration.num_timesteps for config in configs] == [1, 2]


def test_both_names_in_one_file_are_refused(tmp_path):
    write(tmp_path, "model_type/mine.yaml", OLD_FAMILY + "ignore: []\n")

    with pytest.raises(ConfigError, match=r"^model_type\.float_layers and model_type\.ignore are the same"):
        compose_jobs(["device=cpu", "model_type=mine"], config_dir=str(tmp_path))


@pytest.mark.parametrize(
    "target",
    [
        "int8run.store.Storage",
        "int8run.store",
        "xint8run.store.Store",
        "os.system",
        "int8run.models.family.KeepRule",
    ],
)
def test_the_check_of_classes_is_as_strict_as_before(tmp_path, target):
    write(tmp_path, "outlier/mine.yaml", f"_target_: {target}\n")

    with pytest.raises(ConfigError, match=r"^outlier\._target_ is .*; a config may only name classes of"):
        check_command(["device=cpu", "outlier=mine"], announce=lambda *_: None, config_dir=str(tmp_path))


def test_files_of_other_programs_are_read_as_they_are(tmp_path):
    write(tmp_path, "model_type/mine.yaml", "keep_float: listed\n")
    with int8run_options():
        pass

    with initialize_config_module("int8run.conf", version_base="1.3"):
        found = compose("config", [f"hydra.searchpath=[file://{tmp_path}]", "model_type=mine"])

    assert found.model_type.keep_float == "listed"


# -- the command -----------------------------------------------------------------------------------


def test_the_command_takes_an_old_name_and_says_the_new_one(command, caplog):
    outcome = command("model_type.keep_float=auto", "quality_db=40", "--cfg", "job")

    assert outcome.code == 0 and "mixed_precision: auto" in outcome.out and "keep_float" not in outcome.out
    assert warnings_of(caplog) == [
        "model_type.keep_float is now model_type.mixed_precision; the old name works until 0.3"
    ]


def test_a_file_with_an_old_name_is_reported_once(command, caplog):
    write(command.folder, "mine/model_type/mine.yaml", OLD_FAMILY)

    outcome = command(
        "--config-dir", "mine", "model_type=mine", "prompts=file", "prompts.path=absent.txt", "tracker=none"
    )

    assert "absent.txt" in outcome.message
    assert len([line for line in warnings_of(caplog) if "the old name works" in line]) == 3
