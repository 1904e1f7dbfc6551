"""Gather what the model card says of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..data.iterable import is_stream
from ..insight.run_metadata import Named, RunMetadata, public_name
from ..objective.item_counts import OF_USER
from ..objective.report import ExactnessReport
from ..planning.base_plan import named_sizes
from ..runtime.device_state import device_name
from ..runtime.log import logger
from ..tracking.result import Result
from .adapter_summary import summarize_adapters
from .build_identity import software_versions
from .build_plan import summarize_micro_batches
from .named_sources import training_data, validation_data
from .rates import summarize_optimizer

if TYPE_CHECKING:
    from .build_outputs import RunWithOutputs

_PRECISIONS = {
    "no": "{weights}",
    "bf16": "bf16 autocast, {weights} weights",
    "fp16": "fp16 autocast, {weights} weights",
}


def gather_metadata(run: "RunWithOutputs", result: Result, ended_by: str = "") -> RunMetadata | None:
    """Return what the model card says of a run whose model is trained. If that fails, log a warning and return None.

    Args:
        ended_by: why the run ended early, as a sentence; empty if it did not.
    """
    try:
        return _gather(run, result, ended_by)
    except Exception as error:  # a card must not cost a trained model
        logger.warning(f"There will be no model card: {type(error).__name__}: {error}")
        return None


def _gather(run: "RunWithOutputs", result: Result, ended_by: str) -> RunMetadata:
    components, data, base = run.config.components, run.data, run.base
    knows_lengths = data.train.knows_lengths
    cut = summarize_micro_batches(run.config.runtime, run.batch_sizes, run.planner, knows_lengths=knows_lengths)
    n_val = None if data.val_rows is None else len(data.val_rows)
    return RunMetadata(
        name=_name(run, base),
        repository=run.repository,
        base=base,
        train_data=training_data(run.config, is_synthetic=data.synthetic),
        val_data=validation_data(run.config),
        n_train=None if is_stream(components.train_data) else len(data.train_rows),
        n_val=n_val,
        max_train_rows=command.sources.get("max_train_rows") if (command := run.config.command) is not None else None,
        held_out=n_val is not None and components.val_data is None,
        sizes=named_sizes(run.batch_sizes, run.config.recipe.learning_rate_scaling),
        cut=str(cut),
        hyperparameters=_hyperparameters(run),
        result=dict(result),
        criterion=run.criterion.name,
        loss=_loss(data.objective.report),
        inexact=_inexactness(data.objective.report),
        versions=software_versions(run.model),
        device=device_name(run.accelerator.device),
        ended_by=ended_by or (run.best.describe_stop() if run.best.stops else ""),
    )


def _name(run: "RunWithOutputs", base: Named | None) -> str:
    """Return the name of the model: that of its repository, of the run's folder, or of the base model."""
    if run.repository is not None:
        return run.repository.rpartition("/")[2]
    if run.run_dir is not None:
        return public_name(str(run.run_dir.path))
    return "Fine-tuned model" if base is None else f"{base.name.rpartition('/')[2]}-finetuned"


def _hyperparameters(run: "RunWithOutputs") -> dict[str, str]:
    recipe, plan = run.config.recipe, run.plan
    options: Any = recipe.lr_scheduler_kwargs  # the settings have parsed it
    optimizer, adapters = summarize_optimizer(run.optimizer), summarize_adapters(run.model)
    own_groups = isinstance(run.config.components.optimizer, Optimizer) or bool(recipe.optimizer_groups)
    dtypes = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in run.model.parameters()}))
    clip = recipe.gradient_clip_norm
    warmup = f", warm-up of {run.n_warmup} {'update' if run.n_warmup == 1 else 'updates'}" if run.n_warmup else ""
    return {
        **optimizer.named(exempts=set(optimizer.weight_decays) == {0.0, recipe.weight_decay} and not own_groups),
        "Schedule": f"{_schedule(recipe.lr_scheduler, options)}{warmup}",
        "Gradient clipping": "none" if clip is None else f"norm {clip:g}",
        "Epochs": str(plan.n_epochs),
        "Seed": str(recipe.random_seed),
        "Precision": _PRECISIONS[run.accelerator.mixed_precision].format(weights=dtypes),
        **({} if adapters is None else {"Adapters": str(adapters)}),
    }


def _schedule(name: str, options: Mapping[str, Any] | None) -> str:
    return ", ".join([name, *(f"{option} {value}" for option, value in (options or {}).items())])


def _loss(report: ExactnessReport) -> str:
    if report.window:
        return "The loss is computed over all rows of an update together."
    counted_by = report.counted_by.replace(OF_USER, f"items that the training program counts (`{OF_USER}`)")
    return f"The loss is a mean over {counted_by}."


def _inexactness(report: ExactnessReport) -> float | None:
    """Return how far accumulating a loss is from one batch: None if it is exact, 0 if it is unknown how far."""
    if not report.inexact():
        return None
    differences = [
        *report.explanation.differences.values(),
        *report.in_training.differences.values(),
        report.gradient.off or 0.0,
        report.hidden_state.off or 0.0,
    ]
    largest = max(differences, default=0.0)
    return largest if largest > report.tolerance else 0.0
