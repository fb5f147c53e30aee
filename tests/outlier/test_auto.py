"""`outlier=auto`: the best candidate for each layer, the plainest of equals, within the allowed cost."""

from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from support.helpers import randn, shipped

from int8run.backends.reference import Reference
from int8run.errors import ConfigError
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import LayerStatistics
from int8run.outlier.convrot import ConvRot
from int8run.outlier.hadanorm import HadaNorm
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.outlier.smoothquant import SmoothQuant
from int8run.quant.weight import quantize_weight, sqnr_db


def composed(*overrides):
    """`outlier=auto` as the command line makes it: its candidates are options of their own group."""
    with initialize_config_module("int8run.conf", version_base="1.3"):
        return instantiate(compose("config", ["outlier=auto", *overrides]).outlier, _convert_="all")


AUTO = replace(composed(), max_cost=None)
SHIPPED = {method.name for method in shipped("outlier").values()}
THREE = AutoOutlier({"a": NoOutlier(), "b": ConvRot(), "c": QuaRot()}, max_cost=None, tolerance_db=0.5)


def statistics_of(x, weight):
    return LayerStatistics(x, x.flatten(0, -2).abs().amax(0).float(), weight.abs().amax(0).float())


def planted(channels, factor, seed=0, width=256, trial=0):
    """Inputs with `channels` outlier channels, `factor` times as large, and a weight that is small there."""
    x, weight = randn(4, 24, width, seed=seed + 1000 * trial), randn(48, width, seed=seed + 1)
    where = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:channels]
    x[..., where] *= factor
    weight[:, where] /= factor
    return x, weight


def heavy_tailed(*shape, seed):
    return randn(*shape, seed=seed) / randn(*shape, seed=seed + 1).abs().clamp(min=0.05)


X, W = (4, 24, 256), (48, 256)
# layers that different methods are best for: inputs, drawn as often as wanted, and the weight
LAYERS = {
    "plain": lambda trial=0: planted(0, 1, trial=trial),
    "a width for few methods": lambda trial=0: planted(3, 30, width=90, trial=trial),
    "one channel": lambda trial=0: planted(1, 50, seed=2, trial=trial),
    "many channels": lambda trial=0: planted(16, 10, seed=4, trial=trial),
    "outliers anywhere": lambda trial=0: (heavy_tailed(*X, seed=6 + 1000 * trial), randn(*W, seed=8)),
    "a mean that tokens share": lambda trial=0: (
        randn(*X, seed=9 + 1000 * trial) + 20 * randn(256, seed=10),
        randn(*W, seed=11),
    ),
    "a weight with large columns": lambda trial=0: (
        randn(*X, seed=12 + 1000 * trial),
        heavy_tailed(1, 256, seed=14) * randn(*W, seed=13),
    ),
    "the same outliers in both": lambda trial=0: (
        heavy_tailed(256, seed=16) * randn(*X, seed=15 + 1000 * trial),
        heavy_tailed(256, seed=16) * randn(*W, seed=17),
    ),
}


def never(transform):
    pytest.fail("its cost was asked for")


def able(weight, auto=AUTO):
    return {name: m for name, m in auto.candidates.items() if m.unsupported_reason(weight.shape[1]) is None}


def of_layers(method, weight, *pairs):
    """Output SQNR in dB of real layers: for each pair, fitted to the first inputs and given the second."""
    exact, made = [], []
    for seen, x in pairs:
        transform = method.fit(weight, statistics_of(seen, weight))
        layer = Int8Linear(
            QuantizedLayer(quantize_weight(transform.transform_weight(weight)), transform, None),
            Reference(),
            torch.float32,
        )
        exact.append(x @ weight.T)
        made.append(layer(x))
    return sqnr_db(torch.cat(exact), torch.cat(made))


# --- what ships


def test_every_method_is_a_candidate_and_the_plainest_is_the_first():
    assert {m.name for m in AUTO.candidates.values()} == SHIPPED
    assert next(iter(AUTO.candidates)) == "none"
    assert AUTO.candidates["convrot_16"] == ConvRot(16) and AUTO.candidates["smoothquant_75"] == SmoothQuant(
        0.75
    )
    assert len(set(AUTO.candidates.values())) == len(AUTO.candidates), "the same candidate twice"


def test_a_candidate_can_be_set_from_outside():
    auto = composed(
        "outlier.candidates.convrot_16.group_size=4", "~outlier.candidates.hadanorm", "outlier.max_cost=null"
    )
    assert (
        auto.candidates["convrot_16"] == ConvRot(4)
        and "hadanorm" not in auto.candidates
        and auto.max_cost is None
    )


# --- score


@pytest.mark.parametrize("layer", LAYERS)
def test_a_score_is_the_sqnr_of_real_layers_on_the_half_that_they_were_not_fitted_to(layer):
    x, weight = LAYERS[layer]()
    scores = AUTO.score_candidates(weight, statistics_of(x, weight), never)
    first, second = x[:2], x[2:]
    expected = {
        name: of_layers(method, weight, (first, second), (second, first))
        for name, method in able(weight).items()
    }

    assert list(scores) == list(expected) and scores == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_choice_is_close_to_the_best_of_all(layer):
    x, weight = LAYERS[layer]()
    chosen = AUTO.choose_methods(
        {layer: AUTO.score_candidates(weight, statistics_of(x, weight), never)}, [[layer]]
    )[layer]
    first, second = x[:2], x[2:]
    reached = {
        name: of_layers(method, weight, (first, second), (second, first))
        for name, method in able(weight).items()
    }

    assert reached[chosen] >= max(reached.values()) - 0.2

    # on other inputs of the same kind, which nothing was fitted to or judged by
    fresh, _ = LAYERS[layer](1)
    reached = {name: of_layers(method, weight, (x, fresh)) for name, method in able(weight).items()}

    assert reached[chosen] >= max(reached.values()) - 0.3


def test_the_layers_of_this_test_want_different_methods():
    found = {layer: made() for layer, made in LAYERS.items()}
    scores = {
        layer: AUTO.score_candidates(weight, statistics_of(x, weight), never)
        for layer, (x, weight) in found.items()
    }
    best = {max(score, key=score.__getitem__) for score in scores.values()}

    assert len(best) >= 3 and {AUTO.candidates[name].name for name in best} >= {"smoothquant", "hadanorm"}


@pytest.mark.parametrize("factor", [10, 50, 200])
@pytest.mark.parametrize("channels", [1, 4, 16])
def test_the_choice_beats_none_on_planted_outliers(channels, factor):
    x, weight = planted(channels, factor)
    chosen = AUTO.candidates[
        AUTO.choose_methods({"l": AUTO.score_candidates(weight, statistics_of(x, weight), never)}, [["l"]])[
            "l"
        ]
    ]
    # on inputs that the calibration never saw
    fresh, _ = planted(channels, factor, trial=1)

    assert of_layers(chosen, weight, (x, fresh)) > of_layers(NoOutlier(), weight, (x, fresh)) + 5


def test_a_method_that_fits_one_half_only_does_not_look_good():
    x, weight = randn(*X), randn(*W, seed=1)
    # a channel that is large in the second half, and says nothing of it in the first
    x[2:, :, 5] *= 100
    statistics = statistics_of(x, weight)
    scores = AUTO.score_candidates(weight, statistics, never)

    assert scores["smoothquant"] < of_layers(SmoothQuant(), weight, (x, x)) - 3

    # a single image has no other half
    alone = statistics_of(x[2:3], weight)

    assert AUTO.score_candidates(weight, alone, never) == pytest.approx(
        {name: of_layers(method, weight, (x[2:3], x[2:3])) for name, method in able(weight).items()}, abs=0.05
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32(dtype):
    x, weight = (t.to(dtype) for t in planted(2, 10))
    half = AUTO.score_candidates(weight, statistics_of(x, weight), never)
    assert half == pytest.approx(
        AUTO.score_candidates(weight.float(), statistics_of(x.float(), weight.float()), never), abs=1e-3
    )


def test_a_layer_that_nothing_goes_into_scores_the_same_with_every_method():
    weight, x = randn(8, 256), torch.zeros(2, 3, 256)
    scores = AUTO.score_candidates(weight, statistics_of(x, weight), never)

    assert set(scores.values()) == {float("inf")}
    assert AUTO.choose_methods({"l": scores}, [["l"]]) == {"l": "none"}


def test_scoring_twice_gives_the_same():
    x, weight = planted(4, 50)
    assert AUTO.score_candidates(weight, statistics_of(x, weight), never) == AUTO.score_candidates(
        weight.clone(), statistics_of(x.clone(), weight), never
    )


def test_scoring_changes_nothing():
    x, weight = planted(4, 50)
    before = x.clone(), weight.clone()
    AUTO.score_candidates(weight, statistics_of(x, weight), never)

    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])


# --- cost

COSTS = {"none": 1.0, "convrot": 1.05, "quarot": 1.11, "smoothquant": 1.1, "hadanorm": 1.6}


@pytest.mark.parametrize(
    ("max_cost", "names"),
    [
        (0, ["none"]),
        (0.05, ["none", "convrot"]),
        (0.1, ["none", "convrot", "smoothquant"]),
        (0.2, ["none", "convrot", "quarot", "smoothquant"]),
        (0.6, list(COSTS)),
        (10, list(COSTS)),
        (None, list(COSTS)),
    ],
)
def test_what_costs_too_much_is_no_candidate(max_cost, names):
    x, weight = planted(4, 50)
    auto = AutoOutlier(
        {m.name: m for m in (NoOutlier(), ConvRot(), QuaRot(), SmoothQuant(), HadaNorm())}, max_cost
    )
    scores = auto.score_candidates(
        weight, statistics_of(x, weight), lambda transform: COSTS[transform.method]
    )

    assert list(scores) == names

    every = replace(auto, max_cost=None).score_candidates(weight, statistics_of(x, weight), never)

    assert scores == {name: every[name] for name in names}


def test_costs_are_asked_of_the_fitted_transform_and_only_where_the_layer_can_be_taken():
    x, weight = planted(1, 10, width=64)
    asked = []

    def cost(transform):
        asked.append(
            (transform.method, transform.group_size, transform.factor is not None, transform.centered)
        )
        return 1.0

    replace(AUTO, max_cost=0.1).score_candidates(weight, statistics_of(x, weight), cost)
    # 128 does not divide the width: neither quarot nor hadanorm
    rotations = [("convrot", 16, False, False), ("convrot", 64, False, False), ("convrot", 64, False, False)]

    assert asked == [("none", 0, False, False), *rotations, *[("smoothquant", 0, True, False)] * 2]


def test_a_layer_without_an_affordable_candidate_gets_none():
    x, weight = planted(4, 50)
    scores = replace(AUTO, max_cost=0.1).score_candidates(
        weight, statistics_of(x, weight), lambda transform: 2.0
    )

    assert scores == {}
    assert AUTO.choose_methods({"l": scores, "m": {"quarot": 30.0}}, [["l"], ["m"]]) == {
        "l": None,
        "m": "quarot",
    }
    # in a group with such a layer, the others choose for themselves
    assert AUTO.choose_methods({"l": scores, "m": {"quarot": 30.0}}, [["l", "m"]]) == {
        "l": None,
        "m": "quarot",
    }


# --- choose


@pytest.mark.parametrize(
    ("scores", "name"),
    [
        ({"a": 30.0, "b": 30.5, "c": 30.5}, "a"),  # at the tolerance
        ({"a": 30.0, "b": 30.51, "c": 30.2}, "b"),
        ({"a": 30.0, "b": 30.3, "c": 30.7}, "b"),  # near to the best, not to the first
        ({"a": 30.0, "b": 35.0, "c": 36.0}, "c"),
        ({"c": 30.0, "b": 30.0}, "b"),  # the order of the candidates, not of the scores
        ({"c": 1.0}, "c"),
        ({"b": -3.0, "c": -5.0}, "b"),
        ({"a": float("inf"), "b": float("inf")}, "a"),
        ({"a": 90.0, "b": float("inf")}, "b"),
        ({"b": float("-inf")}, "b"),  # not `a`, which has no score at all
    ],
)
def test_of_equals_the_first_in_the_list_is_taken(scores, name):
    assert THREE.choose_methods({"l": scores}, [["l"]]) == {"l": name}


@pytest.mark.parametrize(("tolerance", "name"), [(0, "c"), (0.1, "b"), (2, "a")])
def test_the_tolerance_says_what_counts_as_equal(tolerance, name):
    auto = replace(THREE, tolerance_db=tolerance)
    assert auto.choose_methods({"l": {"a": 30.0, "b": 31.0, "c": 31.1}}, [["l"]]) == {"l": name}


def test_layers_with_the_same_input_share_what_is_good_enough_for_all():
    scores = {
        "q": {"a": 20.0, "b": 30.0, "c": 30.2},  # b alone, c by a little
        "k": {"a": 20.0, "b": 29.0, "c": 30.0},  # c only
        "v": {"a": 30.0, "b": 30.0, "c": 30.1},  # a alone, all are good enough
    }

    assert THREE.choose_methods(scores, [["q"], ["k"], ["v"]]) == {"q": "b", "k": "c", "v": "a"}
    assert THREE.choose_methods(scores, [["q", "k", "v"]]) == {"q": "c", "k": "c", "v": "c"}
    assert THREE.choose_methods(scores, [["q", "v"], ["k"]]) == {"q": "b", "v": "b", "k": "c"}


def test_layers_with_the_same_input_and_no_method_in_common_take_their_own():
    scores = {
        "q": {"a": 20.0, "b": 30.0, "c": 20.0},
        "k": {"a": 20.0, "b": 20.0, "c": 30.0},
        "v": {"a": 30.0, "b": 30.0, "c": 30.0},
    }
    assert THREE.choose_methods(scores, [["q", "k", "v"]]) == {"q": "b", "k": "c", "v": "a"}
    # of several of its own the first in the list
    assert THREE.choose_methods({"q": {"c": 30.0, "b": 30.0}, "k": {"a": 30.0}}, [["q", "k"]]) == {
        "q": "b",
        "k": "a",
    }


def test_sharing_never_costs_more_than_the_tolerance():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        values = 30 + torch.rand(4, 3, generator=generator)
        scores = {f"l{i}": dict(zip("abc", row, strict=True)) for i, row in enumerate(values.tolist())}
        chosen = THREE.choose_methods(scores, [["l0", "l1", "l2"], ["l3"]])
        assert list(chosen) == list(scores)
        for layer, name in chosen.items():
            assert scores[layer][name] >= max(scores[layer].values()) - THREE.tolerance_db


# --- its settings


def test_without_candidates_there_is_nothing_to_choose():
    with pytest.raises(ConfigError, match=r"^outlier\.candidates is empty; name at least one method$"):
        AutoOutlier({})


@pytest.mark.parametrize("value", [-0.1, 10.5, float("nan"), "0.1", True])
@pytest.mark.parametrize("key", ["max_cost", "tolerance_db"])
def test_ranges(key, value):
    with pytest.raises(
        ConfigError, match=rf"^outlier\.{key} is {value!r}; allowed is a number from 0 to 10$"
    ):
        replace(AUTO, **{key: value})


def test_a_tolerance_cannot_be_left_out():
    with pytest.raises(ConfigError, match=r"^outlier\.tolerance_db is None; allowed"):
        replace(AUTO, tolerance_db=None)


def test_layers_that_are_one_in_a_file_get_the_same():
    auto = AutoOutlier({"none": NoOutlier(), "convrot": ConvRot(16), "quarot": QuaRot(16)}, tolerance_db=0.1)
    scores = {
        "q": {"none": 40.0, "convrot": 45.0, "quarot": 44.0},
        "k": {"none": 40.0, "convrot": 41.0, "quarot": 46.0},
        "v": {"none": 50.0},
    }
    apart = [["q"], ["k"], ["v"]]

    assert auto.choose_methods(scores, apart) == {"q": "convrot", "k": "quarot", "v": "none"}
    # 90 dB together against 86
    assert auto.choose_methods(scores, apart, [["q", "k"]]) == {"q": "quarot", "k": "quarot", "v": "none"}
    assert auto.choose_methods(scores, apart, [["q", "k", "v"]]) == dict.fromkeys("qkv", "none")
    assert auto.choose_methods({"a": {"none": 1.0}, "b": {"convrot": 1.0}}, [["a"], ["b"]], [["a", "b"]]) == {
        "a": None,
        "b": None,
    }
