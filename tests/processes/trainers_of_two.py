"""Train `exact(Trainer)` on two processes. Print a JSON line of the errors and the rows of windows, by case."""

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, set_seed

import trainers
from ftaccum import SettingsError, exact
from heads import HEADS, IGNORED, Row, all_in_float64, one_batch
from interrupted import model as dropout_model
from trained_windows import read_window_errors
from trainers import Listed, arguments, gradients, window_errors

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
warnings.filterwarnings("error", ".*", module="ftaccum")

CLASSIFIER, TOKENS, CAUSAL = (
    HEADS[name] for name in ("sequence classification, BERT", "token classification, BERT", "causal LM, GPT-2")
)
EPOCH = {"num_train_epochs": 2}
BALANCED = {"train_sampling_strategy": "batch_rebalance"}


class Gathering(Trainer):
    """A Trainer that gathers a metric of each row, as those of TRL do."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        losses = nn.functional.cross_entropy(outputs.logits, inputs["labels"], reduction="none")
        everywhere = self.accelerator.gather_for_metrics(losses.detach())
        assert everywhere.ndim == 1
        assert len(everywhere) >= len(losses)
        return (losses.mean(), outputs) if return_outputs else losses.mean()


class OwnBatches(Trainer):
    """A Trainer whose loader has a batch sampler that the user wrote, of batches of unequal sizes."""

    def get_train_dataloader(self) -> Any:
        rows: Any = self.train_dataset
        batches = [[8, 0], [1, 2, 3], [4], [5], [6, 7]]
        return self.accelerator.prepare(DataLoader(rows, batch_sampler=batches, collate_fn=self.data_collator))


class Stream(IterableDataset):
    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)


def always_divided(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"].flatten(0, -2)
    loss = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss / num_items_in_batch


def with_an_ignored_half(head: Any, n: int) -> list[Row]:
    """Return rows of which those of one process in the first window have no labels."""
    rows = head.rows(n)
    for row in (2, 3, 6, 7):
        rows[row] = {**rows[row], "labels": [IGNORED] * len(rows[row]["labels"])}
    return rows


# A head, its rows, the micro-batches of a window on each process, and the arguments.
CASES: dict[str, tuple[Any, list[Row], int, dict[str, Any]]] = {
    "9 rows": (CLASSIFIER, CLASSIFIER.rows(9), 2, {}),
    "10 rows": (CLASSIFIER, CLASSIFIER.rows(10), 2, {}),
    "11 rows in random order": (CLASSIFIER, CLASSIFIER.rows(11), 2, {**EPOCH, "train_sampling_strategy": "random"}),
    "13 rows grouped by length": (
        CLASSIFIER, CLASSIFIER.rows(13), 2, {**EPOCH, "train_sampling_strategy": "group_by_length"},
    ),
    "3 rows": (CLASSIFIER, CLASSIFIER.rows(3), 2, {}),
    "own batches, 9 rows": (CLASSIFIER, CLASSIFIER.rows(9), 2, {"class": OwnBatches}),
    "causal LM": (CAUSAL, CAUSAL.rows(9), 2, {}),
    "one process without labels": (TOKENS, with_an_ignored_half(TOKENS, 9), 2, {}),
    "split batches": (
        CLASSIFIER, CLASSIFIER.rows(9), 2,
        {"per_device_train_batch_size": 4, "accelerator_config": {"split_batches": True}},
    ),
    "balanced, 8 rows": (CLASSIFIER, CLASSIFIER.rows(8), 2, BALANCED),
    "balanced, 10 rows": (CLASSIFIER, CLASSIFIER.rows(10), 2, {**EPOCH, **BALANCED}),
    "balanced, 11 rows": (CLASSIFIER, CLASSIFIER.rows(11), 2, {**EPOCH, **BALANCED}),
    "balanced, 3 rows": (CLASSIFIER, CLASSIFIER.rows(3), 2, {**EPOCH, **BALANCED}),
    "balanced, gathered": (CLASSIFIER, CLASSIFIER.rows(11), 2, {**BALANCED, "class": Gathering}),
    "gathered": (CLASSIFIER, CLASSIFIER.rows(11), 2, {"class": Gathering}),
    "a loss that is always divided": (TOKENS, TOKENS.rows(11), 2, {"parts": {"compute_loss_func": always_divided}}),
    "a loss divided on each process": (
        TOKENS, TOKENS.rows(11), 2,
        {"parts": {"compute_loss_func": always_divided}, "average_tokens_across_devices": False},
    ),
}  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def errors(trainer_class: Any, case: str) -> list[Any]:
    head, rows, k, given = CASES[case]
    given = dict(given)
    trainer_class = exact(given.pop("class", Trainer)) if trainer_class is None else trainer_class
    with quiet(), all_in_float64():
        gradient, loss, windows = read_window_errors(trainer_class, head.model(), rows, k=k, **given)
    return [max(gather_object(gradient)), max(gather_object(loss)), windows]


def planned() -> dict[str, list[Any]]:
    """Return the errors and windows with the planner, and the windows without it."""
    found = {}
    for strategy in ("random", "group_by_length"):
        rows, given = TOKENS.rows(23), {**EPOCH, "train_sampling_strategy": strategy}
        with quiet(), all_in_float64(), patch.object(trainers, "Listed", list):  # the lengths of a list are known
            gradient, loss, windows = read_window_errors(
                exact(planner=True)(Trainer), TOKENS.model(), rows, k=3, **given
            )
            *_, arrived = read_window_errors(exact(Trainer), TOKENS.model(), rows, k=3, **given)
        found[strategy] = [max(gather_object(gradient)), max(gather_object(loss)), windows, arrived]
    return found


def grouped_with_dropout() -> list[list[int]]:
    """Return the windows of two epochs in an order that is drawn, while dropout moves each process's generator."""
    with quiet():
        *_, windows = read_window_errors(
            exact(Trainer),
            dropout_model(),
            CLASSIFIER.rows(13),
            k=2,
            train_sampling_strategy="group_by_length",
            **EPOCH,
        )
    return windows


def dispatched() -> list[float]:
    """Return the errors if the main process reads all batches, as it does for a stream by default.

    The others cannot record their rows.
    """
    # The main process concatenates the batches of both, so they have to be of one width.
    rows = [{"input_ids": (row["input_ids"] * 4)[:4], "labels": row["labels"]} for row in CLASSIFIER.rows(11)]
    found = []
    for split in (False, True):
        given = {"accelerator_config": {"dispatch_batches": True, "split_batches": split}}
        given |= {"per_device_train_batch_size": 4 if split else 2}
        with quiet():
            gradient, _ = window_errors(exact(Trainer), CLASSIFIER.model(), rows, size=8, **given)
        found.append(max(gather_object(gradient)))
    with quiet(), patch.object(trainers, "Listed", Stream):
        gradient, _ = window_errors(exact(Trainer), CLASSIFIER.model(), rows, size=8, max_steps=2)
    return [*found, max(gather_object(gradient))]


class StopAt(TrainerCallback):
    def on_substep_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def trained(folder: str, resume: bool | None = None, **parts: Any) -> list[Tensor]:
    set_seed(1 if resume else 0)
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, **EPOCH}
    trainer = exact(Trainer)(
        model=dropout_model(), args=arguments(folder, train_sampling_strategy="random", **given),
        train_dataset=Listed(CLASSIFIER.rows(13)), data_collator=one_batch, **parts,
    )  # fmt: skip
    if not parts:
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 4
    else:
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train()
    return [weight.detach().clone() for weight in trainer.model.state_dict().values()]


def resumed() -> bool:
    """Return whether a run that is interrupted in its second epoch, and resumes there, ends with the same weights."""
    with tempfile.TemporaryDirectory() as mine:
        folder = Path(gather_object([mine])[0])
        with quiet():
            whole = trained(str(folder / "whole"))
            trained(str(folder / "cut"), callbacks=[StopAt()])
            state.wait_for_everyone()
            again = trained(str(folder / "cut"), resume=True)
        state.wait_for_everyone()
    return all(gather_object([all(map(torch.equal, whole, again))]))


def refusals() -> list[str]:
    """Return the messages about batches that are uneven, a model that is wrapped, and a stream that is not dealt."""
    found = []
    wrapped = nn.parallel.DistributedDataParallel(CLASSIFIER.model())
    uneven = {"accelerator_config": {"even_batches": False}}
    for model, given in ((CLASSIFIER.model(), uneven), (wrapped, {})):
        try:
            with tempfile.TemporaryDirectory() as folder:
                exact(Trainer)(model=model, args=arguments(folder, **given), train_dataset=Listed(CLASSIFIER.rows()))
        except SettingsError as error:
            found.append(str(error))
    apart = {"accelerator_config": {"dispatch_batches": False}, "max_steps": 1}
    try:
        gradients(exact(Trainer), CLASSIFIER.model(), Stream(CLASSIFIER.rows()), **apart)
    except SettingsError as error:
        found.append(str(error))
    return found


def heads() -> dict[str, float]:
    """Return the largest error of every head for windows of 8 rows, of 3 and of 1, where one process has none."""
    found = {}
    for name, head in HEADS.items():
        with quiet(), all_in_float64():
            parts = [window_errors(exact(Trainer), head.model(), head.rows(n), size=8)[0] for n in (9, 11)]
        found[name] = max(gather_object([*parts[0], *parts[1]]))
    return found


if sys.argv[1:] == ["heads"]:
    answer: dict[str, Any] = heads()
else:
    answer = {
        "exact": {case: errors(None, case) for case in CASES},
        "unchanged": {case: errors(Trainer, case) for case in ("9 rows", "causal LM", "balanced, 10 rows")},
        "dispatched": dispatched(),
        "planned": planned(),
        "grouped with dropout": grouped_with_dropout(),
        "resumed": resumed(),
        "refusals": refusals(),
    }
if state.is_main_process:
    print("FOUND", json.dumps(answer))
state.destroy_process_group()
