"""The message about an audit's finding: the figures, the likely cause and the remedy."""

from collections.abc import Sequence
from enum import Enum

from ..accumulation.audit import ANOTHER_CUT, Audit

_NAMED = 3  # the maximum number of parameters to name in a message


class Cause(str, Enum):
    """Why an accumulated gradient differs from that of one batch."""

    STATE = "state"
    COUNTS = "counts"
    BACKWARD = "backward"


_REMEDIES = {
    Cause.STATE: (
        "Running the same rows again gives a different loss: forward passes change state outside the model's buffers, "
        "such as a counter in `forward` or `loss_fn`, or a random number generator. An update of k micro-batches "
        "changes it k times, but one large batch changes it once. Change it once per update, outside `forward`. There "
        "will be no more audits in this run."
    ),
    Cause.COUNTS: (
        "The losses differ as well, by {loss}: the loss does not weight these rows by {counted_by}. It may use class "
        "weights, ignore labels by its own rule, or change labels. Pass `count_items`, a function that returns the "
        "number that the loss of a batch divides by, or pass as `loss_fn` a loss that declares its weights and ignored "
        "label, such as `torch.nn.CrossEntropyLoss(weight=…, ignore_index=…)`."
    ),
    Cause.BACKWARD: (
        "The losses agree, so the backward pass is not linear in the loss. For example, a hook clips or normalizes "
        "gradients, an autograd function adds to them, or an embedding has `scale_grad_by_freq`. Remove it, or apply "
        "it to the whole gradient of an update, as `gradient_clip_norm` does."
    ),
}
_REMEDY_OF_LABELLED_HEAD = (
    " If the loss has started to read logits at positions without a label, set `loss_head='full'`."
)
_REMEDY_OF_CHANGE = (
    " The loss has changed since it was measured, before training: {places}. Items are still counted as before the "
    "change. Train the part after it in a new run."
)


def cause_of(audit: Audit, tolerance: float, largest_rounding: float) -> Cause | None:
    """Return the likely cause of a difference, or None if the gradient is exact.

    Args:
        audit: the finding.
        tolerance: the largest relative error that counts as rounding.
        largest_rounding: the largest relative error that rounding can make in this precision.
    """
    if audit.keeps_state or (audit.rounding or 0.0) > largest_rounding:
        return Cause.STATE
    if audit.error <= tolerance:
        return None
    return Cause.COUNTS if audit.loss_error > tolerance else Cause.BACKWARD


def describe_finding(
    audit: Audit, update: int, tolerance: float, cause: Cause, counted_by: str, changed: Sequence[str] = ()
) -> str:
    """Return the message about a gradient that is not exact.

    Args:
        audit: the finding.
        update: the number of the update, from 1.
        tolerance: the largest relative error that counts as rounding.
        cause: the likely cause.
        counted_by: the name of the items that the loss is taken to be a mean over.
        changed: where the state of the loss has changed since the last audit.
    """
    remedy = _REMEDIES[cause].format(loss=_percent(audit.loss_error), counted_by=counted_by)
    if cause is Cause.COUNTS and audit.selects_positions:
        remedy += _REMEDY_OF_LABELLED_HEAD
    if cause is Cause.COUNTS and changed:
        places = ", ".join(f"`{place}`" for place in changed[:_NAMED]) + (" and others" * (len(changed) > _NAMED))
        remedy += _REMEDY_OF_CHANGE.format(places=places)
    if cause is Cause.STATE:
        return f"Audit of update {update}: {remedy[0].lower()}{remedy[1:]}"
    parts = list(audit.parameters.items())
    named = ", ".join(f"{name} ({share:.0%})" for name, share in parts[:_NAMED])
    other = "the same rows in one batch" if audit.reference != ANOTHER_CUT else "the same rows in other micro-batches"
    return (
        f"Audit of update {update}: the accumulated gradient of {audit.n_rows} rows differs by "
        f"{_percent(audit.error)} from the gradient of {other} (tolerance {tolerance:.0e}). Parameters with the "
        f"largest share of the squared difference: {named}. {remedy}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
