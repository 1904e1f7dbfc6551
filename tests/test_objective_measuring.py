"""Measuring how a loss is counted, on hand-written losses and tiny modules."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftaccum.objective import self_check
from ftaccum.objective.item_counts import ItemCounter
from ftaccum.objective.model_forward import ModelForward
from ftaccum.objective.packing_check import difference_of_packing
from ftaccum.objective.perturbation import float32_weights, has_narrow_weights, perturb_head, perturb_norms
from ftaccum.objective.probe import (
    EXPLAINED,
    EXPLAINED_IN_HALF,
    Explanation,
    cache_losses,
    choose,
    difference,
    explain,
    relative,
)
from ftaccum.objective.sample import Sample
from ftaccum.objective.self_check import measured_objective

Batch = tuple[Tensor, Tensor]
X = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0], [2.0, 2.0, 0.0], [1.0, 1.0, 4.0]])
Y = torch.tensor([0, 1, -100, 1])


def rows_apart(batch: Any, groups: Sequence[Sequence[int]]) -> list[Any]:
    return [(batch[0][list(group)], batch[1][list(group)]) for group in groups]


def sample(x: Tensor = X, y: Tensor = Y, **more: Any) -> Sample:
    parts: dict[str, Any] = {"cut": rows_apart, "collated": lambda groups: rows_apart((x, y), groups)} | more
    return Sample((x, y), (x, y), names=["a", "b", "c", "d"], **parts)


def measured(model: nn.Module, loss_fn: Any = None, of: Sample | None = None, **more: Any) -> Any:
    of = of or sample()
    forward = ModelForward(model, of.together, loss_fn or nn.CrossEntropyLoss())
    return measured_objective(model, forward, of, item_counter=ItemCounter(), **more)


def linear(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(dtype)


def test_relative_differences() -> None:
    assert [relative(3.0, 2.0), relative(-1.0, -2.0), relative(0.5, 0.0), relative(0.0, 0.0)] == [0.5, 0.5, 0.5, 0.0]
    assert [relative(math.nan, 1.0), relative(1.0, math.inf), relative(math.inf, 0.0)] == [math.inf] * 3


def test_a_difference_is_of_the_weighted_mean_and_leaves_out_empty_parts() -> None:
    means, parts = [{"a": 2.0}, {"a": math.nan}, {"a": 5.0}], [1, 0, 3]
    assert difference({"a": 4.0}, means, parts, "a", lambda part: part) == pytest.approx(0.0625)
    assert difference({"a": 4.25}, means, parts, "a", lambda part: part) == 0.0
    assert difference({"a": 4.25}, means, parts, "a", lambda _: 0) == math.inf


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("collated", [True, False])
def test_a_mean_is_explained_by_rows_separated_in_either_way(cut: bool, collated: bool) -> None:
    def losses(batch: Any) -> dict[str, float]:
        return {"a": sum(batch) / len(batch)}

    parts = [[1.0], [2.0], [4.0, 5.0]]
    if not (cut or collated):
        with pytest.raises(AssertionError, match="`cut` or `padded` is given"):
            explain(losses, [1.0, 2.0, 4.0, 5.0], None, [], {"a": len})
        return
    found = explain(
        losses, [1.0, 2.0, 4.0, 5.0], (lambda _: parts) if cut else None, parts if collated else [], {"a": len}
    )
    assert found == Explanation({"a": 0.0}, 0.0, False)
    assert not found.padding_sensitive


def test_padding_matters_if_only_rows_of_one_width_are_explained() -> None:
    def losses(batch: Any) -> dict[str, float]:
        return {"a": sum(batch) / len(batch), "b": 1.0}

    together, padded_apart = [1.0, 3.0], [[1.0], [3.5]]
    found = explain(losses, together, lambda rows: [[row] for row in rows], padded_apart, {"a": len, "b": len})
    assert found == Explanation({"a": 0.0, "b": 0.0}, 0.125, False)
    assert found.padding_sensitive
    # Neither way explains the loss. Training would compute it from separately padded rows.
    worse = explain(losses, together, lambda _: [[1.0], [5.0]], padded_apart, {"a": len, "b": len})
    assert worse == Explanation({"a": 0.125, "b": 0.0}, 0.0, False)
    assert explain(losses, together, lambda _: [[1.0], [3.01]], [], {"a": len}, 0.01).differences["a"] < 0.01


def test_a_sum_is_recognised_by_parts_that_add_up() -> None:
    def losses(batch: Any) -> dict[str, float]:
        return {"a": sum(batch), "b": 2 * sum(batch)}

    assert explain(losses, [1.0, 3.0], lambda rows: [[row] for row in rows], [], {"a": len}).adds_up
    assert not explain(losses, [1.0, 3.0], lambda _: [[1.0], [3.5]], [], {"a": len}).adds_up


def test_the_worst_of_two_explanations() -> None:
    one, two = Explanation({"a": 0.1, "b": 0.4}, 0.0, True), Explanation({"a": 0.3, "b": 0.2}, 0.5, False)
    assert one.worst(two) == Explanation({"a": 0.3, "b": 0.4}, 0.5, False)
    assert one.worst(one) == one


def test_a_repeated_batch_is_answered_from_the_cache() -> None:
    asked: list[int] = []

    def losses(batch: Any) -> dict[str, float]:
        asked.append(len(batch["x"]))
        return {"a": float(len(batch["x"]))}

    cached = cache_losses(losses)
    batches = [{"x": torch.zeros(2, 3)}, {"x": torch.zeros(3, 2)}, {"x": torch.ones(2, 3)}, {"x": torch.zeros(2, 3)}]
    assert [cached(batch)["a"] for batch in batches] == [2, 3, 2, 2]
    assert asked == [2, 3, 2]


def test_other_labels_distinguish_ways_that_agree() -> None:
    labels = torch.tensor([[-100, 2, 3], [-100, 4, 1]])

    def losses(batch: Any) -> dict[str, float]:  # a mean over the labels after the next-token shift
        counted = batch["labels"][:, 1:]
        counted = counted[counted != -100]
        return {"a": float(counted.double().mean())}

    def parts(batch: Any) -> list[Any]:
        return [{"labels": batch["labels"][n : n + 1]} for n in range(2)]

    together = {"labels": labels}
    ways = {"a": ItemCounter().applicable(together)}
    assert choose(losses, together, parts, ways, -100) == {"a": "labels after the next-token shift"}
    first = {"a": {name: ways["a"][name] for name in ("rows", "elements")}}
    assert choose(losses, together, parts, first, -100) == {"a": "rows"}, "the first of those that always agree"


def test_a_mean_over_labels_is_measured_exactly() -> None:
    objective = measured(linear())
    assert (objective.terms, objective.report.counted_by) == (("loss",), "labels (measured)")
    assert objective.count((X, Y)) == {"loss": 3}
    assert not objective.report.inexact()
    assert (objective.report.tolerance, objective.padding_sensitive, objective.shifts) == (EXPLAINED, False, False)
    wanted = float(nn.functional.cross_entropy(linear()(X), Y).detach())
    means, _ = objective.means(linear(), (X, Y), {"loss": 3}, ["loss"])
    assert means["loss"].item() == pytest.approx(wanted)


def test_a_sum_over_labels_becomes_their_mean() -> None:
    objective = measured(linear(), nn.CrossEntropyLoss(reduction="sum"), sums=True)
    assert objective.count((X, Y)) == {"loss": 3}
    assert not objective.report.measured
    wanted = float(nn.functional.cross_entropy(linear()(X), Y).detach())
    means, _ = objective.means(linear(), (X, Y), {"loss": 3}, ["loss"])
    assert means["loss"].item() == pytest.approx(wanted)
    assert objective.means(linear(), (X, Y), {"loss": 3}, [])[0] == {}


def test_a_count_given_by_the_user_is_used_and_checked() -> None:
    objective = measured(linear(), count_items=lambda batch: int((batch[1] >= 0).sum()))
    assert (objective.report.counted_by, objective.report.measured) == ("count_items", False)
    assert not objective.report.inexact()
    wrong = measured(linear(), count_items=lambda batch: len(batch[1]))
    (sentence,) = wrong.report.inexact()
    assert "'loss' over separate micro-batches, weighted by count_items, is up to" in sentence


@pytest.mark.parametrize("given", ["cut", "collated"])
def test_rows_separated_in_one_way_are_enough(given: str) -> None:
    other = {"cut": "collated", "collated": "cut"}[given]
    assert measured(linear(), of=sample(**{other: None})).report.counted_by == "labels (measured)"


def test_a_sample_without_cuts_is_collated() -> None:
    of = sample(cut=None)
    assert [len(part[1]) for part in of.separate((X, Y), ([0], [1, 2]))] == [1, 2]
    with pytest.raises(AssertionError, match="`cut` or `collated` is given"):
        sample(cut=None, collated=None).separate((X, Y), ([0],))


def test_a_model_that_cannot_be_widened_is_measured_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: nn.Module) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(self_check, "float32_weights", no_memory)
    x = X.to(torch.bfloat16)
    report = measured(linear(torch.bfloat16), of=sample(x)).report
    assert (report.tolerance, report.ways) == (EXPLAINED_IN_HALF, {"loss": "labels"})
    with pytest.raises(RuntimeError, match="no memory"):
        measured(linear())


def test_narrow_weights_are_widened_temporarily() -> None:
    model, wide = linear(torch.bfloat16), linear()
    before = model.weight.clone()
    assert (has_narrow_weights(model), has_narrow_weights(wide)) == (True, False)
    with float32_weights(wide, model) as widened:
        assert model.weight.dtype == torch.float32
        found = widened({"x": X.half(), "y": Y, "z": X.double()})
        assert [found[name].dtype for name in "xyz"] == [torch.float32, torch.int64, torch.float64]
    assert torch.equal(model.weight, before)
    assert model.weight.dtype == torch.bfloat16
    with float32_weights(wide) as widened:
        batch = {"x": X.half()}
        assert widened(batch) is batch


@pytest.mark.parametrize("setting", ["high", "highest"])
def test_reduced_precision_products_are_switched_off_temporarily(setting: str) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision(setting)
        torch.backends.cudnn.allow_tf32 = True
        with float32_weights(linear()):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (setting, True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_the_last_weight_is_perturbed_by_units_of_a_logit_and_restored() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300), nn.Linear(300, 400), nn.LayerNorm(400)).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        with perturb_head(model):
            moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
            assert [name for name, by in moved.items() if by.any()] == ["1.weight"]
            assert float(moved["1.weight"].std()) == pytest.approx(3 / math.sqrt(300), rel=0.02)
            first = moved["1.weight"][0, 0].item()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with perturb_head(model):
        assert (model[1].weight - before["1.weight"])[0, 0].item() == first, "the same noise each time"
    with perturb_head(nn.LayerNorm(3)):
        pass


def test_an_output_embedding_is_the_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.rest = nn.Linear(4, 5), nn.Linear(4, 4)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Tied()
    head, rest = model.head.weight.clone(), model.rest.weight.clone()
    with perturb_head(model):
        assert not torch.equal(model.head.weight, head)
        assert torch.equal(model.rest.weight, rest)
    assert torch.equal(model.head.weight, head)


def test_scales_and_shifts_of_norms_are_perturbed_and_restored() -> None:
    outer = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    before = [p.detach().clone() for p in outer.parameters()]
    with perturb_norms([outer[0], outer[1]]):
        moved = [not torch.equal(p, was) for p, was in zip(outer.parameters(), before, strict=True)]
        assert moved == [True, True, False, True], "matrices stay"
    assert all(torch.equal(p, was) for p, was in zip(outer.parameters(), before, strict=True))
    with perturb_norms([outer]):
        assert all(torch.equal(p, was) for p, was in zip(outer.parameters(), before, strict=True)), "not below"


@pytest.mark.parametrize(("mean", "off"), [(3.0, 0.0), (3.3, 0.1)])
def test_packed_rows_are_compared_by_their_sum_where_they_count_fewer_items(mean: float, off: float) -> None:
    def forward(_: nn.Module, batch: Any) -> Any:
        return {"loss": batch["mean"]}, None

    forward.modules = ()  # type: ignore[attr-defined]
    objective = SimpleNamespace(forward=forward, count=lambda batch: {"loss": batch["items"]})
    padded = {"mean": torch.tensor(2.0, dtype=torch.float64), "items": 3}
    packed = {"mean": torch.tensor(mean, dtype=torch.float64), "items": 2}
    arguments: Any = (linear(), objective, padded, packed)
    assert difference_of_packing(*arguments) == pytest.approx(off, abs=1e-12)
