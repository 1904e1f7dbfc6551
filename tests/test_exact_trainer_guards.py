"""`exact(Trainer)` leaves a Trainer's objects as they are, and notices what would make its windows wrong."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

import trainers
from ftaccum import DataError, InexactLossWarning, LossScaleWarning, exact
from heads import HEADS, IGNORED, RecordingOptimizer, one_batch

CLASSIFIER, TOKENS = HEADS["sequence classification, BERT"], HEADS["token classification, BERT"]
NEAR, LOGGED = 1e-10, 1e-6


def made(trainer_class: Any, folder: Path, *, rows: Any = None, head: Any = CLASSIFIER, **parts: Any) -> Any:
    model = head.model()
    optimizer = RecordingOptimizer(model)
    return trainer_class(
        model=model,
        args=trainers.arguments(str(folder)),
        train_dataset=head.rows() if rows is None else rows,
        data_collator=one_batch,
        optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
        **parts,
    )


# ---- A Trainer's own objects -----------------------------------------------------------------------------------------


class Metrics(Trainer):
    """A Trainer that keeps metrics of many kinds, one for each pass."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.losses: list[Any] = []
        self.by_mode: dict[str, list[float]] = {"train": []}
        self.n_passes = torch.zeros((), dtype=torch.int64)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        loss = model(**inputs).loss
        self.losses.append(loss.detach())
        self.by_mode["train"].append(loss.item())
        self.n_passes += 1
        self.latest = loss.item()
        return (loss, None) if return_outputs else loss


def test_metrics_count_only_the_passes_of_training(tmp_path: Path) -> None:
    trainer = made(exact(audit=1)(Metrics), tmp_path)
    losses = trainer.losses
    trainer.train()
    assert trainer.losses is losses
    assert (len(losses), len(trainer.by_mode["train"]), int(trainer.n_passes)) == (5, 5, 5)


def test_the_rows_and_the_log_of_a_trainer_stay_its_own(tmp_path: Path) -> None:
    rows, logged = CLASSIFIER.rows(), []
    trainer = made(exact(audit=1)(Trainer), tmp_path, rows=rows)
    trainer.log = lambda logs, *_: logged.append(logs)
    trainer.train()
    assert trainer.train_dataset is rows
    assert sum("loss" in logs for logs in logged) == 3


class Popping(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        inputs = {**inputs, "labels": inputs.pop("labels")}  # changes the batch that it is given
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_step_may_change_the_dict_of_a_dummy() -> None:
    rows = TOKENS.rows(9)
    for n in (2, 3, 6, 7):
        rows[n] = {**rows[n], "labels": [IGNORED] * len(rows[n]["labels"])}
    found, _ = trainers.gradients(exact(Popping), TOKENS.model(), rows)
    assert len(found) == 3


class AsksForLoader(TrainerCallback):
    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.get_train_dataloader()


def test_audits_are_kept_if_a_callback_asks_for_the_loader(tmp_path: Path) -> None:
    callback = AsksForLoader()
    callback.trainer = made(exact(audit=1)(Trainer), tmp_path, callbacks=[callback])
    callback.trainer.train()
    assert [audit["audit"] for audit in callback.trainer.exact_audits] == [1, 2, 3]
    assert callback.trainer.exact_report == "The loss is a mean over labels (measured)."


class Stops(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


def test_a_loss_can_be_computed_after_an_interruption(tmp_path: Path) -> None:
    trainer = made(exact(Trainer), tmp_path, callbacks=[Stops()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    batch = one_batch(CLASSIFIER.rows(4))
    assert torch.equal(trainer.compute_loss(trainer.model, dict(batch)), trainer.model(**batch).loss)


# ---- What would make windows wrong -----------------------------------------------------------------------------------


class Shortens(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        inputs = {name: value[:, :4] for name, value in inputs.items()}
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_step_that_changes_the_items_of_a_batch_is_refused() -> None:
    with pytest.raises(DataError, match="`training_step` of Shortens changes a micro-batch after its loss items were"):
        trainers.gradients(exact(Shortens), TOKENS.model(), TOKENS.rows())


class Divides(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch) / 4
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_step_that_divides_the_weighted_loss_is_refused() -> None:
    with pytest.raises(RuntimeError, match="`training_step` changes the loss that `compute_loss` returned"):
        trainers.gradients(exact(Divides), CLASSIFIER.model(), CLASSIFIER.rows())


class Accumulates(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        loss = model(**inputs).loss / self.args.gradient_accumulation_steps
        return (loss, None) if return_outputs else loss


def test_a_loss_that_is_divided_by_the_accumulation_steps_is_reported() -> None:
    with pytest.warns(LossScaleWarning, match="`compute_loss` returns 1/2 of the model's own loss"):
        trainers.gradients(exact(audit=False)(Accumulates), CLASSIFIER.model(), CLASSIFIER.rows())


def another_loss_without_a_count(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    total = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else 2.5 * len(labels))


def test_a_loss_that_differs_without_a_count_is_reported() -> None:
    parts = {"compute_loss_func": another_loss_without_a_count}
    with pytest.warns(InexactLossWarning, match="With `num_items_in_batch` of a batch, its loss is"):
        trainers.gradients(exact(audit=False)(Trainer), CLASSIFIER.model(), CLASSIFIER.rows(), parts=parts)


class GradientPenalty(Trainer):
    """A loss with the gradient of another loss by the embeddings, squared, for each row."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        outputs = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"], labels=inputs["labels"])
        by_row = nn.functional.cross_entropy(outputs.logits, inputs["labels"], reduction="sum")
        (gradient,) = torch.autograd.grad(by_row, embedded, create_graph=True)
        loss = outputs.loss + gradient.square().sum((1, 2)).mean()
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_takes_gradients_itself_is_exact() -> None:
    def gradients(trainer_class: Any, batch_size: int, k: int) -> list[dict[str, Tensor]]:
        model = CLASSIFIER.model()
        model.set_attn_implementation("eager")  # others have no second derivative
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": k}
        return trainers.gradients(trainer_class, model, CLASSIFIER.rows(), **sizes)[0]

    found, wanted = gradients(exact(GradientPenalty), 2, 2), gradients(GradientPenalty, 4, 1)
    assert max(trainers.relative_error(f, w) for f, w in zip(found, wanted, strict=True)) < NEAR


def test_declared_class_weights_are_counted_to_rounding() -> None:
    weights = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
    loss_fn = nn.CrossEntropyLoss(weight=weights)

    class Weighted(nn.Module):
        weight = weights

        def forward(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:  # noqa: ARG002
            return loss_fn(outputs["logits"], labels)

    parts = {"compute_loss_func": Weighted()}

    def gradients(trainer_class: Any, batch_size: int, k: int) -> list[dict[str, Tensor]]:
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": k}
        return trainers.gradients(trainer_class, CLASSIFIER.model(), CLASSIFIER.rows(), parts=parts, **sizes)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactLossWarning)
        found = gradients(exact(Trainer), 2, 2)
    wanted = gradients(Trainer, 4, 1)
    assert max(trainers.relative_error(f, w) for f, w in zip(found, wanted, strict=True)) < NEAR
