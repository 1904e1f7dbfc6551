"""The best evaluation of a run: keep its weights, and stop the run when there is no better one for long."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import nn

from ..checkpoint.best_weights import BestWeights
from ..runtime.log import logger
from ..tracking.ledger import EvaluationEntry
from ..tracking.selection import Criterion


class BestEvaluation:
    """Follows the evaluations of a run: keeps the weights of the best one, and decides when to stop early."""

    def __init__(
        self,
        criterion: Criterion,
        weights: BestWeights,
        model: nn.Module,
        evaluation_weights: Callable[[], AbstractContextManager[None]],
        evaluations: Sequence[EvaluationEntry],
        patience: int | None,
    ) -> None:
        """Follow the evaluations of a run.

        Args:
            evaluation_weights: returns a context in which the model has the weights that are evaluated.
            evaluations: all evaluations so far. The caller adds to them.
            patience: number of evaluations without improvement after which to stop; None for never.
        """
        self.criterion, self._weights = criterion, weights
        self._model, self._evaluation_weights = model, evaluation_weights
        self._evaluations, self._patience = evaluations, patience

    def update(self) -> bool:
        """Take the last evaluation into account, and return whether it is the best so far."""
        known = self._candidates()
        if not known or self.criterion.best(known) is not known[-1]:
            return False
        with self._evaluation_weights():
            self._weights.keep(self._model, known[-1].evaluation)
        return True

    @property
    def stops(self) -> bool:
        """Whether the run should stop early."""
        if self._patience is None:
            return False
        return self.criterion.n_without_improvement(self._evaluations) >= self._patience

    def describe_stop(self) -> str:
        """Return a message on why training stopped early."""
        name = self.criterion.name
        if self.criterion.best(self._evaluations) is None:
            return f"Stopped early: no finite {name} in {self._patience} evaluations, so there is no best evaluation."
        return f"Stopped early: no better {name} in {self._patience} evaluations."

    def restore(self) -> int | None:
        """Load the kept weights, if any, into the model, and return the number of updates that they have had."""
        best = self.criterion.best(self._candidates())
        if best is None or not self._weights.restore(self._model):
            return None
        value = self.criterion.value(best)
        logger.info(f"Restored the weights of update {best.evaluation}, with {self.criterion.name} {value:.4f}.")
        return best.evaluation

    def _candidates(self) -> list[EvaluationEntry]:
        """Return the evaluations whose weights are known."""
        return [entry for entry in self._evaluations if entry.evaluation > self._weights.after]
