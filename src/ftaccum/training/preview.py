"""Preview a run without training: rows as the model sees them, batch sizes, memory and time."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.loader import LocalRows, MicroBatch
from ..insight.format import format_bytes, format_duration
from ..objective.batch_changes import fresh_batch
from ..planning.micro_batches import MicroBatchRows
from ..runtime.device_state import finish_work, forget_peak_memory, peak_memory
from ..runtime.memory import is_out_of_memory
from ..runtime.model_traits import output_embeddings
from ..runtime.model_wrapper import model_to_save
from ..runtime.state_guards import preserve_gradients
from .base_run import Run
from .build_plan import describe_cut

_TIMED = 8  # micro-batches to time
_ADAM_STATES = 2  # numbers that Adam keeps for each trainable weight
_LONGEST = 48  # tokens to show of each end of a row


class PreviewRun(Run):
    """A run that shows what it would train on, and what an update would take."""

    def preview(self, n_rows: int) -> str:
        """Return rows, batch sizes, memory and time as text.

        Args:
            n_rows: the number of rows to show.
        """
        cut = describe_cut(
            self.config.runtime, self.batch_sizes, self.planner, knows_lengths=self.data.train.knows_lengths
        )
        rows = [line for position in range(min(n_rows, len(self.data.train_rows))) for line in self._row(position)]
        return "\n".join([*rows, str(self.plan), *self.data.notes(), cut, *self._costs()])

    def _row(self, position: int) -> Iterator[str]:
        loader = self.data.train
        piece = MicroBatchRows((position,), places=(0,))
        (micro,) = loader.stream([LocalRows((position,), [piece], (0,))])
        batch = micro.batch if hasattr(micro.batch, "items") else {}
        by_term = len(micro.counts) > 1
        items = ", ".join(f"{count:g} of {term}" if by_term else f"{count:g}" for term, count in micro.counts.items())
        yield f"--- {loader.name_of(position)}: {micro.tokens or 'no'} tokens, loss items: {items}"
        tokenizer = self.config.components.tokenizer
        for name, value in batch.items():
            if isinstance(value, Tensor):
                yield f"  {name} {tuple(value.shape[1:])}: {self._shown(name, value[0], tokenizer)}"

    def _shown(self, name: str, value: Tensor, tokenizer: Any) -> str:
        """Return a column of a row: token ids as text, labels of tokens with the tokens that they belong to."""
        decodes = hasattr(tokenizer, "convert_ids_to_tokens")
        if name == "input_ids" and value.ndim == 1 and decodes:
            return _cut(tokenizer.convert_ids_to_tokens(value.tolist()))
        if name == "labels" and not value.is_floating_point():
            return self._labels(value, tokenizer if decodes else None)
        if value.numel() > 1 and value.min() == value.max():
            return f"all {value.flatten()[0].item():g}"
        return _cut([f"{number:g}" for number in value.flatten()[: 2 * _LONGEST + 1].tolist()])

    def _labels(self, labels: Tensor, tokenizer: Any) -> str:
        """Return labels by name. `·` stands for a label that the loss ignores."""
        ignored, names = self.data.ignore_index, getattr(self.model.config, "id2label", None) or {}
        if labels.ndim != 1:
            return names.get(int(labels), str(labels.tolist())) if labels.ndim == 0 else _cut(labels.tolist())
        vocabulary = getattr(self.model.config, "vocab_size", 0) or 0
        predicts_tokens = output_embeddings(model_to_save(self.model)) is not None  # so that labels may be token ids
        if tokenizer is not None and len(names) < vocabulary and predicts_tokens:
            words = tokenizer.convert_ids_to_tokens(labels.clamp(min=0).tolist())
        else:
            words = [names.get(n, str(n)) for n in labels.tolist()]
        return _cut(["·" if n == ignored else word for n, word in zip(labels.tolist(), words, strict=True)])

    def _costs(self) -> list[str]:
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        states = trained * (1 + _ADAM_STATES)
        lines = [
            f"Memory: {format_bytes(weights)} of weights, {format_bytes(states)} of gradients and AdamW states, and "
            "activations"
        ]
        with preserve_gradients(self.model):
            return lines + self._timed()

    def _timed(self) -> list[str]:
        """Return lines on the time of an update, from some of its forward and backward passes."""
        device, window = self.accelerator.device, next(iter(self.plan.windows(0)))
        slices = self.data.train.cut(window.rows, self.planner)[self.accelerator.process_index]
        (micros,) = self.data.train.load([LocalRows(window.rows, slices, (0,))])
        forget_peak_memory(device)
        try:
            longest = self._longest_rows(max(len(micro.slice.rows) for micro in micros))
            seconds = [self._pass(micro) for micro in [longest, *micros[:_TIMED]]][1:]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return ["A forward and backward pass of the longest rows does not fit in memory. Lower `batch_size`."]
        lines = []
        if device.type != "cpu" and (peak := peak_memory(device)):
            lines.append(f"Peak memory of a pass of the longest rows: {format_bytes(peak)}")
        each = sum(seconds) / len(seconds)
        update = each * len(micros)
        return [
            *lines,
            f"Time: about {each:.3g} s for a forward and backward pass, {update:.3g} s for an update of {len(micros)} "
            f"passes, {format_duration(update * self.plan.n_windows)} in all, without evaluation and optimizer steps",
        ]

    def _longest_rows(self, n_rows: int) -> MicroBatch:
        """Return a micro-batch of the longest rows: as many as given, or as many as the limit on tokens allows."""
        loader, tokens = self.data.train, self.planner.limits.tokens
        if tokens is not None:
            n_rows = min(n_rows, max(1, tokens // (loader.longest_rows(1).positions or 1)))
        return loader.longest_rows(n_rows)

    def _pass(self, micro: MicroBatch) -> float:
        """Return the time in seconds of one forward and backward pass."""
        device = self.accelerator.device
        finish_work(device)
        started = time.perf_counter()
        batch = fresh_batch(micro.batch, device)
        with self.accelerator.autocast():
            means, _ = self.data.objective.means(self.model, batch, micro.counts, micro.terms, micro.names)
        sum(means.values(), torch.zeros((), device=device)).backward()
        self.model.zero_grad(set_to_none=True)
        finish_work(device)
        return time.perf_counter() - started


def _cut(words: Sequence[Any]) -> str:
    """Return words as one line; of a long row, its beginning and its end."""
    shown = [str(word) for word in words]
    if len(shown) > 2 * _LONGEST:
        shown = [*shown[:_LONGEST], f"… ({len(shown) - 2 * _LONGEST} more) …", *shown[-_LONGEST:]]
    return " ".join(shown)
