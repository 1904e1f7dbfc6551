"""The result of measuring a loss, and the messages about it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from .gradient_check import GradientDifference
from .hidden_state import HiddenState
from .item_counts import CountItems
from .probe import Explanation
from .window_report import WindowReport

_NAMED = 3  # modules or parameters to name in a message
_OF_WEIGHTS = "If the loss weights classes, give `nn.CrossEntropyLoss(weight=…)` as `loss_fn`: its weights are counted."
_OF_ITEMS = "the items that the loss is a mean over may be counted wrong: give `count_items`."
_OF_LEFT = "`loss_fn` may read what the last forward pass left behind: return it from `loss_inputs` instead."
OVER_WINDOW = "Set `loss_over='window'`, with which `loss_fn` gets all rows of an update at once: then it is exact."


@dataclass(frozen=True)
class InTraining:
    """The effects of train mode on a loss.

    Attributes:
        differences: for each term, the relative difference between the loss of one batch and the weighted losses of
            separate batches.
        drift: the relative difference between two successive passes of the same rows.
        mixing: the modules whose buffers a pass moves.
        complaint: the model's error message for a batch of a single row; None if it accepts one.
    """

    differences: Mapping[str, float]
    drift: float = 0.0
    mixing: Sequence[str] = ()
    complaint: str | None = None

    def with_exact(self, terms: Sequence[str]) -> "InTraining":
        """Return a copy with a difference of 0 for terms that were not measured."""
        return replace(self, differences={**self.differences, **dict.fromkeys(terms, 0.0)})


@dataclass(frozen=True)
class ExactnessReport:
    """How a loss is counted, and how far accumulating it with that count is from one batch. Mappings are by term.

    Attributes:
        ways: the name of the way to count.
        measured: whether there were several ways to choose from.
        shifts: whether logits predict the next label.
        explanation: how well the ways explain the loss, in eval mode.
        in_training: the effects of train mode.
        joint: the loss of a few rows in one batch.
        single_rows: the largest loss of a batch of one of these rows.
        parts: the terms that are outputs of the model and that its own loss adds up.
        tolerance: the largest difference that counts as rounding.
        sums: whether the loss is given as a sum.
        own_loss: whether the loss is the model's own.
        own_rules: the counts for terms whose loss has rules of its own. `ways` has their names.
        at_fault: the rare rows that the way to count does not explain, for a message.
        not_looked_at: the labels that no measured row has, for a message.
        absent_is_zero: the terms that count as 0 if the loss leaves them out.
        counts_before_changes: whether passes change their batch in place, and the count before the change is right.
        gradient: the difference between gradients of separate batches and of one batch, if the losses agree.
        gradient_hooks: the parameters with hooks that run after each accumulated gradient.
        hidden_state: the state that a pass leaves behind outside buffers.
        unmeasured: the terms that were 0 in all rows, so that any way to count explains them.
        balanced: the terms that are computed over all tokens of a window together.
        window: what is known of a loss that reads all rows of a window together; None for another loss.
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
    balanced: Sequence[str] = ()
    window: WindowReport | None = None

    def over_whole_window(self, terms: Sequence[str], padding: float) -> "ExactnessReport":
        """Return the report of a loss with terms that are computed over all tokens of a window.

        Args:
            padding: the share of padding in these tokens.
        """
        explanation = replace(self.explanation, padding=max(self.explanation.padding, padding))
        return replace(
            self,
            ways={**self.ways, **dict.fromkeys(terms, "all tokens of an update together")},
            explanation=explanation.with_exact(terms),
            in_training=self.in_training.with_exact(terms),
            balanced=tuple(terms),
        )

    @property
    def describes(self) -> str:
        """The description of the loss for a message."""
        twice = "if an update has several micro-batches, they run forward twice, which takes 1.3 to 1.6 times as long"
        if self.window:
            return f"over all rows of an update together; {twice}"
        described = f"mean over {self.counted_by}"
        return f"{described}; {twice} (`router_balance`)" if self.balanced else described

    @property
    def counted_by(self) -> str:
        """The description of what the loss is a mean over, for a message."""
        not_exactly = dict.fromkeys(self._unexplained, ", only approximately")
        not_exactly |= dict.fromkeys(self._mixed, ", only approximately in train mode")
        named = {term: f"{way} for {term!r}" if len(self.ways) > 1 else way for term, way in self.ways.items()}
        words = "; ".join(words + not_exactly.get(term, "") for term, words in named.items())
        words = f"{words} (measured)" if self.measured and not not_exactly else words
        return f"{words}; the check before training did not cover {self.not_looked_at}" if self.not_looked_at else words

    def describe_measurement(self) -> str:
        """Return the relative differences that were measured between one batch and separate ones, by term."""
        in_eval, in_train = self.explanation.differences, self.in_training.differences
        terms = "; ".join(
            f"{term!r} as a mean over {way}: {in_eval.get(term, 0.0):.1e} in eval mode, "
            f"{in_train.get(term, 0.0):.1e} in train mode"
            for term, way in self.ways.items()
        )
        return f"Measured loss, relative difference between one batch and separate ones: {terms}."

    @property
    def mixes_rows(self) -> bool:
        """Whether the main loss of a row depends on the other rows of its batch."""
        return any(term not in self.parts for term in self._unexplained) or bool(self._mixed)

    def inexact(self) -> list[str]:
        """Return the reasons why accumulating this loss only approximates one large batch; empty if it is exact.

        Each is a message with the size of the difference and a remedy.
        """
        if self.hidden_state.off:  # passes differ because of it, so other differences show nothing
            return [self._of_hidden_state()]
        unexplained = self._unexplained
        found = [self._of_rows_at_fault(term) for term in self.at_fault]
        wholes = [term for term in unexplained if term not in (*self.parts, *self.at_fault)]
        found += [self._of_part(term) for term in unexplained if term in self.parts]
        if wholes:
            found.append(
                "The loss is not a mean over items that can be counted, such as labels or rows: "
                f"{self._clauses(wholes)}. {self._cure(wholes)}"
            )
        found += [self._of_train_mode(self._mixed)] if self._mixed else []
        found += [self._of_gradient()] if self.gradient.off else []
        found += [self._of_hooks()] if self.gradient_hooks else []
        found += [self._of_zero(term) for term in self.unmeasured]
        return [*found, *([self._of_drift()] if self.in_training.drift > self.tolerance else [])]

    def padding(self) -> str | None:
        """Return a warning that a loss counts padding; None if it does not, or if it is the model's own.

        Heads of Transformers count padding on purpose: the softmax of question answering runs over all positions.
        """
        if self.own_loss or not self.explanation.padding_sensitive:
            return None
        return (
            "Padding counts in the loss: rows padded to the length of longer rows change their loss by up to "
            f"{_percent(self.explanation.padding)}. All rows of an update are padded to one length, so accumulation "
            "is exact. But the loss of a row depends on the longest row of its update. If this is not intended, ignore "
            "positions where `attention_mask` is 0, in the loss or in the model."
        )

    @property
    def _mixed(self) -> dict[str, float]:
        """The differences of the terms that are exact in eval mode, but not in train mode."""
        off = self.in_training.differences
        return {term: off[term] for term in off if off[term] > self.tolerance and term not in self._unexplained}

    @property
    def _unexplained(self) -> dict[str, float]:
        off = dict(self.explanation.differences)
        off |= {part: max(off[part], self.in_training.differences[part]) for part in self.parts}
        return {term: difference for term, difference in off.items() if difference > self.tolerance}

    def _clauses(self, terms: Sequence[str]) -> str:
        return "; ".join(
            f"{term!r} over separate micro-batches, weighted by {self.ways[term]}, is up to "
            f"{_percent(self._unexplained[term])} off its value for the same rows in one batch"
            for term in terms
        )

    def _cure(self, terms: Sequence[str]) -> str:
        if self.explanation.adds_up and not self.sums:
            return "The losses of the micro-batches add up to that of one batch, so it is a sum: set `reduction='sum'`."
        term = terms[0]
        if abs(self.single_rows[term]) < 1e-3 * abs(self.joint[term]):
            return (
                f"A single row has a loss of {self.single_rows[term]:.2g}, a few rows in one batch "
                f"{self.joint[term]:.2g}: rows are compared with each other, as in-batch negatives are. No weighting "
                f"replaces the rows that a micro-batch lacks. {OVER_WINDOW}"
            )
        return (
            "Accumulating it only approximates one large batch. This is so for losses that compare the rows of a batch "
            f"with each other. {OVER_WINDOW} If yours is a mean over other items, give `count_items`. If it is the "
            f"sum of several means, have `loss_fn` return them by name, in a dict. {_OF_WEIGHTS}"
        )

    def _of_rows_at_fault(self, term: str) -> str:
        return (
            f"The loss is a mean over {self.ways[term]} for most rows, but not for all: in {term!r}, items of some "
            f"rows weigh more or less than those of others ({self.at_fault[term]}). So the loss over separate "
            f"micro-batches is up to {_percent(self._unexplained[term])} off its value for the same rows in one batch, "
            f"and accumulating it only approximates one large batch. {_OF_WEIGHTS} If it ignores or weights items by "
            "another rule, give `count_items`."
        )

    def _of_part(self, term: str) -> str:
        share = abs(self.joint[term]) / (sum(map(abs, self.joint.values())) or 1)
        of_loss = f", {_percent(share)} of the loss," if share else ""
        return (
            f"{term!r}{of_loss} depends on the rows of a batch together, like the load-balancing loss of a mixture of "
            f"experts: {self._clauses([term])}. Training uses this weighted mean over the micro-batches, which only "
            "approximates one large batch. More tokens per micro-batch bring it closer."
        )

    def _of_train_mode(self, mixed: Mapping[str, float]) -> str:
        (term, off), *_ = sorted(mixed.items(), key=lambda item: -item[1])
        mixing, complaint = self.in_training.mixing, self.in_training.complaint
        named = ", ".join(mixing[:_NAMED]) + (", …" if len(mixing) > _NAMED else "")
        verb = "mixes" if len(mixing) == 1 else "mix"
        cause = f"{named} {verb} the rows of a batch" if mixing else "something mixes the rows of a batch"
        alone = f" A micro-batch of a single row cannot be computed at all ({complaint})." if complaint else ""
        return (
            f"In train mode, {term!r} over separate micro-batches is up to {_percent(off)} off its value for the same "
            f"rows in one batch, although the two agree in eval mode: {cause}, so accumulating only approximates one "
            f"large batch.{alone} If this is a batch norm, use a norm over the features of one row (GroupNorm, "
            "LayerNorm), one with fixed statistics (FrozenBatchNorm2d), or a larger `batch_size`."
        )

    def _of_gradient(self) -> str:
        named = ", ".join(f"'{name}'" for name in self.gradient.tensors[:_NAMED])
        ways = "" if self.window else f", weighted by {' and '.join(dict.fromkeys(self.ways.values()))},"
        return (
            f"The gradient over separate micro-batches{ways} is {_percent(self.gradient.off)} off that of the same "
            f"rows in one batch, although the losses agree. The parameters that differ most: {named}. "
            "Hooks, autograd functions and layers that clamp, normalize or scale a gradient (`scale_grad_by_freq`) act "
            "on every micro-batch. Do this once per update, as `gradient_clip_norm` does, or raise `batch_size` to the "
            f"rows of an update. If the model does none of this, {_OF_LEFT if self.window else _OF_ITEMS}"
        )

    def _of_hooks(self) -> str:
        named = ", ".join(f"'{name}'" for name in self.gradient_hooks[:_NAMED])
        return (
            f"Hooks on {named} (`register_post_accumulate_grad_hook`) run once per micro-batch, but would run only "
            "once for one large batch. Remove those that change a gradient or step an optimizer."
        )

    def _of_zero(self, term: str) -> str:
        return (
            f"{term!r} is 0 in all rows that were checked before training, so it is unknown which items it is a mean "
            f"over. Micro-batches are weighted by {self.ways[term]}. Give `count_items`: a function that returns a "
            "dict with the number of items of every term."
        )

    def _of_hidden_state(self) -> str:
        off, places = _percent(self.hidden_state.off), self.hidden_state.places
        what = "these weights" if self.hidden_state.in_weights else "their loss"
        if places:
            named = ", ".join(places[:_NAMED]) + (", …" if len(places) > _NAMED else "")
            found = f"A forward pass changes {named}, which the next one depends on: two passes over the same rows "
        else:
            found = "`forward` or `loss_fn` keeps state from one call to the next: two passes over the same rows "
        return (
            f"{found}differ by {off} in {what}. An update of k micro-batches changes the state k times, but one "
            "large batch changes it only once. Change it once per update instead, outside the forward pass."
        )

    def _of_drift(self) -> str:
        named = ", ".join(self.in_training.mixing[:_NAMED])
        return (
            f"In train mode, a forward pass changes buffers that the next one depends on ({named}): two passes over "
            f"the same rows differ by {_percent(self.in_training.drift)} in their loss. An update of k micro-batches "
            "changes them k times, but one large batch changes them only once. Change them once per update instead, "
            "outside `forward`."
        )


def _percent(share: float) -> str:
    if math.isinf(share):
        return "infinitely far"
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"
