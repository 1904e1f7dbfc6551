"""Messages about a loss, in the words of a Trainer's users."""

from ...objective.report import OVER_WINDOW

_REPHRASED = {
    f" {OVER_WINDOW}": (
        " Make `batch_size` as large as the comparison needs, or train with `test_fine_tuning(loss_over='window')`, "
        "which gives the loss all rows of an update at once."
    ),
    " If it is the sum of several means, have `loss_fn` return them by name, in a dict.": "",
    " If the loss weights classes, give `nn.CrossEntropyLoss(weight=…)` as `loss_fn`: its weights are counted.": "",
    "set `reduction='sum'`": "return their mean instead",
    "give `count_items`": "give `exact` a `count_items`",
    "`loss_fn`": "`compute_loss`",
    "`batch_size`": "`per_device_train_batch_size`",
}


def for_trainers(sentence: str) -> str:
    """Return a message with the arguments that a Trainer has, instead of those of `test_fine_tuning`."""
    for ours, theirs in _REPHRASED.items():
        sentence = sentence.replace(ours, theirs)
    return sentence
