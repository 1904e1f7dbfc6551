"""Packed rows: several documents in one row, recognized by positions that restart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .values import OddRowError


@dataclass(frozen=True)
class Documents:
    """How a model and its loss treat packed rows.

    Attributes:
        kept_apart: whether the model keeps the documents of a row separate without an attention mask; None if this was
            not measured.
        problem: what the model does instead, as a clause.
        shifted: whether a label is predicted from the token before it. A document's first label must then be ignored,
            since the token before it belongs to another document.
    """

    kept_apart: bool | None = None
    problem: str = ""
    shifted: bool = False

    def check(self, columns: Mapping[str, Sequence[Tensor]]) -> bool:
        """Return whether any row is packed. The batch must then get no attention mask.

        Raises:
            OddRowError: for a packed row whose documents would attend to each other.
        """
        positions = columns.get("position_ids")
        if positions is None or positions[0].ndim != 1:
            return False
        masks = columns.get("attention_mask")
        for place, of_row in enumerate(positions):
            if masks is None:
                self._check_row(place, of_row, masked=False)
            elif masks[place].ndim == 1:
                self._check_row(place, of_row[masks[place] != 0], masked=True)
        packed = [masks is None and is_packed(of_row) for of_row in positions]
        for place, of_row in enumerate(positions):
            if any(packed) and not packed[place] and starts_of(of_row)[1:].any():
                raise OddRowError(
                    place,
                    f"its `position_ids` jump at token {first_restart(of_row)}. In a batch with packed rows, the "
                    "model takes that for the start of another document",
                    "Give every row a two-dimensional `attention_mask` of shape (tokens, tokens).",
                )
        return any(packed)

    def ignore_starts(self, columns: dict[str, list[Tensor]], ignore_index: int) -> None:
        """Ignore the first label of each document if it would be predicted from the document before."""
        if self.shifted:
            columns["labels"] = [
                labels.long().masked_fill(starts_of(positions), ignore_index)
                for labels, positions in zip(columns["labels"], columns["position_ids"], strict=True)
            ]

    def _check_row(self, place: int, positions: Tensor, *, masked: bool) -> None:
        """Raise OddRowError if the documents of a row would attend to each other.

        Args:
            positions: those of the tokens that the row's mask does not hide.
        """
        if self.kept_apart is None or not is_packed(positions):
            return
        found = f"it holds several documents (its `position_ids` restart at token {first_restart(positions)})"
        if self.kept_apart and masked:
            raise OddRowError(
                place,
                f"{found}, but with its `attention_mask` the documents attend to each other",
                "Leave out the column `attention_mask`: without it, the model keeps the documents separate.",
            )
        if not self.kept_apart and (self.shifted or not masked):
            is_text = (
                "" if self.shifted else " If the row is really a single text, give it an `attention_mask` of ones."
            )
            raise OddRowError(
                place,
                f"{found}, and {self.problem}",
                "Make each document a separate row, or load the model with another `attn_implementation` or class."
                + is_text,
            )


def is_packed(positions: Tensor) -> bool:
    """Return whether positions start again within a row."""
    return bool((positions[1:] <= positions[:-1]).any())


def first_restart(positions: Tensor) -> int:
    """Return the index of the first token of a row's second document."""
    return int(starts_of(positions)[1:].nonzero()[0]) + 1


def starts_of(positions: Tensor) -> Tensor:
    """Return a mask of the tokens that begin a document: those whose position is not one more than the previous one."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[1:] = positions.diff() != 1
    return begins
