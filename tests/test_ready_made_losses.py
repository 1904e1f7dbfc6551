"""`ftaccum.losses`: values and gradients equal those of plain loops in float64, and wrong inputs are refused."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftaccum import DataError, SettingsError
from ftaccum.checkpoint.compatibility import function_identity
from ftaccum.checkpoint.optimizer_state import load_optimizer_state, optimizer_state
from ftaccum.errors import CheckpointError
from ftaccum.losses import CoxLoss, InfoNCELoss, MultipleNegativesRankingLoss, PairwiseRankingLoss

ROWS = 7
COLUMNS = {
    "labels": torch.tensor([2, 0, 1, 2, 0, 3, 1]),
    "id": torch.tensor([5, 8, 5, 9, 8, 5, 4]),
    "time": torch.tensor([4.0, 2.0, 4.0, 7.0, 2.0, 2.0, 9.0]),  # ties with and without an event
    "event": torch.tensor([1, 1, 0, 1, 1, 0, 0]),
}
Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A loss and the same loss in plain loops.

    Attributes:
        reference: what the loss should be; a function of the inputs, the columns and log_scale.
        inputs: shapes of the inputs, without the rows.
    """

    loss: Callable[[], nn.Module]
    reference: Callable[[Any, Rows, Any], Tensor]
    inputs: Mapping[str, tuple[int, ...]]

    def draw(self, n_rows: int = ROWS, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {
            name: torch.randn(n_rows, *shape, dtype=dtype, requires_grad=True) for name, shape in self.inputs.items()
        }


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return sum_of(x * y) / (sum_of(x * x).sqrt() * sum_of(y * y).sqrt())


def dot(x: Tensor, y: Tensor) -> Tensor:
    return sum_of(x * y)


def sum_of(values: Any) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x in values:
        total = total + x
    return total


def negative_log_share(chosen: Tensor, others: list[Tensor]) -> Tensor:
    return -(chosen.exp() / (chosen.exp() + sum_of(x.exp() for x in others))).log()


def info_nce(first: str, second: str, group: str | None = None, limit: float = 100.0) -> Callable[..., Tensor]:
    def reference(inputs: Rows, batch: Rows, log_scale: Tensor) -> Tensor:
        scale = log_scale.exp() if log_scale.exp() < limit else limit
        terms = []
        for a, b in ((first, second), (second, first)):
            n = len(inputs[a])
            for i in range(n):
                others = [j for j in range(n) if j != i and (group is None or batch[group][i] != batch[group][j])]
                logits = [scale * cosine(inputs[a][i], inputs[b][j]) for j in others]
                terms.append(negative_log_share(scale * cosine(inputs[a][i], inputs[b][i]), logits))
        return sum_of(terms) / len(terms)

    return reference


def multiple_negatives(similarity: Callable[..., Tensor], scale: float, group: str | None = None) -> Any:
    def reference(inputs: Rows, batch: Rows, _: Any) -> Tensor:
        anchor, positive, terms = inputs["anchor"], inputs["positive"], []
        n, dim = anchor.shape
        hard = [x for negatives in inputs.get("negative", ()) for x in negatives.reshape(-1, dim)]
        for i in range(n):
            others = [positive[j] for j in range(n) if j != i and (not group or batch[group][i] != batch[group][j])]
            logits = [scale * similarity(anchor[i], x) for x in [*others, *hard]]
            terms.append(negative_log_share(scale * similarity(anchor[i], positive[i]), logits))
        return sum_of(terms) / n

    return reference


def pairwise(group: str | None = None) -> Callable[..., Tensor]:
    def reference(inputs: Rows, batch: Rows, _: Any) -> Tensor:
        s, terms = inputs["logits"].reshape(-1), []
        for i in range(len(s)):
            for j in range(len(s)):
                is_pair = group is None or batch[group][i] == batch[group][j]
                if is_pair and batch["labels"][i] > batch["labels"][j]:
                    terms.append((1 + (s[j] - s[i]).exp()).log())
        return sum_of(terms) / max(len(terms), 1)

    return reference


def cox(inputs: Rows, batch: Rows, _: Any) -> Tensor:
    s, time, terms = inputs["logits"].reshape(-1), batch["time"], []
    for i in range(len(s)):
        if batch["event"][i]:
            at_risk = [s[j].exp() for j in range(len(s)) if time[j] >= time[i]]
            terms.append(sum_of(at_risk).log() - s[i])
    return sum_of(terms) / max(len(terms), 1)


PAIR = {"anchor": (4,), "positive": (4,)}
CASES = {
    "InfoNCE": Case(InfoNCELoss, info_nce("anchor", "positive"), PAIR),
    "InfoNCE, other names": Case(
        lambda: InfoNCELoss(("image", "text"), temperature=0.3),
        info_nce("image", "text"),
        {"image": (4,), "text": (4,)},
    ),
    "InfoNCE, groups": Case(lambda: InfoNCELoss(group="id"), info_nce("anchor", "positive", "id"), PAIR),
    "multiple negatives": Case(MultipleNegativesRankingLoss, multiple_negatives(cosine, 20.0), PAIR),
    "multiple negatives, one hard": Case(
        MultipleNegativesRankingLoss, multiple_negatives(cosine, 20.0), {**PAIR, "negative": (4,)}
    ),
    "multiple negatives, three hard, groups": Case(
        lambda: MultipleNegativesRankingLoss(group="id"),
        multiple_negatives(cosine, 20.0, "id"),
        {**PAIR, "negative": (3, 4)},
    ),
    "multiple negatives, dot products": Case(
        lambda: MultipleNegativesRankingLoss(scale=0.5, similarity="dot"), multiple_negatives(dot, 0.5), PAIR
    ),
    "pairwise": Case(PairwiseRankingLoss, pairwise(), {"logits": ()}),
    "pairwise, groups": Case(lambda: PairwiseRankingLoss(group="id"), pairwise("id"), {"logits": (1,)}),
    "Cox": Case(CoxLoss, cox, {"logits": ()}),
    "Cox, a column of scores": Case(CoxLoss, cox, {"logits": (1,)}),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def gradients(loss: Tensor, inputs: Rows, module: nn.Module | None = None) -> list[Tensor]:
    of = [*inputs.values(), *(module.parameters() if module is not None else ())]
    return list(torch.autograd.grad(loss, of))


@each_case
def test_value_and_gradients_equal_those_of_plain_loops(case: Case) -> None:
    module, inputs = case.loss().double(), case.draw()
    loss = module(inputs, COLUMNS)
    expected = case.reference(inputs, COLUMNS, getattr(module, "log_scale", None))
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for found, right in zip(gradients(loss, inputs, module), gradients(expected, inputs, module), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@each_case
def test_the_order_of_rows_does_not_matter(case: Case) -> None:
    module, inputs = case.loss().double(), case.draw()
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    loss = module(inputs, COLUMNS)
    shuffled = module({k: x[order] for k, x in inputs.items()}, {k: x[order] for k, x in COLUMNS.items()})
    torch.testing.assert_close(shuffled, loss, rtol=1e-13, atol=0)
    for found, right in zip(gradients(shuffled, inputs), gradients(loss, inputs), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)


@each_case
def test_a_single_row_has_the_loss_of_plain_loops_and_finite_gradients(case: Case) -> None:
    module, inputs = case.loss().double(), case.draw(1)
    batch = {name: values[:1] for name, values in COLUMNS.items()}
    loss = module(inputs, batch)
    expected = case.reference(inputs, batch, getattr(module, "log_scale", None))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for gradient in gradients(loss, inputs, module):
        assert gradient.isfinite().all()
        assert "negative" in inputs or not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_case
def test_inputs_of_16_bits_are_computed_in_float32_under_autocast_too(case: Case, dtype: torch.dtype) -> None:
    module, inputs = case.loss(), case.draw(dtype=dtype)
    wide = module({name: x.detach().float() for name, x in inputs.items()}, COLUMNS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(inputs, COLUMNS)
    assert loss.dtype == wide.dtype == torch.float32
    torch.testing.assert_close(loss, wide, rtol=1e-6, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, inputs))


def test_a_loss_in_16_bits_keeps_its_scale_in_float32() -> None:
    loss = InfoNCELoss().bfloat16()
    inputs = CASES["InfoNCE"].draw()
    expected = info_nce("anchor", "positive")(inputs, COLUMNS, loss.log_scale.double())
    torch.testing.assert_close(loss(inputs, COLUMNS), expected, rtol=1e-6, atol=0)


def test_embeddings_of_unequal_types_meet_in_the_wider() -> None:
    inputs = {"anchor": torch.randn(3, 4).bfloat16(), "positive": torch.randn(3, 4, dtype=torch.float64)}
    assert MultipleNegativesRankingLoss()(inputs, {}).dtype == torch.float64


@pytest.mark.parametrize(("log_scale", "sign", "passes"), [(5.0, 1, True), (5.0, -1, False), (4.0, -1, True)])
def test_a_scale_beyond_its_bound_can_only_fall(log_scale: float, sign: int, passes: bool) -> None:
    """Pairs that match have a loss that falls with the scale; those that do not, one that rises with it."""
    loss = InfoNCELoss().double()
    nn.init.constant_(loss.log_scale, log_scale)
    vectors = torch.eye(3, dtype=torch.float64)[:, :2] + 0.5
    order = torch.arange(3) if sign < 0 else torch.tensor([1, 2, 0])
    inputs = {"anchor": vectors, "positive": vectors[order]}
    value = loss(inputs, {})
    (gradient,) = torch.autograd.grad(value, [loss.log_scale])
    at_bound = torch.tensor(min(log_scale, math.log(100)), dtype=torch.float64, requires_grad=True)
    expected = info_nce("anchor", "positive", limit=math.inf)(inputs, {}, at_bound)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    (right,) = torch.autograd.grad(expected, [at_bound])
    assert right * sign > 0
    torch.testing.assert_close(gradient, right if passes else torch.zeros_like(right), rtol=1e-9, atol=1e-14)


def test_a_fixed_temperature_is_not_trained() -> None:
    loss = InfoNCELoss(temperature=0.05, learn_temperature=False)
    assert [p.requires_grad for p in loss.parameters()] == [False]
    assert loss.log_scale.exp().item() == pytest.approx(20)


def test_rows_of_a_group_are_no_negatives_of_each_other() -> None:
    inputs = CASES["InfoNCE"].draw(3)
    one_group = {"id": torch.tensor([[7], [7], [7]])}
    for loss in (InfoNCELoss(group="id"), MultipleNegativesRankingLoss(group="id")):
        value = loss(inputs, one_group)
        assert value == 0
        assert not any(gradient.any() for gradient in gradients(value, inputs))


@pytest.mark.parametrize(
    ("loss", "batch"),
    [
        (PairwiseRankingLoss(), {"labels": torch.ones(3)}),
        (PairwiseRankingLoss(group="id"), {"labels": torch.arange(3), "id": torch.arange(3)}),
        (CoxLoss(), {"time": torch.arange(3), "event": torch.zeros(3, dtype=torch.bool)}),
    ],
    ids=["equal labels", "one row per group", "no event"],
)
def test_without_a_pair_or_an_event_the_loss_is_zero_and_so_are_its_gradients(loss: nn.Module, batch: Rows) -> None:
    scores = torch.randn(3, requires_grad=True)
    value = loss(scores, batch)
    value.backward()
    assert value == 0
    assert torch.equal(scores.grad, torch.zeros(3))


def test_pairs_far_apart_keep_their_small_losses() -> None:
    scores = torch.tensor([30.0, 0.0, 2000.0], dtype=torch.float64, requires_grad=True)
    value = PairwiseRankingLoss()(scores, {"labels": torch.tensor([1, 0, -1])})
    right = (math.log1p(math.exp(-30)) + 1970 + 2000) / 3
    assert value.item() == pytest.approx(right, rel=1e-15)
    near = PairwiseRankingLoss()(scores[:2], {"labels": torch.tensor([1, 0])})
    assert near.item() == pytest.approx(math.log1p(math.exp(-30)), rel=1e-12)
    wrong = PairwiseRankingLoss()(scores[:2] * 0.7, {"labels": torch.tensor([0, 1])})
    assert wrong.item() == pytest.approx(21 + math.log1p(math.exp(-21)), rel=1e-15)  # 3.6e-11 more than 21
    assert torch.autograd.grad(value, scores)[0].isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_cox_is_stable_for_large_scores(offset: float) -> None:
    """In float32, exp overflows at 89, and leaves nothing of the last rows if it is scaled to the first."""
    scores = torch.tensor([800.25, 800.0, -300.0, 0.5], dtype=torch.float32) + offset
    scores.requires_grad_()
    batch = {"time": torch.tensor([1, 2, 3, 4]), "event": torch.tensor([True, True, True, True])}
    value = CoxLoss()(scores, batch)
    share = 1 / (1 + math.exp(-0.25))  # of the first row in its risk set
    right = (-math.log(share) + 0 + 300.5 + 0) / 4
    assert value.item() == pytest.approx(right, rel=1e-6)
    (gradient,) = torch.autograd.grad(value, scores)
    right = torch.tensor([share - 1, 1 - share, -1.0, 1.0])
    torch.testing.assert_close(gradient * 4, right, rtol=0, atol=2e-4)  # float32 rounds 800 to 6e-5


def test_cox_tells_times_apart_that_float32_does_not() -> None:
    scores, event = torch.tensor([1.0, 0.0]), torch.tensor([0, 1])
    times = torch.tensor([1_700_000_000, 1_700_000_001])
    assert torch.equal(*times.float())
    assert CoxLoss()(scores, {"time": times, "event": event}) == 0
    assert CoxLoss()(scores, {"time": times.flip(0), "event": event}) > 1


def test_cox_with_a_tied_event_equals_breslows_formula_by_hand() -> None:
    scores = torch.tensor([0.0, math.log(2), math.log(3)], dtype=torch.float64)
    value = CoxLoss()(scores, {"time": torch.tensor([1, 1, 2]), "event": torch.tensor([1, 1, 1])})
    assert value.item() == pytest.approx((2 * math.log(6) - math.log(2)) / 3, rel=1e-14)


def test_columns_and_scores_may_have_other_names() -> None:
    scores = torch.randn(4, dtype=torch.float64)
    batch = {"days": torch.tensor([1, 3, 2, 3]), "died": torch.tensor([1, 0, 1, 1])}
    renamed = {"time": batch["days"], "event": batch["died"]}
    assert CoxLoss("days", "died", scores="risk")({"risk": scores}, batch) == CoxLoss()(scores, renamed)
    ranked = PairwiseRankingLoss("days", scores="risk")({"risk": scores}, batch)
    assert ranked == PairwiseRankingLoss()(scores, {"labels": batch["days"]})


x = torch.randn(3, 4)
WRONG = {
    "a tensor": (
        InfoNCELoss(),
        x,
        {},
        r"a dict with 'anchor' and 'positive', but `inputs` is float32 of shape \(3, 4\)",
    ),
    "a missing embedding": (InfoNCELoss(), {"anchor": x}, {}, r"reads 'positive', but the inputs are \['anchor'\]"),
    "unequal rows": (
        InfoNCELoss(),
        {"anchor": x, "positive": x[1:]},
        {},
        r"shape \(3, 4\), as 'anchor', but is .*\(2, 4",
    ),
    "unequal sizes": (InfoNCELoss(), {"anchor": x, "positive": x[:, 1:]}, {}, r"'positive' must .* is .*\(3, 3\)"),
    "three dimensions": (InfoNCELoss(), {"anchor": x[None], "positive": x[None]}, {}, r"shape \(rows, dim\), but is"),
    "one dimension": (InfoNCELoss(), {"anchor": x[0], "positive": x[0]}, {}, r"'anchor' must .* is .*\(4,\)"),
    "no rows": (InfoNCELoss(), {"anchor": x[:0], "positive": x[:0]}, {}, r"'anchor' must .* is .*\(0, 4\)"),
    "integers": (InfoNCELoss(), {"anchor": x.long(), "positive": x}, {}, "'anchor' must be a floating-point"),
    "a list": (InfoNCELoss(), {"anchor": [1.0], "positive": x}, {}, "but is a list"),
    "wrong negatives": (
        MultipleNegativesRankingLoss(),
        {"anchor": x, "positive": x, "negative": x[:2, None]},
        {},
        r"'negative' must be .* \(3, 4\), as 'anchor' or \(rows, n, dim\), but is float32 of shape \(2, 1, 4\)",
    ),
    "a missing group": (InfoNCELoss(group="id"), {"anchor": x, "positive": x}, {"a": x}, r"'id'.* has only \['a'\]"),
    "a fractional group": (
        InfoNCELoss(group="id"),
        {"anchor": x, "positive": x},
        {"id": torch.ones(3)},
        r"'id' \(`group`\) must have integers, but is float32 .*Number the groups",
    ),
    "two scores": (CoxLoss(), torch.randn(3, 2), {}, r"scores must .* but are float32 of shape \(3, 2\).*num_labels=1"),
    "a score": (CoxLoss(), torch.tensor(1.0), {}, r"scores must .* of shape \(\)"),
    "no scores": (CoxLoss(), torch.ones(0), {}, r"scores must .* of shape \(0,\)"),
    "integer scores": (CoxLoss(), torch.arange(3), {}, r"scores must .* are int64"),
    "missing scores": (CoxLoss(), {"score": x[:, 0]}, {}, r"reads 'logits', but the inputs are \['score'\]"),
    "missing labels": (PairwiseRankingLoss(), x[:, 0], {}, r"reads the column 'labels'.*name another with `labels`"),
    "labels alone": (PairwiseRankingLoss(), x[:, 0], x[:, 0], r"'labels' of a dict, but the batch is float32 of shape"),
    "wide labels": (
        PairwiseRankingLoss(),
        x[:, 0],
        {"labels": torch.ones(3, 2)},
        r"'labels' \(`labels`\) must be a tensor of shape \(3,\), but is float32 of shape \(3, 2\)",
    ),
    "text": (PairwiseRankingLoss(), x[:, 0], {"labels": ["a"] * 3}, "must be a tensor .* but is a list"),
    "NaN labels": (PairwiseRankingLoss(), x[:, 0], {"labels": torch.tensor([0, 1, math.nan])}, "'labels' .* has NaN"),
    "NaN times": (
        CoxLoss(),
        x[:, 0],
        {"time": torch.tensor([0, 1, math.nan]), "event": torch.ones(3)},
        r"'time' \(`time`\) must have no NaN",
    ),
    "other events": (
        CoxLoss(),
        x[:, 0],
        {"time": torch.ones(3), "event": torch.tensor([0, 1, 2])},
        r"'event' \(`event`\) only 0 and 1",
    ),
    "too few events": (CoxLoss(), x[:, 0], {"time": torch.ones(3), "event": torch.ones(2)}, r"'event' .*\(2,\)"),
}


@pytest.mark.parametrize(("loss", "inputs", "batch", "message"), WRONG.values(), ids=WRONG)
def test_wrong_inputs_are_refused(loss: nn.Module, inputs: Any, batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        loss(inputs, batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InfoNCELoss(temperature=0), "`temperature` must be a positive number, but is 0 instead"),
        (lambda: InfoNCELoss(max_scale=math.inf), "`max_scale` must be a positive number, but is inf instead"),
        (lambda: InfoNCELoss(("a", "a")), r"`names` must be two different names .* is \('a', 'a'\)"),
        (lambda: InfoNCELoss("ab"), "`names` must be two different names .* is 'ab'"),
        (lambda: MultipleNegativesRankingLoss(scale="20"), "`scale` must be a positive number, but is '20'"),
        (
            lambda: MultipleNegativesRankingLoss(similarity="cos"),
            "`similarity` must be 'cosine' or 'dot', but is 'cos'",
        ),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make()


def test_losses_show_their_settings() -> None:
    shown = "InfoNCELoss(names=('anchor', 'positive'), temperature=0.07, max_scale=100.0, group='id')"
    assert repr(InfoNCELoss(group="id")) == shown
    shown = "MultipleNegativesRankingLoss(scale=20.0, similarity='cosine', group=None)"
    assert repr(MultipleNegativesRankingLoss()) == shown
    assert repr(PairwiseRankingLoss()) == "PairwiseRankingLoss(labels='labels', group=None, scores='logits')"
    assert repr(CoxLoss()) == "CoxLoss(time='time', event='event', scores='logits')"
    trained = InfoNCELoss()
    nn.init.constant_(trained.log_scale, 10.0)
    assert repr(trained) == repr(InfoNCELoss()), "a resumed run compares the settings"


def test_a_run_does_not_resume_with_other_options_of_its_loss() -> None:
    one, other = MultipleNegativesRankingLoss(scale=20), MultipleNegativesRankingLoss(scale=2)
    assert function_identity(one) == function_identity(MultipleNegativesRankingLoss())
    assert function_identity(one) != function_identity(other)


def test_a_loss_with_other_parameters_cannot_take_the_optimizer_of_a_checkpoint() -> None:
    one, two = torch.optim.AdamW(InfoNCELoss().parameters()), torch.optim.AdamW([torch.zeros(1), torch.ones(1)])
    with pytest.raises(CheckpointError, match=r"groups of \[2\] parameters, but had groups of \[1\]"):
        load_optimizer_state(two, optimizer_state(one), own_numbers=False, names={}, restore=lambda value, _: value)
