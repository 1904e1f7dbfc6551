"""The normalizer's arithmetic: contributions of passes and processes add up to the window's loss, in float64."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ftaccum.objective.normalizer import LossNormalizer, WeightedMeans, gathered, means_of_sums, widened

TERMS = ("loss", "balance")
# Counts of three micro-batches on each of two processes; no labels in one, and none of a term in another.
COUNTS = [
    [{"loss": 3, "balance": 8}, {"loss": 0, "balance": 5}, {"loss": 7, "balance": 1}],
    [{"loss": 2, "balance": 0}, {"loss": 11, "balance": 4}, {"loss": 1, "balance": 9}],
]
MEANS = [
    [{"loss": 0.5, "balance": 2.0}, {"loss": 9.0, "balance": -1.0}, {"loss": 0.25, "balance": 4.0}],
    [{"loss": 3.0, "balance": 5.0}, {"loss": 1.5, "balance": 0.5}, {"loss": -2.0, "balance": 1.0}],
]


def accelerator(num_processes: int = 1, others: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Return an accelerator that reduces a tensor to itself plus `others` of it, the sum of the other processes."""

    def reduce(tensor: Tensor, reduction: str = "mean") -> Tensor:
        assert num_processes > 1, "a single process reduced"
        assert reduction == "sum"
        assert others is not None
        return tensor + others(tensor)

    return SimpleNamespace(num_processes=num_processes, device=torch.device("cpu"), reduce=reduce)


def items(rank: int, term: str) -> int:
    return sum(counts[term] for counts in COUNTS[rank])


def of(rank: int, n: int) -> dict[str, Tensor]:
    return {term: torch.tensor(value, dtype=torch.float64) for term, value in MEANS[rank][n].items()}


def mean_over(ranks: list[int], term: str) -> float:
    pairs = [(MEANS[r][n][term], COUNTS[r][n][term]) for r in ranks for n in range(3)]
    return sum(mean * count for mean, count in pairs) / sum(count for _, count in pairs)


def test_contributions_of_one_process_add_up_to_the_mean_over_its_items() -> None:
    normalizer = LossNormalizer(COUNTS[0], TERMS, accelerator())
    assert normalizer.items_T.tolist() == [10, 14]
    assert normalizer.items_T.dtype == torch.float64
    total = sum(normalizer.contribution(of(0, n), COUNTS[0][n]) for n in range(3))
    assert float(total) == pytest.approx(mean_over([0], "loss") + mean_over([0], "balance"), rel=1e-15)


def test_contributions_of_two_processes_add_up_to_the_mean_over_the_items_of_both() -> None:
    total = 0.0
    for rank in (0, 1):
        other = torch.tensor([items(1 - rank, term) for term in TERMS], dtype=torch.float64)
        normalizer = LossNormalizer(COUNTS[rank], TERMS, accelerator(2, lambda _, other=other: other))
        assert normalizer.items_T.tolist() == [24, 27]
        total += sum(float(normalizer.contribution(of(rank, n), COUNTS[rank][n])) for n in range(3))
    assert total == pytest.approx(mean_over([0, 1], "loss") + mean_over([0, 1], "balance"), rel=1e-15)


@pytest.mark.parametrize("processes", [1, 3])
def test_the_backward_loss_undoes_the_division_by_passes_and_processes(processes: int) -> None:
    normalizer = LossNormalizer(COUNTS[0], TERMS, accelerator(processes, torch.zeros_like))
    contribution = torch.tensor(0.125, dtype=torch.float64)
    assert float(normalizer.for_backward(contribution)) == 0.125 * 3 * processes


def test_a_dummy_micro_batch_contributes_an_exact_zero_and_a_gradient_of_zeros() -> None:
    normalizer = LossNormalizer([{"loss": 0}], ["loss"], accelerator(2, lambda items: items + 4))
    mean = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    contribution = normalizer.contribution({"loss": mean}, {"loss": 0})
    contribution.backward()
    assert float(contribution.detach()) == 0.0
    assert mean.grad is not None
    assert float(mean.grad) == 0.0


def test_a_term_without_a_mean_is_left_out_of_a_contribution() -> None:
    normalizer = LossNormalizer([{"loss": 4, "balance": 0}], TERMS, accelerator())
    mean = torch.tensor(3.0, dtype=torch.float64)
    assert float(normalizer.contribution({"loss": mean}, {"loss": 4, "balance": 0})) == 3.0


def test_means_are_weighted_by_their_items() -> None:
    means = WeightedMeans(TERMS, torch.device("cpu"))
    for n in range(3):
        means.add(of(0, n), COUNTS[0][n])
    assert means.items_T.tolist() == [10, 14]
    assert means.sums_T.dtype == torch.float64
    assert means.read() == pytest.approx({term: mean_over([0], term) for term in TERMS}, rel=1e-15)
    assert means.total() == pytest.approx(mean_over([0], "loss") + mean_over([0], "balance"), rel=1e-15)


def test_a_mean_over_no_items_is_ignored() -> None:
    means = WeightedMeans(TERMS, torch.device("cpu"))
    assert math.isnan(means.total())
    means.add({"loss": torch.tensor(2.0)}, {"loss": 4, "balance": 0})
    assert means.total() == 2.0
    assert math.isnan(means.read()["balance"])
    means.add({"loss": torch.tensor(math.nan), "balance": torch.tensor(1.0)}, {"loss": 1, "balance": 1})
    assert math.isnan(means.total())


def test_merged_means_are_means_over_the_items_of_both() -> None:
    both = [WeightedMeans(TERMS, torch.device("cpu")) for _ in (0, 1)]
    for rank, means in enumerate(both):
        for n in range(3):
            means.add(of(rank, n), COUNTS[rank][n])
    both[0].merge(both[1])
    assert both[0].read() == pytest.approx({term: mean_over([0, 1], term) for term in TERMS}, rel=1e-15)
    assert both[1].items_T.tolist() == [14, 13]


@pytest.mark.parametrize("processes", [1, 2])
def test_gathered_means_are_those_of_all_processes(processes: int) -> None:
    many = [WeightedMeans(TERMS, torch.device("cpu")) for _ in (0, 1)]
    for rank, means in enumerate(many):
        for n in range(3):
            means.add(of(rank, n), COUNTS[rank][n])
    found = gathered(many, accelerator(processes, lambda pairs: 2 * pairs))
    factor = 3 if processes == 2 else 1
    assert [means.terms for means in found] == [TERMS, TERMS]
    assert [means.items_T.tolist() for means in found] == [[factor * 10, factor * 14], [factor * 14, factor * 13]]
    assert [means.read() for means in found] == [pytest.approx(means.read()) for means in many]
    assert found[0].sums_T.dtype == torch.float64
    assert gathered([], accelerator()) == []


def test_a_sum_over_items_becomes_their_mean_and_a_sum_over_none_stays() -> None:
    sums = {"loss": torch.tensor(6.0), "balance": torch.tensor(0.0)}
    assert {term: float(mean) for term, mean in means_of_sums(sums, {"loss": 4, "balance": 0}).items()} == {
        "loss": 1.5,
        "balance": 0.0,
    }


def test_narrow_means_are_widened_to_float32_and_wide_ones_stay() -> None:
    types = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    assert [widened(torch.tensor(1.0, dtype=dtype)).dtype for dtype in types] == [torch.float32] * 3 + [torch.float64]


def test_counts_beyond_float32_are_exact() -> None:
    normalizer = LossNormalizer([{"loss": 2**24}, {"loss": 1}], ["loss"], accelerator())
    assert normalizer.items_T.tolist() == [2**24 + 1]
    means = WeightedMeans(["loss"], torch.device("cpu"))
    means.add({"loss": torch.tensor(1.0)}, {"loss": 2**24})
    means.add({"loss": torch.tensor(1.0)}, {"loss": 1})
    assert means.items_T.tolist() == [2**24 + 1]


@pytest.mark.parametrize("term", [0, 1])
def test_each_term_has_its_own_items(term: int) -> None:
    normalizer = LossNormalizer(COUNTS[0], TERMS, accelerator())
    name = TERMS[term]
    mean = torch.tensor(1.0, dtype=torch.float64)
    assert float(normalizer.contribution({name: mean}, COUNTS[0][0])) == pytest.approx(
        [3 / 10, 8 / 14][term], rel=1e-15
    )


def test_a_device_without_float64_counts_in_float32() -> None:
    on_mps = SimpleNamespace(num_processes=1, device=SimpleNamespace(type="mps"))
    assert LossNormalizer(COUNTS[0], TERMS, on_mps).items_T.dtype == torch.float32  # type: ignore[arg-type]
