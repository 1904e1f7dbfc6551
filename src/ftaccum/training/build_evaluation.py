"""The components of a training run that act between two updates: evaluation and checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

from ..checkpoint.best_weights import BestWeights
from ..checkpoint.manager import CheckpointManager, SavePolicy
from ..checkpoint.state import TrainState
from ..data.loader import Loader
from ..runtime.optimizers import evaluation_weights
from ..runtime.state_guards import preserve_rng, seed_all
from ..tracking.ledger import EvaluationEntry
from .base_run import Run
from .best_evaluation import BestEvaluation
from .build_run import TrainingSetup
from .evaluated_weights import EvaluatedWeights
from .evaluation import Evaluation
from .evaluation_groups import EvaluationGroups
from .evaluator import Evaluator
from .generator import Generator
from .metrics import Metrics


def build_evaluation(run: Run, loader: Loader, groups: EvaluationGroups) -> Evaluation:
    """Return the evaluation of a run's model on rows.

    Args:
        loader: loads the rows.
        groups: the groups of rows that the loss reads together, if it reads several rows.

    Raises:
        SettingsError: if the predictions for the metrics would not fit in memory.
    """
    limits = run.planner.limits
    limits = replace(limits, rows=run.config.runtime.eval_batch_size or limits.rows)
    evaluation = Evaluation(
        run.accelerator,
        run.data.objective,
        loader,
        groups=groups,
        planner=replace(run.planner, packed=False, limits=limits),
        process_group=run.process_group,
        metrics=_build_metrics(run),
        generator=build_generator(run, run.data.ignore_index),
    )
    with run.independent_passes(), preserve_rng():
        evaluation.check_memory(run.model, run.config.components.configuration)
    return evaluation


def _build_metrics(run: Run) -> Metrics | None:
    components = run.config.components
    if components.compute_metrics is None:
        return None
    return Metrics(
        components.compute_metrics,
        components.preprocess_logits_for_metrics,
        run.model,
        run.data.objective,
        run.data.ignore_index,
        run.process_group,
    )


def build_generator(run: Run, ignore_index: int) -> Generator | None:
    """Return the text generator of a run; None without `generation_kwargs`.

    Args:
        ignore_index: the label of tokens that are no answer.
    """
    components = run.config.components
    if components.generation_kwargs is None:
        return None
    return Generator(
        run.model,
        components.generation_kwargs,
        tokenizer=components.tokenizer,
        pad_token_id=components.pad_token_id,
        ignore_index=ignore_index,
        seed=run.config.recipe.random_seed,
    )


class EvaluatedSetup(TrainingSetup):
    """The components of a training run, with those that evaluate and save it."""

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """The evaluation of the model; None if there are no validation rows."""
        data = self.data
        if data.val is None or data.val_rows is None:
            return None
        return build_evaluation(self, data.val, EvaluationGroups(len(data.val_rows), self.evaluation_rows))

    @property
    def notes(self) -> list[str]:
        """The banner's lines, with those on losses that depend on the number of rows that they read together."""
        return [*super().notes, *self._notes_on_window]

    @property
    def _notes_on_window(self) -> list[str]:
        if self.data.objective.window is None:
            return []
        notes = []
        if self.data.val_rows is not None:
            notes.append(EvaluationGroups(len(self.data.val_rows), self.evaluation_rows).describe())
        sizes = self.plan.batch_sizes
        if any(len(w.rows) < sizes.at(w.index).effective_batch_size for w in self.plan.sample_windows()):
            notes.append(
                f"Note: some updates have fewer than {sizes.effective_batch_size} rows, which changes their loss; "
                "`short_updates` of the result lists them"
            )
        return notes

    def evaluate(self) -> tuple[float, dict[str, float]] | None:
        """Return the current validation loss and metrics; None if there are no validation rows.

        Sync buffers first, so that all processes evaluate the same model. A model or a metric that draws random
        numbers draws the same ones in each evaluation, and none of those of the training.
        """
        self.accumulator.sync_buffers()
        if self.evaluation is None:
            return None
        with self.evaluation_weights(), preserve_rng():
            seed_all(self.config.recipe.random_seed)
            found = self.evaluation(self.model, self.independent_passes)
            self.evaluated.take(self.model)
            return found

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Give the model the weights to evaluate, until exit: an optimizer or a callback may keep an average."""
        with evaluation_weights(self.optimizer), self.callback_handler.evaluation_weights(self.model):
            yield

    @cached_property
    def evaluated(self) -> EvaluatedWeights:
        """The weights of the last evaluation, to compare with those that are saved."""
        return EvaluatedWeights(self.callback_handler.has_callbacks, self.process_group)

    @cached_property
    def best_weights(self) -> BestWeights:
        return BestWeights(self.config.recipe.restore_best_weights, self.config.components.loss_fn)

    @cached_property
    def best(self) -> BestEvaluation:
        return BestEvaluation(
            self.criterion,
            self.best_weights,
            self.model,
            self.evaluation_weights,
            self.metrics_logger.ledger.evaluations,
            self.config.recipe.early_stopping_patience,
        )

    @property
    def evaluates_at_epochs(self) -> bool:
        """Whether the run is evaluated at the end of each epoch."""
        return self.config.recipe.evaluate_every is None and self.callback.evaluation_rows(self.plan) is None

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(
            self.plan,
            self.evaluation_schedule(self.plan),
            self.evaluate,
            self.metrics_logger,
            self.best,
            self.console,
            self._on_evaluation,
        )

    def _on_evaluation(self, entry: EvaluationEntry) -> None:
        best = self.criterion.best(self.metrics_logger.ledger.evaluations)
        with self.evaluation_weights():
            self.callback_handler.evaluated(entry, best, self.criterion)
        self.callback.on_evaluation(entry)

    @cached_property
    def state(self) -> TrainState:
        """The state that later windows depend on, which checkpoints save."""
        components = self.config.components
        return TrainState(
            self.accelerator,
            self.model,
            components.loss_fn,
            self.schedule,
            self.metrics_logger,
            self.best_weights,
            self.callback_handler,
            {"oom_recovery": self.oom_recovery, "nonfinite": self.nonfinite.counts, "audits": self.audits},
        )

    @cached_property
    def checkpoint_manager(self) -> CheckpointManager:
        runtime, callback, checkpoints = self.config.runtime, self.callback, self.checkpoints
        stop_signals = callback.stop_signals(saves=checkpoints is not None)
        self._inner.enter_context(stop_signals.kept())
        manager = CheckpointManager(
            self.state,
            self.identity,
            checkpoints,
            SavePolicy(
                runtime.checkpoint_every,
                callback.saves_model,
                max(1, runtime.keep_checkpoints),
                self.criterion,
                (*callback.endings, *self.callback_handler.endings),
            ),
            self.process_group,
            stop_signals,
            is_healthy=self.nonfinite.counts.is_sound,
            resumed_from=self.resume_point.path,
        )
        self._inner.callback(manager.close)
        return manager
