"""The estimate of the gradient noise scale from numbers alone, on simulated rows whose noise scale is known."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest

from ftaccum import SettingsError
from ftaccum.arguments import parse_settings
from ftaccum.insight.noise_scale import NoiseEstimate, NoiseScaleEstimator, summarize
from ftaccum.insight.noise_words import describe_noise
from ftaccum.planning.base_plan import Window
from ftaccum.planning.halves import Halves, MeasuredWindows, split_halves
from ftaccum.planning.micro_batches import BatchLimits, MicroBatchPlanner

ROWS = 64  # of a window
_DIMENSIONS, _LONGEST = 40, 512


@dataclass(frozen=True)
class Population:
    """Rows of unequal length, with the sum of the gradients of their items and the number of these."""

    lengths: np.ndarray
    items: np.ndarray
    sums: np.ndarray

    @classmethod
    def of(cls, signal: float, between: float, power: float, one_item: bool = False, n: int = 2000) -> "Population":
        """Return rows whose gradient depends on their length.

        Args:
            signal: the norm of the mean gradient.
            between: how much the gradient depends on the length of its row.
            power: the gradients of a row's items are independent (0.5) up to equal (1).
            one_item: whether the loss is a mean over rows, else it is a mean over tokens.
        """
        draw = np.random.default_rng(0)
        lengths = np.clip(np.exp(draw.normal(3.7, 0.8, n)), 4, _LONGEST).astype(int)
        items = np.ones(n) if one_item else lengths.astype(float)
        of_length = np.log(lengths) - (items * np.log(lengths)).sum() / items.sum()
        of_length /= math.sqrt((items * of_length**2).sum() / items.sum())
        size = (lengths / lengths.mean()) ** (power - 1)
        gradients = draw.normal(size=(n, _DIMENSIONS)) / math.sqrt(_DIMENSIONS) * size[:, None]
        gradients[:, 0] += signal + 0.3 * between * of_length
        gradients[:, 1] += between * of_length
        return cls(lengths, items, gradients * items[:, None])

    @property
    def mean(self) -> np.ndarray:
        mean: np.ndarray = self.sums.sum(0) / self.items.sum()
        return mean

    @property
    def noise_rows(self) -> float:
        """The noise scale: the mean square of what a row adds to the mean, relative to the mean's square."""
        noise = self.sums - self.items[:, None] * self.mean
        return float((noise**2).sum(1).mean() / self.items.mean() ** 2 / (self.mean**2).sum())

    def measured(self, deal: Callable[[np.ndarray, int], Halves], n: int, *, replace: bool = True) -> np.ndarray:
        """Return the agreement and the power of `n` windows."""
        draw, left, found = np.random.default_rng(1), np.zeros(0, dtype=int), []
        for index in range(n):
            if replace:
                rows = draw.integers(0, len(self.items), ROWS)
            else:
                left = left if len(left) >= ROWS else draw.permutation(len(self.items))
                rows, left = left[:ROWS], left[ROWS:]
            places = deal(self.lengths[rows], index)
            a, b = (self.sums[rows[list(half)]].sum(0) for half in places)
            n_a, n_b = (self.items[rows[list(half)]].sum() for half in places)
            found.append((a @ b / (n_a * n_b), (a + b) @ (a + b) / (n_a + n_b) ** 2))
        return np.array(found)


def at_random(lengths: np.ndarray, index: int) -> Halves:
    halves = MeasuredWindows(1, seed=3).halves(Window(index, 0, tuple(range(len(lengths)))))
    assert halves is not None
    return halves


def by_length(lengths: np.ndarray, _: int) -> Halves:
    short, long = np.split(np.argsort(lengths, kind="stable"), 2)
    return tuple(short.tolist()), tuple(long.tolist())


def noise_of(measured: np.ndarray) -> float:
    agreement, power = measured.mean(0)
    return math.inf if agreement <= 0 else float(ROWS * (power / agreement - 1))


def estimator_of(measured: np.ndarray) -> NoiseScaleEstimator:
    estimator = NoiseScaleEstimator()
    for agreement, power in measured:
        estimator.add(agreement, power, ROWS)
    return estimator


def entry(tokens: int, estimate: NoiseEstimate) -> dict[str, Any]:
    """Return an entry of the ledger, with an estimate."""
    return {"rows": ROWS, "update_rows": ROWS, "tokens": tokens, "training_rows": 400, **asdict(estimate)}


INDEPENDENT = Population.of(signal=0.15, between=0.3, power=0.5)  # tokens of a row
CORRELATED = Population.of(signal=0.2, between=0.4, power=1.0, one_item=True)


@pytest.mark.parametrize("rows", [INDEPENDENT, CORRELATED])
def test_random_halves_find_the_noise_scale_where_halves_by_length_do_not(rows: Population) -> None:
    assert noise_of(rows.measured(at_random, 2500)) == pytest.approx(rows.noise_rows, rel=0.1)
    assert abs(noise_of(rows.measured(by_length, 500)) / rows.noise_rows - 1) > 0.5


def test_the_running_estimate_is_near_the_noise_scale() -> None:
    measured = INDEPENDENT.measured(at_random, 300)
    estimate = estimator_of(measured).estimate(ROWS)
    assert estimate.noise_rows == pytest.approx(INDEPENDENT.noise_rows, rel=0.3)
    assert estimate.noise_rows_lower < INDEPENDENT.noise_rows < estimate.noise_rows_upper
    assert estimate.signal_share == pytest.approx(1 / (1 + INDEPENDENT.noise_rows / ROWS), rel=0.3)


def test_the_noise_scale_of_the_data_is_that_of_epochs_over_few_rows() -> None:
    rows = Population.of(signal=0.15, between=0.15, power=0.75, n=400)
    agreement, power = rows.measured(at_random, 3000, replace=False).mean(0)
    estimator = NoiseScaleEstimator()
    for _ in range(8):
        estimator.add(agreement, power, ROWS)
    estimate = estimator.estimate(ROWS, 400)
    assert estimate.noise_rows_of_data == pytest.approx(rows.noise_rows, rel=0.1)
    assert estimate.noise_rows == estimator.estimate(ROWS).noise_rows > 1.15 * rows.noise_rows
    assert estimate.noise_rows_of_data == pytest.approx(1 / (1 / estimate.noise_rows + 1 / 400), rel=1e-12)
    assert math.isnan(estimator.estimate(ROWS).noise_rows_of_data)


def test_nine_of_ten_intervals_contain_the_true_share() -> None:
    measured, draw = INDEPENDENT.measured(at_random, 2000), np.random.default_rng(0)
    truth = measured[:, 0].mean() / measured[:, 1].mean()
    hits = 0
    for _ in range(500):
        estimate = estimator_of(measured[draw.integers(0, len(measured), 30)]).estimate(ROWS)
        hits += estimate.signal_share_lower <= truth <= estimate.signal_share_upper
    assert 0.86 < hits / 500 < 0.95


def test_updates_of_another_size_count_by_the_noise_of_a_row() -> None:
    """With a noise scale of 100 rows, an update of R rows has a power of 1 + 100 / R."""
    estimator = NoiseScaleEstimator()
    for rows in 5 * (20, 50, 400):
        estimator.add(1.0, 1 + 100 / rows, rows)
    assert estimator.estimate(100).signal_share == pytest.approx(0.5)
    assert estimator.estimate(50).signal_share == pytest.approx(1 / 3)
    assert estimator.estimate(50).noise_rows == pytest.approx(100)


def test_small_updates_add_little_noise_to_the_estimate() -> None:
    """The agreement of two halves of R rows is 1, give or take 100 / R, for a noise scale of 100 rows."""
    draw, alone, mixed = np.random.default_rng(0), NoiseScaleEstimator(), NoiseScaleEstimator()
    for rows in 40 * (256, 16):
        measured = (1 + 100 / rows * draw.normal(), 1 + 100 / rows, rows)
        mixed.add(*measured)
        if rows == 256:
            alone.add(*measured)
    wide, narrow = (
        e.signal_share_upper - e.signal_share_lower for e in (each.estimate(256) for each in (mixed, alone))
    )
    assert mixed.estimate(256).signal_share == pytest.approx(256 / 356, rel=0.15)
    assert wide < 1.5 * narrow


def test_recent_updates_count_more() -> None:
    estimator = NoiseScaleEstimator()
    for agreement in (*300 * (0.9,), *200 * (0.1,)):
        estimator.add(agreement, 1.0, ROWS)
    assert estimator.estimate(ROWS).signal_share == pytest.approx(0.1 + 0.8 * math.exp(-4), abs=1e-3)


def test_nothing_is_known_after_few_updates_or_without_agreement() -> None:
    measured = INDEPENDENT.measured(at_random, 8)
    assert not math.isnan(estimator_of(measured).estimate(ROWS).signal_share_upper)
    opposite = np.array(20 * [(-0.5, 1.0), (-0.4, 1.0)])
    wide = np.array(4 * [(-2.0, 1.0), (2.5, 1.0)])  # from -1 to 1.5
    for unknown in (measured[:7], opposite, wide):
        assert all(math.isnan(number) for number in vars(estimator_of(unknown).estimate(ROWS, 400)).values())


@pytest.mark.parametrize("mean", [-0.05, 0.05])
def test_an_agreement_that_may_be_zero_leaves_only_a_lower_end(mean: float) -> None:
    measured = np.array(20 * [(mean - 0.3, 1.0), (mean + 0.3, 1.0)])
    estimate = estimator_of(measured).estimate(ROWS, 400)
    assert estimate.signal_share_lower == 0
    assert 0 < estimate.signal_share_upper < 0.25
    assert estimate.noise_rows_lower == pytest.approx(ROWS * (1 / estimate.signal_share_upper - 1))
    assert estimate.noise_rows_upper == math.inf
    assert math.isnan(estimate.noise_rows)
    assert math.isnan(estimate.noise_rows_of_data)
    assert math.isnan(estimate.signal_share) == (mean < 0)


def test_rows_that_agree_have_no_noise() -> None:
    estimate = estimator_of(np.array(10 * [(1.1, 1.0), (1.0, 1.0)])).estimate(ROWS, 400)
    assert (estimate.signal_share, estimate.signal_share_upper, estimate.noise_rows) == (1, 1, 0)
    assert (estimate.noise_rows_lower, estimate.noise_rows_of_data, estimate.noise_rows_upper) == (0, 0, 0)


def test_a_restored_estimate_continues() -> None:
    measured = INDEPENDENT.measured(at_random, 20)
    first, again = estimator_of(measured[:11]), NoiseScaleEstimator()
    again.load_state_dict(first.state_dict())
    for agreement, power in measured[11:]:
        again.add(agreement, power, ROWS)
    assert again.estimate(ROWS) == estimator_of(measured).estimate(ROWS)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.05, 0.1, "790 rows (90% interval: 580 to 1,200); an update has 64 rows, and updates are mostly noise: "),
        (0.05, 0.1, "twice the rows make one 1.8 times as useful or more"),
        (0.0, 0.1, "at least 580 rows; an update has 64 rows, and updates are mostly noise"),
        (
            0.3,
            0.6,
            "43 to 150); an update has 64 rows, and twice the rows make one 1.2 to 1.5 times as useful",
        ),
        (
            0.85,
            0.95,
            "3.4 to 11); an update has 64 rows, and rows mostly agree: half the rows would be ",
        ),
        (0.85, 0.95, "half the rows would be 87% as useful or more (docs"),
        (math.nan, math.nan, "not known yet (measured in 1 updates of 64 rows)"),
    ],
)
def test_an_estimate_is_described_in_words(low: float, high: float, words: str) -> None:
    def scale(share: float) -> float:
        return math.inf if share == 0 else ROWS * (1 / share - 1)

    shares = {"signal_share": (low + high) / 2, "signal_share_lower": low, "signal_share_upper": high}
    scales = {"noise_rows": scale((low + high) / 2), "noise_rows_lower": scale(high), "noise_rows_upper": scale(low)}
    summary = summarize([entry(0, NoiseEstimate(**shares, **scales))])
    assert summary is not None
    assert words in describe_noise(summary)


def test_a_summary_has_the_noise_scale_in_tokens() -> None:
    estimate = NoiseEstimate(0.5, 0.4, 0.6, 64.0, 43.0, 96.0, 55.0)
    summary: Any = summarize([entry(tokens, estimate) for tokens in (600, 680)])
    assert (summary["measured_updates"], summary["noise_tokens"], summary["training_rows"]) == (2, 640, 400)
    assert (summary["noise_rows"], summary["noise_rows_of_data"]) == (64, 55)
    assert summarize([]) is None


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("planned", [True, False])
def test_each_half_is_cut_separately_and_comes_before_the_next(processes: int, planned: bool) -> None:
    draw, rows = np.random.default_rng(0), tuple(range(100, 133))
    planner = MicroBatchPlanner(BatchLimits(4), num_processes=processes)
    planner = planner if planned else MicroBatchPlanner(BatchLimits(4), costs=None, num_processes=processes)
    halves = MeasuredWindows(2, seed=7).halves(Window(3, 0, rows))
    assert halves is not None
    cut = split_halves(planner, rows, draw.integers(3, 60, len(rows)).tolist(), halves)
    assert cut.n_first is not None
    assert len({len(share) for share in cut.by_process}) == 1
    for half, part in zip(halves, (slice(cut.n_first), slice(cut.n_first, None)), strict=True):
        pieces = [piece for share in cut.by_process for piece in share[part]]
        assert sorted(place for piece in pieces for place in piece.places) == list(half)
        assert all(piece.rows == tuple(rows[place] for place in piece.places) for piece in pieces)
        assert all(len(piece.rows) <= 4 for piece in pieces)


def test_halves_depend_on_the_seed_and_the_index_alone() -> None:
    def halves(seed: int, index: int, every: int = 5, n_rows: int = 33) -> Halves | None:
        return MeasuredWindows(every, seed).halves(Window(index, 0, tuple(range(n_rows))))

    one = halves(1, 4)
    assert one is not None
    assert [len(half) for half in one] == [16, 17]
    assert sorted((*one[0], *one[1])) == list(range(33))
    assert halves(1, 4) == one
    assert halves(2, 4) != one != halves(1, 9)
    assert [index for index in range(20) if halves(1, index) is not None] == [4, 9, 14, 19]
    assert halves(1, 4, n_rows=15) is None
    assert halves(1, 4, n_rows=16) is not None


@pytest.mark.parametrize("value", [True, 0, -3, 1.5, "often", None, "-2"])
def test_other_settings_are_refused(value: Any) -> None:
    with pytest.raises(SettingsError, match="`noise_scale` must be 'auto', False, or a positive number of updates"):
        parse_settings({"noise_scale": value})


@pytest.mark.parametrize(("given", "value"), [("auto", "auto"), ("no", False), (False, False), ("20", 20), (1, 1)])
def test_settings_are_read(given: Any, value: Any) -> None:
    read = parse_settings({"noise_scale": given})[1].noise_scale
    assert (read, type(read)) == (value, type(value))
