"""The console output of a search: a heading, a progress bar, a line for each trial that ends, and the result."""

from types import TracebackType

from optuna import Study
from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage

from ...runtime.progress_bar import can_draw_bars, print_above_bars, tqdm
from .definition import Search
from .retry import n_counted
from .space import Space
from .study import criterion_of, has_heartbeat, hide_password
from .tables import format_table, format_trial, summarize, trial_rows

_RULE = "=" * 64


class SearchProgress:
    """The progress of a study over all its workers, printed to standard output."""

    def __init__(self, study: Study, search: Search, storage: BaseStorage, num_processes: int) -> None:
        self._study, self._search, self._storage, self._num_processes = study, search, storage, num_processes
        self._shown = {t.number for t in study.get_trials(deepcopy=False) if t.state.is_finished()}

    def __enter__(self) -> "SearchProgress":
        n_trials, n_ended = self._search.settings.n_trials, n_counted(self._study)
        shown = self._search.progress and not self._search.is_quiet and can_draw_bars()
        self._print(_RULE, "SEARCH", _RULE, *self._heading(n_ended), _RULE)
        self._bar = tqdm(total=n_trials, desc="trials", initial=n_ended, disable=not shown, position=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if kind is None:
            folder = self._search.folder
            outputs = [] if folder is None else [f"outputs               {folder}"]
            self._print(_RULE, format_table(trial_rows(self._study)), _RULE, summarize(self._study), *outputs, _RULE)

    def update(self) -> None:
        """Show the trials that have ended since the last call."""
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.number not in self._shown:
                self._shown.add(trial.number)
                self._print(format_trial(trial, criterion_of(self._study)))
        self._bar.n = n_counted(self._study)
        self._bar.refresh()

    def _heading(self, n_ended: int) -> list[str]:
        search, settings = self._search, self._search.settings
        unit = search.batch_size(self._num_processes)
        batches = ", ".join(f"{k} ({k * unit})" for k in search.space.candidates())
        lines = [
            f"Trials: {settings.n_trials}" + (f", {n_ended} of them already done" if n_ended else ""),
            f"Batch size: {search.fixed['batch_size']}",
            f"Processes of a trial: {self._num_processes}",
            f"Gradient accumulation steps (effective batch size): {batches}",
            f"Learning rate: {_describe_rate(search.space)}",
            f"Best trial: {'highest' if search.criterion.greater_is_better else 'lowest'} {search.criterion.name}",
            f"Each trial: n_epochs {search.fixed['n_epochs']}, the same rows in the same order, evaluated up to "
            f"{settings.n_reports} times",
            f"Pruning: {'none, because of two objectives' if settings.trade_time else settings.pruner}; "
            f"proposals: {settings.sampler}",
            f"Study: {self._study.study_name!r} in {_describe_storage(self._storage)}",
        ]
        if not has_heartbeat(self._storage):
            lines.append("Note: this storage has no heartbeat, so a worker's death is only noticed on its own machine")
        return lines

    def _print(self, *lines: str) -> None:
        if not self._search.is_quiet:
            print_above_bars("\n".join(lines))


def _describe_rate(space: Space) -> str:
    if not isinstance(space.rate, FloatDistribution):
        return f"{space.rate:g}"
    scale = {
        "none": "",
        "sqrt": ", × √(effective batch / reference batch)",
        "linear": ", × effective batch / reference batch",
    }
    return f"{space.rate.low:g} to {space.rate.high:g}{scale[space.couple_learning_rate]}"


def _describe_storage(storage: BaseStorage) -> str:
    engine = getattr(storage, "engine", None)
    return hide_password(str(engine.url)) if engine is not None else type(storage).__name__
