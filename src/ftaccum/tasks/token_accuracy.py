"""The share of labelled tokens that a language model predicts, without keeping its logits."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


class PredictedTokens:
    """The most probable token at each position, for `preprocess_logits_for_metrics`."""

    by_position = True  # `TokenAccuracy` reads only positions with a label

    def __call__(self, logits: Any, labels: Any) -> Tensor:  # noqa: ARG002
        """Return token ids of shape (rows, tokens).

        Args:
            logits: of shape (rows, tokens, vocabulary), or a tuple that begins with them.
        """
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


@dataclass(frozen=True)
class TokenAccuracy:
    """The share of labels that are predicted, for `compute_metrics`. Labels of -100 do not count.

    Attributes:
        next_token: whether the label of a token is predicted at the token before it.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("token_accuracy",)
    next_token: bool

    def __call__(self, evaluated: Any) -> dict[str, float]:
        tokens, labels = evaluated.predictions, evaluated.label_ids
        if self.next_token:
            tokens, labels = tokens[:, :-1], labels[:, 1:]
        counted = labels != -100
        return {"token_accuracy": float((tokens == labels)[counted].mean()) if counted.any() else float("nan")}


def accuracy_arguments(*, next_token: bool) -> dict[str, Any]:
    """Return the arguments of `test_fine_tuning` that compute `TokenAccuracy`, which describes `next_token`."""
    return {"compute_metrics": TokenAccuracy(next_token), "preprocess_logits_for_metrics": PredictedTokens()}
