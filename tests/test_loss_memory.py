"""The memory of a loss over the window, predicted from a few rows, and the refusal of a loss that will not fit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftaccum import test_fine_tuning
from ftaccum.errors import SettingsError
from ftaccum.objective.loss_memory import LossMemory
from ftaccum.objective.window_loss import WindowLoss
from ftaccum.training import check_window_loss


def contrastive(embeddings_ND: Tensor, _: Any) -> Tensor:
    return nn.functional.cross_entropy(embeddings_ND @ embeddings_ND.T, torch.arange(len(embeddings_ND)))


def linear(embeddings_ND: Tensor, _: Any) -> Tensor:
    return (embeddings_ND.sum(-1) ** 2).mean()


def measured(loss_fn: Any) -> LossMemory | None:
    window_loss = WindowLoss(loss_fn, lambda outputs, _: outputs)
    batch = {"x": torch.zeros(4, 1)}
    return LossMemory.measure(window_loss, window_loss.read(torch.randn(4, 8), batch))


def test_a_contrastive_loss_grows_with_the_square_of_the_rows() -> None:
    memory = measured(contrastive)
    assert memory is not None
    # It keeps one matrix of N² numbers of 4 bytes, and its backward pass is counted as much again.
    assert memory.of(100_000) == pytest.approx(2 * 4 * 100_000**2, rel=0.01)


def test_a_loss_of_single_rows_grows_with_the_rows() -> None:
    memory = measured(linear)
    assert memory is not None
    assert memory.of(2_000_000) == pytest.approx(2 * memory.of(1_000_000), rel=0.01)


def test_a_loss_that_refuses_repeated_rows_has_no_prediction() -> None:
    def only_four(embeddings_ND: Tensor, _: Any) -> Tensor:
        assert len(embeddings_ND) == 4
        return embeddings_ND.sum()

    assert measured(only_four) is None


def test_an_update_whose_loss_will_not_fit_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_window_loss, "free_memory", lambda _: 2**20)
    model = nn.Linear(3, 4)
    rows = [{"input": torch.randn(3)} for _ in range(2000)]
    with pytest.raises(SettingsError, match=r"An update has 2,000 rows, for which `loss_fn` needs about 3[12].* MB of"):
        test_fine_tuning(
            model, train_data=rows, loss_fn=contrastive, loss_over="window", loss_inputs=lambda outputs, _: outputs,
            batch_size=500, effective_batch_size=4000, n_epochs=1, validation_split=0.0, verbosity="quiet",
        )  # fmt: skip
