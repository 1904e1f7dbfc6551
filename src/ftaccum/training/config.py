"""The configuration of a run: its settings, and the user's model, data and functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from ..arguments import parse_settings
from ..data.collator import Collator
from ..data.iterable import is_split, is_stream
from ..data.rare_rows import LabelKind
from ..errors import fault_of_class, refuse, shown
from ..fields import DefaultFloat
from ..objective.item_counts import CountItems
from ..objective.model_forward import LossFn
from ..objective.window_loss import LossInputs
from ..runtime.model_traits import can_generate, output_embeddings
from ..runtime.model_wrapper import model_to_save
from ..runtime.sharding.launcher import loads_on_one_process
from ..runtime.sharding.tensors import has_sharded_tensors
from ..settings.recipe import Recipe
from ..settings.runtime import Runtime
from ..tracking.run_record import Command
from ..tracking.selection import fault_of_criterion
from .adapters import faults_of_adapters
from .generation_config import faults_of_generation
from .metrics import ComputeMetrics, PreprocessLogits, faults_of_metrics, is_function
from .named_optimizers import faults_of_optimizer
from .optimizer import CoupledBeta2, OptimizerFactory
from .schedule import faults_of_lr_scheduler
from .trainer_callbacks import fault_of_callbacks
from .window_loss_faults import faults_of_window_loss


@dataclass(frozen=True)
class Components:
    """The arguments of `test_fine_tuning` that are not settings; its documentation describes each."""

    model: Any
    config: Any
    train_data: Any
    val_data: Any
    tokenizer: Any
    data_collator: Collator | None
    loss_fn: LossFn | None
    reduction: str
    count_items: CountItems | None
    optimizer: OptimizerFactory | Optimizer | None
    compute_metrics: ComputeMetrics | None
    callbacks: Sequence[TrainerCallback] = ()
    preprocess_logits_for_metrics: PreprocessLogits | None = None
    lora: Any = None
    generation_kwargs: Mapping[str, Any] | None = None
    loss_inputs: LossInputs | None = None

    @property
    def configuration(self) -> Any:
        """The given config, or the model's, or an empty one."""
        return self.config or getattr(self.model, "config", None) or SimpleNamespace()

    @property
    def is_causal_lm(self) -> bool:
        """Whether the model predicts each token of a row from the tokens before it."""
        return _is_causal_lm(self.model, self.configuration)

    @property
    def padding_side(self) -> str:
        """The side that rows are padded on.

        Rows of a causal LM, also of one in a `ModelWrapper`, are padded on the right, even if its tokenizer pads on the
        left for generation: with padding on the left, the model would predict a row's first token from padding.
        """
        if _is_causal_lm(model_to_save(self.model), self.configuration) and self.data_collator is None:
            return "right"
        return getattr(self.tokenizer, "padding_side", "right")

    @property
    def label_kind(self) -> LabelKind:
        """Whether labels are tokens that a model predicts with a loss of its own, and the declared special tokens."""
        config = vars(self.configuration)
        named = [value for name, value in config.items() if name.endswith("_token_id")]
        special = {n for n in (*named, *getattr(self.tokenizer, "all_special_ids", ())) if isinstance(n, int)}
        predicts_tokens = self.loss_fn is None and output_embeddings(model_to_save(self.model)) is not None
        return LabelKind(predicts_tokens, special)

    @property
    def pad_token_id(self) -> int:
        named = (getattr(source, "pad_token_id", None) for source in (self.tokenizer, self.configuration))
        return next((pad for pad in named if isinstance(pad, int)), 0)


@dataclass(frozen=True)
class RunConfig:
    """The arguments of `test_fine_tuning`, sorted into settings and components.

    Attributes:
        recipe: the settings that affect what the model learns.
        runtime: the settings that only affect how the run executes.
        components: the user's model, data and functions.
        given: `learning_rate` and `weight_decay`, if the user gave them; if not, an optimizer may set its own.
        command: the command line that started the run; None if a call from Python did.
        coupled_beta2: scales the optimizer's β2, if a search couples it to the batch size.
    """

    recipe: Recipe
    runtime: Runtime
    components: Components
    given: frozenset[str] = frozenset()
    command: Command | None = None
    coupled_beta2: CoupledBeta2 | None = None

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "RunConfig":
        """Sort and check the arguments.

        Args:
            arguments: the arguments by name; a setting that is left out takes its default.

        Raises:
            SettingsError: with a sentence for each fault, before anything is loaded.
        """
        recipe, runtime = parse_settings(arguments)
        parts = {f.name: arguments[f.name] for f in fields(Components) if f.name in arguments}
        components = Components(**parts | {"optimizer": own_optimizer(arguments)})
        check_components(components, recipe, runtime)
        defaults = {name for name, value in arguments.items() if isinstance(value, DefaultFloat)}
        given = {"learning_rate", "weight_decay"} & arguments.keys() - defaults
        return cls(recipe, runtime, components, frozenset(given))


def own_optimizer(arguments: Mapping[str, Any]) -> Any:
    """Return the user's optimizer or function among the arguments; None if they name an optimizer or give none."""
    optimizer = arguments.get("optimizer")
    return None if isinstance(optimizer, str) else optimizer


def check_components(components: Components, recipe: Recipe, runtime: Runtime) -> None:
    """Raise SettingsError with every fault that can be found before anything is loaded."""
    faults = faults_of_config(components.config)
    faults += _faults_of_stream(components, recipe, runtime) if is_stream(components.train_data) else []
    faults += [*_faults_of_own_loss(components, recipe), *faults_of_window_loss(components, recipe, runtime)]
    if not isinstance(components.model, nn.Module):
        faults.append(
            f"`model` must be a torch.nn.Module, but is {type(components.model).__name__} instead. "
            "Load it first, for example with `AutoModelForSequenceClassification.from_pretrained`."
        )
    elif has_sharded_tensors(components.model):
        faults.append(
            "`model` has weights that are divided among processes already (DTensor). An earlier run has sharded them, "
            "or they were loaded for tensor parallelism. Load the model again, without `tp_plan` and `device_mesh`."
        )
    elif _has_missing_weights(components.model):
        faults.append(
            "`model` has weights on the meta device, which are shapes without numbers. Create the model outside "
            f"`torch.device('meta')` and `init_empty_weights`, or load it with `from_pretrained`.{_hint_on_loading()}"
        )
    else:
        faults += faults_of_adapters(components.model, components.lora, runtime.save)
    if isinstance(components.tokenizer, str):
        faults.append(f"`tokenizer` is the name {components.tokenizer!r}. Load it: `AutoTokenizer.from_pretrained`.")
    for name in ("data_collator", "loss_fn", "loss_inputs", "count_items"):
        part = getattr(components, name)
        if part is not None and not callable(part):
            faults.append(f"`{name}` must be callable or None, but is {shown(part)} instead. Give a function.")
    if not (isinstance(components.reduction, str) and components.reduction in ("mean", "sum")):
        faults.append(
            f"`reduction` must be 'mean' or 'sum', but is {shown(components.reduction)} instead. "
            "Choose 'mean' if `loss_fn` returns the mean over its items, 'sum' if it returns their sum."
        )
    more = (
        *faults_of_metrics(components.compute_metrics, components.preprocess_logits_for_metrics),
        *_faults_of_generation(components),
        fault_of_callbacks(components.callbacks),
        fault_of_class("loss_fn", components.loss_fn),
        *faults_of_optimizer(recipe, components.optimizer),
        *faults_of_lr_scheduler(recipe),
    )
    faults += [fault for fault in more if fault]
    has_metrics, has_val_data = components.compute_metrics is not None, components.val_data is not None
    faults += faults_of_evaluation(recipe, has_metrics=has_metrics, has_val_data=has_val_data)
    refuse(faults)


def _hint_on_loading() -> str:
    if not loads_on_one_process():
        return ""
    return (
        " The launcher asks for `fsdp_cpu_ram_efficient_loading`, with which only one process of a machine gets the "
        "weights: set it to false."
    )


def _faults_of_own_loss(components: Components, recipe: Recipe) -> list[str]:
    """Return a sentence for each setting of the model's own loss that contradicts the user's loss or its count."""
    contradict = {
        "`loss_fn` is given, which computes the loss itself. Put it into that loss": components.loss_fn is not None,
        "`count_items` counts the items of the loss without it. Leave one of them out": (
            components.count_items is not None
        ),
        "`reduction` is 'sum', but it makes a mean. Leave one of them out": components.reduction == "sum",
    }
    given = {name: getattr(recipe, name) for name in ("class_weights", "label_smoothing")}
    return [
        f"`{name}` is {shown(value)}, which changes the model's own loss, but {reason}."
        for name, value in given.items()
        for reason, holds in contradict.items()
        if value and holds
    ]


def _is_causal_lm(model: Any, config: Any) -> bool:
    return can_generate(model) and not getattr(config, "is_encoder_decoder", False)


def _faults_of_generation(components: Components) -> list[str]:
    if components.generation_kwargs is None:
        return []
    return faults_of_generation(
        components.generation_kwargs,
        components.model,
        has_function=is_function(components.compute_metrics),
        preprocesses=components.preprocess_logits_for_metrics is not None,
    )


def faults_of_evaluation(recipe: Recipe, *, has_metrics: bool, has_val_data: bool) -> list[str]:
    """Return a sentence for each setting that needs metrics or validation rows that there are not."""
    fault = fault_of_criterion(recipe.metric_for_best, recipe.greater_is_better, has_metrics)
    faults = [fault] if fault else []
    if has_val_data or recipe.validation_split:
        return faults
    needs = {
        "early_stopping_patience": recipe.early_stopping_patience is not None,
        "restore_best_weights": recipe.restore_best_weights,
        "evaluate_every": recipe.evaluate_every is not None,
        "compute_metrics": has_metrics,
    }
    return faults + [
        f"`{name}` needs validation rows, but `val_data` is None and `validation_split` is 0. Give one of them."
        for name, needed in needs.items()
        if needed
    ]


def faults_of_config(config: Any) -> list[str]:
    """Return a sentence if the second positional argument, `config`, is rows or the arguments of a Trainer."""
    if hasattr(config, "per_device_train_batch_size"):
        return [
            f"`config` must be the model's configuration, but is {type(config).__name__} instead. Give each of its "
            "settings as an argument, such as `batch_size` for `per_device_train_batch_size`."
        ]
    if isinstance(config, str):
        return [
            f"`config` must be the model's configuration, but is {config!r} instead. The second positional argument is "
            "`config`: load the rows, and give them as `train_data=`."
        ]
    # A configuration of Transformers has `__iter__`, too.
    are_rows = is_stream(config) or any(hasattr(type(config), n) for n in ("__getitem__", "__len__", "__next__"))
    if not are_rows or hasattr(config, "vocab_size"):
        return []
    return [
        f"`config` must be the model's configuration, but is {type(config).__name__} instead, which looks like rows. "
        "The second positional argument is `config`: write `train_data=` before the training rows, and `val_data=` "
        "before the validation rows."
    ]


def _has_missing_weights(model: nn.Module) -> bool:
    """Return whether the model has weights without values.

    If the model is spread over devices, its frozen weights may be on disk, but its trainable weights may not.
    """
    is_spread = bool(getattr(model, "hf_device_map", None))
    return any(p.is_meta and (p.requires_grad or not is_spread) for p in model.parameters())


def _faults_of_stream(components: Components, recipe: Recipe, runtime: Runtime) -> list[str]:
    faults = {
        "`train_data` is a stream, whose length is unknown, and `max_updates` is None. Set `max_updates`: the "
        "learning rate's schedule needs the number of updates.": recipe.max_updates is None,
        f"`train_data` is a stream, from which no rows can be held out, but `validation_split` is "
        f"{recipe.validation_split} and `val_data` is None. Give `val_data`, or set `validation_split=0` to train "
        "without validation.": (components.val_data is None and recipe.validation_split > 0),
        f"`train_data` is a stream, whose length is unknown, but `evaluate_every` is {recipe.evaluate_every}, a share "
        "of an epoch. Give a number of updates.": isinstance(recipe.evaluate_every, float),
        f"`train_data` is a stream, which the main process reads and collates, but `num_workers` is "
        f"{runtime.num_workers}. Leave it out; the main process reads and collates the next window while the device "
        "computes.": runtime.num_workers > 0,
        "`train_data` is a stream, whose classes are unknown, but `sampler` is 'balanced'. Leave it out, and balance "
        "the stream itself.": recipe.sampler == "balanced",
        "`train_data` is a stream, whose labels cannot be counted, but `class_weights` is 'balanced'. Give a list of "
        "one number per class.": recipe.class_weights == "balanced",
        "`train_data` is a stream that `split_dataset_by_node` has divided among processes, but the main process "
        "reads it for all of them. Give the undivided stream.": is_split(components.train_data),
    }
    return [sentence for sentence, holds in faults.items() if holds]
