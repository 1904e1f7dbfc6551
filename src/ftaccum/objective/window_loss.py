"""A user's loss over all rows of a window, as `loss_over="window"` defines it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, SettingsError
from ..runtime.memory import is_out_of_memory
from .item_counts import TOKEN_COLUMNS, Batch, rows_of, tensors_of
from .window_terms import Values

LossInputs = Callable[[Any, Any], Any]

_INPUT, _COLUMN = "input ", "column "  # prefixes of the names among the values of a micro-batch
_ONLY = ""  # the name of inputs or columns that are a single tensor
_MOST_DIMENSIONS = 2  # of a column that the loss gets: images of all rows of a window would take too much memory


class WindowLoss(nn.Module):
    """Computes `loss_fn(inputs, batch)` from the values of all rows, which may come from several micro-batches.

    It is called with the outputs and the batch, as any other loss, if all rows are in one batch.

    Attributes:
        loss_fn: the user's function, or module.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Any], loss_inputs: LossInputs | None) -> None:
        """Args:
        loss_inputs: returns a tensor or a dict of tensors, rows first, given the outputs and the batch; None for the
            model's outputs.
        """
        super().__init__()
        self.loss_fn, self._loss_inputs = loss_fn, loss_inputs
        self._columns: frozenset[str] | None = None

    @property
    def state(self) -> Mapping[str, Any]:
        """The user's functions, by name."""
        return {"loss_fn": self.loss_fn, "loss_inputs": self._loss_inputs}

    def find_columns(self, batches: Sequence[Batch]) -> None:
        """Decide which columns the loss gets: those of at most two dimensions whose rows all have the same shape.

        Args:
            batches: batches of rows of different lengths.
        """
        named = [_columns_of(batch) for batch in batches]
        in_all = [name for name in named[0] if all(name in columns for columns in named)]
        shapes = {name: {columns[name].shape[1:] for columns in named} for name in in_all}
        self._columns = frozenset(
            name
            for name, found in shapes.items()
            if len(found) == 1 and name not in TOKEN_COLUMNS
            if name == _ONLY or all(len(shape) < _MOST_DIMENSIONS for shape in found)
        )

    def forward(self, outputs: Any, batch: Batch, places: Sequence[int] = ()) -> Any:
        """Return the loss of the rows of one batch.

        Args:
            places: the positions of the rows in their window; empty if they are in order.
        """
        values = self.read(outputs, batch)
        if places:
            order = torch.tensor(places).argsort()
            values = {name: value[order.to(value.device)] for name, value in values.items()}
        return self.loss(values)

    def read(self, outputs: Any, batch: Batch) -> Values:
        """Return the inputs and the columns of the loss, by name.

        Raises:
            DataError: if `loss_inputs` raises an error, or the inputs are not tensors with one entry per row.
        """
        n_rows = rows_of(batch)
        given = outputs
        if self._loss_inputs is not None:
            given = _called("loss_inputs", self._loss_inputs, outputs, batch, "The outputs are", "the batch is")
        inputs = _inputs_of(given, has_function=self._loss_inputs is not None)
        for name, value in inputs.items():
            _refuse_complex(name, value)
            _check_rows(name, value, n_rows, has_function=self._loss_inputs is not None)
        columns = {n: v for n, v in _columns_of(batch).items() if self._columns is None or n in self._columns}
        return {_INPUT + n: v for n, v in inputs.items()} | {_COLUMN + n: v for n, v in columns.items()}

    def loss(self, values: Values) -> Any:
        """Return the loss of all rows, as `loss_fn` returns it, which may change what it is given in place.

        Raises:
            DataError: if `loss_fn` raises an error.
            SettingsError: if it returns neither a number nor a dict of numbers.
        """
        copies = {name: value.clone() for name, value in values.items()}
        inputs, columns = _with_prefix(copies, _INPUT), _with_prefix(copies, _COLUMN)
        given = inputs.get(_ONLY, inputs), columns.get(_ONLY, _Columns(columns))
        found = _called("loss_fn", self.loss_fn, *given, "The inputs of all rows are", "the columns are")
        terms = found if isinstance(found, Mapping) else {"": found}
        if not terms or not all(isinstance(term, Tensor) and term.numel() == 1 for term in terms.values()):
            raise SettingsError([_NO_NUMBER.format(found=_described(found))])
        return found

    @staticmethod
    def inputs(values: Values) -> dict[str, Tensor]:
        """Return the inputs among the values of a micro-batch."""
        return {name: value for name, value in values.items() if name.startswith(_INPUT)}

    @staticmethod
    def describe(name: str) -> str:
        """Return how messages name a value."""
        kind, key = (_INPUT, name[len(_INPUT) :]) if name.startswith(_INPUT) else (_COLUMN, name[len(_COLUMN) :])
        if kind == _COLUMN:
            return f"column {key!r}"
        return "the tensor from `loss_inputs`" if key == _ONLY else f"{key!r} among the inputs of the loss"


class _Columns(dict[str, Tensor]):
    """The columns of all rows of a window."""

    def __missing__(self, name: str) -> Tensor:
        raise DataError(
            f"`loss_fn` reads column {name!r} of the batch, but with `loss_over='window'` it only gets columns of at "
            f"most {_MOST_DIMENSIONS} dimensions whose rows all have the same shape: {sorted(self)}. Return what it "
            "needs from `loss_inputs`."
        )


_NO_NUMBER = (
    "With `loss_over='window'`, `loss_fn` must return one number for all rows of an update as a tensor, or a dict of "
    "such numbers by name, but returns {found}. Return a mean over rows, as the tensor itself (without `.item()`)."
)


def _called(name: str, function: Callable[[Any, Any], Any], first: Any, batch: Any, *described: str) -> Any:
    """Call a function of the user.

    Args:
        described: how a message introduces each of the two arguments.

    Raises:
        DataError: if it raises an error, with the shapes of what it was given.
    """
    try:
        return function(first, batch)
    except (DataError, SettingsError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        given = ", ".join(
            f"{words} {_described(value)}" for words, value in zip(described, (first, batch), strict=True)
        )
        raise DataError(f"`{name}` raised {error!r}. {given}.") from error


def _described(value: Any) -> str:
    """Return the shapes of the tensors in a value, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return str(
            {str(key): tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for key, v in value.items()}
        )
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of ({', '.join(map(_described, value))})"
    return type(value).__name__


def _inputs_of(given: Any, *, has_function: bool) -> dict[str, Tensor]:
    """Return the inputs of the loss by name."""
    if isinstance(given, Tensor):
        return {_ONLY: given}
    if isinstance(given, Mapping) and given:
        found = {str(name): value for name, value in given.items() if has_function or value is not None}
        if all(isinstance(value, Tensor) for value in found.values()):
            return found
        kinds = {name: type(value).__name__ for name, value in found.items() if not isinstance(value, Tensor)}
        if not has_function:
            raise DataError(
                f"With `loss_over='window'` and no `loss_inputs`, all outputs of the model must be tensors, but "
                f"{_listed(kinds)}. Give `loss_inputs`: a function of the outputs and the batch that returns what the "
                "loss reads, as a tensor or a dict of tensors."
            )
        raise DataError(f"`loss_inputs` must return a tensor or a dict of tensors, but {_listed(kinds)}.")
    source = "`loss_inputs` returns" if has_function else "without `loss_inputs`, the model returns"
    raise DataError(
        f"With `loss_over='window'`, the loss reads a tensor or a dict of tensors, but {source} "
        f"{type(given).__name__}. Let `loss_inputs(outputs, batch)` return the tensors that `loss_fn` reads."
    )


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name!r} is {kind}" for name, kind in kinds.items())


def _refuse_complex(name: str, value: Tensor) -> None:
    if value.is_complex():
        raise DataError(
            f"With `loss_over='window'`, the inputs of the loss must be real numbers, but "
            f"{WindowLoss.describe(_INPUT + name)} is {value.dtype}. Return `torch.view_as_real(x)` from `loss_inputs`."
        )


def _check_rows(name: str, value: Tensor, n_rows: int, *, has_function: bool) -> None:
    if value.ndim and value.shape[0] == n_rows:
        return
    described = WindowLoss.describe(_INPUT + name) if has_function else f"the output {name!r}"
    raise DataError(
        f"With `loss_over='window'`, each input of the loss must have one entry per row first, but {described} has "
        f"the shape {tuple(value.shape)} for {n_rows} rows. "
        + ("Return" if has_function else "Give `loss_inputs`: a function of the outputs and the batch that returns")
        + " what each row contributes, such as its embedding; `loss_fn` compares rows with each other."
    )


def _columns_of(batch: Batch) -> dict[str, Tensor]:
    """Return the columns of a batch, or the targets of an (inputs, targets) pair."""
    if isinstance(batch, Mapping):
        n_rows = rows_of(batch)
        named = {str(name): value for name, value in batch.items() if isinstance(value, Tensor)}
        return {name: value for name, value in named.items() if value.ndim and value.shape[0] == n_rows}
    targets = batch[1]
    if isinstance(targets, Tensor):
        return {_ONLY: targets}
    if isinstance(targets, Mapping):
        return {str(name): value for name, value in targets.items() if isinstance(value, Tensor)}
    if tensors_of(targets):
        raise DataError(
            f"With `loss_over='window'`, the targets of a batch must be a tensor or a dict of tensors, but are "
            f"{type(targets).__name__}. Return one of these from `data_collator`."
        )
    return {}


def _with_prefix(values: Values, prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in values.items() if name.startswith(prefix)}
