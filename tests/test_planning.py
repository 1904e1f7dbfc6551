"""The plan's laws, over every small case."""

import math

import pytest

from ftaccum import SettingsError, plan
from ftaccum.planning.base_plan import Progress
from ftaccum.planning.batch_size import BatchSizes, batch_sizes_of
from ftaccum.planning.plan import Plan
from ftaccum.planning.shuffle import hold_out
from ftaccum.planning.stream_plan import StreamPlan
from ftaccum.settings.recipe import Recipe

SIZES = [(n, b, k, p) for n in range(1, 15) for b in (1, 2, 3) for k in (1, 2, 3) for p in (1, 2, 3)]


def planned(n: int, b: int, k: int, p: int) -> Plan:
    return Plan(n, 2, BatchSizes(b, k, p, b * k * p))


@pytest.mark.parametrize("epoch", [0, 1])
def test_every_row_is_seen_once_an_epoch(epoch: int) -> None:
    for sizes in SIZES:
        a_plan = planned(*sizes)
        rows = [row for window in a_plan.windows(epoch) for row in window.rows]
        assert sorted(rows) == list(range(sizes[0]))


def test_windows_depend_only_on_the_effective_batch_size() -> None:
    cuts = [BatchSizes(12, 1, 1, 12), BatchSizes(4, 3, 1, 12), BatchSizes(2, 3, 2, 12), BatchSizes(5, 3, 1, 12)]
    windows = [list(Plan(31, 1, batch_sizes).windows(0)) for batch_sizes in cuts]
    assert all(other == windows[0] for other in windows[1:])


def test_windows_are_numbered_through_the_run_and_every_epoch_is_reshuffled() -> None:
    a_plan = planned(14, 2, 2, 1)
    both = [*a_plan.windows(0), *a_plan.windows(1)]
    assert [w.index for w in both] == list(range(a_plan.n_windows))
    assert [w.rows for w in a_plan.windows(0)] != [w.rows for w in a_plan.windows(1)]


def test_the_order_follows_the_seed_and_matches_recorded_values() -> None:
    first = next(Plan(10, 1, BatchSizes(5, 1, 1, 5), seed=42).windows(0)).rows
    assert first != next(Plan(10, 1, BatchSizes(5, 1, 1, 5), seed=43).windows(0)).rows
    # Recorded values: a resumed run must find its rows again, so a change here breaks every run in progress.
    assert first == (8, 7, 3, 9, 6)


@pytest.mark.parametrize(
    ("micro_batches", "k", "updates"), [(100, 4, 25), (10, 3, 4), (3, 8, 1), (8, 8, 1), (9, 8, 2), (1, 1, 1)]
)
def test_updates_per_epoch_are_the_windows(micro_batches: int, k: int, updates: int) -> None:
    a_plan = plan(micro_batches * 4, gradient_accumulation_steps=k, n_epochs=1, validation_split=0.0)
    assert a_plan.n_windows_of(0) == updates == len(list(a_plan.windows(0)))


def test_sizes_of_an_update_follow_from_rows_or_tokens() -> None:
    assert batch_sizes_of(Recipe(effective_batch_size=256), 4, 1) == BatchSizes(4, 64, 1, 256)
    assert batch_sizes_of(Recipe(effective_batch_size=30), 4, 2) == BatchSizes(4, 4, 2, 30)
    assert batch_sizes_of(Recipe(effective_batch_size=3), 4, 1) == BatchSizes(4, 1, 1, 3)
    # Typical numbers of pre-training: 4 × 2048 tokens per micro-batch, 524,288 per update.
    by_tokens = batch_sizes_of(Recipe(tokens_per_update=524_288), 4, 1, 2048)
    assert by_tokens == BatchSizes(4, 64, 1, 256)
    # both are allowed if the rows need exactly that many passes
    assert (
        batch_sizes_of(Recipe(gradient_accumulation_steps=8, effective_batch_size=30), 4, 1).effective_batch_size == 30
    )


def test_sizes_that_disagree_are_an_error_with_the_arithmetic() -> None:
    with pytest.raises(SettingsError, match=r"asks for 64 rows; .*4 rows × 3 steps × 2 processes = 24 rows"):
        batch_sizes_of(Recipe(gradient_accumulation_steps=3, effective_batch_size=64), 4, 2)
    with pytest.raises(SettingsError, match=r"asks for 8 rows; .*100 tokens / 10 per row = 10 rows"):
        batch_sizes_of(Recipe(effective_batch_size=8, tokens_per_update=100), 4, 1, 10)


def test_hold_out_takes_its_share_by_the_seed_and_leaves_the_rest() -> None:
    for n in range(2, 40):
        kept, held = hold_out(n, 0.1, seed=1)
        assert sorted(kept + held) == list(range(n))
        assert len(held) == max(1, round(n / 10))
    assert hold_out(50, 0.2, seed=1)[1] == hold_out(50, 0.2, seed=1)[1] != hold_out(50, 0.2, seed=2)[1]
    assert hold_out(5, 0.0, seed=1) == ((0, 1, 2, 3, 4), ())


def test_hold_out_that_leaves_nothing_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"`validation_split` is 0\.1, which leaves none of 1 rows to train on"):
        hold_out(1, 0.1, seed=1)


def test_warm_up_is_in_updates() -> None:
    a_plan = plan(100, batch_size=10, n_epochs=3, validation_split=0.0)
    assert a_plan.n_windows == 30
    assert a_plan.warmup_updates(0, 0.1) == math.ceil(3.0)
    assert a_plan.warmup_updates(7, 0.0) == 7


def test_a_plan_describes_itself() -> None:
    text = str(plan(1110, batch_size=4, gradient_accumulation_steps=8))
    assert "Training samples: 999\nBatch size: 4\nGradient accumulation steps: 8\n" in text
    assert "Effective batch size: 32\n" in text
    assert "Updates per epoch: 32 (31 full windows; the remainder of 7 rows (micro-batches: 2)" in text


def test_a_plan_whose_windows_differ_describes_itself() -> None:
    text = str(
        plan(
            103, batch_size=4, gradient_accumulation_steps=[(0, 2), (4, 8)], learning_rate_scaling="sqrt",
            remainder="carry", max_updates=7, validation_split=0.0,
        )
    )  # fmt: skip
    assert "Gradient accumulation steps: 2, after 4 updates 8\n" in text
    assert "Effective batch size: 8, after 4 updates 32\n" in text
    assert "Learning rate factor: 1, after 4 updates 2\n" in text
    assert "Updates per epoch: 6, 1 (the remainder of an epoch is carried into the next)\n" in text
    assert "Epochs: 3, 7 updates in all (`max_updates`), the last of them in epoch 2" in text
    whole = str(plan(10, batch_size=8, n_epochs=2, remainder="carry", validation_split=0.0))
    assert "Updates per epoch: 1, 2 (the remainder of an epoch is carried into the next; the last window has 4" in whole


def test_a_stream_resumed_with_fewer_epochs_continues_no_finished_epoch() -> None:
    def read(*_: int) -> int:
        raise AssertionError("nothing is read before training")

    def resumed(n_epochs: int, max_updates: int, done: Progress) -> int:
        return StreamPlan(n_epochs, BatchSizes(2, 1, 1, 2), max_updates, read).resume_after(done)[1]

    assert resumed(2, 9, Progress([2] * 6, last_epoch=2, n_rows=4, max_updates=9)) == 3
    assert resumed(3, 9, Progress([2] * 6, last_epoch=2, n_rows=4, max_updates=9)) == 3
    assert resumed(3, 9, Progress([2] * 6, last_epoch=2, n_rows=4, max_updates=6)) == 2, "`max_updates` had cut it"
