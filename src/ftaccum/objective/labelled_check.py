"""Find out before training whether a model's loss can be computed from the logits at labelled positions."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line
from ..runtime.memory import is_out_of_memory
from ..runtime.model_context import is_compiled
from ..runtime.model_traits import output_embeddings
from ..runtime.module_attributes import has_hooks_after, preserve_attributes
from ..runtime.process_group import of_main_process
from ..runtime.state_guards import inspection_mode, preserve_buffers, preserve_rng, training_mode
from .batch_changes import fresh_batch_for
from .forward import Forward
from .gradient_check import GradientCheck, difference_of
from .item_counts import AFTER_SHIFT, Batch, are_per_token
from .labelled_head import LabelledHead, NeededLogits, modules_around
from .labelled_positions import LabelledPositions
from .objective import Objective
from .own_loss import LOSS, logits_of
from .perturbation import float32_weights, perturb_head
from .probe import relative
from .rare_labels import with_rare_labels
from .sample import PAIRS, Sample

_WAYS = {"labels": False, AFTER_SHIFT: True}  # whether logits predict the next label
_GRADIENT = 10  # the tolerance of the gradient, in multiples of that of the loss


def find_labelled_head(model: nn.Module, sample: Sample, objective: Objective, ignore_index: int) -> LabelledHead | str:
    """Return a head that computes logits only at labelled positions, if it gives the model's own loss and gradient.

    Compare both on the sample: the loss in eval mode, also for rare labels, and the gradient in train mode, with equal
    random draws. All passes are in float32 or wider, without autocast. No model is known by name: scales, soft caps,
    biases and adapters of a head apply to the selected positions as to all. All processes use the main process's
    finding.

    Args:
        ignore_index: the label that the loss ignores.

    Returns:
        The head, or the reason why all logits are computed, for a message.
    """
    way = "" if objective.report.sums else objective.report.ways.get(LOSS, "")
    labelled = candidate_head(model, objective.forward, sample.together, way, ignore_index)
    if not isinstance(labelled, LabelledHead):
        return labelled
    comparison = _Comparison(model, sample, objective, labelled)
    found, labelled.gives_logits = of_main_process((comparison.reason(), comparison.gives_logits))
    return labelled if found is None else found


def candidate_head(model: nn.Module, forward: Forward, batch: Batch, way: str, ignore_index: int) -> LabelledHead | str:
    """Return a head that computes logits only at labelled positions, not yet compared with the model's own way.

    Args:
        batch: a few rows.
        way: the name of the items that the loss is a mean over.

    Returns:
        The head, or the reason why all logits are needed.
    """
    head = output_embeddings(model)
    if head is None:
        return "the model has no output embedding"
    if (reason := _excluded(model, head, forward, batch, way)) is not None:
        return reason
    return LabelledHead(model, head, LabelledPositions(_WAYS[way], ignore_index))


def _excluded(model: nn.Module, head: nn.Module, forward: Forward, batch: Batch, way: str) -> str | None:
    if not forward.is_own:
        return "the loss is not the model's own"
    if not isinstance(batch, Mapping) or not are_per_token(batch.get("labels")):
        return "the rows have no label for each token"
    if way not in _WAYS:
        return "the loss is not a plain mean over labels"
    if any(map(has_hooks_after, modules_around(model, head))):
        return "the model or its output embedding has hooks, which may read all logits"
    # Its graphs may fix each number of labels, or be older than the hook that selects positions.
    return "the model is compiled" if is_compiled(model) else None


class _Comparison:
    """A comparison of the loss and the gradient from labelled positions with the model's own.

    Attributes:
        gives_logits: whether the model returns the outputs of its head unchanged, as logits.
    """

    def __init__(self, model: nn.Module, sample: Sample, objective: Objective, labelled: LabelledHead) -> None:
        self._model, self._forward, self._sample, self._objective = model, objective.forward, sample, objective
        self._labelled, self._tolerance = labelled, objective.report.tolerance
        self._prepared: Callable[[Batch], Batch] = lambda batch: batch
        self.gives_logits = False

    def reason(self) -> str | None:
        """Return how the two differ, or the error that the selection of positions causes; None if they are equal."""
        modules = self._forward.modules
        with (
            inspection_mode(self._model, *modules),
            float32_weights(self._model, *modules) as prepared,
            perturb_head(self._model),  # with a new head, a penalty of large logits hardly shows
        ):
            self._prepared = prepared
            try:
                return self._of_losses() or self._of_gradient()
            except Exception as error:  # a model may need its labels, or use its hidden states in another way
                if is_out_of_memory(error):
                    return "memory ran out during the comparison"
                return f"the model fails with labelled positions only: {first_line(error)}"
            finally:
                self._forward.labelled_head = None

    def _of_losses(self) -> str | None:
        relabelled = with_rare_labels(self._sample, self._labelled.positions.ignore_index)
        rare = [group.together for group in self._sample.rare] if relabelled is None else relabelled
        found = self._losses(self._sample.together, self._labelled)
        batches = [self._sample.together, *rare]
        # The self-check has measured the model's own loss with the same noise, unless its verdict came from the cache.
        if _difference(self._objective.report.joint, found) <= self._tolerance:
            batches = rare
        for batch in batches:
            own, found = (self._losses(batch, head) for head in (None, self._labelled))
            if (off := _difference(own, found)) > self._tolerance:
                return f"the loss differs by {off:.1e}"
        return None

    def _of_gradient(self) -> str | None:
        """Compare gradients of two rows, that of labelled positions in two chunks if the logits allow it."""
        together = self._sample.separate(self._sample.together, PAIRS)[0]
        n_half = -(-int(self._objective.count(together)[LOSS]) // 2) or 1
        self._labelled.gives_logits = self.gives_logits
        sketches = []
        with training_mode(self._model, training=True), self._labelled.chunks_of(n_half):
            for head in (None, self._labelled):
                self._forward.labelled_head = head
                means = partial(self._means, needs=NeededLogits.NONE)
                with preserve_rng():  # dropout draws the same numbers in both
                    check = GradientCheck(self._model, means, self._objective.count_by_term, self._forward.modules)
                    sketches.append(check.together(together))
        own, found = sketches
        off = difference_of(own, found, None, _GRADIENT * self._tolerance).off
        return f"the gradient differs by {off:.1e}" if off else None

    def _losses(self, batch: Batch, head: LabelledHead | None) -> dict[str, float]:
        """Return the loss of a batch, and find out whether the model returns the outputs of its head unchanged.

        Equal numbers do not show that: large logits may be clamped.
        """
        self._forward.labelled_head = head
        outputs_of_head: list[tuple[Tensor, Tensor]] = []
        hook = self._labelled.head.register_forward_hook(
            lambda _, __, output: outputs_of_head.append((output, output.detach().clone()))  # it may change in place
        )
        try:
            with preserve_rng(), preserve_buffers(self._model), preserve_attributes(self._model):
                means, outputs = self._run(batch, NeededLogits.LABELLED)
        finally:
            hook.remove()
        logits = logits_of(outputs)
        (output, copy), *others = outputs_of_head or [(logits, logits)]
        self.gives_logits = bool(outputs_of_head) and not others and output is logits and torch.equal(copy, logits)
        return {term: mean.item() for term, mean in means.items()}

    def _means(self, batch: Batch, needs: NeededLogits) -> dict[str, Tensor]:
        return self._run(batch, needs)[0]

    def _run(self, batch: Batch, needs: NeededLogits) -> tuple[dict[str, Tensor], Any]:
        given = self._prepared(fresh_batch_for(self._model, batch))
        return self._forward(self._model, given, self._objective.count(batch), needs)


def _difference(own: Mapping[str, float], found: Mapping[str, float]) -> float:
    """Return the largest relative difference of a term, or 1 if the terms are not the same."""
    return max(relative(found[term], own[term]) for term in own) if own.keys() == found.keys() else 1.0
