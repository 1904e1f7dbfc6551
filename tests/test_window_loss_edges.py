"""Losses over the window with unusual inputs, parameters, state and models: each is exact, or named before training."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from ftaccum.errors import CheckpointError, DataError, InexactLossWarning, SettingsError, UntrainedLossWarning
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


def short_run(model: nn.Module, loss: Loss, **arguments: Any) -> None:
    trained(model, loss_fn=loss, val_data=None, validation_split=0.0, max_updates=1, **arguments)


def refusal(loss: Loss, **arguments: Any) -> str:
    with pytest.raises((SettingsError, DataError)) as caught:
        short_run(Embedder(), loss, **arguments)
    return str(caught.value)


def test_parameters_that_only_a_closure_holds_are_refused() -> None:
    temperature, head = torch.tensor(1.0, requires_grad=True), nn.Linear(3, 3, dtype=torch.float64)
    wanted = "belongs to neither the model nor `loss_fn`"
    assert wanted in refusal(lambda x, batch: compared(x * temperature, batch))
    assert wanted in refusal(compared, loss_inputs=lambda outputs, _: head(outputs))
    assert temperature.grad is None
    assert head.weight.grad is None


def test_a_loss_may_read_frozen_parameters_and_tensors_made_in_the_pass() -> None:
    teacher = nn.Linear(3, 3, dtype=torch.float64).requires_grad_(requires_grad=False)

    def inputs(outputs: Tensor, _: Any) -> Tensor:
        return teacher(outputs) + torch.zeros_like(outputs).requires_grad_()

    assert difference(Embedder(), compared, inputs) < 1e-12


def test_complex_inputs_are_refused() -> None:
    wanted = "must be real numbers"
    assert wanted in refusal(lambda x, batch: compared(x.abs(), batch), loss_inputs=lambda x, _: torch.fft.fft(x))


def test_a_collator_that_returns_several_rows_for_one_is_refused() -> None:
    def two_views(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: column.repeat_interleave(2, 0) for name, column in collate(rows).items()}

    assert "returns 2 rows for a single one" in refusal(compared, data_collator=two_views)


@pytest.mark.parametrize("size", [4, 5])
def test_a_column_that_is_not_one_of_rows_is_named_where_the_loss_reads_it(size: int) -> None:
    """Also if it has as many entries as the batch has rows, by chance."""

    def with_prior(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return collate(rows) | {"prior": torch.ones(size)}

    def loss(embeddings_BD: Tensor, batch: Any) -> Tensor:
        return compared(embeddings_BD, batch) * batch["prior"].mean()

    assert "reads column 'prior' of the batch, but" in refusal(loss, data_collator=with_prior)


class Queueing(Embedder):
    """An embedder that compares each row with the mean of the pass before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.ones(3, dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = super().forward(input_ids, attention_mask)
        past, self.queue = self.queue, found.detach().mean(0) if self.training else self.queue
        return found * past


class Clamping(Embedder):
    """An embedder whose gradient is clamped."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


class Leaving(Embedder):
    """An embedder that leaves a number of its last batch behind."""

    scale = torch.ones(())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = super().forward(input_ids, attention_mask)
        self.scale = found.detach().norm()
        return found


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (Queueing(), "changes buffers that the next one depends on"),
        (Clamping(), "Hooks, autograd functions and layers that clamp"),
        (Leaving(), "`loss_fn` may read what the last forward pass left behind"),
    ],
    ids=["queue", "hook", "attribute"],
)
def test_a_model_that_makes_two_passes_inexact_is_named(model: nn.Module, cause: str) -> None:
    def loss(embeddings_BD: Tensor, batch: Any) -> Tensor:
        return compared(embeddings_BD, batch) * getattr(model, "scale", 1.0)

    with pytest.warns(InexactLossWarning, match=cause):
        short_run(model, loss)


def test_a_balance_of_experts_that_counts_padding_is_that_of_one_batch() -> None:
    """Without a mask, the balance reads padding, so the rows of an update are padded to one length."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=20, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=1.0,
        **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)

    def without_mask(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        return {"input_ids": batch["input_ids"], "labels": batch["input_ids"].where(batch["attention_mask"] > 0, -100)}

    made: list[Recording] = []

    def optimizer(groups: Any) -> Recording:
        made.append(Recording(groups))
        return made[0]

    one_update = {"train_data": ROWS[:GROUP], "val_data": None, "validation_split": 0.0, "gradient_clip_norm": None}
    own_loss = {"loss_fn": None, "loss_over": "items", "data_collator": without_mask}
    trained(model, optimizer=optimizer, **one_update, **own_loss)
    model.train()
    model.zero_grad()
    model(**without_mask(ROWS[:GROUP])).loss.backward()
    gate = model.model.layers[0].mlp.gate.weight
    assert (made[0].gradients[0][gate] - gate.grad).norm() < 1e-5 * gate.grad.norm()


def test_parameters_of_a_loss_that_the_optimizer_lacks_are_named() -> None:
    model = Embedder()
    with pytest.warns(UntrainedLossWarning, match="`loss_fn` has the parameter `scale`"):
        short_run(model, Scaled(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedLossWarning)
        short_run(Embedder(), Scaled())


class Listening(nn.Module):
    """A loss that notes whether it is in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, embeddings_BD: Tensor, batch: Any) -> Tensor:
        self.modes.append(self.training)
        return compared(embeddings_BD, batch)


def test_a_loss_is_in_eval_mode_in_evaluations_alone() -> None:
    loss = Listening()
    trained(Embedder(), loss_fn=loss, train_data=ROWS[:GROUP], val_data=ROWS[:GROUP])
    assert loss.modes == [False, True, False]  # before the update, in it and after it
    assert loss.training


def test_a_run_with_other_inputs_of_its_loss_is_not_resumed(tmp_path: Path) -> None:
    saved = {"output_dir": str(tmp_path), "checkpoint_every": 1, "val_data": None, "validation_split": 0.0}
    trained(loss_fn=compared, max_updates=1, **saved)
    with pytest.raises(CheckpointError, match=r"`loss_inputs` was None, but is '.*lambda"):
        trained(
            loss_fn=compared, loss_inputs=lambda x, _: 2 * x, max_updates=2, resume="auto",
            allow_changed=["max_updates"], **saved,
        )  # fmt: skip
