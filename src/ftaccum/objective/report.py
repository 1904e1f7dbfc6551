"""What a measurement of the loss came to, and what a user should be told of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from .gradient_check import GradientDifference
from .hidden_state import HiddenState
from .item_counts import CountItems
from .probe import Explanation

_NAMED = 3  # modules to name in a sentence
_OF_WEIGHTS = "Where it weighs classes, give `nn.CrossEntropyLoss(weight=…)` as `loss_fn`: its weights are counted."


@dataclass(frozen=True)
class InTraining:
    """What train mode does to a loss.

    Attributes:
        differences: by term, the relative difference between the loss of rows together and that of rows apart.
        drift: the same between two passes of the same rows, one after the other.
        mixing: the modules whose buffers a pass moves.
        complaint: the model's, of a single row; None where it takes one.
    """

    differences: Mapping[str, float]
    drift: float = 0.0
    mixing: Sequence[str] = ()
    complaint: str | None = None

    def with_exact(self, terms: Sequence[str]) -> "InTraining":
        """Return the same with terms that nothing was measured of."""
        return replace(self, differences={**self.differences, **dict.fromkeys(terms, 0.0)})


@dataclass(frozen=True)
class ExactnessReport:
    """By term: how a loss is counted, and how far accumulating it so is from one batch.

    Attributes:
        ways: the name of the way to count.
        measured: whether there were several to choose from.
        shifts: whether logits predict the next label.
        explanation: how well the ways explain the loss, in eval mode.
        in_training: what train mode changes.
        joint: the loss of a few rows together.
        single_rows: the largest loss of one of them by itself.
        parts: the terms that are outputs of the model's, which its loss has added.
        tolerance: the largest difference that is rounding.
        sums: whether the loss is handed over as a sum.
        own_loss: whether it is the model's own.
        own_rules: the counts that the ways are names for where the loss has rules of its own.
        at_fault: the rare rows that a way does not explain, in words.
        not_looked_at: labels that no row has that was measured, in words.
        absent_is_zero: the terms that count as 0 where the loss leaves them out.
        counts_before_changes: whether passes change their batch in place, and the count is right from before.
        gradient: how far gradients of rows apart are from that of all together, where the losses agree.
        gradient_hooks: the parameters with hooks that run after each accumulated gradient.
        hidden_state: what a pass leaves behind outside of buffers.
        unmeasured: the terms that were 0 in all rows, which any way to count explains.
    """

    ways: Mapping[str, str]
    measured: bool
    shifts: bool
    explanation: Explanation
    in_training: InTraining
    joint: Mapping[str, float]
    single_rows: Mapping[str, float]
    parts: Sequence[str]
    tolerance: float
    sums: bool
    own_loss: bool
    own_rules: Mapping[str, CountItems] = field(default_factory=dict)
    at_fault: Mapping[str, str] = field(default_factory=dict)
    not_looked_at: str = ""
    absent_is_zero: Sequence[str] = ()
    counts_before_changes: bool = False
    gradient: GradientDifference = GradientDifference()
    gradient_hooks: Sequence[str] = ()
    hidden_state: HiddenState = HiddenState()
    unmeasured: Sequence[str] = ()

    @property
    def counted_by(self) -> str:
        """What the loss is a mean over, in words."""
        not_exactly = dict.fromkeys(self._unexplained, ", NOT exactly")
        not_exactly |= dict.fromkeys(self._mixed, ", NOT exactly in train mode")
        named = {term: f"{way} for {term!r}" if len(self.ways) > 1 else way for term, way in self.ways.items()}
        words = "; ".join(words + not_exactly.get(term, "") for term, words in named.items())
        words = f"{words} (measured)" if self.measured and not not_exactly else words
        return f"{words}; {self.not_looked_at} not looked at" if self.not_looked_at else words

    @property
    def mixes_rows(self) -> bool:
        """Whether the main loss of a row depends on what it is batched with."""
        return any(term not in self.parts for term in self._unexplained) or bool(self._mixed)

    def inexact(self) -> list[str]:
        """Why accumulating this loss only approximates one large batch: a sentence for each reason, with the figure by
        which the two differ and what can be done. Empty where it is exact."""
        if self.hidden_state.off:  # rows together and apart differ for it, whatever else they do
            return [self._of_hidden_state()]
        unexplained = self._unexplained
        found = [self._of_rows_at_fault(term) for term in self.at_fault]
        wholes = [term for term in unexplained if term not in (*self.parts, *self.at_fault)]
        found += [self._of_part(term) for term in unexplained if term in self.parts]
        if wholes:
            found.append(f"The loss is not a mean over countable items: {self._clauses(wholes)}. {self._cure(wholes)}")
        found += [self._of_train_mode(self._mixed)] if self._mixed else []
        found += [self._of_gradient()] if self.gradient.off else []
        found += [self._of_hooks()] if self.gradient_hooks else []
        found += [self._of_zero(term) for term in self.unmeasured]
        return [*found, *([self._of_drift()] if self.in_training.drift > self.tolerance else [])]

    def padding(self) -> str | None:
        """What to know of a loss of the user's own that counts padding; None where it does not. (In heads of
        Transformers' it is meant so: the softmax of question answering runs over all positions.)"""
        if self.own_loss or not self.explanation.padding_sensitive:
            return None
        return (
            f"Padding counts in the loss: rows padded to their own width instead of that of others differ by up to "
            f"{_percent(self.explanation.padding)}. Every window is padded to one width, so that accumulating it is "
            "exact; but what a row adds depends on the longest that it meets. Where that is not meant, leave positions "
            "at which `attention_mask` is 0 out of account, in the loss or in the model."
        )

    @property
    def _mixed(self) -> dict[str, float]:
        """What train mode alone mixes."""
        off = self.in_training.differences
        return {term: off[term] for term in off if off[term] > self.tolerance and term not in self._unexplained}

    @property
    def _unexplained(self) -> dict[str, float]:
        off = dict(self.explanation.differences)
        off |= {part: max(off[part], self.in_training.differences[part]) for part in self.parts}
        return {term: difference for term, difference in off.items() if difference > self.tolerance}

    def _clauses(self, terms: Sequence[str]) -> str:
        return "; ".join(
            f"{term!r} of rows apart, weighted by {self.ways[term]}, is up to {_percent(self._unexplained[term])} off "
            "that of all together"
            for term in terms
        )

    def _cure(self, terms: Sequence[str]) -> str:
        if self.explanation.adds_up and not self.sums:
            return "The parts add up, so the loss is a sum: say so with `reduction='sum'`."
        term = terms[0]
        if abs(self.single_rows[term]) < 1e-3 * abs(self.joint[term]):
            return (
                f"A row by itself costs {self.single_rows[term]:.2g}, a few together {self.joint[term]:.2g}: rows are "
                "compared with each other, as in-batch negatives are. No weighting makes up for the rows that a "
                "micro-batch has not; make `batch_size` as large as the comparison has to be."
            )
        return (
            "Accumulating it only approximates one large batch. Losses that compare the rows of a batch with each "
            "other do this; where yours is a mean over items of your own, give `count_items`; where it is the sum of "
            f"several means, have `loss_fn` give them by name, in a dict. {_OF_WEIGHTS}"
        )

    def _of_rows_at_fault(self, term: str) -> str:
        return (
            f"The loss is a mean over {self.ways[term]} for most rows, but not for all: in {term!r}, items of some "
            f"rows weigh more or less than those of others ({self.at_fault[term]}), and rows apart are up to "
            f"{_percent(self._unexplained[term])} off all together. Accumulating it only approximates one large batch. "
            f"{_OF_WEIGHTS} Where it leaves items out or weighs them by another rule, give `count_items`."
        )

    def _of_part(self, term: str) -> str:
        share = abs(self.joint[term]) / (sum(map(abs, self.joint.values())) or 1)
        of_loss = f", {_percent(share)} of the loss," if share else ""
        return (
            f"{term!r}{of_loss} looks at the rows of a batch together, as a router's balance "
            f"over its experts does: {self._clauses([term])}. It is trained on as that weighted mean, the nearest to "
            "one large batch that micro-batches can have; the more tokens a micro-batch has, the nearer it comes."
        )

    def _of_train_mode(self, mixed: Mapping[str, float]) -> str:
        (term, off), *_ = sorted(mixed.items(), key=lambda item: -item[1])
        mixing, complaint = self.in_training.mixing, self.in_training.complaint
        named = ", ".join(mixing[:_NAMED]) + (", …" if len(mixing) > _NAMED else "")
        verb = "takes" if len(mixing) == 1 else "take"
        cause = f"{named} there {verb} in the rows given at a time" if mixing else "something there mixes rows"
        alone = f" A micro-batch of a single row cannot be computed at all ({complaint})." if complaint else ""
        return (
            f"In train mode, {term!r} of rows apart is up to {_percent(off)} off that of all together, and in eval "
            f"mode it is not: {cause}, and accumulating only approximates one large batch.{alone} Where that is a "
            "batch norm, use a norm over the features of one row (GroupNorm, LayerNorm) or one with fixed statistics "
            "(FrozenBatchNorm2d), or a larger `batch_size`."
        )

    def _of_gradient(self) -> str:
        named = ", ".join(f"'{name}'" for name in self.gradient.tensors[:_NAMED])
        ways = " and ".join(dict.fromkeys(self.ways.values()))
        return (
            f"The gradient of rows apart, weighted by {ways}, is {_percent(self.gradient.off)} off that of all "
            f"together, although their losses agree. The parameters that differ most: {named}. Hooks, autograd "
            "functions and layers that clamp, normalise or scale a gradient (`scale_grad_by_freq`) do so for each "
            "micro-batch. Do it once an update, as `gradient_clip_norm` does, or raise `batch_size` to the rows of an "
            "update. If there is none, the items may be counted wrong: give `count_items`."
        )

    def _of_hooks(self) -> str:
        named = ", ".join(f"'{name}'" for name in self.gradient_hooks[:_NAMED])
        return (
            f"Hooks run whenever a gradient is accumulated (`register_post_accumulate_grad_hook`, on {named}): once a "
            "micro-batch, where one large batch runs them once. Remove those that change a gradient or step an "
            "optimizer."
        )

    def _of_zero(self, term: str) -> str:
        return (
            f"{term!r} is 0 in all rows that were looked at, so what it is a mean over could not be measured; it is "
            f"weighted by {self.ways[term]}. Give `count_items`, which returns a dict with the items of every term."
        )

    def _of_hidden_state(self) -> str:
        off, places = _percent(self.hidden_state.off), self.hidden_state.places
        if places:
            named = ", ".join(places[:_NAMED]) + (", …" if len(places) > _NAMED else "")
            found = f"A forward pass changes {named}, which the next one depends on: the same rows, passed again, "
        else:
            found = "`forward` or `loss_fn` keeps something from call to call: the same rows, passed again, "
        return (
            f"{found}differ by {off}. An update of k passes changes it k times, one large batch once. Change it once "
            "an update instead, outside of the forward pass."
        )

    def _of_drift(self) -> str:
        named = ", ".join(self.in_training.mixing[:_NAMED])
        return (
            f"In train mode, a pass moves buffers that the next one depends on ({named}): the same rows, passed again, "
            f"differ by {_percent(self.in_training.drift)}. An update of k passes moves them k times, one large batch "
            "once. Move them once an update instead, outside of `forward`."
        )


def _percent(share: float) -> str:
    if math.isinf(share):
        return "infinitely far"
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"
