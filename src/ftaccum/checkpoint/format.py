"""The files of a checkpoint: write them from a snapshot, and read them."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..insight.format import format_bytes
from ..planning.base_plan import Progress
from ..runtime.log import logger
from ..tracking.ledger import Entry, EpochEntry, EvaluationEntry, WindowEntry
from ..tracking.ledger_file import read_entry
from .manifest import BESIDE, BEST, BUFFERS, LEDGER, OPTIMIZER, PROCESSES, STATE, WEIGHTS, damage
from .serialization import n_bytes_in
from .shards import Shard


@dataclass(frozen=True)
class WholeTensors:
    """A copy of the tensors of a run whose model is not sharded, in host memory.

    Attributes:
        weights, buffers, beside: see `RunTensors`.
        best: the weights of the best evaluation, if they are kept.
        config: the model's configuration in JSON, if it has one.
    """

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    beside: dict[str, Tensor]
    best: dict[str, Tensor] | None
    config: str | None

    @property
    def n_bytes(self) -> int:
        """Approximate size on disk."""
        return n_bytes_in([self.weights, self.buffers, self.beside, self.best])

    def write(self, folder: Path) -> None:
        """Write the tensors into the folder of a checkpoint.

        Raises:
            OSError: if the disk is full, among other causes.
        """
        (folder / WEIGHTS).parent.mkdir()
        save_file(self.weights, folder / WEIGHTS, metadata={"format": "pt"})  # as Transformers writes it
        if self.config is not None:
            (folder / WEIGHTS).with_name("config.json").write_text(self.config)
        save_file(self.buffers, folder / BUFFERS)
        if self.beside:
            save_file(self.beside, folder / BESIDE)
        if self.best is not None:
            save_file(self.best, folder / BEST)


@dataclass(frozen=True)
class Snapshot:
    """A copy of a run's state in host memory, which the run no longer changes.

    Attributes:
        tensors: the tensors of the run; if its model is sharded, those that the main process saves.
    """

    metadata: dict[str, Any]
    entries: list[Entry]
    tensors: WholeTensors | Shard
    steps: dict[str, Any]
    processes: list[dict[str, Any]]

    @property
    def n_bytes(self) -> int:
        """Approximate size on disk."""
        return self.tensors.n_bytes + n_bytes_in(self.steps) + 300 * len(self.entries)

    def write(self, folder: Path) -> None:
        """Write the files of a checkpoint into an empty folder.

        Raises:
            OSError: if the disk is full, among other causes.
            pickle.UnpicklingError: if reading the optimizer's state would require running code.
        """
        started = time.perf_counter()
        self.tensors.write(folder)
        torch.save(self.steps, folder / OPTIMIZER)
        torch.save(self.processes, folder / PROCESSES)
        torch.load(folder / OPTIMIZER, weights_only=True, mmap=True)
        (folder / STATE).write_text(json.dumps(self.metadata, indent=2) + "\n")
        with (folder / LEDGER).open("w") as file:
            file.writelines(json.dumps(vars(entry)) + "\n" for entry in self.entries)
        seconds = time.perf_counter() - started
        logger.debug(f"Wrote a checkpoint of {format_bytes(self.n_bytes)} in {seconds:.2f} s.")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the run's metadata and ledger. The tensors are still on disk."""

    path: Path
    metadata: dict[str, Any]
    entries: list[Entry]

    @classmethod
    def opened(cls, path: Path) -> "Checkpoint":
        entries = [read_entry(line) for line in (path / LEDGER).read_text().splitlines()]
        return cls(path, json.loads((path / STATE).read_text()), entries)

    def processes(self) -> list[dict[str, Any]]:
        """Return the random generators of each process."""
        return torch.load(self.path / PROCESSES, weights_only=True)

    @property
    def windows(self) -> list[WindowEntry]:
        return [entry for entry in self.entries if isinstance(entry, WindowEntry)]

    @property
    def epochs(self) -> list[EpochEntry]:
        return [entry for entry in self.entries if isinstance(entry, EpochEntry)]

    @property
    def evaluations(self) -> list[EvaluationEntry]:
        return [entry for entry in self.entries if isinstance(entry, EvaluationEntry)]

    @property
    def progress(self) -> Progress:
        """How far the run had come."""
        windows, metadata = self.windows, self.metadata
        last_epoch = windows[-1].epoch if windows else 0
        rows = [entry.rows for entry in windows]
        return Progress(rows, last_epoch, metadata["n_rows"], metadata["recipe"]["max_updates"])

    def at_update(self, n_updates: int) -> Path | None:
        """Return the newest sound checkpoint after that number of updates in the same folder, if there is one."""
        there = sorted(self.path.parent.glob(f"update-{n_updates:08d}*"), reverse=True)
        return next((path for path in there if damage(path) is None), None)
