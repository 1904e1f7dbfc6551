"""Milestones: the numbers of rows after which trials are compared."""

import math
from collections.abc import Sequence


def milestones(n_rows: int, n_epochs: int, batch_sizes: Sequence[int], n_reports: int) -> dict[int, int]:
    """Return the numbers of rows after which trials are evaluated, and the step of each report.

    A trial reports at the end of an update. Trials with different effective batch sizes can report after the same
    number of rows only where each of them ends an update: within an epoch at multiples of their least common multiple,
    and at the end of an epoch. The milestones are the positions of this kind that are nearest to equal shares of the
    budget. If the least common multiple is larger than a share, multiples of the largest batch are used instead. Trials
    with other batches then report at their first update after a milestone, less than one of their batches later.

    Args:
        n_rows: number of rows of an epoch.
        n_epochs: number of epochs of a trial.
        batch_sizes: effective batch sizes of all candidates.
        n_reports: number of equal shares of the budget, which is `n_epochs * n_rows` rows.

    Returns:
        The step of each report by its number of rows, in ascending order. The last is the whole budget. Steps also
        count rows, but before a share is moved to a milestone: successive halving needs multiples of the first step.
    """
    budget = n_epochs * n_rows
    common, share = math.lcm(*batch_sizes), budget / n_reports
    grid = common if common <= share else max(batch_sizes)
    steps = {}
    for number in range(1, n_reports):
        epoch, within = divmod(number * share, n_rows)
        nearest = min(round(within / grid) * grid, n_rows)  # the end of an epoch is always possible
        rows = int(epoch) * n_rows + nearest
        if 0 < rows < budget:
            steps[rows] = number * (budget // n_reports)
    return steps | {budget: budget}
