"""The state that a checkpoint holds: take it from a run between two windows, and restore it."""

import functools
import warnings
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..runtime.log import logger
from ..runtime.optimizers import evaluation_weights, switches_weights
from ..runtime.state_guards import Generators, seed_all
from ..tracking.ledger import EvaluationEntry
from ..tracking.metrics_logger import MetricsLogger
from ..tracking.throughput import Throughput
from .best_weights import BestWeights, fill, passing_of, weights_of
from .format import BESIDE, BEST, BUFFERS, OPTIMIZER, WEIGHTS, Checkpoint, Snapshot
from .optimizer_state import load_optimizer_state, optimizer_state
from .serialization import n_bytes_in, on_host, unreadable


class Stateful(Protocol):
    """An object whose state can be stored as JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class CallbackState(Protocol):
    """The states of the user's callbacks, by name. A state may contain tensors, and is an error if taking it failed."""

    @property
    def changes_weights(self) -> bool: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], *, continues: bool) -> None: ...


class _UnreadableError(Exception):
    """Part of the run's state could be written, but not read again."""


class TrainState:
    """Everything that the rest of a run depends on, taken between two windows."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        loss_fn: Callable[..., Any] | None,
        schedule: LRScheduler,
        metrics_logger: MetricsLogger,
        best: BestWeights,
        callbacks: CallbackState,
        extra_state: Mapping[str, Stateful],
    ) -> None:
        """Create a train state.

        Args:
            model: the model, not wrapped.
            loss_fn: the user's loss, if any; it may have its own weights and buffers.
            schedule: the schedule of the optimizer's learning rates, not wrapped.
            best: the weights of the best evaluation so far, if they are kept.
            callbacks: the state of the user's callbacks.
            extra_state: all other state, by name.
        """
        self.metrics_logger = metrics_logger
        self._accelerator, self._model, self._loss_fn = accelerator, model, loss_fn
        self._optimizer: Optimizer = schedule.optimizer
        self._schedule, self._best, self._callbacks = schedule, best, callbacks
        # Restored in this order, because others may read the first two.
        self._extra_state: dict[str, Stateful] = {"metrics_logger": metrics_logger, "best": best, **extra_state}
        self._logged: set[str] = set()

    @property
    def n_bytes(self) -> int:
        """Total bytes of weights, buffers and optimizer state."""
        states = optimizer_state(self._optimizer)
        of_model = [weights_of(self._model), passing_of(self._model)]
        return n_bytes_in([*of_model, self._beside(), states, self._callback_states()])

    def snapshot(self, metadata: Mapping[str, Any], *, copy: bool) -> "Snapshot | None":
        """Return a snapshot in host memory on the main process, and None on the others.

        If it fails, logs a warning and returns None. All processes must call this together.

        Args:
            metadata: further metadata for the checkpoint.
            copy: whether to copy tensors. Otherwise training must wait until the snapshot is written.
        """
        processes = gather_object(
            [{"generators": Generators.now().state_dict(), "work": asdict(self.metrics_logger.throughput)}]
        )
        if not self._accelerator.is_main_process:
            return None
        try:
            return self._snapshot(metadata, processes, copy)
        except Exception as error:  # the other processes have continued; so must this one
            why = str(error) if isinstance(error, _UnreadableError) else repr(error)
            self._log_once(f"No checkpoint could be made: {why}. Training continues, and tries again at the next one.")
            return None

    def _snapshot(self, metadata: Mapping[str, Any], processes: list[dict[str, Any]], copy: bool) -> "Snapshot":
        host = functools.partial(on_host, copy=copy)
        scaler = self._accelerator.scaler
        steps = {
            **optimizer_state(self._optimizer),
            "schedule": self._schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "extra": self._extra_states(),
            "callbacks": self._callback_states(),
        }
        for name, state in steps.items():
            if kind := unreadable(state):
                raise _UnreadableError(
                    f"the {name}'s state contains a {kind}, which cannot be loaded without running code"
                )
        config: Any = getattr(self._model, "config", None)
        extra_state = {name: part.state_dict() for name, part in self._extra_state.items()}
        with evaluation_weights(self._optimizer):
            weights = on_host(weights_of(self._model), copy=copy or switches_weights(self._optimizer))
        return Snapshot(
            metadata={
                **metadata,
                "updates": len(self.metrics_logger.ledger.windows),
                "epochs": len(self.metrics_logger.ledger.epochs),
                "rows": sum(entry.rows for entry in self.metrics_logger.ledger.windows),
                "extra_state": extra_state,
            },
            entries=self.metrics_logger.ledger.entries(),
            weights=weights,
            buffers=host(passing_of(self._model)),
            beside=host(self._beside()),
            best=self._best.weights,
            steps=host(steps),
            processes=processes,
            config=config.to_json_string() if hasattr(config, "to_json_string") else None,
        )

    def restore(self, checkpoint: "Checkpoint", changed: Set[str]) -> None:
        """Restore everything except the random generators. All processes must call this together.

        Args:
            changed: the settings in which this run differs from the checkpoint's run. If any differ, this run's
                optimizer hyperparameters and schedule are used, and the schedule is advanced to the same update. If the
                model differs, only tensors of unchanged shape are restored, and the optimizer starts fresh, as it does
                if its groups differ.
        """
        folder = checkpoint.path
        fill(weights_of(self._model), load_file(folder / WEIGHTS), strict="model" not in changed)
        fill(passing_of(self._model), load_file(folder / BUFFERS), strict=False)
        if (folder / BESIDE).exists():
            fill(self._beside(), load_file(folder / BESIDE), strict=not {"model", "optimizer", "loss_fn"} & changed)
        steps = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        if not {"model", "optimizer", "optimizer_groups"} & changed:
            load_optimizer_state(self._optimizer, steps, own_numbers=bool(changed))
        if changed:
            _forward(self._schedule, sum(not entry.skipped for entry in checkpoint.windows))
        else:
            self._schedule.load_state_dict(steps["schedule"])
        if self._accelerator.scaler is not None and steps["scaler"]:
            self._accelerator.scaler.load_state_dict(steps["scaler"])
        self.metrics_logger.ledger.resume_from(checkpoint.entries)
        for name, part in self._extra_state.items():
            part.load_state_dict(checkpoint.metadata["extra_state"][name])
        for name, module in self._with_extra_state():
            if name in steps["extra"]:
                module.set_extra_state(steps["extra"][name])
        self._callbacks.load_state_dict(steps["callbacks"], continues=bool(changed))
        self._restore_work([process["work"] for process in checkpoint.processes()])

    def restore_best(self, checkpoint: "Checkpoint", best: EvaluationEntry | None, changed: Set[str]) -> None:
        """Restore the weights of the best evaluation, if this run keeps them.

        They are those that the checkpoint keeps, or those of the checkpoint at that evaluation.

        Args:
            best: the best evaluation of the earlier run.
        """
        if not self._best.is_kept or best is None:
            return
        if "model" not in changed:
            if (checkpoint.path / BEST).exists() and self._best.n_updates == best.evaluation:
                self._best.weights = load_file(checkpoint.path / BEST)
                return
            there = checkpoint.at_update(best.evaluation)
            if there is not None and not self._callbacks.changes_weights:
                self._best.weights, self._best.n_updates = load_file(there / WEIGHTS), best.evaluation
                self._log_once(
                    f"The checkpoint has no copy of the best weights so far, so those of update {best.evaluation} are "
                    f"loaded from {there}."
                )
                return
        self._best.after = checkpoint.evaluations[-1].evaluation
        self._log_once(
            f"The checkpoint has no weights of update {best.evaluation}, the best so far, for this model. "
            "`restore_best_weights` will use the best of the remaining evaluations."
        )

    def restore_generators(self, checkpoint: "Checkpoint", seed: int) -> None:
        """Restore the random generators, or seed them anew if the number of processes has changed.

        Call this right before the next window: other steps may draw numbers.
        """
        processes, index = checkpoint.processes(), self._accelerator.process_index
        if len(processes) == self._accelerator.num_processes:
            Generators.of_state(processes[index]["generators"]).restore()
        else:
            seed_all(seed, index, len(checkpoint.windows))

    def _beside(self) -> dict[str, Tensor]:
        """Return the tensors outside the model that training changes, by name.

        These are weights and buffers of the loss, other optimized tensors and, for an optimizer that evaluates with
        other weights than it trains, the weights in training.
        """
        known = {id(t) for t in (*self._model.parameters(), *self._model.buffers())}
        named: list[tuple[str, Tensor]] = []
        if isinstance(self._loss_fn, nn.Module):
            of_loss = (*self._loss_fn.named_parameters(), *self._loss_fn.named_buffers())
            named += [(f"loss_fn.{name}", t) for name, t in of_loss]
        for number, group in enumerate(self._optimizer.param_groups):
            named += [(f"optimizer.{number}.{index}", p) for index, p in enumerate(group["params"])]
        first_names = {id(t): (name, t) for name, t in reversed(named) if id(t) not in known}
        trained = weights_of(self._model) if switches_weights(self._optimizer) else {}
        return dict(first_names.values()) | {f"train.{name}": t for name, t in trained.items()}

    def _with_extra_state(self) -> list[tuple[str, nn.Module]]:
        """Return the modules that override `get_extra_state`, by name."""
        roots = {"model": self._model, "loss_fn": self._loss_fn}
        named = [
            (f"{root}.{name}".rstrip("."), module)
            for root, part in roots.items()
            if isinstance(part, nn.Module)
            for name, module in part.named_modules()
        ]
        return [(name, m) for name, m in named if type(m).get_extra_state is not nn.Module.get_extra_state]

    def _extra_states(self) -> dict[str, Any]:
        found = {name: module.get_extra_state() for name, module in self._with_extra_state()}
        for name, state in [*found.items()]:
            if kind := unreadable(state):
                del found[name]
                self._log_once(
                    f"The extra state of `{name}` is not saved in checkpoints: it contains a {kind}, which cannot be "
                    "loaded without running code. A resumed run starts with fresh extra state."
                )
        return found

    def _callback_states(self) -> dict[str, Any]:
        """Return the states of callbacks by name, without those that could not be read again."""
        found = self._callbacks.state_dict()
        for name, state in [*found.items()]:
            kind = state if isinstance(state, Exception) else unreadable(state)
            if kind:
                del found[name]
                why = f"taking it raised {kind!r}" if isinstance(kind, Exception) else f"it contains a {kind}"
                self._log_once(
                    f"The state of the callback {name} is not saved in checkpoints: {why}. It may contain tensors, "
                    "numbers, texts, lists and dicts. A resumed run starts with a fresh state."
                )
        return found

    def _log_once(self, sentence: str) -> None:
        if sentence not in self._logged:
            self._logged.add(sentence)
            logger.warning(sentence)

    def _restore_work(self, by_process: list[dict[str, Any]]) -> None:
        """Restore the throughput. If the number of processes has changed, the main process gets all counts.

        The seconds are the same on all processes.
        """
        index, n = self._accelerator.process_index, self._accelerator.num_processes
        own = by_process[index : index + 1] if len(by_process) == n else by_process if index == 0 else []
        for work in own:
            self.metrics_logger.throughput.merge(Throughput(**work))
        self.metrics_logger.throughput.seconds = by_process[0]["seconds"]


def _forward(schedule: LRScheduler, n_updates: int) -> None:
    """Advance a schedule by this many updates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer took these steps in the earlier run
        for _ in range(n_updates):
            schedule.step()
