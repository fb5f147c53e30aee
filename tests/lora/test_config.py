"""A LoRA stack as configured: ranges, names, modes, sources, schedules, few-step presets."""

from dataclasses import replace

import pytest

from int8run.errors import ConfigError
from int8run.lora.config import Adapter, LoraSettings

HUB = {"repo": "user/style", "weight_name": "style.safetensors"}


@pytest.mark.parametrize("strength", [-20.01, 21, float("nan"), True, "1.0"], ids=repr)
def test_adapter_strength_out_of_range_is_rejected(strength):
    with pytest.raises(
        ConfigError, match=r"strength of LoRA 'ink' is .*; allowed is a number from -20 to 20"
    ):
        Adapter("ink", "ink.safetensors", strength)


@pytest.mark.parametrize("strength", [-20.01, 21, float("inf"), False], ids=repr)
def test_stack_strength_out_of_range_is_rejected(strength):
    with pytest.raises(ConfigError, match=r"lora\.strength is .*; allowed is a number from -20 to 20"):
        LoraSettings([Adapter("ink", "ink")], strength=strength)


def test_product_of_both_strengths_is_checked():
    with pytest.raises(
        ConfigError,
        match=r"strength of LoRA 'gloss' times lora\.strength is -25\.0; allowed is a number from -20 to 20",
    ):
        LoraSettings([Adapter("ink", "ink"), Adapter("gloss", "gloss", -5.0)], strength=5.0)
    assert LoraSettings(
        [Adapter("ink", "ink", 0.5), Adapter("gloss", "gloss", -20)], strength=0.5
    ).strengths == [0.25, -10.0]


def test_ends_of_the_range_are_allowed():
    assert LoraSettings([Adapter("ink", "ink", -20), Adapter("gloss", "gloss", 20)]).strengths == [-20, 20]


def test_repeated_name_is_rejected():
    with pytest.raises(
        ConfigError, match=r"lora\.adapters has the name 'ink' twice; give each adapter its own name"
    ):
        LoraSettings([Adapter("ink", "a"), Adapter("gloss", "b"), Adapter("ink", "c")])


@pytest.mark.parametrize(("mode", "hint"), [("dynamik", r"did you mean 'dynamic'\? "), ("zzz", "")])
def test_unknown_mode_is_rejected_with_a_hint(mode, hint):
    with pytest.raises(
        ConfigError, match=rf"lora\.mode is '{mode}'; {hint}choose from .*auto, bake, dynamic"
    ):
        LoraSettings(mode=mode)


@pytest.mark.parametrize(("mode", "bakes"), [("auto", False), ("dynamic", False), ("bake", True)])
def test_only_bake_makes_strengths_part_of_the_build(mode, bakes):
    assert LoraSettings(mode=mode).is_baked is bakes


@pytest.mark.parametrize(
    ("path", "weight_name", "source"),
    [
        ("ink", None, ("ink", None)),
        ("user/style", "style.safetensors", ("user/style", "style.safetensors")),
        ({"tiny": "ink", "flux": HUB}, None, ("user/style", "style.safetensors")),
        ({"tiny": HUB, "flux": "style.safetensors"}, None, ("style.safetensors", None)),
    ],
    ids=["path", "hub", "mapping to hub", "mapping to path"],
)
def test_source_is_path_and_weight_name(path, weight_name, source):
    assert Adapter("ink", path, weight_name=weight_name).get_source("flux") == source


def test_missing_source_lists_the_bases_that_have_one():
    with pytest.raises(
        ConfigError,
        match=r"LoRA 'ink' has no source for base model 'sdxl'; it has one for flux, tiny; "
        r"add an entry under",
    ):
        Adapter("ink", {"tiny": "ink", "flux": HUB}).get_source("sdxl")


@pytest.mark.parametrize("missing", ["repo", "weight_name"])
def test_hub_source_needs_repo_and_weight_name(missing):
    entry = {key: value for key, value in HUB.items() if key != missing}

    with pytest.raises(ConfigError, match=rf"LoRA 'ink'.*{missing}"):
        Adapter("ink", {"flux": entry}).get_source("flux")


def test_adapters_may_be_plain_mappings():
    stack = LoraSettings(adapters=[{"name": "a", "path": "a.safetensors", "strength": 0.5}])

    assert stack.adapters == (Adapter("a", "a.safetensors", 0.5),)


@pytest.mark.parametrize(
    "entry", ["a.safetensors", {"name": "a"}, {"name": "a", "path": "b", "strenght": 1}], ids=repr
)
def test_malformed_adapter_is_rejected(entry):
    words = (
        "it takes path, and may have name, strength, text_strength, components, weight_name, "
        "enabled, few_step$"
    )

    with pytest.raises(ConfigError, match=rf"an entry of lora\.adapters is .*; {words}"):
        LoraSettings(adapters=[entry])


def test_adapter_without_a_path_is_rejected():
    with pytest.raises(ConfigError, match=r"LoRA 'ink' has no path; set lora\.adapters\.0\.path="):
        Adapter("ink", None)
    with pytest.raises(ConfigError, match=r"^a LoRA has no path; set lora\.adapters\.0\.path="):
        Adapter(None, None)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"path": "runs/portrait"}, "portrait"),
        ({"path": "loras/ink.safetensors", "name": None}, "ink"),
        ({"path": "loras/ink.safetensors", "name": "mine"}, "mine"),
        ({"path": "user/repo", "weight_name": "gloss.safetensors"}, "gloss"),
    ],
    ids=repr,
)
def test_an_adapter_without_a_name_is_called_like_its_file(given, name):
    assert [adapter.name for adapter in LoraSettings(adapters=[given]).adapters] == [name]


def test_two_files_of_one_name_need_names_of_their_own():
    with pytest.raises(ConfigError, match=r"lora\.adapters has the name 'ink' twice"):
        LoraSettings(adapters=[{"path": "a/ink.safetensors"}, {"path": "b/ink.safetensors"}])


def test_a_file_for_each_base_needs_a_name():
    message = r"^a LoRA with a path for each of flux, sdxl has no name; give it one: lora\.adapters\.0\.name="
    with pytest.raises(ConfigError, match=message):
        LoraSettings(adapters=[{"path": {"sdxl": "a.safetensors", "flux": "b.safetensors"}}])


# -- schedules -----------------------------------------------------------------------------------------------

FORM = (
    r"a schedule is \[\[fraction of the steps, strength\], …\] with rising fractions from 0 on, "
    r"such as \[\[0,1\],\[0\.5,0\]\]$"
)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [[0.1, 1]],
        [[0, 1], [0, 0]],
        [[0, 1], [0.5, 0], [0.25, 1]],
        [1.0, 0.0],
        [[0, 1, 2]],
        [[0]],
        ["ab"],
        [[0, 1], {"a": 1}],
        [None],
    ],
    ids=repr,
)
def test_malformed_schedule_is_rejected_with_the_form(entries):
    with pytest.raises(ConfigError, match=rf"^strength of LoRA 'ink' is \[.*; {FORM}"):
        Adapter("ink", "ink", entries)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [[0, 1], [1.5, 0]],
            r"^fraction in the strength of LoRA 'ink' is 1\.5; allowed is a number from 0 to 1$",
        ),
        ([[-0.1, 1]], r"^fraction in the strength of LoRA 'ink' is -0\.1; allowed is"),
        ([["0", 1]], r"^fraction in the strength of LoRA 'ink' is '0'; allowed is"),
        ([[0, 1], [float("nan"), 0]], r"^fraction in the strength of LoRA 'ink' is nan; allowed is"),
        ([[0, 21]], r"^strength of LoRA 'ink' is 21; allowed is a number from -20 to 20$"),
        ([[0, None]], r"^strength of LoRA 'ink' is None; allowed is a number from -20 to 20$"),
    ],
    ids=repr,
)
def test_numbers_of_a_schedule_are_checked(entries, message):
    with pytest.raises(ConfigError, match=message):
        Adapter("ink", "ink", entries)


SWITCHED = LoraSettings(
    [Adapter("a", "a", [[0, 1], [0.5, -0.25], [0.75, 0]]), Adapter("b", "b", 0.8), Adapter("c", "c")],
    strength=2,
)


@pytest.mark.parametrize(
    ("fraction", "strengths"),
    [
        (0, [2, 1.6, 2]),
        (0.499, [2, 1.6, 2]),
        (0.5, [-0.5, 1.6, 2]),
        (0.7, [-0.5, 1.6, 2]),
        (0.75, [0, 1.6, 2]),
        (1, [0, 1.6, 2]),
    ],
    ids=str,
)
def test_strengths_follow_the_schedule(fraction, strengths):
    assert SWITCHED.get_strengths_at(fraction) == strengths


def test_change_points_are_those_of_all_adapters():
    assert (
        SWITCHED.change_points == [0, 0.5, 0.75]
        and SWITCHED.is_scheduled
        and SWITCHED.strengths == [2, 1.6, 2]
    )
    for plain in (
        LoraSettings(),
        LoraSettings([Adapter("a", "a", 0.5)]),
        LoraSettings([Adapter("a", "a", [[0, 0.5]])]),
    ):
        assert plain.change_points == [0] and not plain.is_scheduled
    assert LoraSettings([Adapter("a", "a", [[0, 0.5]])]).strengths == [0.5]


@pytest.mark.parametrize("mode", ["bake", "stochastic"])
def test_merging_modes_reject_a_schedule(mode):
    message = (
        rf"^LoRA 'b' has a schedule of strengths, which lora\.mode={mode} cannot follow; "
        rf"set lora\.mode=dynamic$"
    )

    with pytest.raises(ConfigError, match=message):
        LoraSettings([Adapter("a", "a"), Adapter("b", "b", [[0, 1], [0.5, 0]])], mode=mode)

    LoraSettings([Adapter("b", "b", [[0, 1]])], mode=mode)  # one entry is a strength like any other
    LoraSettings([Adapter("b", "b", [[0, 1], [0.5, 0]], enabled=False)], mode=mode)


def test_schedule_is_scaled_by_the_stack():
    with pytest.raises(
        ConfigError,
        match=r"^strength of LoRA 'a' times lora\.strength is 24; allowed is a number from -20 to 20$",
    ):
        LoraSettings([Adapter("a", "a", [[0, 1], [0.5, 12]])], strength=2)


# -- text encoders, parts, switches --------------------------------------------------------------------------


def test_text_strength_defaults_to_that_of_the_first_step():
    adapters = [
        Adapter("a", "a", 0.5),
        Adapter("b", "b", 0.5, text_strength=0.2),
        Adapter("c", "c", 0.5, text_strength=0),
    ]
    switched = Adapter("d", "d", [[0, 0.3], [0.5, 1]])

    assert LoraSettings([*adapters, switched], strength=2).text_strengths == [1, 0.4, 0, 0.6]


@pytest.mark.parametrize("strength", [-20.5, 21, True, "1", [[0, 1]]], ids=repr)
def test_text_strength_out_of_range_is_rejected(strength):
    with pytest.raises(
        ConfigError, match=r"^text_strength of LoRA 'ink' is .*; allowed is a number from -20 to 20$"
    ):
        Adapter("ink", "ink", text_strength=strength)


def test_text_strength_is_scaled_by_the_stack():
    with pytest.raises(
        ConfigError, match=r"^strength of LoRA 'ink' times lora\.strength is -22\.0; allowed is"
    ):
        LoraSettings([Adapter("ink", "ink", 0.1, text_strength=-11.0)], strength=2.0)


def test_components_have_the_names_of_the_pipeline():
    texts = "text_encoder, text_encoder_2, text_encoder_3"
    choices = f"denoiser, {texts}, transformer, transformer_2, transformer_ref, unconditional_transformer"

    with pytest.raises(ConfigError, match=rf"^a component of LoRA 'ink' is 'unet'; .*choose from {choices}$"):
        Adapter("ink", "ink", components=["denoiser", "unet"])
    assert Adapter("ink", "ink", components=["denoiser", "text_encoder_3"]).components == [
        "denoiser",
        "text_encoder_3",
    ]
    # of a pipeline with two denoisers one alone
    for name in ("transformer", "transformer_2"):
        assert Adapter("ink", "ink", components=[name]).components == [name]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Adapter("ink", "ink", enabled="no"), "enabled of LoRA 'ink' is 'no'"),
        (lambda: LoraSettings(strict=1), "lora.strict is 1"),
        (lambda: LoraSettings(insert_triggers="yes"), "lora.insert_triggers is 'yes'"),
    ],
)
def test_switches_take_booleans_only(make, name):
    with pytest.raises(ConfigError, match=rf"^{name}; choose true or false$"):
        make()


@pytest.mark.parametrize("share", [-0.1, 101, "a", None, True], ids=repr)
def test_max_overhead_out_of_range_is_rejected(share):
    with pytest.raises(ConfigError, match=r"^lora\.max_overhead is .*; allowed is a number from 0 to 100$"):
        LoraSettings(max_overhead=share)


def test_largest_strength_of_a_schedule_is_the_one_farthest_from_0():
    scheduled = Adapter("a", "a", strength=[[0, 0.5], [0.3, -2], [0.6, 1]])
    settings = LoraSettings([scheduled, Adapter("b", "b", strength=0.4)], strength=0.5)

    assert settings.largest_strengths == [-1.0, 0.2]


def test_a_strength_without_a_lora_is_said():
    assert LoraSettings().list_unusual_strengths() == []
    assert LoraSettings(strength=0.5).list_unusual_strengths() == [
        "lora.strength=0.5 changes nothing: there is no LoRA; choose one with lora="
    ]


def test_unusual_strengths_are_listed_once_for_each_lora():
    adapters = [
        Adapter("usual", "a", 2),
        Adapter("low", "a", -1),
        Adapter("strong", "a", 2.5),
        Adapter("backwards", "a", -1.5),
        Adapter("late", "a", [[0, 1], [0.3, 3], [0.6, 4]]),
        Adapter("words", "a", 0.5, text_strength=5),
    ]
    tell = "-1 to 2 are usual, beyond them images often break"

    values = {"strong": "2.5", "backwards": "-1.5", "late": "3", "words": "5"}

    assert LoraSettings(adapters).list_unusual_strengths() == [
        f"LoRA {name!r} has strength {value}; {tell}" for name, value in values.items()
    ]
    # with the stack's own strength multiplied in
    assert LoraSettings(adapters[:2], strength=0.5).list_unusual_strengths() == []
    assert LoraSettings([Adapter("a", "a", 0.8)], strength=3).list_unusual_strengths() == [
        f"LoRA 'a' has strength 2.4; {tell}"
    ]


# -- for one base model --------------------------------------------------------------------------------------


def test_disabled_adapters_are_left_out():
    off = Adapter("off", {"flux": "other"}, 5, enabled=False, few_step="lcm")
    found = LoraSettings([Adapter("ink", "ink"), off, Adapter("gloss", "b", 0.3)]).resolve_for_base("tiny")

    # neither a source nor a preset for this base is asked of what is off
    assert [(a.name, a.strength) for a in found.adapters] == [("ink", 1), ("gloss", 0.3)]
    assert found.resolve_for_base("tiny") == found


def test_strength_defaults_to_that_of_the_preset():
    fast = Adapter("fast", "lcm", few_step="z_image_distill")

    assert LoraSettings([fast, Adapter("ink", "a")]).resolve_for_base("z_image").strengths == [0.8, 1]

    given = LoraSettings([replace(fast, strength=0.5)], strength=2).resolve_for_base("z_image")

    assert given.strengths == [1] and given.find_preset("z_image").strength == 0.8


def test_steps_in_the_file_name_win():
    stack = LoraSettings([Adapter("fast", "somewhere/lcm-6steps.safetensors", few_step="lcm")])

    assert stack.find_preset("sd15").steps == 6

    hub = LoraSettings(
        [
            Adapter(
                "fast",
                {"sd15": {"repo": "user/lcm", "weight_name": "lcm_3-steps.safetensors"}},
                few_step="lcm",
            )
        ]
    )

    assert hub.find_preset("sd15").steps == 3


def test_two_presets_at_once_are_rejected():
    first, second = Adapter("a", "a", few_step="lcm"), Adapter("b", "b", few_step="lcm")

    with pytest.raises(
        ConfigError, match=r"^LoRAs 'a' and 'b' both bring few-step settings; leave one of them out$"
    ):
        LoraSettings([first, second]).find_preset("sd15")
    for other in (
        replace(second, enabled=False),
        replace(second, strength=0.0),
        replace(second, strength=0.0, few_step=None),
    ):
        assert LoraSettings([first, other]).resolve_for_base("sd15").find_preset("sd15").name == "lcm"
    # one that begins later is in use
    with pytest.raises(ConfigError, match="both bring few-step settings"):
        LoraSettings([first, replace(second, strength=[[0, 0], [0.5, 1]])]).find_preset("sd15")
    assert LoraSettings([replace(first, strength=0)]).find_preset("sd15") is None


PRESETS = [("lcmm", r"few_step is 'lcmm'; did you mean 'lcm'\?"), ("turbo_alpha", "is not made for 'tiny'")]


@pytest.mark.parametrize(("name", "message"), PRESETS)
def test_unknown_preset_is_rejected(name, message):
    with pytest.raises(ConfigError, match=message):
        LoraSettings([Adapter("a", "a", few_step=name)]).resolve_for_base("tiny")


@pytest.mark.parametrize(
    ("adapter", "used"),
    [
        (Adapter("a", "a"), True),
        (Adapter("a", "a", 0), False),
        (Adapter("a", "a", 0, text_strength=0.5), True),
        (Adapter("a", "a", [[0, 0], [0.9, 0.1]]), True),
        (Adapter("a", "a", [[0, 0], [0.9, 0.0]]), False),
    ],
    ids=lambda v: repr(v.strength) if isinstance(v, Adapter) else None,
)
def test_adapter_is_used_unless_every_strength_is_zero(adapter, used):
    assert LoraSettings([Adapter("other", "b"), adapter]).is_used == [True, used]
    assert LoraSettings([Adapter("other", "b"), adapter], strength=0).is_used == [False, False]


def test_components_must_be_a_list():
    with pytest.raises(
        ConfigError, match=r"^components of LoRA 'a' is 'denoiser'; it takes a list: \[denoiser\]$"
    ):
        Adapter("a", "a", components="denoiser")
