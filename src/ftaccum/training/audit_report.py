"""What an audit found, in sentences: the figures, the likely cause, the remedy."""

from enum import Enum

from ..accumulation.audit import ANOTHER_CUT, Audit

_NAMED = 3  # parameters


class Cause(str, Enum):
    """Why an accumulated gradient differs from that of one batch."""

    STATE = "state"
    COUNTS = "counts"
    BACKWARD = "backward"


_REMEDIES = {
    Cause.STATE: (
        "The same rows, passed again, give another loss: forward passes change state outside of the model's buffers, "
        "such as a counter in `forward` or in `loss_fn`, or a generator of random numbers. An update of k passes "
        "changes it k times, and one large batch once. Change it once an update, outside of `forward`. This run is "
        "not audited any more."
    ),
    Cause.COUNTS: (
        "The losses differ as well, by {loss}: the loss does not weight these rows by {counted_by}. It may have class "
        "weights, leave out labels by a rule of its own, or change labels. Give `count_items`, a function that returns "
        "what the loss of a batch divides by, or pass a loss that declares them, such as "
        "`torch.nn.CrossEntropyLoss(weight=…, ignore_index=…)`, as `loss_fn`."
    ),
    Cause.BACKWARD: (
        "The losses agree, so the backward pass is not linear in the loss: a hook clips or normalizes gradients, an "
        "autograd function adds to them, or an embedding has `scale_grad_by_freq`. Remove it, or apply it to the "
        "whole gradient of an update; `gradient_clip_norm` clips that."
    ),
}


def cause_of(audit: Audit, tolerance: float, largest_rounding: float) -> Cause | None:
    """Return the likely cause of a difference; None where the gradient is exact.

    Args:
        tolerance: the largest difference that counts as rounding.
        largest_rounding: what rounding never exceeds.
    """
    if audit.keeps_state or (audit.rounding or 0.0) > largest_rounding:
        return Cause.STATE
    if audit.error <= tolerance:
        return None
    return Cause.COUNTS if audit.loss_error > tolerance else Cause.BACKWARD


def describe_finding(audit: Audit, update: int, tolerance: float, cause: Cause, counted_by: str) -> str:
    """Return the sentences that report a gradient which is not exact.

    Args:
        update: its number, from 1.
        counted_by: what the loss is counted as a mean over.
    """
    remedy = _REMEDIES[cause].format(loss=_percent(audit.loss_error), counted_by=counted_by)
    if cause is Cause.STATE:
        return f"Audit of update {update}: {remedy[0].lower()}{remedy[1:]}"
    parts = list(audit.parameters.items())
    named = ", ".join(f"{name} ({share:.0%})" for name, share in parts[:_NAMED])
    other = "one batch of the same rows" if audit.reference != ANOTHER_CUT else "another cut of the same rows"
    return (
        f"Audit of update {update}: the accumulated gradient of {audit.n_rows} rows is "
        f"{_percent(audit.error)} off that of {other} (tolerance {tolerance:.0e}). Shares of the "
        f"difference: {named}. {remedy}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
