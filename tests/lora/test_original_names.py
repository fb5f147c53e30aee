"""The naming rules: their files, and every family's names against diffusers' own checkpoint converter."""

import re
from dataclasses import replace

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import lora_conversion_utils as lora_converters
from families.denoisers import hunyuan_video15
from families.instance_sets import LONG_TAIL
from support.original_families import FAMILIES, HIDDEN, Family, tiny
from support.parameter_ids import name_parameter
from torch import Tensor, nn

from int8run.errors import ConfigError
from int8run.lora.module_names import NameTable, flatten_name
from int8run.lora.row_slices import ModuleTarget, count_source_rows
from int8run.models.denoiser_classes import OWN_DENOISERS
from int8run.models.key_mapping import (
    MAPPING_FOLDER,
    KeyMapping,
    KeyMappingSet,
    load_lora_mappings,
    load_mappings,
    read_mapping_file,
    read_mapping_folder,
)
from int8run.models.name_pattern import fill_pattern, match_pattern
from int8run.models.original_names import to_original
from int8run.text_encoders.registry import list_supported_encoders, load_encoders

NEEDS_ALL = {"krea2", "pixart", "sana", "sana_sprint", "wan_first_last"}


def get_modules_with_weight(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have a weight of their own."""
    return {n: m for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}


def number_rows(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """For every parameter of these modules numbers for its rows, none of them twice. [rows] each."""
    numbers, first = {}, 0
    for name, module in modules.items():
        for parameter, value in module.named_parameters(recurse=False):
            numbers[f"{name}.{parameter}"] = torch.arange(first, first + len(value))
            first += len(value)
    return numbers


def load_authors_mappings(family: Family) -> tuple[KeyMapping, ...]:
    """The rules of a family without the names that only LoRA files use, such as XLabs' for FLUX."""
    return load_mappings(family.cls).names


def list_authors_names(table: NameTable, rules: tuple[KeyMapping, ...]) -> list[str]:
    """The names that no rule takes further: those of the model's authors."""
    targets = [(target, rule.original) for rule in rules for target in rule.targets]
    return [
        n
        for n in table.targets_by_name
        if not any(
            (v := match_pattern(t, n)) and fill_pattern(native, v) in table.targets_by_name
            for t, native in targets
        )
    ]


def build_authors_checkpoint(
    table: NameTable, rules: tuple[KeyMapping, ...], numbers: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What the authors' file would hold if the table is right: the row numbers, put together by targets."""
    checkpoint = {}
    for name in list_authors_names(table, rules):
        for parameter in ("weight", "bias"):
            places = table.find_targets(name)
            parts = [numbers.get(f"{place.module}.{parameter}") for place in places]
            if parts[0] is None:
                continue
            parts = [
                part.roll(len(part) // 2) if place.swap_halves else part
                for part, place in zip(parts, places, strict=True)
            ]
            # norms of these authors call their weight scale
            spelled = (
                "scale"
                if re.search(r"(query_norm|key_norm|distilled_guidance_layer\.norms\.\d+)$", name)
                else parameter
            )
            checkpoint[f"{name}.{spelled}"] = torch.cat(parts)
    return checkpoint


# the other converters want parameters of no module as well: tests/models/test_state_dict_adapter.py checks
# them with all there is
@pytest.mark.parametrize("key", [key for key in FAMILIES if key not in NEEDS_ALL])
def test_names_match_the_converter_of_diffusers(key):
    family = FAMILIES[key]
    model = tiny(family)
    rules = load_authors_mappings(family)
    modules = get_modules_with_weight(model)
    numbers = number_rows(modules)

    table = NameTable(modules, rules)

    assert {n for n in list_authors_names(table, rules) if n in modules} == {
        n for n in modules if re.fullmatch(family.unchanged, n)
    }

    checkpoint = build_authors_checkpoint(table, rules, numbers)
    checkpoint |= dict.fromkeys(family.besides, torch.zeros(1))
    arguments = {"config": dict(model.config)} if family.prefix else {}
    converted = family.convert(
        {family.prefix + name: value for name, value in checkpoint.items()}, **arguments
    )

    assert set(numbers) <= set(converted), (
        f"the converter finds no {sorted(set(numbers) - set(converted))[:5]}"
    )

    wrong = [name for name, rows in numbers.items() if not torch.equal(converted[name], rows)]

    assert not wrong, f"other rows in {wrong[:5]}"
    # nothing else came out, but for names that the converter passed through unread
    assert set(converted) - set(numbers) <= {"pos_embed.pos_embed"} | set(checkpoint)


@pytest.mark.parametrize("key", FAMILIES)
def test_names_match_files_of_the_authors(key):
    family = FAMILIES[key]
    model = tiny(family)
    table = NameTable.from_model(model)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for native, parts in to_original(shapes, family.cls).items():
        name, _, parameter = native.removeprefix(family.prefix).rpartition(".")
        if parameter == "weight" and {part.key.removesuffix(".weight") for part in parts} <= set(
            table.targets_by_name
        ):
            places = table.find_targets(name)
            assert [(p.module, p.swap_halves) for p in places] == [
                (p.key.removesuffix(".weight"), p.swap_halves) for p in parts
            ]


@pytest.mark.parametrize("key", FAMILIES)
def test_every_naming_covers_each_row_once(key):
    family = FAMILIES[key]
    model = tiny(family)
    rules = load_lora_mappings(family.cls)
    table = NameTable.from_model(model)
    modules = get_modules_with_weight(model)
    of_authors = list_authors_names(
        NameTable(modules, load_authors_mappings(family)), load_authors_mappings(family)
    )

    for dialect in (list(modules), of_authors):
        for spelled in (str, flatten_name):
            covered = set()
            for name in dialect:
                places = table.find_targets(spelled(name))
                assert places == table.find_targets(name)
                first = 0
                for place in places:
                    rows = modules[place.module].weight.shape[0]
                    assert place.start is None and place.total is None
                    assert place.source_rows == (None if len(places) == 1 else slice(first, first + rows))
                    first += rows
                    covered.add(place.module)
                assert count_source_rows(places) == (None if len(places) == 1 else first)
            assert covered == set(modules)

    assert rules and all(len(meanings) == 1 for meanings in table.targets_by_flat_name.values())


def test_xlabs_names_match_the_converter_of_diffusers():
    family = FAMILIES["flux"]
    model = tiny(family)
    table = NameTable.from_model(model)
    names = [f"double_blocks.1.{part}{side}" for part in ("qkv_lora", "proj_lora") for side in (1, 2)]
    names += ["single_blocks.1.qkv_lora", "single_blocks.1.proj_lora"]
    file, expected = {}, {}
    for i, name in enumerate(names):
        assert not any(place.swap_halves for place in table.find_targets(name))
        down, rows = (
            torch.full((1, 2), i),
            count_source_rows(table.find_targets(name))
            or HIDDEN["attention_head_dim"] * HIDDEN["num_attention_heads"],
        )
        up = torch.arange(rows)[:, None] + i * 10**5
        block, _, part = name.rpartition(".")
        file |= {f"{block}.processor.{part}.down.weight": down, f"{block}.processor.{part}.up.weight": up}
        for place in table.find_targets(name):
            expected[f"transformer.{place.module}.lora_A.weight"] = down
            expected[f"transformer.{place.module}.lora_B.weight"] = up[place.source_rows or slice(None)]

    converted = lora_converters._convert_xlabs_flux_lora_to_diffusers(file)

    assert set(converted) == set(expected) and all(
        torch.equal(converted[key], expected[key]) for key in expected
    )


def test_ltx2_names_match_the_lora_converter_of_diffusers():
    family = FAMILIES["ltx2"]
    model = tiny(
        replace(family, config={**family.config, "cross_attn_mod": True, "audio_cross_attn_mod": True})
    )
    table = NameTable(get_modules_with_weight(model), load_authors_mappings(family))
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]

    names = [
        n
        for n in list_authors_names(table, load_authors_mappings(family))
        if table.find_targets(n)[0].module in linears
    ]

    assert (
        len(names) == len(linears)
        and "prompt_adaln_single.linear" in names
        and "audio_prompt_adaln_single.linear" in names
    )

    file = {f"diffusion_model.{n}.lora_A.weight": n for n in names}
    converted = lora_converters._convert_non_diffusers_ltx2_lora_to_diffusers(file)

    assert converted == {f"transformer.{table.find_targets(n)[0].module}.lora_A.weight": n for n in names}
    assert not any(place.swap_halves for n in names for place in table.find_targets(n))


@pytest.mark.parametrize(
    "key, names",
    [
        (
            "flux2",
            {
                "double_blocks.1.img_attn.qkv": [f"transformer_blocks.1.attn.to_{x}" for x in "qkv"],
                "double_blocks.1.txt_attn.qkv": [f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"],
            },
        ),
        (
            "hunyuan_video",
            {
                f"txt_in.individual_token_refiner.blocks.1.{there}": [
                    f"context_embedder.token_refiner.refiner_blocks.1.{x}" for x in here
                ]
                for there, here in {
                    "self_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
                    "self_attn_proj": ["attn.to_out.0"],
                    "mlp.fc1": ["ff.net.0.proj"],
                    "mlp.fc2": ["ff.net.2"],
                    "adaLN_modulation.1": ["norm_out.linear"],
                    "norm2": ["norm2"],
                }.items()
            },
        ),
    ],
    ids=name_parameter,
)
def test_loose_names_are_found(key, names):
    table = NameTable.from_model(tiny(FAMILIES[key]))

    assert {name: [place.module for place in table.find_targets(name)] for name in names} == names


def test_every_mapping_is_used():
    models = [tiny(family) for family in FAMILIES.values()] + list(make_text_encoders().values())
    ltx2 = FAMILIES["ltx2"]
    models.append(tiny(replace(ltx2, config={**ltx2.config, "cross_attn_mod": True})))
    with torch.device("meta"):
        models += [instance.denoiser() for instance in LONG_TAIL.values() if instance.denoiser is not None]
        models.append(hunyuan_video15(use_meanflow=True))
    used = set()
    for model in models:
        # a parameter may belong to a module without a weight, such as a block
        owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
        names = {*NameTable.from_model(model).targets_by_name, *owners}
        for rule in load_lora_mappings(type(model).__name__):
            if any(match_pattern(rule.targets[0], name) for name in names):
                used.add(rule)

    of_classes = [
        rules for name, rules in read_mapping_folder(MAPPING_FOLDER).items() if name not in load_encoders()
    ]

    assert not {rule for rules in of_classes for rule in rules.names + rules.lora_names} - used


def make_text_encoders() -> dict[str, nn.Module]:
    """A small one of each class, on the meta device."""
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 9,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    sees = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 8}
    llm = transformers.Qwen3Config(**sizes, num_key_value_heads=1, head_dim=4)
    vlm = transformers.Qwen2_5_VLConfig(text_config={**sizes, "num_key_value_heads": 1}, vision_config=sees)
    clip = transformers.CLIPTextConfig(**sizes, projection_dim=8)
    with torch.device("meta"):
        return {
            "CLIPTextModel": transformers.CLIPTextModel(clip),
            "CLIPTextModelWithProjection": transformers.CLIPTextModelWithProjection(clip),
            "T5EncoderModel": transformers.T5EncoderModel(
                transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
            ),
            "Qwen3Model": transformers.Qwen3Model(llm),
            "Qwen3ForCausalLM": transformers.Qwen3ForCausalLM(llm),
            "Qwen2_5_VLForConditionalGeneration": transformers.Qwen2_5_VLForConditionalGeneration(vlm),
        }


@pytest.mark.parametrize(
    "cls, names",
    [
        (
            "CLIPTextModel",
            [
                "encoder.layers.1.self_attn.q_proj",
                "text_model.encoder.layers.1.self_attn.q_proj",
                "text_model.encoder.layers.1.self_attn.to_q",
                "encoder.layers.1.self_attn.to_q",
            ],
        ),
        (
            "CLIPTextModelWithProjection",
            [
                "encoder.layers.1.self_attn.out_proj",
                "text_model.encoder.layers.1.self_attn.out_proj",
                "text_model.encoder.layers.1.self_attn.to_out",
                "encoder.layers.1.self_attn.to_out",
            ],
        ),
        (
            "CLIPTextModel",
            ["encoder.layers.0.self_attn.k_proj", "text_model.encoder.layers.0.self_attn.to_k"],
        ),
        (
            "CLIPTextModel",
            ["encoder.layers.0.self_attn.v_proj", "text_model.encoder.layers.0.self_attn.to_v"],
        ),
        ("CLIPTextModelWithProjection", ["text_projection"]),
        ("T5EncoderModel", ["encoder.block.1.layer.0.SelfAttention.q"]),
        ("Qwen3Model", ["layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("Qwen3ForCausalLM", ["layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"]),
        (
            "Qwen2_5_VLForConditionalGeneration",
            [
                "layers.1.mlp.up_proj",
                "model.layers.1.mlp.up_proj",
                "language_model.layers.1.mlp.up_proj",
                "language_model.model.layers.1.mlp.up_proj",
                "model.language_model.layers.1.mlp.up_proj",
            ],
        ),
        (
            "Qwen2_5_VLForConditionalGeneration",
            ["visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"],
        ),
    ],
    ids=name_parameter,
)
def test_text_encoder_names_may_lack_outer_levels(cls, names):
    model = make_text_encoders()[cls]
    table = NameTable.from_model(model)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]

    own = [name for name in names if name in linears]

    assert len(own) == 1
    assert {
        place
        for name in names
        for spelled in (str, flatten_name)
        for place in table.find_targets(spelled(name))
    } == {ModuleTarget(own[0])}
    assert all(table.find_targets(flatten_name(n)) == table.find_targets(n) for n in linears)


@pytest.mark.parametrize("key", ["sd15", "sdxl"])
def test_ldm_resnet_names_are_found(key):
    model = tiny(FAMILIES[key])
    table, own = NameTable.from_model(model), dict(model.named_modules())
    inner = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    blocks = {
        "input_blocks.4.0": "down_blocks.1.resnets.0",
        "middle_block.0": "mid_block.resnets.0",
        "output_blocks.8.0": "up_blocks.2.resnets.2",
    }
    for native, block in blocks.items():
        for there, here in inner.items():
            wanted = (ModuleTarget(f"{block}.{here}"),) if f"{block}.{here}" in own else None
            assert (
                table.find_targets(f"{native}.{there}")
                == table.find_targets(flatten_name(f"{native}.{there}"))
                == wanted
            )
            assert (wanted is None) == (native == "middle_block.0" and here == "conv_shortcut")


@pytest.mark.parametrize(
    "key, names", [("sd15", ["2.1", "5.2", "8.2"]), ("sdxl", ["2.2", "5.2"])], ids=name_parameter
)
def test_ldm_upsamplers_follow_the_attention(key, names):
    table = NameTable.from_model(tiny(FAMILIES[key]))

    assert [table.find_targets(f"output_blocks.{n}.conv") for n in names] == [
        (ModuleTarget(f"up_blocks.{i}.upsamplers.0.conv"),) for i in range(len(names))
    ]


def test_every_linear_of_clip_has_a_kohya_name():
    for cls in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        model = make_text_encoders()[cls]
        table = NameTable.from_model(model)
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "text_projection"]
        assert len(linears) == 12
        for name in linears:
            kohya = flatten_name(f"text_model.{name.removeprefix('text_model.')}")
            assert [p.module for p in table.find_targets(kohya)] == [name]


GOOD = "classes: [Model]\nnames: {a.*: b.*}\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "x.yaml is not readable YAML"),
        (
            "- a",
            "x.yaml: a file .* is a mapping with classes and names, and may have drop, lacks, "
            "lora_names, needs, parameters, prefix$",
        ),
        (GOOD + "more: 1", "a mapping with classes and names, and may have"),
        ("names: {a: b}", "a mapping with classes and names, and may have"),
        ("classes: Model\nnames: {a: b}", "classes is 'Model'; it takes a list of class names"),
        ("classes: []\nnames: {a: b}", "classes is \\[\\]; it takes a list"),
        ("classes: [1]\nnames: {a: b}", "classes is \\[1\\]; it takes a list"),
        (
            GOOD + "prefix: net",
            "prefix is 'net'; it takes the beginning of a name up to a dot, such as 'net.'",
        ),
        (GOOD + "prefix: '*.'", "prefix is '[*].'"),
        (GOOD + "prefix: ''", "prefix is ''"),
        (GOOD + "prefix: [net.]", "prefix is \\['net.'\\]"),
        (GOOD + "needs: a", "needs is 'a'; it takes a list of module names"),
        (GOOD + "lacks: [a..b]", "lacks is \\['a..b'\\]; it takes a list of module names"),
        (GOOD + "drop: [a]", "drop is \\['a'\\]; it takes a mapping of a key's pattern to the reason"),
        (GOOD + "drop: {a: }", "drop is {'a': None}; it takes a mapping"),
        (GOOD + "drop: {a: 3}", "drop is {'a': 3}; it takes a mapping"),
        (
            GOOD + "drop: {a.b*: c}",
            "drop has the pattern 'a.b[*]'; it takes a key with [*] for numbers and one [*][*] at most",
        ),
        (GOOD + "drop: {3: c}", "drop has the pattern 3; it takes a key"),
        (GOOD + "lora_names: [a]", "lora_names is \\['a'\\]; it takes a mapping"),
        (GOOD + "lora_names: {a: 3}", "rule 'a' points to 3"),
        (GOOD + "parameters: a", "parameters is 'a'; it takes a mapping"),
        (
            GOOD + "parameters: {a: {to: [b, c], shape: [2]}}",
            "rule 'a' changes the shape of several parameters; only a rule with one can",
        ),
        (GOOD + "parameters: {a: {to: [b, c], transposed: true}}", "changes the shape of several parameters"),
        (GOOD + "parameters: {a: {to: b, transposed: 3}}", "rule 'a' has transposed 3; choose true or false"),
        (
            GOOD + "parameters: {a: {to: b, swap_halves: true}}",
            "rule 'a' has the fields to, swap_halves; it takes to, and may have shape",
        ),
        (
            GOOD + "parameters: {a: {to: b, shape: 3}}",
            "rule 'a' has the shape 3; it takes a list of whole numbers above 0, and -1 for one",
        ),
        (GOOD + "parameters: {a: {to: b, shape: []}}", "has the shape \\[\\]"),
        (GOOD + "parameters: {a: {to: b, shape: }}", "has the shape None"),
        (GOOD + "parameters: {a: {to: b, shape: [-1, -1]}}", "has the shape \\[-1, -1\\]"),
        (GOOD + "parameters: {a: {to: b, shape: [0]}}", "has the shape \\[0\\]"),
        (GOOD + "parameters: {a: {to: b, shape: [true]}}", "has the shape \\[True\\]"),
        (
            "classes: [Model]\nnames: {a: {to: b, shape: [-1]}}",
            "has the fields to, shape; it takes to, and may have swap_halves or w",
        ),
        (
            "classes: [Model]\nnames: {a: {to: b, without: 3}}",
            "rule 'a' has without 3; it takes the pattern of a module name",
        ),
        ("classes: [Model]\nnames: {a: {to: b, without: a.b*}}", "has without 'a.b[*]'"),
        ("classes: [Model]\nnames: [a]", "names is \\['a'\\]; it takes a mapping"),
        ("classes: [Model]\nnames: {a: b, a: c}", "not readable YAML: the key 'a' is given twice"),
        ("classes: [Model]\nnames: {a: 3}", "rule 'a' points to 3; it takes a module name or a list of them"),
        ("classes: [Model]\nnames: {3: a}", "rule 3 points to 'a'; it takes a module name"),
        ("classes: [Model]\nnames: {a: []}", "rule 'a' points to \\[\\]; it takes a module name"),
        ("classes: [Model]\nnames: {a: b..c}", "rule 'a' points to 'b..c'; it takes a module name"),
        (
            "classes: [Model]\nnames: {a: {from: b}}",
            "rule 'a' has the fields from; it takes to, and may have swap_halves",
        ),
        (
            "classes: [Model]\nnames: {a: {to: b, swap: true}}",
            "rule 'a' has the fields to, swap; it takes to",
        ),
        (
            "classes: [Model]\nnames: {a: {to: b, swap_halves: first}}",
            "swap_halves 'first'; choose true, false or last",
        ),
        (
            "classes: [Model]\nnames: {a: {to: b, part: 1/3}, c: {to: b, part: 3/3}}",
            "b has rules for its parts 1/3, 3/3; all parts from 1/3 to 3/3 need one",
        ),
        (
            "classes: [Model]\nnames: {a: {to: b, part: 1/2}, c: {to: b, part: 2/3}}",
            "b has rules for its parts 1/2, 2/3; all parts from 1/3 to 3/3 need one",
        ),
        *[
            (
                f"classes: [Model]\nnames: {{a: {{to: b, part: {part}}}}}",
                "it takes a number and how many there are",
            )
            for part in ("1", "0/2", "3/2", "1/1", "half", "[1, 2]")
        ],
        (
            "classes: [Model]\nnames: {a: {to: [b, c], part: 1/2}}",
            "rule 'a' is a part of a module; such a rule has one module and no swap_halves",
        ),
        (
            "classes: [Model]\nnames: {a: {to: b, swap_halves: 1}}",
            "swap_halves 1; choose true, false or last",
        ),
        (
            "classes: [Model]\nnames: {a: {to: [b, c], swap_halves: true}}",
            "swaps the halves of several modules",
        ),
        (
            "classes: [Model]\nnames: {a: {to: b, swap_halves: last}}",
            "swaps halves in the last block but has no [*] for its number",
        ),
        (
            "classes: [Model]\nnames: {a.*: b}",
            "both sides need the same number of [*], and the same [*][*] [(]one at most[)]",
        ),
        ("classes: [Model]\nnames: {a.*: [b.*, b]}", "both sides need the same number"),
        ("classes: [Model]\nnames: {a.**: b.*}", "both sides need the same number"),
        ("classes: [Model]\nnames: {'**.a.**': '**.b.**'}", "both sides need the same number"),
        ("classes: [Model]\nnames: {a.q*: b.q*}", "both sides need the same number"),
    ],
)
def test_malformed_mapping_file_is_rejected(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)

    with pytest.raises(ConfigError, match=message):
        read_mapping_file(tmp_path / "x.yaml")


def test_mappings_of_a_class_are_loaded(tmp_path):
    text = (
        "classes: [One, Two]\nnames: {a.*: b.*, c: [d, e], f: {to: g, swap_halves: "
        "true}}\nlora_names: {j: {to: k, without: l.**}}\n"
    )
    text += (
        "parameters: {m.*: {to: n.*, shape: [1, -1]}}\nprefix: p.\ndrop: {q.**: r}\nneeds: [s]\nlacks: [t]"
    )
    (tmp_path / "x.yaml").write_text(text)
    (tmp_path / "y.yaml").write_text("classes: ['*']\nnames: {h: i}")
    own = (KeyMapping("a.*", ("b.*",)), KeyMapping("c", ("d", "e")), KeyMapping("f", ("g",), True))

    lora = KeyMapping("j", ("k",), without="l.**")

    assert load_lora_mappings("Two", tmp_path) == (*own, lora, KeyMapping("h", ("i",)))

    parameters = (KeyMapping("m.*", ("n.*",), shape=(1, -1), whole_key=True),)

    assert load_mappings("Two", tmp_path) == KeyMappingSet(
        own, (lora,), parameters, {"q.**": "r"}, "p.", ("s",), ("t",)
    )
    assert load_mappings("Three", tmp_path) == KeyMappingSet()
    assert load_lora_mappings("Three", tmp_path) == (KeyMapping("h", ("i",)),)


def test_class_in_two_files_is_rejected(tmp_path):
    for name in ("x", "y"):
        (tmp_path / f"{name}.yaml").write_text(GOOD)

    with pytest.raises(
        ConfigError, match=r"y\.yaml: class Model has rules in another file as well; name it in one file only"
    ):
        load_lora_mappings("Model", tmp_path)


def test_shipped_classes_exist():
    known = set(read_mapping_folder(MAPPING_FOLDER)) - {"*"}
    classes = known - set(load_encoders()) - set(OWN_DENOISERS)

    assert all(hasattr(diffusers, name) or hasattr(transformers, name) for name in classes)
    assert (
        set(list_supported_encoders()) <= known
    )  # the names of a text encoder's files are kept under its own name


@pytest.mark.parametrize(
    "pattern, name, found",
    [
        ("a.*.b", "a.12.b", (("12",), "")),
        ("a.*.b", "a.x.b", None),
        ("a.*.b", "a.1.b.c", None),
        ("a.**", "a.b.c", ((), "b.c")),
        ("a.**", "a", None),
        ("**.b.*", "x.y.b.3", (("3",), "x.y")),
        ("*.a.*", "1.a.2", (("1", "2"), "")),
        ("a.b", "a_b", None),
        ("a+", "aa", None),
        ("a.2-1.**", "a.2-1.b", ((), "b")),
    ],
    ids=name_parameter,
)
def test_pattern_matches_and_captures(pattern, name, found):
    match = match_pattern(pattern, name)

    assert match == found
    if match:
        assert fill_pattern(pattern, match) == name
