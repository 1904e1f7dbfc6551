"""Record what happens in a run: in the ledger, the trackers and the progress bar."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..objective.normalizer import WeightedMeans, gathered
from ..planning.batch_size import BatchSizes
from .ledger import AuditEntry, EpochEntry, Ledger, WindowEntry
from .step import StepResult
from .throughput import Throughput
from .trackers import run_trackers

# Losses stay on the device until this many windows are read at once.
_DRAIN_EVERY = 10


class MetricsLogger:
    """A recorder for the outcomes of a run, in order.

    All processes make the same calls. Only the main process has the ledger's file, the trackers and the bar.
    """

    def __init__(self, accelerator: Accelerator, ledger: Ledger, bar: tqdm, batch_sizes: BatchSizes) -> None:
        self.ledger, self.throughput = ledger, Throughput()
        self._accelerator, self._bar = accelerator, bar
        self._batch_sizes = batch_sizes
        self._pending: list[StepResult] = []
        self.n_epochs = 0
        self._epoch_losses: WeightedMeans | None = None
        self._ended: tuple[int, WeightedMeans] | None = None  # the last epoch that had losses
        self._started = time.perf_counter()

    def window(self, outcome: StepResult) -> None:
        """Record a window's outcome. Every few windows, read the losses of those recorded so far."""
        self.throughput.merge(outcome.work)
        self._pending.append(outcome)
        self._bar.update()
        if len(self._pending) == _DRAIN_EVERY:
            self.drain()

    def epoch(self, val_loss: float | None, metrics: dict[str, float]) -> EpochEntry:
        """End an epoch. Its training loss is the mean over the loss items of all windows that were not skipped."""
        self.drain()
        train_loss = self._epoch_losses.total() if self._epoch_losses is not None else float("nan")
        entry = EpochEntry(self.n_epochs, train_loss, val_loss, metrics)
        self.ledger.record(entry)
        values: dict[str, Any] = {"epoch": entry.epoch + 1, "train/epoch_loss": train_loss}
        values |= {} if val_loss is None else {"val/loss": val_loss}
        values |= {f"val/{name}": value for name, value in metrics.items()}
        sizes = self._batch_sizes.at(max(0, len(self.ledger.windows) - 1))  # of the last update
        values |= {f"config/{name}": size for name, size in _sizes(sizes).items()}
        self._accelerator.log(values, step=len(self.ledger.windows))
        if self._epoch_losses is not None:
            self._ended = self.n_epochs, self._epoch_losses
        self.n_epochs, self._epoch_losses = self.n_epochs + 1, None
        return entry

    def audit(self, entry: AuditEntry) -> None:
        """Record an audit after the windows before it. Its time does not count as training."""
        self.drain()
        self.throughput.seconds -= entry.seconds
        self.ledger.record(entry)
        values = {"audit/error": entry.error, "audit/loss_error": entry.loss_error}
        self._accelerator.log(values, step=entry.audit - 1)

    @property
    def n_windows(self) -> int:
        """Number of windows that are done."""
        return len(self.ledger.windows) + len(self._pending)

    @property
    def seconds(self) -> float:
        """Seconds of training and evaluation, over all parts of an interrupted run."""
        return time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        """Return the state. Call `drain` before."""
        ended = self._ended
        return {
            "epoch": self.n_epochs,
            "seconds": self.seconds,
            "losses": None if self._epoch_losses is None else _as_lists(self._epoch_losses),
            "ended": None if ended is None else {"epoch": ended[0], "losses": _as_lists(ended[1])},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        losses, ended = state_dict["losses"], state_dict["ended"]
        self.n_epochs = state_dict["epoch"]
        self._started = time.perf_counter() - state_dict["seconds"]
        self._epoch_losses = None if losses is None else _of_lists(losses)
        self._ended = None if ended is None else (ended["epoch"], _of_lists(ended["losses"]))
        self._bar.update(len(self.ledger.windows))

    def drain(self) -> None:
        """Read the losses of the windows recorded so far, and write their entries. All processes take part."""
        outcomes, self._pending = self._pending, []
        for outcome, losses in zip(outcomes, gathered([o.losses for o in outcomes], self._accelerator), strict=True):
            terms = losses.read()
            entry = WindowEntry(
                window=len(self.ledger.windows),
                epoch=self.n_epochs,
                rows=outcome.rows,
                loss=losses.total(),
                terms=terms if len(terms) > 1 else {},
                grad_norm=outcome.grad_norm,
                learning_rate=outcome.learning_rate,
                skipped=outcome.skipped,
                passes=outcome.work.passes,
            )
            self.ledger.record(entry)
            self._log(entry)
            if not outcome.skipped:
                self._add_to_epoch(losses)
        if outcomes:
            self._bar.set_postfix(loss=f"{entry.loss:.4f}", norm=f"{entry.grad_norm:.3f}", refresh=False)

    def _log(self, entry: WindowEntry) -> None:
        values = {
            "train/loss": entry.loss,
            "train/grad_norm": entry.grad_norm,
            "train/learning_rate": entry.learning_rate,
            "train/skipped": int(entry.skipped),
        } | {f"train/terms/{term}": value for term, value in entry.terms.items()}
        self._accelerator.log(values, step=entry.window + 1)

    def _add_to_epoch(self, losses: WeightedMeans) -> None:
        if self._epoch_losses is None:
            self._epoch_losses = losses
        else:
            self._epoch_losses.merge(losses)


def within(state_dict: Mapping[str, Any], epoch: int) -> dict[str, Any]:
    """Return a logger's state for a run that continues in an epoch that the earlier run had ended."""
    ended = state_dict["ended"]
    losses = ended["losses"] if ended is not None and ended["epoch"] == epoch else None
    return {**state_dict, "epoch": epoch, "losses": losses, "ended": None}


@contextmanager
def tracking(accelerator: Accelerator, settings: Mapping[str, Any], batch_sizes: BatchSizes) -> Iterator[None]:
    """Start the trackers with a run's settings, isolate them from the run, and finish them whatever happens."""
    plain = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
    schedule = ",".join(
        f"{update}:{k}" for update, k in ((0, batch_sizes.gradient_accumulation_steps), *batch_sizes.later)
    )
    grows = {"accumulation_schedule": schedule} if batch_sizes.later else {}
    with run_trackers(accelerator, plain | _sizes(batch_sizes) | grows):
        yield


def _as_lists(losses: WeightedMeans) -> dict[str, Any]:
    return {"terms": losses.terms, "sums": losses.sums_T.tolist(), "items": losses.items_T.tolist()}


def _of_lists(saved: Mapping[str, Any]) -> WeightedMeans:
    losses = WeightedMeans(saved["terms"], torch.device("cpu"))
    losses.sums_T = torch.tensor(saved["sums"], dtype=losses.sums_T.dtype)
    losses.items_T = torch.tensor(saved["items"], dtype=losses.items_T.dtype)
    return losses


def _sizes(batch_sizes: BatchSizes) -> dict[str, int]:
    return {
        "effective_batch_size": batch_sizes.effective_batch_size,
        "gradient_accumulation_steps": batch_sizes.gradient_accumulation_steps,
        "physical_batch_size": batch_sizes.batch_size,
    }
