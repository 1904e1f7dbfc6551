"""The selection of labelled positions in a compiled model, with one graph for any number of them.

Dynamo gives tensors that it reaches through a module, such as attributes of a hook object, a fixed shape: it would
compile each number of positions anew. Tensors in a global variable have free sizes, and a hook that is always the same
function does not start a compilation when it is registered again. It would if registered with `with_kwargs=True` in
older torch, where Dynamo compiles for the number of each such hook.

Shape suffixes: B rows, L tokens of a row, N labelled positions, P padded positions, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError
from .labelled_positions import LabelledPositions
from .normalizer import widened
from .own_loss import logits_of

_MULTIPLE = 8  # of positions: sizes of 0 and 1 would have graphs of their own


class _HookState:
    """The state of the current forward pass, which the hooks share through a global variable.

    Only one pass runs at a time.

    Attributes:
        labels: of shape (B, L).
        places: the P places to select.
        targets: the P labels at these places; None to leave the loss to the caller.
        loss: the mean loss, if a hook has computed it.
    """

    labels: Tensor | None = None
    places: Tensor | None = None
    targets: Tensor | None = None
    ignore_index = 0
    loss: Tensor | None = None


_STATE = _HookState()


def loss_in_graphs(
    run: Callable[[], Any],
    head: nn.Module,
    positions: LabelledPositions,
    labels_BL: Tensor,
    n_labels: int | None,
    *,
    drops_logits: bool,
) -> tuple[Tensor, Any]:
    """Run a compiled model, select the labelled positions before its head, and return the mean loss and the outputs.

    The logits of the outputs are those of labelled positions, of shape (1, N, V).

    Args:
        run: runs the model without its labels.
        n_labels: the number of labelled positions; None to count them, which waits for the device.
        drops_logits: whether nobody reads the logits, and the outputs of the head are the logits. If so, the graph of
            the model computes the loss as well, and the outputs have no logits.

    Raises:
        DataError: if the model returns no logits of shape (1, P, V) or (B, L, V).
    """
    places_N = positions.places(labels_BL, n_labels)
    n = len(places_N)
    places_P = _padded(places_N, labels_BL.shape)
    targets_P = positions.targets(labels_BL, places_P)
    targets_P[n:] = positions.ignore_index
    # Both in each pass: Dynamo does not notice a hook that is missing where it has seen none.
    hooks = head.register_forward_pre_hook(_select), head.register_forward_hook(_take_loss)
    _STATE.labels, _STATE.places, _STATE.ignore_index = labels_BL, places_P, positions.ignore_index
    _STATE.targets = targets_P if drops_logits else None
    try:
        outputs = run()
        loss = _STATE.loss
    finally:
        _STATE.labels = _STATE.places = _STATE.targets = _STATE.loss = None
        for hook in hooks:
            hook.remove()
    if loss is not None:
        return loss, outputs
    given = logits_of(outputs)
    logits_1PV = given
    if given.shape[:-1] == labels_BL.shape:  # from a graph of earlier passes without hooks
        logits_1PV = given.flatten(0, 1).index_select(0, places_P)[None]
    if logits_1PV.shape[:-1] != (1, len(places_P)):
        raise DataError(
            f"The logits have the shape {tuple(given.shape)} although {len(places_P)} positions were selected before "
            "the head. Pass `loss_head='full'`."
        )
    return _mean(logits_1PV, targets_P, positions.ignore_index), _with_logits(outputs, given, logits_1PV[:, :n])


def _padded(places_N: Tensor, shape_BL: torch.Size) -> Tensor:
    """Pad places with the first one, whose hidden states are finite if those of labelled positions are."""
    n = len(places_N)
    size = max(1, -(-n // _MULTIPLE)) * _MULTIPLE
    while size in shape_BL:  # Dynamo assumes that sizes which are equal once are always equal
        size += _MULTIPLE
    padding = places_N[:1].expand(size - n) if n else places_N.new_zeros(size)
    return torch.cat([places_N, padding])


def _select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the inputs of the head at the places of the pass; None to leave them as they are."""
    labels_BL, places_P = _STATE.labels, _STATE.places
    if labels_BL is None or places_P is None or not inputs:
        return None
    hidden_BLH, *others = inputs
    if hidden_BLH.ndim != 3 or hidden_BLH.shape[:2] != labels_BL.shape:
        return None
    return hidden_BLH.flatten(0, 1).index_select(0, places_P)[None], *others


def _take_loss(_: nn.Module, __: tuple[Any, ...], logits_1PV: Tensor) -> Tensor | None:
    """Compute the loss of the pass, and return no logits; None to leave them as they are."""
    targets_P = _STATE.targets
    if targets_P is None or logits_1PV.ndim != 3 or logits_1PV.shape[:2] != (1, len(targets_P)):
        return None
    _STATE.loss = _mean(logits_1PV, targets_P, _STATE.ignore_index)
    return logits_1PV[:, :0].detach()


def _mean(logits_1PV: Tensor, targets_P: Tensor, ignore_index: int) -> Tensor:
    return F.cross_entropy(widened(logits_1PV[0]), targets_P, ignore_index=ignore_index)


def _with_logits(outputs: Any, before: Tensor, after: Tensor) -> Any:
    """Return the outputs with other logits."""
    if isinstance(outputs, Mapping):
        return {name: after if value is before else value for name, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return tuple(after if value is before else value for value in outputs)
    return after
