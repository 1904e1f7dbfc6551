"""The error for a loss that cannot be computed on the first rows. It names the row and, for known causes, a remedy."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..data.collator import RowCollator
from ..data.dataset import Rows
from ..errors import DataError
from ..objective.batch_changes import fresh_batch_for
from ..objective.embedding_limits import columns_of
from ..objective.item_counts import Batch, targets_of
from ..objective.model_forward import ModelForward
from ..objective.window_forward import WindowForward
from ..runtime.model_traits import can_generate
from ..runtime.state_guards import inspection_mode
from .config import Components

# Parts of PyTorch's messages about integer or boolean labels given to a loss that compares floats.
_NOT_FLOATS = ("can't be cast to the desired output type", "two bool tensors", "Found dtype Long", "but found Long")
_NO_PADDING = "no padding token is defined"  # part of Transformers' message for its classifiers


def loss_fault(
    components: Components,
    forward: ModelForward,
    rows: Rows,
    row_collator: RowCollator,
    candidates: Sequence[int],
    error: Exception,
) -> DataError:
    """Return the error to raise after the loss of a few rows has raised one.

    Args:
        candidates: the positions of these rows.
        error: the error that the loss raised.
    """
    if components.train_data is None:
        return DataError(
            f"`train_data` is None, and {type(components.model).__name__} cannot train on synthetic tokens, "
            f"where each token is the label of the one before: {error!r}. Give training data."
        )
    failing = _failing_row(components, forward, rows, row_collator, candidates)
    named = (
        f"the first rows of `{rows.argument}`" if failing is None else f"{rows.name_of(failing)} of `{rows.argument}`"
    )
    row = row_collator.seeded(rows, [candidates[0] if failing is None else failing], 0)
    used = ", ".join(f"`{name}`" for name in ("loss_fn", "count_items") if getattr(components, name)) or "this model"
    usual = f"Check that its columns, lengths and labels are what {used} expects."
    remedy = next(_remedies(components, forward, row, error), usual)
    return DataError(f"The loss of {named} cannot be computed: {error!r}. {remedy}")


def _failing_row(
    components: Components, forward: ModelForward, rows: Rows, row_collator: RowCollator, candidates: Sequence[int]
) -> int | None:
    """Return the position of the first row that fails when it is run separately, or None."""
    for position in candidates:
        try:
            with inspection_mode(components.model, *forward.modules):
                row = fresh_batch_for(components.model, row_collator.seeded(rows, [position], 0))
                if isinstance(forward, WindowForward):  # its loss may not take a single row
                    forward.values(components.model, row)
                else:
                    forward(components.model, row)
        except Exception:
            return position
    return None


def _remedies(components: Components, forward: ModelForward, row: Batch, error: Exception) -> Iterator[str]:
    """Yield the remedies for known causes of an error.

    Args:
        row: a batch of the row that failed, or of the first row.
        error: the error that the loss raised.
    """
    model, loss_fn, labels = components.model, components.loss_fn, targets_of(row)
    if _is_of_torch(loss_fn) and isinstance(error, TypeError) and "must be Tensor" in str(error):
        yield _of_two_tensors(model, loss_fn, row, forward.accepted or ())
    if loss_fn is not None and not isinstance(forward, WindowForward):
        yield from _of_arguments(loss_fn, row, error)
    if _NO_PADDING in str(error):
        yield (
            "Set a padding token, such as the end-of-text token: `tokenizer.pad_token = tokenizer.eos_token` and "
            "`model.config.pad_token_id = tokenizer.pad_token_id`."
        )
    if "forward() missing" in str(error) and isinstance(row, Mapping) and forward.accepted:
        has, takes = (", ".join(map(repr, names)) for names in (row, sorted(forward.accepted)))
        yield f"The rows have the columns {has}, and `forward` takes {takes}. Rename the columns."
    if labels is None:
        return
    if any(words in str(error) for words in _NOT_FLOATS) and not labels.is_floating_point():
        yield "The loss compares floats, but the labels are integers or booleans. Give them as 0.0 and 1.0."
    n_classes = getattr(getattr(model, "config", None), "num_labels", None)
    if forward.is_own and not labels.is_floating_point() and labels.shape[1:] == (n_classes,):
        yield (
            f"The row has {n_classes} labels, one per class. If a row can have several classes, set "
            "`model.config.problem_type = 'multi_label_classification'`; if not, give the index of its class."
        )
    if forward.is_own and labels.is_floating_point() and labels.ndim == 1 and (n_classes or 1) > 1:
        yield (
            "The labels are decimal numbers, which a model of several classes does not take for classes. Give whole "
            "numbers: 1 instead of 1.0."
        )
    leading = [name for name, column in columns_of(row).items() if column.ndim > 2 and column.shape[1] == 1]
    if leading:
        yield (
            f"The columns {leading} of the row begin with a dimension of 1, which `return_tensors='pt'` adds. Give "
            "`column[0]` of each."
        )


def _of_arguments(loss_fn: Any, row: Batch, error: Exception) -> Iterator[str]:
    """Yield the remedies for a `loss_fn` that takes other arguments, or reads columns that the batch lacks."""
    is_dict = isinstance(row, Mapping)
    if isinstance(error, KeyError) and is_dict:
        yield f"The batch that `loss_fn` gets has the columns {', '.join(map(repr, row))}."
    function = getattr(type(loss_fn), "forward", loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
    if isinstance(error, TypeError) and "must be Tensor, not dict" in str(error):
        yield "`loss_fn` gets the outputs and the batch, a dict: take the labels from it, as in `batch['labels']`."
    name = getattr(function, "__qualname__", None)
    if isinstance(error, TypeError) and "positional argument" in str(error) and f"{name}()" in str(error):
        yield f"`loss_fn` is called with two arguments: (outputs, {'batch' if is_dict else 'targets'})."


def _is_of_torch(loss_fn: Any) -> bool:
    """Return whether a loss is one of PyTorch's own, which compare two tensors."""
    owner = loss_fn if not isinstance(loss_fn, nn.Module) else type(loss_fn)
    return getattr(owner, "__module__", "") in (nn.modules.loss.__name__, nn.functional.__name__)


def _of_two_tensors(model: Any, loss_fn: Any, row: Batch, accepted: Collection[str]) -> str:
    """Return the remedy for a PyTorch loss that was called with the model's outputs instead of a tensor."""
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    problem = f"{name} compares two tensors, but the model's outputs are an object."
    own = "leave `loss_fn` out: the model computes its own loss." if "labels" in accepted else ""
    labels = targets_of(row)
    is_of_tokens = labels is not None and labels.ndim > 1 and not labels.is_floating_point()
    if own and is_of_tokens and can_generate(model):  # its labels must be shifted
        return f"{problem} Give rows that are dicts, and {own}"
    batch, targets = ("batch", "batch['labels']") if isinstance(row, Mapping) else ("targets", "targets")
    first, second = ("outputs.logits", targets)
    if is_of_tokens:
        first, second = f"{first}.flatten(0, 1)", f"{second}.flatten()"
    remedy = f"Give `loss_fn=lambda outputs, {batch}: loss({first}, {second})`, where `loss` is your loss"
    return f"{problem} {remedy}{f', or {own}' if own else '.'}"
