"""Losses over the window with unusual inputs, parameters, state and models: each is exact, or named before training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from windowed import GROUP, ROWS, Embedder, trained

Loss = Callable[[Any, Any], Tensor]


class Recording(torch.optim.SGD):
    """An optimizer that records each update's gradients and changes no weight."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=1.0)
        self.gradients: list[dict[Tensor, Tensor]] = []

    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradients.append({p: p.grad.clone() for p in parameters if p.grad is not None})


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    padded = {
        name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in rows])
        for name in ("input_ids", "attention_mask")
    }
    return padded | {"labels": torch.tensor([row["labels"] for row in rows])}


def difference(model: nn.Module, loss: Loss, loss_inputs: Loss | None = None, **arguments: Any) -> float:
    """Return how far the gradient of the first update is from that of one batch of its rows in plain PyTorch."""
    made: list[Recording] = []

    def optimizer(groups: Any) -> Recording:
        made.append(Recording(groups))
        return made[0]

    defaults = {"train_data": ROWS[:GROUP], "val_data": None, "validation_split": 0.0, "gradient_clip_norm": None}
    trained(model, loss_fn=loss, loss_inputs=loss_inputs, optimizer=optimizer, **(defaults | arguments))
    found = made[0].gradients[0]
    model.train()
    order = torch.randperm(GROUP)  # not a loss that reads positions
    batch = collate([ROWS[n] for n in order])
    outputs = model(batch["input_ids"], batch["attention_mask"])
    modules = [model, *([loss] if isinstance(loss, nn.Module) else [])]
    parameters = list(dict.fromkeys(p for module in modules for p in module.parameters()))
    for p in parameters:
        p.grad = None
    loss(outputs if loss_inputs is None else loss_inputs(outputs, batch), batch).backward()
    return max(
        ((found.get(p, torch.zeros_like(p)) - p.grad).norm() / p.grad.norm()).item()
        for p in parameters
        if p.grad is not None and p.grad.any()
    )


def compared(embeddings_BD: Tensor, batch: Any) -> Tensor:
    """Return a loss that compares all rows with each other, in any order."""
    scores_BB = (embeddings_BD @ embeddings_BD.T).log_softmax(-1)
    return -(scores_BB.diagonal() * batch["labels"].double()).mean()


class Scaled(nn.Module):
    """A loss with a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, embeddings_BD: Tensor, batch: Any) -> Tensor:
        return compared(embeddings_BD * self.scale, batch)


class Sharing(Scaled):
    """A loss that holds the model, and reads its embeddings."""

    def __init__(self, model: Embedder) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeddings_BD: Tensor, batch: Any) -> Tensor:
        return super().forward(embeddings_BD * self.model.embedding.weight.sum(0), batch)


def test_a_parameter_that_the_loss_shares_with_the_model_gets_its_gradient_once() -> None:
    model = Embedder()
    assert difference(model, Sharing(model)) < 1e-12


def test_a_hook_on_a_parameter_of_the_loss_runs_once_per_update() -> None:
    loss = Scaled()
    loss.scale.register_hook(lambda gradient: 3 * gradient)
    assert difference(Embedder(), loss) < 1e-12


def test_a_loss_may_write_to_what_it_gets() -> None:
    def writing(embeddings_BD: Tensor, batch: Any) -> Tensor:
        embeddings_BD *= 2
        batch["labels"] -= 1
        return compared(embeddings_BD, batch)

    assert difference(Embedder(), writing) < 1e-12


class Centring(nn.Module):
    """A loss that centres what it reads by a moving average, which each call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3, dtype=torch.float64))

    def forward(self, embeddings_BD: Tensor, batch: Any) -> Tensor:
        loss = compared(embeddings_BD - self.centre, batch)
        self.centre = 0.5 * self.centre + embeddings_BD.detach().mean(0)
        return loss


def test_the_loss_moves_its_buffers_once_per_update_however_it_is_cut() -> None:
    centres = []
    for batch_size in (1, 2, GROUP):
        loss = Centring()
        trained(Embedder(), loss_fn=loss, val_data=None, validation_split=0.0, batch_size=batch_size)
        centres.append(loss.centre)
    assert centres[0].abs().min() > 0
    assert torch.allclose(centres[0], centres[2], rtol=1e-12)
    assert torch.allclose(centres[1], centres[2], rtol=1e-12)


def test_each_update_draws_other_numbers_in_its_loss_however_it_is_cut() -> None:
    def drawn(batch_size: int) -> list[float]:
        numbers = []

        def drawing(embeddings_BD: Tensor, batch: Any) -> Tensor:
            numbers.append(torch.rand(()).item())
            return compared(embeddings_BD, batch) * numbers[-1]

        trained(loss_fn=drawing, val_data=None, validation_split=0.0, batch_size=batch_size)
        return numbers[-3:]  # the updates

    assert len(set(drawn(1))) == 3
    assert drawn(1) == drawn(2) == drawn(GROUP)
