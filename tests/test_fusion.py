import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusion_layers import (
    SHAPES,
    dense,
    random_adapter,
    random_layer,
    random_member,
    random_second_moment,
    random_sketch,
)
from rite_diffusion.adapters import Adapter, load_adapter, save_adapter
from rite_diffusion.errors import FusionError
from rite_diffusion.fusion import FUSIONS, FusionSettings
from rite_diffusion.fusion.embeddings import merge_tokens
from rite_diffusion.fusion.layer import Factors, Layer, Part, output_energy, stack
from rite_diffusion.fusion.low_rank import (
    factorised,
    to_error,
    to_rank,
    to_rank_on_inputs,
    to_true_rank,
)
from rite_diffusion.fusion.members import Member
from rite_diffusion.fusion.merge import merge
from rite_diffusion.fusion.methods.custom_diffusion import distinct_directions
from rite_diffusion.fusion.methods.gradient import gradient
from rite_diffusion.fusion.methods.gram import gram, objective
from rite_diffusion.fusion.second_moments import (
    SecondMomentSum,
    full_second_moment,
    mean,
    truncated,
)
from rite_diffusion.fusion.settings import checked_settings

NAMES = list(SHAPES)
PLAIN = FusionSettings()


def settings_for(method: str) -> FusionSettings:
    return FusionSettings(rank=4) if method == "svd" else PLAIN


def test_fusing_one_adapter_at_weight_1_returns_it():
    adapter = random_adapter(0, rank=5, alpha=1.5)
    for method in FUSIONS:
        fused = merge([Member(adapter, 1.0, Path("a"))], method, PLAIN)
        for name, update in dense(fused).items():
            torch.testing.assert_close(update, dense(adapter)[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["weighted", "concat", "svd"])
@pytest.mark.parametrize(("ranks", "alphas"), [((3, 3), (3, 1)), ((1, 5, 2), (0.5, 8, 2))])
def test_exact_methods_equal_the_dense_sum(method, ranks, alphas):
    weights = [1.0, -0.4, 2.0]
    members = [
        random_member(seed, weights[seed], rank=rank, alpha=alpha, names=NAMES[seed:])
        for seed, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True))
    ]
    settings = FusionSettings(error=1e-12) if method == "svd" else PLAIN
    fused = merge(members, method, settings)
    assert [pair.name for pair in fused.pairs] == sorted(NAMES)
    for pair in fused.pairs:
        expected = sum(m.weight * dense(m.adapter).get(pair.name, 0) for m in members)
        torch.testing.assert_close(dense(fused)[pair.name], expected, rtol=1e-5, atol=1e-5)
        assert (pair.up.shape[0], *pair.down.shape[1:]) == SHAPES[pair.name]


def test_weighted_stores_shared_directions_once():
    one, other = random_adapter(0, rank=2), random_adapter(1, rank=2)
    shared = [
        replace(pair, up=first.up) for pair, first in zip(other.pairs, one.pairs, strict=True)
    ]
    members = [Member(one, 1.0, Path("a")), Member(replace(other, pairs=shared), 1.0, Path("b"))]
    assert merge(members, "concat", PLAIN).ranks() == [4]
    assert merge(members, "weighted", PLAIN).ranks() == [2]


@pytest.mark.parametrize("method", FUSIONS)
def test_fusing_does_not_depend_on_the_order_of_adapters(method, monkeypatch):
    # A difference in rounding would spread within the first steps of L-BFGS.
    monkeypatch.setattr(sys.modules[gradient.__module__], "iterations", lambda name: 8)
    members = [random_member(seed, rank=seed + 1) for seed in range(3)]
    results = [
        merge(order, method, settings_for(method)) for order in itertools.permutations(members)
    ]
    for result in results[1:]:
        assert result.info == results[0].info
        for pair, first in zip(result.pairs, results[0].pairs, strict=True):
            assert torch.equal(pair.up, first.up) and torch.equal(pair.down, first.down)


# --- low rank ----------------------------------------------------------------------------------


def random_factors(out=12, width=20, rank=6, seed=0) -> Factors:
    draws = torch.Generator().manual_seed(seed)
    up, down = (
        torch.randn(*shape, generator=draws).double() for shape in ((out, rank), (rank, width))
    )
    return Factors(up * torch.logspace(0, -2, rank), down)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (3, 20)])
def test_truncation_is_the_best_of_its_rank(shape):
    factors = random_factors(*shape)
    left, values, right = torch.linalg.svd(factors.dense(), full_matrices=False)
    for rank in (1, 2, 3):
        best = left[:, :rank] * values[:rank] @ right[:rank]
        torch.testing.assert_close(to_rank(factors, rank).dense(), best)
        torch.testing.assert_close(factorised(factors.dense(), rank).dense(), best)
        assert to_rank(factors, rank).rank == factorised(factors.dense(), rank).rank == rank


@pytest.mark.parametrize("error", [0.5, 0.1, 0.01])
def test_an_error_budget_takes_the_smallest_rank_that_keeps_it(error):
    factors = random_factors()
    whole = factors.dense().norm()
    cut = to_error(factors, error)
    assert (cut.dense() - factors.dense()).norm() <= error * whole
    if cut.rank > 1:
        smaller = to_rank(factors, cut.rank - 1)
        assert (smaller.dense() - factors.dense()).norm() > error * whole


def test_true_rank_drops_what_is_zero_to_rounding():
    factors = random_factors(rank=3)
    twice = Factors(torch.cat([factors.up, factors.up], 1), torch.cat([factors.down, factors.down]))
    cut = to_true_rank(twice)
    assert cut.rank == 3
    torch.testing.assert_close(cut.dense(), 2 * factors.dense())
    gone = Factors(torch.cat([factors.up, -factors.up], 1), twice.down)
    assert to_true_rank(gone).rank == 1 and gone.dense().abs().max() < 1e-12


def test_truncation_on_inputs_is_the_svd_of_the_weighted_update():
    factors, inputs = random_factors(), random_second_moment(20, 3, rows=40)
    values, vectors = inputs.values, inputs.basis
    root = (vectors.mT * values.sqrt()) @ vectors
    left, singular, right = torch.linalg.svd(factors.dense() @ root, full_matrices=False)
    best = left[:, :2] * singular[:2] @ right[:2] @ torch.linalg.inv(root)
    covariance = inputs.times(factors.down) @ factors.down.mT
    cut = to_rank_on_inputs(factors, covariance, 2)
    torch.testing.assert_close(cut.dense(), best, rtol=1e-6, atol=1e-8)
    plain = to_rank(factors, 2)
    off = [output_energy(stack([each, Factors(-factors.up, factors.down)]), inputs)
           for each in (cut, plain)]  # fmt: skip
    assert off[0] < off[1]


# --- gram and gradient -------------------------------------------------------------------------


def normal_equations(layer: Layer, settings: FusionSettings) -> torch.Tensor:
    """The dense minimiser of `gram`'s objective."""

    grams = [part.second_moment.matrix() for part in layer.parts]
    total = sum(grams) + settings.preserve * layer.base.matrix()
    ridge = settings.ridge * total.trace() / len(total)
    wanted = sum(p.factors.dense() @ g for p, g in zip(layer.parts, grams, strict=True))
    return torch.linalg.solve(total + ridge * torch.eye(len(total)).double(), wanted, left=False)


@pytest.mark.parametrize("width", [20, 400])  # by Cholesky of inputs x inputs, and by Woodbury
@pytest.mark.parametrize("preserve", [0.0, 0.7])
@pytest.mark.parametrize("full", [False, True])
def test_gram_equals_a_dense_solve_of_the_normal_equations(width, preserve, full):
    layer = random_layer(3, width=width)
    if full:
        parts = [
            replace(p, second_moment=full_second_moment(p.second_moment.matrix(), 1))
            for p in layer.parts
        ]
        layer = replace(layer, parts=parts)
    settings = FusionSettings(preserve=preserve, ridge=1e-4)
    fused = gram(layer, settings)
    torch.testing.assert_close(
        fused.dense(), normal_equations(layer, settings), rtol=1e-8, atol=1e-10
    )
    assert fused.rank == layer.rank
    ups = torch.cat([part.factors.up for part in layer.parts], 1)
    assert torch.equal(fused.up, ups)


def test_the_mean_of_second_moments_is_the_mean_of_their_matrices():
    grams = [random_second_moment(30, seed) for seed in range(3)]
    expected = torch.stack([gram.matrix() for gram in grams]).mean(0)
    mixed = [full_second_moment(grams[0].matrix(), 12), *grams[1:]]
    for each in (grams, mixed):
        torch.testing.assert_close(mean(each).matrix(), expected)
    assert mean([grams[0], truncated(grams[0], 40)]) is grams[0]


def test_gram_error_is_at_most_that_of_l_bfgs():
    for seed in range(3):
        layer = random_layer(3, seed=seed)
        exact = gram(layer, FusionSettings(preserve=0.0, ridge=1e-9))
        descended = gradient(layer, PLAIN)
        assert objective(layer, exact) <= objective(layer, descended) * (1 + 1e-9)
        assert objective(layer, descended) < objective(layer, Factors(exact.up, 0 * exact.down))


def test_concepts_with_inputs_of_their_own_do_not_disturb_each_other():
    parts = []
    for index in range(3):
        factors = random_factors(rank=2, seed=index)
        inputs = random_second_moment(20, index, rows=4)  # 4 directions each: 12 of 20
        parts.append(Part(str(index), factors, inputs))
    layer = Layer("x", parts, None)
    fused = gram(layer, FusionSettings(ridge=1e-9))
    for part in parts:
        seen = part.second_moment.root().mT
        torch.testing.assert_close(fused.dense() @ seen, part.factors.dense() @ seen,
                                   rtol=1e-3, atol=1e-4)  # fmt: skip


def test_preserving_reduces_the_update_on_other_inputs():
    layer = random_layer(2)
    quiet = [
        output_energy(gram(layer, FusionSettings(preserve=p)), layer.base) for p in (0, 1, 100)
    ]
    assert quiet[0] > quiet[1] > quiet[2]


def test_truncating_gram_weighs_errors_by_the_inputs():
    layer = random_layer(3)
    whole = gram(layer, PLAIN)
    cut = FUSIONS["gram"].cut(layer, whole, FusionSettings(rank=3))
    plain = to_rank(whole, 3)
    moments = SecondMomentSum([p.second_moment for p in layer.parts], [1.0] * 3, 1e-3)

    def loss(update):
        off = update.dense() - whole.dense()
        return (moments.times(off) * off).sum()

    assert cut.rank == 3 and loss(cut) < loss(plain)


def test_adding_and_removing_a_concept_equals_fusing_afresh():
    members = [random_member(seed) for seed in range(3)]
    both = merge(members[:2], "gram", PLAIN)
    merge(members, "gram", PLAIN)
    again = merge([members[1], members[0]], "gram", PLAIN)
    for pair, other in zip(both.pairs, again.pairs, strict=True):
        assert torch.equal(pair.up, other.up) and torch.equal(pair.down, other.down)


def test_custom_diffusion_keeps_each_concept_on_its_directions():
    layer = random_layer(2, width=40)
    fused = FUSIONS["custom_diffusion"].fuse_layer(layer, FusionSettings(constraints=4))
    ridge = PLAIN.ridge * layer.base.trace / 40
    for part in layer.parts:
        directions = layer.base.power(
            distinct_directions(part.second_moment, layer.base, ridge, 4), 0.5, ridge
        )
        torch.testing.assert_close(
            fused.dense() @ directions.mT, part.factors.dense() @ directions.mT
        )
    summed = FUSIONS["concat"].fuse_layer(layer, PLAIN)
    assert output_energy(fused, layer.base) < output_energy(summed, layer.base)


# --- members, files, tokens --------------------------------------------------------------------


def test_a_fused_file_makes_the_round_trip(tmp_path):
    members = [random_member(seed, 0.5) for seed in range(2)]
    fused = merge(members, "gram", PLAIN)
    save_adapter(tmp_path / "f.safetensors", fused)
    again = load_adapter(tmp_path / "f.safetensors")
    assert again.info == fused.info
    assert again.info.trigger == "<0>, <1>" and again.info.base_fingerprint == "f"
    for pair, other in zip(again.pairs, fused.pairs, strict=True):
        assert torch.equal(pair.up, other.up) and torch.equal(pair.down, other.down)
    nested = merge([Member(again, 2.0, Path("f")), random_member(2)], "concat", PLAIN)
    assert nested.info.trigger == "<0>, <1>, <2>"
    assert '"<1>", "class_noun": "toy", "method": "", "ranks": [3], "weight": 1.0' in (
        nested.info.concepts
    )


def other_base(adapter):
    return replace(adapter, info=replace(adapter.info, base_fingerprint="g"))


def other_shape(adapter):
    first, *rest = adapter.pairs
    return replace(adapter, pairs=[replace(first, down=torch.zeros(3, 7)), *rest])


def same_trigger(adapter):
    return replace(adapter, info=replace(adapter.info, trigger="<0>"))


def pair_of(first: Adapter, second: Adapter) -> list[Member]:
    return [Member(first, 1.0, Path("a")), Member(second, 1.0, Path("b"))]


BAD = {
    "no adapters": lambda: [],
    "same adapter as a": lambda: pair_of(random_adapter(0), random_adapter(0)),
    "weight 0: leave it out": lambda: [Member(random_adapter(0), 0.0, Path("a"))],
    "trained on tiny and a": lambda: pair_of(random_adapter(0), other_base(random_adapter(1))),
    "different base models": lambda: pair_of(random_adapter(0), other_shape(random_adapter(1))),
    "the trigger '<0>'": lambda: pair_of(random_adapter(0), same_trigger(random_adapter(1))),
}


@pytest.mark.parametrize("words", BAD)
def test_adapters_that_cannot_be_fused_are_refused(words):
    with pytest.raises(FusionError, match=words):
        merge(BAD[words](), "concat", PLAIN)


def test_unknown_methods_and_invalid_settings_of_fusing_are_refused():
    members = [random_member(0), random_member(1)]
    with pytest.raises(FusionError, match="no method 'grim'"):
        merge(members, "grim", PLAIN)
    with pytest.raises(FusionError, match="rank or an error"):
        merge(members, "svd", PLAIN)
    for bad in (
        {"rank": 0},
        {"rank": True},
        {"rank": 2.5},
        {"error": 0.0},
        {"ridg": 1.0},
        {"trim": 2.0},
        {"ridge": 0.0},
        {"preserve": -1.0},
    ):
        with pytest.raises(FusionError, match=next(iter(bad))):
            checked_settings(bad)
    bare = [Member(random_adapter(seed), 1.0, Path("a")) for seed in range(2)]
    with pytest.raises(FusionError, match="has no statistics for"):
        merge(bare, "gram", PLAIN)


def test_a_negative_weight_subtracts():
    members = [random_member(0), random_member(1, -1.0)]
    fused = dense(merge(members, "concat", PLAIN))
    for name in NAMES:
        expected = dense(members[0].adapter)[name] - dense(members[1].adapter)[name]
        torch.testing.assert_close(fused[name], expected, rtol=1e-5, atol=1e-5)


def test_fused_file_has_the_embeddings_of_all_adapters():
    one, two = {"<a>": torch.ones(2)}, {"<b>": torch.zeros(2), "<a>": torch.ones(2)}
    assert list(merge_tokens([two, one])) == ["<a>", "<b>"]
    with pytest.raises(FusionError, match="different embeddings of '<a>'"):
        merge_tokens([one, {"<a>": torch.zeros(2)}])


def test_a_layer_without_a_concepts_update_changes_little_on_its_inputs():
    name = NAMES[0]
    loud, silent = random_member(0, names=(name,)), random_member(1, names=NAMES[1:])
    fused = dense(merge([loud, silent], "gram", FusionSettings(preserve=0, ridge=1e-6)))[name]
    summed = dense(loud.adapter)[name]
    inputs = random_sketch(1).concept[name].root().mT
    assert (fused @ inputs).norm() < 0.7 * (summed @ inputs).norm()


def test_a_truncated_second_moment_keeps_the_trace():
    whole = random_second_moment(30, 5)
    for keep in (2, 6, 40):
        cut = truncated(whole, keep)
        assert len(cut.values) <= keep and cut.trace == pytest.approx(whole.trace)
    rows = torch.randn(3, 30).double()
    torch.testing.assert_close(truncated(whole, 40).times(rows), whole.times(rows))
