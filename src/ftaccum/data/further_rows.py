"""The choice of further rows that show which of several rules a loss counts its items by."""

from collections.abc import Collection, Sequence
from functools import reduce

import numpy as np

from ..objective.own_rules import TARGETS
from ..objective.sample import Evidence
from .dataset import Rows
from .labels import LABELS
from .number_columns import NumberColumn, SearchedRows

_OF_EACH_RULE = 4  # rows


def further_rows(rows: Rows, evidence: Sequence[Evidence], known: Collection[int]) -> list[int]:
    """Return the positions of up to four rows for each rule that have its values, shortest first.

    Rows with the values of few rules are taken first: they tell whether the one rule or the other holds. Among
    these, rows are drawn at random from the shorter half and then from the other, with a fixed seed.

    Args:
        evidence: of each rule, the column in a batch and the values.
        known: positions of rows to leave out, because they have been measured.
    """
    searched = SearchedRows.of(rows)
    masks = [_rows_with(searched, column, values) for column, values in evidence]
    n_rules = reduce(np.add, masks, np.zeros(len(searched), dtype=int))
    order = np.random.RandomState(0).permutation(len(searched))
    is_long = searched.lengths > np.median(searched.lengths)
    order = order[np.lexsort([is_long[order], n_rules[order]])]
    is_free = np.ones(len(searched), dtype=bool)
    is_free[[position for position in known if position < len(searched)]] = False
    chosen: list[int] = []
    for mask in masks:
        places = order[(mask & is_free)[order]][:_OF_EACH_RULE]
        is_free[places] = False
        chosen += places.tolist()
    return sorted(chosen, key=lambda position: searched.lengths[position])


def _rows_with(searched: SearchedRows, name: str, values: Sequence[float]) -> np.ndarray:
    column = _column(searched, name)
    return np.zeros(len(searched), dtype=bool) if column is None else column.rows_with(values)


def _column(searched: SearchedRows, name: str) -> NumberColumn | None:
    """Return the numbers of a column of a batch; None if rows have no numbers of this name."""
    if not searched.names:
        return searched.column(name)
    names = LABELS if name == TARGETS else (name,)
    key = next((key for key in names if key in searched.names), None)
    return None if key is None else searched.column(key)
