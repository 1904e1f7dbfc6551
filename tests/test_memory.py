"""Running out of memory does not change updates, and `batch_size="auto"` finds the largest batch that fits."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftaccum import Accuracy, SettingsError, test_fine_tuning
from ftaccum.planning.micro_batches import BatchLimits
from ftaccum.runtime.memory import MemoryLimits, is_out_of_memory
from ftaccum.training.batch_size_finder import largest
from heads import HEADS
from invariance import difference, trained
from running_out import limited
from training_passes import in_self_check, is_training_pass

NAME = "sequence classification, BERT"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most", "where"),
    [
        (NAME, 1, "forward"),
        (NAME, 2, "backward"),
        (NAME, 5, "forward"),
        ("causal LM, Llama", 5, "backward"),
        ("question answering, BERT", 4, "forward"),  # padded to one length per update
    ],
)
def test_running_out_of_memory_changes_no_update(name: str, most: int, where: str) -> None:
    in_plenty = trained(name, 12)
    scarce = trained(name, 12, prepare=lambda model: limited(model, most, where))
    assert scarce[1].out_of_memory > 0 == in_plenty[1].out_of_memory
    assert difference(in_plenty, scarce) < 1e-9
    assert scarce[1].passes_per_update > in_plenty[1].passes_per_update


@pytest.mark.slow
def test_windows_prefetched_by_workers_follow_limits_learnt_later() -> None:
    """The workers cut these windows before memory ran out, so they would run out of memory again."""
    alone, with_workers = (
        trained(NAME, 12, planner=False, num_workers=n, prepare=lambda model: limited(model, 3)) for n in (0, 2)
    )
    assert with_workers[1].out_of_memory == alone[1].out_of_memory > 0
    assert difference(alone, with_workers) < 1e-9


def rows_of_equal_length(n: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 61, (6,), generator=draw).tolist(), "labels": i % 3} for i in range(n)]


class Dropping(nn.Module):
    """A model with dropout and batch norm, so a forward pass changes a generator and buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(61, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_BD = self.norm(self.embed(input_ids).mean(1))
        return self.head(nn.functional.dropout(hidden_BD, 0.3, self.training))


@pytest.mark.filterwarnings("ignore::ftaccum.InexactLossWarning")
def test_a_rerun_window_starts_with_its_original_generators_and_buffers() -> None:
    """Micro-batches of 4 rows, halved, draw the same dropout as a run with 2 rows: the weights agree bit for bit."""

    def weights(batch_size: int, prepare: Callable[[nn.Module], object]) -> dict[str, Tensor]:
        model = Dropping()
        prepare(model)
        test_fine_tuning(
            model, train_data=rows_of_equal_length(24), batch_size=batch_size, effective_batch_size=8, n_epochs=2,
            loss_fn=lambda logits, batch: nn.functional.cross_entropy(logits, batch["labels"]),
            learning_rate=1e-2, validation_split=0.0, progress=False, deterministic=True,
        )  # fmt: skip
        return model.state_dict()

    in_twos, halved = weights(2, lambda _: None), weights(4, lambda model: limited(model, 2, "backward"))
    assert in_twos.keys() == halved.keys()
    assert all(torch.equal(in_twos[name], halved[name]) for name in in_twos)


def test_running_out_of_memory_for_a_single_row_reports_the_row(capsys: pytest.CaptureFixture[str]) -> None:
    head = HEADS[NAME]
    model = head.model()
    limited(model, 0)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"a single row \(row \d+ of `train_data`\)\. Truncate the rows.*The device reported: CUDA out of memory",
    ):
        test_fine_tuning(model, train_data=head.rows(9), batch_size=4, progress=False)
    assert "Out of memory: update 1 is run again with the same rows, in" in capsys.readouterr().err


def test_other_errors_are_not_mistaken_for_out_of_memory() -> None:
    head = HEADS[NAME]
    model = head.model()
    model.register_forward_pre_hook(lambda *_: 1 / 0 if is_training_pass() else None)
    with pytest.raises(ZeroDivisionError):
        test_fine_tuning(model, train_data=head.rows(9), progress=False)


@pytest.mark.slow
def test_micro_batches_grow_back_in_later_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another program uses the memory during the first three windows."""
    monkeypatch.setattr("ftaccum.runtime.memory._CALM", 2)
    model = HEADS[NAME].model()
    limit = limited(model, 2)
    steps: list[int] = []

    class ItemCounter(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            steps.append(1)
            limit.most = 2 if len(steps) < 3 else 8
            super().step(closure)

    result = test_fine_tuning(
        model, train_data=HEADS[NAME].rows(80), batch_size=8, effective_batch_size=8, n_epochs=3, planner=False,
        validation_split=0.0, optimizer=lambda groups: ItemCounter(groups), progress=False, output_dir=str(tmp_path),
    )  # fmt: skip
    windows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    passes = [window["passes"] for window in windows if "window" in window]
    assert passes[0] > 1 == passes[-1]
    assert result.out_of_memory >= 2


def test_limits_halve_then_grow_and_wait_longer_after_each_failed_growth() -> None:
    memory_limits = MemoryLimits(BatchLimits(8))
    memory_limits.record_failure(160)
    assert memory_limits.current == BatchLimits(8, 80)
    memory_limits.record_failure(80)
    assert memory_limits.current == BatchLimits(8, 40)
    waited = []
    for _ in range(3):
        calm = 0
        while memory_limits.current == BatchLimits(8, 40):
            memory_limits.record_success()
            calm += 1
        assert memory_limits.current == BatchLimits(8, 80)
        memory_limits.record_failure(80)
        waited.append(calm)
    assert waited == [50, 100, 200]
    for _ in range(800):
        memory_limits.record_success()
    assert memory_limits.current == BatchLimits(8)
    assert memory_limits.failures == 5


@pytest.mark.parametrize("at_most", [1, 2, 7, 64, 100])
def test_the_largest_number_that_fits_is_found_in_few_tries(at_most: int) -> None:
    for most in range(at_most + 3):
        tried: list[int] = []

        def fits(n: int, most: int = most, tried: list[int] = tried) -> bool:
            tried.append(n)
            return n <= most

        assert largest(fits, at_most) == min(most, at_most)
        assert len(set(tried)) == len(tried) <= 2 * at_most.bit_length() + 1


@pytest.mark.parametrize("most", [1, 5, 99])
@pytest.mark.slow
def test_auto_takes_the_most_rows_that_fit_without_changing_the_update(most: int) -> None:
    given = trained(NAME, 12)
    found = trained(NAME, "auto", prepare=lambda model: limited(model, most))
    assert found[1].batch_size == min(most, 12)
    assert found[1].effective_batch_size == 12
    assert found[1].out_of_memory == 0
    assert difference(given, found) < 1e-9


def test_auto_changes_no_weights_gradients_buffers_or_generators() -> None:
    """Dropout is on, so random draws during the tries would change every loss."""
    losses = []
    for batch_size in (8, "auto"):
        torch.manual_seed(0)
        model = HEADS[NAME].model()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        result = test_fine_tuning(
            model, train_data=HEADS[NAME].rows(30), batch_size=batch_size, effective_batch_size=8, n_epochs=1,
            validation_split=0.0, learning_rate=1e-2, progress=False,
        )  # fmt: skip
        assert result.batch_size == 8
        losses.append(result.loss_history)
    assert losses[0] == losses[1]


def test_auto_tries_rows_without_labels_at_their_full_length() -> None:
    """The longest rows have no label that counts, so training would replace them with a dummy."""
    head = HEADS["causal LM, Llama"]
    rows = [{"input_ids": [5] * 40, "labels": [-100] * 40}] * 12 + head.rows(28)
    model = head.model()
    widths: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, __, given: widths.append(tuple(given["input_ids"].shape)) if is_training_pass() else None,
        with_kwargs=True,
    )
    test_fine_tuning(
        model, train_data=rows, batch_size="auto", effective_batch_size=8, n_epochs=1, validation_split=0.0,
        progress=False,
    )  # fmt: skip
    assert widths[:4] == [(1, 40), (2, 40), (4, 40), (8, 40)]


def test_auto_keeps_gradients_between_tries_and_clears_them_before_training() -> None:
    model = HEADS[NAME].model()
    found: list[bool] = []
    model.register_forward_pre_hook(
        lambda m, _: found.append(any(p.grad is not None for p in m.parameters())) if is_training_pass() else None
    )
    limited(model, 4)
    test_fine_tuning(
        model, train_data=HEADS[NAME].rows(12), batch_size="auto", effective_batch_size=4, n_epochs=1,
        validation_split=0.0, progress=False, audit=False,
    )  # fmt: skip
    # tries with 1, 2 and 4 rows, then three updates with one pass each
    assert found == [False, True, True, False, False, False]


@pytest.mark.slow
def test_evaluation_continues_with_half_batches_when_memory_runs_out() -> None:
    plain = trained(NAME, 12)
    refused: list[int] = []

    def refuse(model: nn.Module, _: Any, given: dict[str, Any]) -> None:
        if not model.training and len(given["input_ids"]) == 3 and not in_self_check():  # all validation rows
            refused.append(3)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    halved = trained(
        NAME, 12, prepare=lambda model: model.register_forward_pre_hook(refuse, with_kwargs=True),
        compute_metrics=Accuracy(),
    )  # fmt: skip
    assert refused == [3, 3, 3]
    assert difference(plain, halved) < 1e-9
    assert len(halved[1].metrics) == 2


def test_out_of_memory_errors_are_recognized() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_auto_is_an_error_where_no_row_fits() -> None:
    model = HEADS[NAME].model()
    limited(model, 0)
    with pytest.raises(SettingsError, match="`batch_size` is 'auto', but even the longest row alone"):
        test_fine_tuning(model, train_data=HEADS[NAME].rows(9), batch_size="auto", effective_batch_size=8)


def test_auto_on_a_host_stays_within_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row takes 20 MB of 250 MB, a fifth of which stays free: a host raises no error but kills the process."""
    taken = [0]
    model = HEADS[NAME].model()
    model.register_forward_pre_hook(
        lambda _, __, given: taken.append(given["input_ids"].shape[0] * 20_000_000), with_kwargs=True
    )
    monkeypatch.setattr("ftaccum.training.batch_size_finder.free_memory", lambda _: 250_000_000)
    monkeypatch.setattr("ftaccum.training.batch_size_finder._peak", lambda: 7_000_000 + taken[-1])
    monkeypatch.setattr("ftaccum.training.batch_size_finder._forget_peak", lambda: taken.append(0))
    result = test_fine_tuning(
        model, train_data=HEADS[NAME].rows(40), batch_size="auto", effective_batch_size=32, n_epochs=1, progress=False
    )
    assert result.batch_size == 9  # 10 rows would leave no memory for the optimizer


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_agree_when_one_runs_out_of_memory(two_processes: Callable[..., str], tmp_path: Path) -> None:
    torch.save(trained(NAME, 12), tmp_path / "alone.pt")
    printed = two_processes("out_of_memory_of_two.py", str(tmp_path / "alone.pt"))
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("FOUND "))[6:])
    assert found["out_of_memory"] > 0
    assert found["difference"] < 1e-9
    assert found["last"] > 0
    assert found["last_difference"] < 1e-9
    assert found["before the pass"] < 1e-9
    assert found["apart"] > 0
    assert found["apart_difference"] < 1e-9
    assert found["auto"] == 2
    assert found["auto_difference"] < 1e-9
    assert found["single row"] == 2


@pytest.mark.slow
@pytest.mark.processes
def test_running_out_of_memory_in_the_synced_pass_ends_all_processes_soon(two_processes: Callable[..., str]) -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match="Memory ran out in a pass in which gradients are synced"):
        two_processes("out_of_memory_of_two.py", "synced")
    assert time.monotonic() - started < 60
