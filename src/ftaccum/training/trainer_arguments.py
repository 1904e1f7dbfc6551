"""The settings of a run in the form that Transformers' callbacks read them: as `TrainingArguments`."""

from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from ..planning.batch_size import BatchSizes
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime
from ..tracking.selection import LOSS, Criterion

_OUTPUT_DIR = "trainer_output"  # where callbacks write if a run has no folder; also what `Trainer` takes


class CallbackArguments(TrainingArguments):
    """`TrainingArguments` for callbacks to read. Creating them initialises no device and no process."""

    def __post_init__(self) -> None:
        """Convert and derive attributes as the base class does, but without its checks and without its devices."""
        for name, kind in {"optim": OptimizerNames, "hub_strategy": HubStrategy}.items():
            setattr(self, name, kind(getattr(self, name)))
        self.accelerator_config = AcceleratorConfig()
        self.mixed_precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
        self.fsdp_plugin_args = self.deepspeed_plugin = None
        if hasattr(self, "activation_checkpointing"):  # the newer name
            self.activation_checkpointing = self.gradient_checkpointing

    @classmethod
    def of_run(
        cls,
        recipe: Recipe,
        runtime: Runtime,
        batch_sizes: BatchSizes,
        criterion: Criterion,
        accelerator: Accelerator,
        *,
        evaluates: bool,
    ) -> "CallbackArguments":
        """Return the arguments that describe a run.

        Args:
            evaluates: whether the run has validation rows.
        """
        arguments = cls(
            output_dir=runtime.output_dir or _OUTPUT_DIR,
            num_train_epochs=recipe.n_epochs,
            max_steps=recipe.max_updates or -1,
            per_device_train_batch_size=batch_sizes.batch_size,
            per_device_eval_batch_size=runtime.eval_batch_size or batch_sizes.batch_size,
            gradient_accumulation_steps=batch_sizes.gradient_accumulation_steps,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            **_betas(recipe),
            max_grad_norm=recipe.gradient_clip_norm or 0.0,
            lr_scheduler_type=SchedulerType(recipe.lr_scheduler),
            lr_scheduler_kwargs=recipe.lr_scheduler_kwargs,
            warmup_steps=recipe.warmup_steps or recipe.warmup_ratio,
            seed=recipe.random_seed,
            do_train=True,
            do_eval=evaluates,
            logging_strategy=IntervalStrategy.STEPS,
            logging_steps=runtime.log_every,
            report_to=[],
            debug=[],
            bf16=accelerator.mixed_precision == "bf16",
            fp16=accelerator.mixed_precision == "fp16",
            disable_tqdm=not runtime.progress,
            dataloader_num_workers=runtime.num_workers,
            remove_unused_columns=False,
            gradient_checkpointing=runtime.gradient_checkpointing,
            load_best_model_at_end=recipe.restore_best_weights,
            metric_for_best_model="loss" if criterion.metric == LOSS else criterion.metric,
            greater_is_better=criterion.greater_is_better,
            torch_compile=runtime.compile,
            **_evaluation(recipe, evaluates=evaluates),
            **_saving(runtime),
        )
        # The base class looks these up when a device or a number of processes is asked for.
        arguments.__dict__["_setup_devices"] = accelerator.device
        names = ("device", "distributed_type", "num_processes", "process_index", "local_process_index")
        arguments.distributed_state = SimpleNamespace(**{name: getattr(accelerator, name) for name in names})
        arguments._n_gpu = int(accelerator.device.type != "cpu")
        return arguments


def _betas(recipe: Recipe) -> dict[str, float]:
    return {name: beta for name in ("adam_beta1", "adam_beta2") if (beta := getattr(recipe, name)) is not None}


def _evaluation(recipe: Recipe, *, evaluates: bool) -> dict[str, Any]:
    every = recipe.evaluate_every
    if not evaluates:
        return {"eval_strategy": IntervalStrategy.NO}
    if every is None:
        return {"eval_strategy": IntervalStrategy.EPOCH}
    assert not isinstance(every, str), "the settings have parsed it"
    # Trainer takes a share of the whole training instead of an epoch.
    steps = every if isinstance(every, int) else every / recipe.n_epochs
    return {"eval_strategy": IntervalStrategy.STEPS, "eval_steps": steps}


def _saving(runtime: Runtime) -> dict[str, Any]:
    if runtime.output_dir is None:
        return {"save_strategy": SaveStrategy.NO}
    limit = {"save_total_limit": runtime.keep_checkpoints}
    if isinstance(runtime.checkpoint_every, int):
        return {"save_strategy": SaveStrategy.STEPS, "save_steps": runtime.checkpoint_every, **limit}
    return {"save_strategy": SaveStrategy.EPOCH, **limit}
