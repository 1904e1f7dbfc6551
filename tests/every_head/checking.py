"""The check of one class: the gradient of accumulated windows against that of one batch in plain PyTorch."""

import contextlib
import gc
import io
import logging
import math
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from exactness import accumulated_gradients, windows_of
from ftaccum import DataError, InexactLossWarning, SettingsError
from heads import IGNORED, Row, one_batch, relative_error

from .rows import accepted
from .tasks import Case
from .tiny import TINY_SIZES, tiny_config, tiny_model

WINDOWS = {"batch_size": 2, "gradient_accumulation_steps": 3}  # 9 rows: 6 and 3, so the last micro-batch is short
TOLERANCE = 1e-9

Kind = Literal["exact", "exact with a remedy", "caught", "not buildable", "crashed", "SILENTLY WRONG"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """The outcome of a case.

    Attributes:
        why: the remedy, ftaccum's message, the reason why the model cannot be built, or the failure.
        error: the largest relative error of any window's gradient; None if there is no gradient.
        logits: the positions at which logits are computed, and the reason if these are not the labelled ones.
        last_layer: the positions at which the last layer is computed, and the reason if these are all.
    """

    task: str
    name: str
    variant: str
    kind: Kind
    why: str = ""
    error: float | None = None
    logits: str = ""
    last_layer: str = ""


class _PositionsHandler(logging.Handler):
    """A handler that collects the messages of a run about the positions of its logits and of its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.last_layer = "", ""

    def emit(self, record: logging.LogRecord) -> None:
        subject, found, text = record.getMessage().removesuffix(".").partition(" computed ")
        if found and subject == "Logits are":
            self.logits = text
        elif found and subject == "The last layer is":
            self.last_layer = text


@dataclass(frozen=True)
class _Built:
    """A tiny model, rows for it, their windows, and the gradient of each window in plain PyTorch."""

    model: nn.Module
    rows: list[Row]
    windows: list[list[Row]]
    wanted: list[Gradient]

    def as_sum(self) -> "_Built":
        """Return the same for a loss that is a sum: the expected gradient is that of its mean over the labels."""
        items = [
            sum(int((torch.as_tensor(row["labels"]) != IGNORED).sum()) for row in window) for window in self.windows
        ]
        means = [{name: g / n for name, g in sums.items()} for sums, n in zip(self.wanted, items, strict=True)]
        return replace(self, wanted=means)


class _NotBuildableError(Exception): ...


class _TimeOutError(BaseException):
    """Derived from BaseException, since models and ftaccum may catch an Exception."""


def check(case: Case, limit: int = 60, **arguments: Any) -> Verdict:
    """Build the class of a case, train it on fixed weights, and compare its gradients with one batch.

    Args:
        limit: seconds after which the check is given up.
        arguments: of `test_fine_tuning`.
    """
    built, handler = None, _PositionsHandler()
    logger = logging.getLogger("ftaccum")
    logger.addHandler(handler)
    try:
        with _time_limit(limit), _in_float64(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = _built(case)
            kind, why, error = _judged(built, **arguments)
    except _NotBuildableError as reason:
        kind, why, error = "not buildable", str(reason), None
    except _TimeOutError:
        kind, why, error = "crashed" if built else "not buildable", f"took longer than {limit} s", None
    finally:
        logger.removeHandler(handler)
        gc.collect()
    why = " ".join(why.split())
    found = handler.logits, handler.last_layer
    return Verdict(case.task, case.model_class.__name__, case.variant, kind, why, error, *found)


def _judged(built: _Built, **arguments: Any) -> tuple[Kind, str, float | None]:
    """Return the verdict. If a warning advises `reduction='sum'`, try that too."""
    kind, why, error = _trained(built, **arguments)
    if kind == "caught" and "`reduction='sum'`" in why:
        remedied, more, error_then = _trained(built.as_sum(), reduction="sum", **arguments)
        if remedied in ("exact", "exact with a remedy"):
            return (
                "exact with a remedy",
                "; ".join(filter(None, ["reduction='sum', as the warning says", more])),
                error_then,
            )
    return kind, why, error


def _trained(built: _Built, **arguments: Any) -> tuple[Kind, str, float | None]:
    """Return how a run with these arguments ends for a user, and the error of its gradients."""
    console, error, crash = io.StringIO(), None, ""
    with warnings.catch_warnings(record=True) as told, contextlib.redirect_stdout(console):
        warnings.simplefilter("always")
        try:
            found = accumulated_gradients(built.model, built.rows, verbosity="debug", **WINDOWS, **arguments)
            error = _largest_error(found, built.wanted)
        except (DataError, SettingsError) as refusal:
            return "caught", f"{type(refusal).__name__}: {refusal}", None
        except Exception as other:
            crash = _describe(other)
    warned = [str(w.message) for w in told if issubclass(w.category, InexactLossWarning)]
    if warned:
        false_alarm = "(though it is exact) " if error is not None and error <= TOLERANCE else ""
        return "caught", false_alarm + warned[0], error
    if error is None:
        return "crashed", crash, None
    if not error <= TOLERANCE:
        counted = next((line for line in console.getvalue().splitlines() if line.startswith("Loss:")), "")
        return "SILENTLY WRONG", f"the gradient is {error:.1e} off. {counted}", error
    if "one length per update" in console.getvalue():
        return "exact with a remedy", "one padded length per update, by itself", error
    return "exact", "", error


def _largest_error(found: Sequence[Gradient], wanted: Sequence[Gradient]) -> float:
    """Return the largest error of the windows: infinite if one was skipped or a gradient is not finite."""
    if len(found) != len(wanted):
        return math.inf
    errors = [relative_error(f, w) for f, w in zip(found, wanted, strict=True)]
    return max(e if math.isfinite(e) else math.inf for e in errors)


def _built(case: Case) -> _Built:
    """Build the smallest model that runs, with the first kind of rows that it accepts.

    Raises:
        _NotBuildableError: with the last error, if no model runs or no gradient can be compared.
    """
    error: Exception = ValueError("there is no way to draw a row")
    for size in TINY_SIZES:
        try:
            config = tiny_config(case.config_class, size, case.how.settings, case.how.switches)
            model = tiny_model(case.model_class, config)
        except Exception as unfit:
            error = unfit
            continue
        for rows in case.how.rows_for(model):
            try:
                windows = windows_of(rows, **WINDOWS)
                wanted = [one_batch_gradient(model, window) for window in windows]
                again = one_batch_gradient(model, windows[0], seed=1)
            except Exception as unfit:
                error = unfit
                continue
            norms = [sum(float((g**2).sum()) for g in gradient.values()) for gradient in wanted]
            if not all(0 < norm < math.inf for norm in norms):
                raise _NotBuildableError(f"the squared norms of its gradients in plain PyTorch are {norms}")
            if relative_error(again, wanted[0]) > TOLERANCE:
                raise _NotBuildableError("its forward pass draws at random, though dropout is off")
            return _Built(model, rows, windows, wanted)
    raise _NotBuildableError(_describe(error))


def one_batch_gradient(model: nn.Module, rows: Sequence[Row], seed: int = 0) -> Gradient:
    """Return the gradient of the model's own loss over a batch of all rows, and restore buffers and generators."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batch = {name: value for name, value in one_batch(rows).items() if name in accepted(model)}
    model.train()
    model.zero_grad()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            loss = getattr(model(**batch), "loss", None)
            if loss is None:
                raise ValueError("it is given labels, and computes no loss")
            loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    finally:
        model.zero_grad()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])


def _describe(error: Exception) -> str:
    """Describe an error with the line that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/transformers/" in f.filename]
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


class _NoFloat32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            return args[0].double()
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    """Replace float32 by float64 everywhere, so that only the error of the accumulation is left.

    `heads.all_in_float64` does not cover calls that name their dtype. This does, but does not work with checkpointing.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _NoFloat32():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TimeOutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
