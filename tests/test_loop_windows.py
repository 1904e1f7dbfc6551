"""Between two windows, the training loop is in a consistent state."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftaccum import test_fine_tuning

ROWS, SIZE = 24, 4


class Failing(torch.utils.data.Dataset):
    """Rows that cannot be read after a number of updates."""

    def __init__(self, fails_after: int | None) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS, 3, generator=draw, dtype=torch.float64)
        self.fails_after, self.updates = fails_after, 0

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        if self.updates == self.fails_after:
            raise OSError("the disk is gone")
        return self.x[row], row % 2


def train(rows: Failing, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        found = torch.optim.SGD(groups, lr=0.1)
        found.register_step_post_hook(lambda *_: setattr(rows, "updates", rows.updates + 1))
        return found

    test_fine_tuning(
        model, train_data=rows, optimizer=optimizer, loss_fn=nn.CrossEntropyLoss(), learning_rate=0.1, n_epochs=1,
        batch_size=2, effective_batch_size=SIZE, validation_split=0.0, planner=False, progress=False, **arguments,
    )  # fmt: skip
    return model


def test_an_error_between_two_updates_loses_none_of_them(tmp_path: Path) -> None:
    failing = Failing(fails_after=2)
    with pytest.raises(Exception, match="the disk is gone"):
        train(failing, output_dir=str(tmp_path))
    assert failing.updates < ROWS // SIZE
    resumed = Failing(fails_after=None)
    found = train(resumed, output_dir=str(tmp_path), resume="auto")
    assert failing.updates + resumed.updates == ROWS // SIZE, "updates were lost or taken twice"
    wanted = train(Failing(fails_after=None))
    assert torch.equal(found.weight, wanted.weight)
