"""Evaluate a run after the updates where that is due."""

from collections.abc import Callable

from ..planning.base_plan import BasePlan
from ..planning.evaluation_schedule import EvaluationSchedule
from ..runtime.log import logger
from ..tracking.console import Console
from ..tracking.ledger import EvaluationEntry
from ..tracking.metrics_logger import MetricsLogger
from .best_evaluation import BestEvaluation

Measure = Callable[[], tuple[float, dict[str, float]] | None]
OnEvaluation = Callable[[EvaluationEntry], None]


class Evaluator:
    """Evaluates a run on its validation rows after the updates where this is due.

    An evaluation changes no state of the run, random generators included. So a run with more evaluations trains the
    same weights.

    Attributes:
        improved: whether the run was evaluated after its last update, with the best value so far.
    """

    def __init__(
        self,
        plan: BasePlan,
        schedule: EvaluationSchedule,
        measure: Measure,
        metrics_logger: MetricsLogger,
        best: BestEvaluation,
        console: Console,
        on_evaluation: OnEvaluation,
    ) -> None:
        """Create an evaluator.

        Args:
            measure: returns the validation loss and the metrics of the current weights; None if there are no
                validation rows.
            on_evaluation: called with each evaluation after the first update.
        """
        self._plan, self._schedule, self._measure = plan, schedule, measure
        self._metrics_logger, self._best, self._console = metrics_logger, best, console
        self._on_evaluation = on_evaluation
        self.improved = False
        self._is_requested = False  # after an update that ends its epoch

    def before_training(self) -> None:
        """Evaluate a new run before its first update, which also lets a faulty metric fail now."""
        if (entry := self._evaluate()) is not None:
            self._best.criterion.check(entry.metrics)

    def after_update(self, *, requested: bool) -> bool:
        """Evaluate if that is due or requested, and return whether it was.

        If the update ends its epoch, leave this to `after_epoch`.
        """
        self.improved = False
        self._is_requested = requested
        if not (requested or self._is_due()) or self._plan.ends_epoch(self._n_updates):
            return False
        self._evaluate_again()
        return True

    def after_epoch(self, *, always: bool, requested: bool) -> None:
        """Evaluate at the end of an epoch if that is due or requested.

        Args:
            always: whether to evaluate even if the schedule does not say so.
        """
        if always or requested or self._is_requested or self._is_due():
            self._evaluate_again()
        self._is_requested = False

    @property
    def _n_updates(self) -> int:
        return self._metrics_logger.n_windows

    @property
    def _last(self) -> int:
        """Number of updates at the last evaluation."""
        evaluations = self._metrics_logger.ledger.evaluations
        return evaluations[-1].evaluation if evaluations else 0

    def _is_due(self) -> bool:
        return self._schedule.is_due(self._n_updates, self._last)

    def _evaluate_again(self) -> None:
        if self._last < self._n_updates and (entry := self._evaluate()) is not None:
            if not self._best.criterion.is_known(entry):
                logger.warning(
                    f"`compute_metrics` returned no {self._best.criterion.name!r} after update {entry.evaluation}, so "
                    "this evaluation cannot be the best. Let it return the same metrics each time."
                )
            self.improved = self._best.update()
            self._on_evaluation(entry)

    def _evaluate(self) -> EvaluationEntry | None:
        self._metrics_logger.drain()  # the run may end here, and the ledger must then have all of its updates
        measured = self._measure()
        if measured is None:
            return None
        entry = self._metrics_logger.evaluation(*measured)
        self._console.evaluation(entry, self._plan)
        return entry
