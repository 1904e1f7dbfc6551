"""Record what happens in a run: in the ledger, the trackers and the progress bar."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from ..insight.curves import with_loss
from ..objective.normalizer import WeightedMeans, gathered_with
from ..planning.batch_size import BatchSizes
from .ledger import AuditEntry, EpochEntry, EvaluationEntry, Ledger, WindowEntry
from .log_period import LogPeriod
from .noise_scale import NoiseScaleRecorder, tracked
from .progress import Progress
from .running_loss import RunningLoss
from .step import NoiseMeasurement, StepResult
from .trackers import run_trackers

# Losses stay on the device until this many windows are read at once.
_DRAIN_EVERY = 10
OnLog = Callable[[dict[str, float], int], None]


class MetricsLogger:
    """A recorder for the outcomes of a run, in order.

    All processes make the same calls. Only the main process has the ledger's file and the trackers, and shows progress.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        ledger: Ledger,
        progress: Progress,
        batch_sizes: BatchSizes,
        log_every: int,
        on_log: OnLog,
        noise_scale: NoiseScaleRecorder,
    ) -> None:
        """Create a logger.

        Args:
            log_every: number of updates between two entries for the trackers.
            on_log: called with each of these entries and the number of updates before it, on all processes.
        """
        self.ledger = ledger
        self._accelerator, self._progress = accelerator, progress
        self._batch_sizes, self._log_every, self._on_log = batch_sizes, log_every, on_log
        self._noise_scale = noise_scale
        self._pending: list[StepResult] = []
        self.n_epochs = 0
        self._epoch_loss, self._evaluation_loss, self._period = RunningLoss(), RunningLoss(), LogPeriod()
        self._ended: tuple[int, dict[str, Any]] | None = None  # the last epoch that had losses
        self._before_evaluation: dict[str, Any] | None = None  # the loss up to the last evaluation
        self._started = time.perf_counter()

    def window(self, outcome: StepResult) -> None:
        """Record a window's outcome. Every few windows, read the losses of those recorded so far."""
        self._pending.append(outcome)
        self._progress.advance()
        if len(self._pending) == _DRAIN_EVERY or self.n_windows % self._log_every == 0:
            self.drain()

    def epoch(self) -> EpochEntry:
        """End an epoch. Its training loss is the mean over the loss items of all windows that were not skipped."""
        self.drain()
        if (state := self._epoch_loss.state_dict()) is not None:
            self._ended = self.n_epochs, state
        entry = EpochEntry(self.n_epochs, self._epoch_loss.take())
        self.ledger.record(entry)
        values = {"epoch": entry.epoch + 1, "train/epoch_loss": entry.train_loss}
        sizes = self._batch_sizes.at(max(0, len(self.ledger.windows) - 1))  # of the last update
        values |= {f"config/{name}": size for name, size in _sizes(sizes).items()}
        self._accelerator.log(values, step=len(self.ledger.windows))
        self.n_epochs += 1
        return entry

    @property
    def is_in_epoch(self) -> bool:
        """Whether an epoch has begun and not ended."""
        return bool(self.ledger.windows) and self.ledger.windows[-1].epoch == self.n_epochs

    def evaluation(self, val_loss: float, metrics: dict[str, float]) -> EvaluationEntry:
        """Record an evaluation of the current weights."""
        self.drain()
        windows = self.ledger.windows
        epoch, rows = windows[-1].epoch if windows else 0, sum(window.rows for window in windows)
        self._before_evaluation = self._evaluation_loss.state_dict()
        entry = EvaluationEntry(len(windows), epoch, rows, self._evaluation_loss.take(), val_loss, metrics)
        self.ledger.record(entry)
        values = {f"val/{name}": value for name, value in with_loss(val_loss, metrics, "loss").items()}
        self._accelerator.log(values, step=len(windows))
        return entry

    def audit(self, entry: AuditEntry) -> None:
        """Record an audit after the windows before it."""
        self.drain()
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
            "losses": self._epoch_loss.state_dict(),
            "ended": None if ended is None else {"epoch": ended[0], "losses": ended[1]},
            "since_evaluation": self._evaluation_loss.state_dict(),
            "before_evaluation": self._before_evaluation,
            "since_log": self._period.state_dict(),
            "noise_scale": self._noise_scale.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ended = state_dict["ended"]
        self.n_epochs = state_dict["epoch"]
        self._started = time.perf_counter() - state_dict["seconds"]
        self._epoch_loss.load_state_dict(state_dict["losses"])
        self._ended = None if ended is None else (ended["epoch"], ended["losses"])
        self._evaluation_loss.load_state_dict(state_dict["since_evaluation"])
        self._before_evaluation = state_dict["before_evaluation"]
        self._period.load_state_dict(state_dict["since_log"])
        self._noise_scale.load_state_dict(state_dict.get("noise_scale", {}))
        self._progress.advance(len(self.ledger.windows))

    def drain(self) -> None:
        """Read the losses of the windows recorded so far, and write their entries. All processes take part."""
        outcomes, self._pending = self._pending, []
        numbers = [self._numbers(outcome) for outcome in outcomes]
        found = gathered_with([outcome.losses for outcome in outcomes], numbers, self._accelerator)
        for outcome, (losses, (tokens, positions, *peaks)) in zip(outcomes, found, strict=True):
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
                tokens=tokens,
                positions=positions,
                clip_coefficient=outcome.clip_coefficient,
                data_seconds=outcome.seconds.data,
                pass_seconds=outcome.seconds.passes,
                optimizer_seconds=outcome.seconds.optimizer,
                peak_memory=max(peaks),
            )
            self.ledger.record(entry)
            self._add(entry, losses)
            if outcome.noise is not None:
                self._add_noise(entry, outcome.noise)
        if outcomes:
            self._progress.show(entry)

    def _numbers(self, outcome: StepResult) -> list[int]:
        """Return whole numbers of an outcome whose sums over all processes are wanted.

        These are tokens, positions, and the peak memory of each process, which is 0 on all others.
        """
        peaks = [0] * self._accelerator.num_processes
        peaks[self._accelerator.process_index] = outcome.peak_memory
        return [outcome.work.tokens, outcome.work.positions, *peaks]

    def log(self) -> None:
        """Give the trackers an entry on the updates since the last one, if there were any."""
        self.drain()
        if self._period.n_updates:
            self._end_period()

    def _add(self, entry: WindowEntry, losses: WeightedMeans) -> None:
        self._period.add(entry, losses)
        if not entry.skipped:
            self._epoch_loss.add(losses)
            self._evaluation_loss.add(losses)
        if len(self.ledger.windows) % self._log_every == 0:
            self._end_period()

    def _add_noise(self, window: WindowEntry, noise: NoiseMeasurement) -> None:
        rows = self._batch_sizes.at(window.window).effective_batch_size
        entry = self._noise_scale.entry(window, noise, rows)
        if entry is not None:
            self.ledger.record(entry)
            self._accelerator.log(tracked(entry), step=entry.noise_scale)

    def _end_period(self) -> None:
        values, work, n_updates = self._period.values(), self._period.work(), len(self.ledger.windows)
        self._period = LogPeriod()
        tracked = {f"train/{name}": value for name, value in {**values, **work}.items()}
        self._accelerator.log(tracked, step=n_updates)
        self._on_log(values, n_updates)


def within(state_dict: Mapping[str, Any], epoch: int, *, drops_evaluation: bool) -> dict[str, Any]:
    """Return a logger's state for a run that continues in an epoch that the earlier run had ended.

    Args:
        drops_evaluation: whether the last evaluation is dropped too.
    """
    ended = state_dict["ended"]
    losses = ended["losses"] if ended is not None and ended["epoch"] == epoch else None
    changed = {"epoch": epoch, "losses": losses, "ended": None}
    if drops_evaluation:
        changed["since_evaluation"] = state_dict["before_evaluation"]
    return {**state_dict, **changed}


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


def _sizes(batch_sizes: BatchSizes) -> dict[str, int]:
    return {
        "effective_batch_size": batch_sizes.effective_batch_size,
        "gradient_accumulation_steps": batch_sizes.gradient_accumulation_steps,
        "physical_batch_size": batch_sizes.batch_size,
    }
