"""Losses over all rows of an update, for `test_fine_tuning(loss_over="window", loss_fn=…)`.

Each loss is a module that is called as `loss(inputs, batch)`. `inputs` has what the model computed: a tensor, or a dict
of tensors. `batch` is a dict of columns. All have an entry per row first. The result is a scalar.

No loss depends on the order of rows. All compute in float32, or in float64 if the inputs are float64, under autocast as
well. A window without a pair or an event, and one of a single row, has the loss 0 and zero gradients. Wrong shapes,
types and values, and missing columns, raise a `DataError`.

Suffixes of shapes: N rows, D size of an embedding, M candidates.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import DataError, refuse, shown
from .objective.checked_inputs import column, embeddings, equal_ids, scores

Inputs = Tensor | Mapping[str, Tensor]


class InfoNCELoss(nn.Module):
    """Symmetric InfoNCE with a learnable temperature, as in CLIP: each row's pair against those of all other rows.

    With normalized embeddings a and b, scale s = 1 / temperature, and N rows:

        loss = − 1/2N · Σ_i [ log softmax_j(s · a_i·b_j) at j = i  +  log softmax_j(s · a_j·b_i) at j = i ]

    `inputs` has the two embeddings under `names`, each of shape (rows, dim). They need not be normalized.

    The scale is at most `max_scale`. Beyond it, the gradient of `log_scale` is kept if it pulls the scale back, and is
    zero otherwise. So a scale that has reached the bound can still fall, as if the parameter itself were clipped.

    References:
        Radford et al., "Learning transferable visual models from natural language supervision", 2021, arXiv:2103.00020.
        van den Oord et al., "Representation learning with contrastive predictive coding", 2018, arXiv:1807.03748.

    Attributes:
        log_scale: log(1 / temperature), a scalar parameter.
    """

    def __init__(
        self,
        names: tuple[str, str] = ("anchor", "positive"),
        *,
        temperature: float = 0.07,
        learn_temperature: bool = True,
        max_scale: float = 100.0,
        group: str | None = None,
    ) -> None:
        """Create the loss.

        Args:
            names: the two embeddings in `inputs`, such as ("image_embeds", "text_embeds") for a CLIPModel.
            temperature: the value at the start.
            learn_temperature: whether `log_scale` is trained.
            max_scale: the largest scale.
            group: a column of integers. Rows with equal ones are no negatives of each other.

        Raises:
            SettingsError: if a number is not positive, or `names` are not two different names.
        """
        super().__init__()
        faults = [*_not_positive(temperature=temperature, max_scale=max_scale)]
        if not isinstance(names, tuple | list) or len(names) != 2 or names[0] == names[1]:
            faults.append(f"`names` must be two different names of embeddings, but is {shown(names)} instead.")
        refuse(faults)
        self.names, self.temperature, self.max_scale, self.group = tuple(names), temperature, max_scale, group
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn_temperature)

    def forward(self, inputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of all rows."""
        first_ND, second_ND = (F.normalize(x, dim=-1) for x in embeddings(inputs, self.names))
        log_scale = self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32))
        scale: Tensor = _BoundedExp.apply(log_scale, self.max_scale)
        logits_NN = _without_false_negatives(scale * _products(first_ND, second_ND), batch, self.group)
        return (_diagonal_cross_entropy(logits_NN) + _diagonal_cross_entropy(logits_NN.T)) / 2

    def extra_repr(self) -> str:
        # The temperature at the start: a resumed run compares this with the earlier one, which has trained it.
        learns = "" if self.log_scale.requires_grad else "learn_temperature=False, "
        of_scale = f"temperature={self.temperature}, {learns}max_scale={self.max_scale}"
        return f"names={self.names}, {of_scale}, group={self.group!r}"


class MultipleNegativesRankingLoss(nn.Module):
    """Each anchor's positive against the positives of all other rows, and the hard negatives of all rows.

    With candidates c, the N positives first and then all hard negatives:

        loss = − 1/N · Σ_i log softmax_j(scale · similarity(anchor_i, c_j)) at j = i

    `inputs` has `anchor` and `positive` of shape (rows, dim), and may have `negative` of shape (rows, dim) or
    (rows, n, dim). With the defaults, this is sentence-transformers' loss of the same name.

    References:
        Henderson et al., "Efficient natural language response suggestion for Smart Reply", 2017, arXiv:1705.00652.
    """

    def __init__(self, *, scale: float = 20.0, similarity: str = "cosine", group: str | None = None) -> None:
        """Create the loss.

        Args:
            scale: factor of the similarities.
            similarity: "cosine" or "dot".
            group: a column of integers. A row's positive is no negative of rows with an equal one. Hard negatives are
                negatives of all rows.

        Raises:
            SettingsError: if an argument has another value.
        """
        super().__init__()
        faults = [*_not_positive(scale=scale)]
        if similarity not in ("cosine", "dot"):
            faults.append(f"`similarity` must be 'cosine' or 'dot', but is {shown(similarity)} instead.")
        refuse(faults)
        self.scale, self.similarity, self.group = float(scale), similarity, group

    def forward(self, inputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of all rows."""
        anchor_ND, positive_ND, *negatives = embeddings(inputs, ("anchor", "positive"), several="negative")
        candidates_MD = torch.cat([positive_ND, *(x.flatten(0, -2) for x in negatives)])
        if self.similarity == "cosine":
            anchor_ND, candidates_MD = F.normalize(anchor_ND, dim=-1), F.normalize(candidates_MD, dim=-1)
        logits_NM = self.scale * _products(anchor_ND, candidates_MD)
        return _diagonal_cross_entropy(_without_false_negatives(logits_NM, batch, self.group))

    def extra_repr(self) -> str:
        return f"scale={self.scale}, similarity={self.similarity!r}, group={self.group!r}"


class PairwiseRankingLoss(nn.Module):
    """RankNet: the more relevant row of each pair should have the higher score.

    With scores s, and P pairs (i, j) of one group in which row i has the higher label:

        loss = 1/P · Σ_(i,j) log(1 + exp(−(s_i − s_j)))

    All pairs of the window count equally, whatever their group. `inputs` is a tensor of shape (rows,) or (rows, 1), or
    a dict that has it under `scores`.

    References:
        Burges et al., "Learning to rank using gradient descent", 2005, ICML.
    """

    def __init__(self, labels: str = "labels", *, group: str | None = None, scores: str = "logits") -> None:
        """Create the loss.

        Args:
            labels: the column of relevances, higher is better.
            group: a column of integers, such as the ids of queries. Rows of different groups make no pair. None: all
                rows are one group.
            scores: the name of the scores, if `inputs` is a dict.
        """
        super().__init__()
        self.labels, self.group, self.scores = labels, group, scores

    def forward(self, inputs: Inputs, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of all rows."""
        scores_N = scores(inputs, self.scores)
        labels_N = column(batch, self.labels, "labels", len(scores_N))
        if labels_N.isnan().any():
            raise DataError(f"The column {self.labels!r} (`labels`) has NaN. Give each row a number.")
        pairs_NN = labels_N[:, None] > labels_N
        if self.group is not None:
            pairs_NN = pairs_NN & equal_ids(batch, self.group, "group", len(scores_N))
        # F.softplus is the identity above 20, which is off by 2e-9
        losses_NN = -F.logsigmoid(scores_N[:, None] - scores_N)
        return losses_NN.where(pairs_NN, 0).sum() / pairs_NN.sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f"labels={self.labels!r}, group={self.group!r}, scores={self.scores!r}"


class CoxLoss(nn.Module):
    """Cox's negative log partial likelihood of survival times, with ties after Breslow.

    With risk scores s, times t, and the d rows whose event was observed:

        loss = − 1/d · Σ_(i with event) [ s_i − log Σ_(j with t_j ≥ t_i) exp(s_j) ]

    A higher score means a higher risk, and an earlier event. `inputs` is a tensor of shape (rows,) or (rows, 1), or a
    dict that has it under `scores`.

    References:
        Cox, "Regression models and life-tables", 1972, J. R. Stat. Soc. B 34(2).
        Breslow, "Covariance analysis of censored survival data", 1974, Biometrics 30(1).
    """

    def __init__(self, time: str = "time", event: str = "event", *, scores: str = "logits") -> None:
        """Create the loss.

        Args:
            time: the column of times, of the event or of the end of observation, in any unit.
            event: the column that is 1 (or True) if the event was observed, and 0 (or False) if it was not.
            scores: the name of the scores, if `inputs` is a dict.
        """
        super().__init__()
        self.time, self.event, self.scores = time, event, scores

    def forward(self, inputs: Inputs, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of all rows."""
        scores_N = scores(inputs, self.scores)
        time_N = column(batch, self.time, "time", len(scores_N))
        event_N = column(batch, self.event, "event", len(scores_N))
        if not (time_N.isnan().logical_not() & ((event_N == 0) | (event_N == 1))).all():
            raise DataError(
                f"The column {self.time!r} (`time`) must have no NaN, and {self.event!r} (`event`) only 0 and 1 or "
                "True and False. Correct the rows with other values."
            )
        time_N, order_N = time_N.sort()
        event_N = event_N[order_N].to(scores_N.dtype)
        # The loss is the same for scores that are all lower by the same number, and this one keeps the sums small.
        scores_N = scores_N[order_N] - scores_N.max().detach()
        log_risk_N = scores_N.flip(0).logcumsumexp(0).flip(0)  # of a row and all after it
        # All events of one time count at the first row of that time, whose risk set is that of all of them.
        events_N = torch.zeros_like(event_N).scatter_add(0, torch.searchsorted(time_N, time_N), event_N)
        return (events_N * log_risk_N - event_N * scores_N).sum() / event_N.sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f"time={self.time!r}, event={self.event!r}, scores={self.scores!r}"


class _BoundedExp(torch.autograd.Function):
    """min(exp(x), limit). Beyond the limit, only a gradient that lowers x in a step of descent passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y.clamp(max=limit), y > limit)
        return y.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, is_beyond = ctx.saved_tensors
        return (grad * y).where(is_beyond.logical_not() | (grad > 0), 0), None


def _not_positive(**numbers: float) -> Iterable[str]:
    for name, x in numbers.items():
        if not (isinstance(x, int | float) and 0 < x < math.inf):
            yield f"`{name}` must be a positive number, but is {shown(x)} instead."


def _products(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    with torch.autocast(x_ND.device.type, enabled=False):  # otherwise the product would be in 16 bits
        return x_ND @ y_MD.T


def _diagonal_cross_entropy(logits_NM: Tensor) -> Tensor:
    return F.cross_entropy(logits_NM, torch.arange(len(logits_NM), device=logits_NM.device))


def _without_false_negatives(logits_NM: Tensor, batch: Mapping[str, Any], group: str | None) -> Tensor:
    """Mask the logits of other rows of the same group, among the first N columns."""
    if group is None:
        return logits_NM
    n = len(logits_NM)
    masked_NN = equal_ids(batch, group, "group", n).fill_diagonal_(False)
    return logits_NM.masked_fill(F.pad(masked_NN, (0, logits_NM.shape[1] - n)), -math.inf)
