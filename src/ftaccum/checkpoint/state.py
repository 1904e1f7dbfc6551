"""The state that a checkpoint holds: take it from a run between two windows, and restore it."""

import functools
import secrets
import warnings
from collections.abc import Callable, Mapping, Set
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..runtime.model_wrapper import ModelWrapper
from ..runtime.optimizers import evaluation_weights, switches_weights
from ..runtime.sharding.tensors import is_sharded
from ..runtime.state_guards import Generators, seed_all
from ..tracking.ledger import EvaluationEntry
from ..tracking.metrics_logger import MetricsLogger
from .best_weights import BestWeights
from .format import Checkpoint, Snapshot, WholeTensors
from .manifest import OPTIMIZER
from .optimizer_state import load_optimizer_state, optimizer_state
from .restored_state import StateRestorer
from .run_tensors import RunTensors
from .saved_tensors import SavedTensors, load, local_parts
from .serialization import n_bytes_in, on_host, unreadable
from .shards import Shard, ShardTaker
from .user_states import CallbackState, UserStates


class Stateful(Protocol):
    """An object whose state can be stored as JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


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
        self._accelerator, self._model = accelerator, model
        self._optimizer: Optimizer = schedule.optimizer
        self._schedule, self._best, self._callbacks = schedule, best, callbacks
        # Restored in this order, because others may read the first two.
        self._extra_state: dict[str, Stateful] = {"metrics_logger": metrics_logger, "best": best, **extra_state}
        self._tensors = RunTensors(model, loss_fn, self._optimizer)
        self._user_states = UserStates(model, loss_fn, callbacks)
        self._processes: list[dict[str, Any]] = []  # of the checkpoint that was restored

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds and saves its own part of the weights."""
        return is_sharded(self._model)

    @property
    def n_bytes(self) -> int:
        """Total bytes of the weights, buffers and optimizer state that this process holds."""
        states = optimizer_state(self._optimizer)
        tensors = [self._tensors.weights, self._tensors.buffers, self._tensors.beside()]
        return n_bytes_in([*tensors, states, self._user_states.of_callbacks()])

    def snapshot(self, metadata: Mapping[str, Any], *, copy: bool) -> Snapshot | Shard | None:
        """Return a snapshot in host memory on the main process; on the others a shard, or None without sharding.

        If it fails on any process, logs a warning and returns None on all. All processes must call this together.

        Args:
            metadata: further metadata for the checkpoint.
            copy: whether to copy tensors. Otherwise training must wait until the snapshot is written.
        """
        processes = gather_object(
            [
                {
                    "generators": Generators.now().state_dict(),
                    "checkpoint": secrets.token_hex(8),
                }
            ]
        )
        names = [process.pop("checkpoint") for process in processes]
        taken, fault = None, None
        try:
            if self.is_sharded:
                index = self._accelerator.process_index
                taken = self._sharded_snapshot(metadata, processes, copy, ShardTaker(names[0], index, len(processes)))
            elif self._accelerator.is_main_process:
                taken = self._whole_snapshot(metadata, processes, copy)
        except Exception as error:  # the other processes have continued; so must this one
            fault = str(error) if isinstance(error, _UnreadableError) else repr(error)
        faults = gather_object([fault]) if self.is_sharded else [fault]
        for fault in filter(None, faults):
            self._user_states.log_once(
                f"No checkpoint could be made: {fault}. Training continues, and tries again at the next one."
            )
            return None
        return taken

    def _whole_snapshot(self, metadata: Mapping[str, Any], processes: list[dict[str, Any]], copy: bool) -> Snapshot:
        host = functools.partial(on_host, copy=copy)
        steps = host(self._steps(None))
        # The names of a wrapper's weights are not those of its model, so `from_pretrained` could not read them.
        config: Any = None if isinstance(self._model, ModelWrapper) else getattr(self._model, "config", None)
        with evaluation_weights(self._optimizer):
            weights = on_host(self._tensors.weights, copy=copy or switches_weights(self._optimizer))
        tensors = WholeTensors(
            weights=weights,
            buffers=host(self._tensors.buffers),
            beside=host(self._tensors.beside()),
            best=self._best.weights,
            config=config.to_json_string() if hasattr(config, "to_json_string") else None,
        )
        return self._with_metadata(metadata, tensors, steps, processes)

    def _sharded_snapshot(
        self, metadata: Mapping[str, Any], processes: list[dict[str, Any]], copy: bool, shards: ShardTaker
    ) -> Snapshot | Shard:
        weights = self._tensors.weights
        steps = shards.take_nested("steps", self._steps(self._tensors.names()), copy=copy)
        with evaluation_weights(self._optimizer):
            shards.take("model", weights, copy=copy or switches_weights(self._optimizer))
        shards.take("buffers", self._tensors.buffers, copy=copy)
        shards.take("beside", self._tensors.beside(), copy=copy)
        shards.take_parts("best", self._best.weights or {}, weights)
        if not self._accelerator.is_main_process:
            return shards.shard()
        return self._with_metadata(metadata, shards.shard(), on_host(steps, copy), processes)

    def _steps(self, names: Mapping[int, str] | None) -> dict[str, Any]:
        """Return the state of the optimizer and of what advances with it.

        Args:
            names: the names of weights, by `id`, that the optimizer's state is to have in place of numbers.
        """
        scaler = self._accelerator.scaler
        steps = {
            **optimizer_state(self._optimizer, names),
            "schedule": self._schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "extra": self._user_states.of_modules(),
            "callbacks": self._user_states.of_callbacks(),
        }
        for name, state in steps.items():
            if kind := unreadable(state):
                raise _UnreadableError(
                    f"the {name}'s state contains a {kind}, which cannot be loaded without running code"
                )
        return steps

    def _with_metadata(
        self,
        metadata: Mapping[str, Any],
        tensors: WholeTensors | Shard,
        steps: dict[str, Any],
        processes: list[dict[str, Any]],
    ) -> Snapshot:
        return Snapshot(
            metadata={
                **metadata,
                "updates": len(self.metrics_logger.ledger.windows),
                "epochs": len(self.metrics_logger.ledger.epochs),
                "rows": sum(entry.rows for entry in self.metrics_logger.ledger.windows),
                "extra_state": {name: part.state_dict() for name, part in self._extra_state.items()},
            },
            entries=self.metrics_logger.ledger.entries(),
            tensors=tensors,
            steps=steps,
            processes=processes,
        )

    def restore(self, checkpoint: "Checkpoint", changed: Set[str]) -> None:
        """Restore everything except the random generators. All processes must call this together.

        Args:
            changed: the settings in which this run differs from the checkpoint's run. If any differ, this run's
                optimizer hyperparameters and schedule are used, and the schedule is advanced to the same update. If the
                model differs, only tensors of unchanged shape are restored, and the optimizer starts fresh, as it does
                if its groups differ.
        """
        saved, same_model = SavedTensors(checkpoint.path), "model" not in changed
        load(self._tensors.weights, saved.section("model"), strict=same_model)
        load(self._tensors.buffers, saved.section("buffers"), strict=False)
        if beside := saved.section("beside"):
            load(self._tensors.beside(), beside, strict=not {"model", "optimizer", "loss_fn"} & changed)
        # A sharded run reads parts of what is whole in the file.
        steps = torch.load(checkpoint.path / OPTIMIZER, map_location="cpu", weights_only=True, mmap=self.is_sharded)
        restorer = StateRestorer(saved, self._model)
        if not {"model", "optimizer", "optimizer_groups"} & changed:
            names = self._tensors.names()
            load_optimizer_state(
                self._optimizer, steps, own_numbers=bool(changed), names=names, restore=restorer.restore
            )
        steps = restorer.restore({name: state for name, state in steps.items() if name not in ("optimizer", "inner")})
        if changed:
            _forward(self._schedule, sum(not entry.skipped for entry in checkpoint.windows))
        else:
            self._schedule.load_state_dict(steps["schedule"])
        if self._accelerator.scaler is not None and steps["scaler"]:
            self._accelerator.scaler.load_state_dict(steps["scaler"])
        self.metrics_logger.ledger.resume_from(checkpoint.entries)
        for name, part in self._extra_state.items():
            part.load_state_dict(checkpoint.metadata["extra_state"][name])
        for name, module in self._user_states.modules():
            if name in steps["extra"]:
                module.set_extra_state(steps["extra"][name])
        self._callbacks.load_state_dict(steps["callbacks"], continues=bool(changed))
        self._processes = checkpoint.processes()  # before the run writes anything: the file may be damaged

    def restore_best(self, checkpoint: "Checkpoint", best: EvaluationEntry | None, changed: Set[str]) -> None:
        """Restore the weights of the best evaluation, if this run keeps them.

        They are those that the checkpoint keeps, or those of the checkpoint at that evaluation.

        Args:
            best: the best evaluation of the earlier run.
        """
        if not self._best.is_kept or best is None:
            return
        if "model" not in changed:
            saved = SavedTensors(checkpoint.path).section("best")
            if saved and self._best.n_updates == best.evaluation:
                self._best.weights = local_parts(self._tensors.weights, saved)
                return
            there = checkpoint.at_update(best.evaluation)
            if there is not None and not self._callbacks.changes_weights:
                self._best.weights = local_parts(self._tensors.weights, SavedTensors(there).section("model"))
                self._best.n_updates = best.evaluation
                self._user_states.log_once(
                    f"The checkpoint has no copy of the best weights so far, so those of update {best.evaluation} are "
                    f"loaded from {there}."
                )
                return
        self._best.after = checkpoint.evaluations[-1].evaluation
        self._user_states.log_once(
            f"The checkpoint has no weights of update {best.evaluation}, the best so far, for this model. "
            "`restore_best_weights` will use the best of the remaining evaluations."
        )

    def restore_generators(self, checkpoint: "Checkpoint", seed: int) -> None:
        """Restore the random generators, or seed them anew if the number of processes has changed.

        Call this right before the next window: other steps may draw numbers.
        """
        processes, index = self._processes, self._accelerator.process_index
        if len(processes) == self._accelerator.num_processes:
            Generators.of_state(processes[index]["generators"]).restore()
        else:
            seed_all(seed, index, len(checkpoint.windows))


def _forward(schedule: LRScheduler, n_updates: int) -> None:
    """Advance a schedule by this many updates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer took these steps in the earlier run
        for _ in range(n_updates):
            schedule.step()
