"""The weights of a loaded model that its checkpoint does not have."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import listed

_LARGEST_HEAD = 0.1  # share of a model that can be new without a warning
_NAMED = 6  # new weights to name


@dataclass(frozen=True)
class NewWeights:
    """The weights of a model that its checkpoint does not have, or has in another shape. They are random.

    Attributes:
        names: the names of the weights.
        share: their share of all weights.
    """

    names: list[str]
    share: float

    @classmethod
    def of(cls, model: Any, report: Mapping[str, Any]) -> "NewWeights | None":
        """Return the weights that Transformers has made anew, from its report on loading; None if there are none."""
        names = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
        sizes = {name: weight.numel() for name, weight in model.state_dict().items()}
        share = sum(sizes.get(name, 0) for name in names) / max(1, sum(sizes.values()))
        return cls(names, share) if names else None

    @property
    def level(self) -> int:
        """The level to log them at: a new head is as planned, but a new body means that the checkpoint does not fit."""
        return logging.WARNING if self.share > _LARGEST_HEAD else logging.INFO

    def __str__(self) -> str:
        fits = " Does the checkpoint belong to this kind of model?" if self.level == logging.WARNING else ""
        return (
            f"New weights, which the checkpoint does not have: {listed(self.names, _NAMED)} "
            f"({100 * self.share:.2g}% of the model).{fits}"
        )
