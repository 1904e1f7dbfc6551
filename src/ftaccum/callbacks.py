"""Callbacks for `test_fine_tuning(callbacks=…)`. Those of Transformers and other packages work as well.

They are `transformers.TrainerCallback` objects. In addition, ftaccum uses these members, if a callback has them:

- `evaluation_weights(model)`: a context manager that gives the model the weights to evaluate.
- `state_dict()` and `load_state_dict(state)`: the state to save in checkpoints. It may contain tensors.
- `ends_run_with`: types of exceptions that end the run as they are, instead of as the cause of a `CallbackError`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import SettingsError
from .runtime.log import logger
from .runtime.progress_bar import print_above_bars
from .runtime.state_guards import preserve_rng, seed_all, training_mode


class ExponentialMovingAverage(TrainerCallback):
    """Keeps an exponential moving average of the trainable weights: average ← d · average + (1 − d) · weights.

    The average starts as the initial weights and is updated after each optimizer step, on the model's device and in at
    least float32. Each evaluation uses it, and so do the best weights. At the end of training, the model has the
    average, too.
    """

    def __init__(self, decay: float = 0.999, *, evaluates: bool = True, saves: bool = True) -> None:
        """Create the callback.

        Args:
            decay: d, from 0 to below 1.
            evaluates: whether to evaluate the average instead of the weights in training.
            saves: whether the model ends with the average.

        Raises:
            SettingsError: if `decay` is not in this range.
        """
        if not 0 <= decay < 1:
            raise SettingsError([f"`decay` must be a number from 0 to below 1, but is {decay!r} instead."])
        self.decay, self.evaluates, self.saves = decay, evaluates, saves
        self._average: dict[str, Tensor] = {}
        self._restored: Mapping[str, Tensor] = {}

    def on_init_end(self, *_: Any, **__: Any) -> None:
        """Forget an earlier run of the same callback."""
        self._average, self._restored = {}, {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        for name, p in _trainable(model):
            self._average[name] = _wide(p)
            saved = self._restored.get(name)
            if saved is not None and saved.shape == p.shape:  # not if the model has changed
                self._average[name].copy_(saved)
        self._restored = {}

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        for name, p in _trainable(model):
            if name in self._average:
                self._average[name].lerp_(p.to(self._average[name].dtype), 1 - self.decay)
            else:  # another callback has unfrozen it
                self._average[name] = _wide(p)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Give the model the average, unless it ends with the weights of the best evaluation."""
        if self.saves and not args.load_best_model_at_end:
            _load(model, self._average)
        self._average = {}

    @contextmanager
    def evaluation_weights(self, model: nn.Module) -> Iterator[None]:
        """Give the model the average until exit."""
        if not (self.evaluates and self._average):
            yield
            return
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if name in self._average}
        _load(model, self._average)
        try:
            yield
        finally:
            _load(model, trained)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average, "decay": self.decay}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._restored = state["average"]
        if (before := state.get("decay", self.decay)) != self.decay:  # older checkpoints lack it
            logger.warning(
                f"The decay of the average of weights is {self.decay}. Before the run resumed, it was {before}."
            )


class GenerateSamples(TrainerCallback):
    """Prints what the model generates for some prompts, after each evaluation and with the weights that it used.

    The samples do not change the run: random numbers are drawn from generators of their own. Only the main process
    generates.

    Attributes:
        samples: for each evaluation, the number of updates before it and the generated texts.
    """

    runs_model = True  # on the main process alone, in which the others take part if the weights are sharded

    def __init__(self, prompts: Sequence[str] | str | Path, *, max_new_tokens: int = 40, **options: Any) -> None:
        """Create the callback.

        Args:
            prompts: a list of texts, or the path of a text file with one prompt per line.
            max_new_tokens: most tokens to generate for each prompt.
            **options: further options of the model's `generate`, such as `do_sample=True`.

        Raises:
            SettingsError: if there are no prompts, or the file cannot be read.
        """
        self._prompts = _read_prompts(prompts)
        self._options = {"max_new_tokens": max_new_tokens, **options}
        self.samples: list[tuple[int, list[str]]] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        if processing_class is None or not callable(getattr(model, "generate", None)):
            raise SettingsError(
                ["`GenerateSamples` needs a model that generates text, and its `tokenizer`. Give both, or remove it."]
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any,
        processing_class: Any,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        with torch.no_grad(), training_mode(model, training=False), preserve_rng():
            seed_all(args.seed, state.global_step)
            texts = [self._generate(model, processing_class, prompt) for prompt in self._prompts]
        self.samples.append((state.global_step, texts))
        print_above_bars("\n".join(f"update {state.global_step}: {text}" for text in texts))

    def _generate(self, model: Any, tokenizer: Any, prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
        pad = getattr(tokenizer, "pad_token_id", None)
        options = {"pad_token_id": pad} | self._options if pad is not None else self._options
        return tokenizer.decode(model.generate(**inputs, **options, synced_gpus=False)[0], skip_special_tokens=True)


class OptunaPruning(TrainerCallback):
    """Reports each evaluation to an Optuna trial, and ends the run with `optuna.TrialPruned` if the trial is pruned.

    Use it in your own objective; `ftaccum.search` needs no callback to prune. A report's step is the number of
    evaluations so far. So trials with different `gradient_accumulation_steps` are compared after about the same numbers
    of rows if `evaluate_every` is a share of an epoch.
    """

    ends_run_with = (optuna.TrialPruned,)

    def __init__(self, trial: optuna.Trial, metric: str = "loss") -> None:
        """Create the callback.

        Args:
            trial: the trial of the objective.
            metric: the value to report: "loss", or the name of a metric that `compute_metrics` returns.
        """
        self._trial, self._metric = trial, metric

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: Mapping[str, float],
        **_: Any,
    ) -> None:
        name = f"eval_{self._metric.removeprefix('eval_')}"
        if name not in metrics:
            known = ", ".join(each.removeprefix("eval_") for each in metrics if each.startswith("eval_"))
            raise SettingsError([f"`metric` is {self._metric!r}, but the evaluation has only: {known}."])
        if not state.is_world_process_zero:
            return
        n_evaluations = sum("eval_loss" in entry for entry in state.log_history)
        self._trial.report(metrics[name], n_evaluations)
        is_trained = state.global_step >= state.max_steps  # pruning would save nothing
        if math.isnan(metrics[name]) or (self._trial.should_prune() and not is_trained):
            raise optuna.TrialPruned(
                f"Pruned after update {state.global_step}, with {self._metric} {metrics[name]:.4f}."
            )


def _wide(p: Tensor) -> Tensor:
    """Return a copy in at least float32: small changes would be lost in 16 bits."""
    return p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@torch.no_grad()
def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        if name in weights:
            p.copy_(weights[name])


def _read_prompts(prompts: Sequence[str] | str | Path) -> list[str]:
    if not isinstance(prompts, str | Path):
        found = list(prompts)
    else:
        try:
            lines = Path(prompts).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise SettingsError(
                [f"`prompts` is {str(prompts)!r}, which cannot be read: {error}. Give a list of texts, or a text file."]
            ) from error
        found = [line for line in lines if line.strip()]
    if not found or not all(isinstance(prompt, str) for prompt in found):
        raise SettingsError([f"`prompts` must be texts, and at least one, but is {prompts!r} instead."])
    return found
