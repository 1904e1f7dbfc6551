"""Labels in a form or with values that their loss does not support."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from .case import case, update_error

N_ROWS = 120
FAULTY = 77


def classifier(**settings: Any) -> BertForSequenceClassification:
    size = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=11, **size, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings
    )
    return BertForSequenceClassification(config).double()


def multi_hot_error(faulty: list[float]) -> float:
    """Return the error against the rows without the meaningless one."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 11, (N_ROWS, 6), generator=generator)
    labels_NC = (torch.rand(N_ROWS, 3, generator=generator) < 0.4).double()
    rows = [{"input_ids": ids[n], "labels": faulty if n == FAULTY else labels_NC[n].tolist()} for n in range(N_ROWS)]
    sound = [n for n in range(N_ROWS) if n != FAULTY]

    def loss_of_all(model: nn.Module) -> Tensor:
        logits_NC = model(ids[sound]).logits
        return F.binary_cross_entropy_with_logits(logits_NC, labels_NC[sound])

    model = classifier(problem_type="multi_label_classification")
    return update_error(model, rows, loss_of_all, N_ROWS, batch_size=4)


@case(18, "a label of 2.0 in one of 120 rows of a binary cross entropy", refused="row 77 has the label 2.0")
def a_label_of_two() -> float:
    return multi_hot_error([0.0, 2.0, 1.0])


@case(18, "labels of -100 in one of 120 rows, which a binary cross entropy does not ignore", refused="the label -100.0")
def an_ignored_label() -> float:
    return multi_hot_error([-100.0, -100.0, 1.0])


@case(18, "a whole number of -100 among the targets of a squared error, which does not ignore it")
def a_measurement_of_minus_100() -> float:
    generator = torch.Generator().manual_seed(0)
    inputs_NC = torch.randn(N_ROWS, 4, generator=generator, dtype=torch.float64)
    targets_N = torch.randint(-150, 150, (N_ROWS,), generator=generator)
    targets_N[FAULTY] = -100

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs[:, 0], targets.double() / 100)

    def loss_of_all(model: nn.Module) -> Tensor:
        return loss_fn(model(inputs_NC), targets_N)

    torch.manual_seed(0)
    rows = list(zip(inputs_NC, targets_N, strict=True))
    return update_error(nn.Linear(4, 1).double(), rows, loss_of_all, N_ROWS, loss_fn=loss_fn, batch_size=16)


@case(18, "labels of which nearly all rows lack as many, left out of a mean")
def rows_with_more_labels_than_others() -> float:
    generator = torch.Generator().manual_seed(0)
    inputs_NC = torch.randn(N_ROWS, 5, generator=generator, dtype=torch.float64)
    labels_NC = torch.randint(0, 2, (N_ROWS, 4), generator=generator).double()
    lacks_NC = torch.rand(N_ROWS, 4, generator=generator).argsort(1) < 2
    lacks_NC[FAULTY] = False
    labels_NC[lacks_NC] = -1

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        known = targets >= 0
        return F.binary_cross_entropy_with_logits(outputs[known], targets[known])

    def loss_of_all(model: nn.Module) -> Tensor:
        return loss_fn(model(inputs_NC), labels_NC)

    torch.manual_seed(0)
    rows = list(zip(inputs_NC, labels_NC, strict=True))
    return update_error(nn.Linear(5, 4).double(), rows, loss_of_all, N_ROWS, loss_fn=loss_fn, batch_size=16)
