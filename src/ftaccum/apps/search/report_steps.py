"""The numbers of rows after which trials are compared. Pure integers."""

import math
from collections.abc import Sequence


def milestones(n_rows: int, n_epochs: int, batch_sizes: Sequence[int], n_reports: int) -> dict[int, int]:
    """Return the numbers of rows after which trials are evaluated, and the step of each report.

    Trials report only at the end of an update, so trials of different effective batches meet at the same row only where
    an update of each ends: at multiples of their least common multiple within an epoch, and at an epoch's end. The
    milestones are those nearest to equal shares of the budget. Where batches have no such multiple within a share,
    multiples of the largest batch take their place, and the others report at their first update after it, less than one
    of their batches later.

    Args:
        n_rows: rows of an epoch.
        n_epochs: epochs of a trial.
        batch_sizes: effective batches of all candidates.
        n_reports: equal shares of the budget, `n_epochs * n_rows` rows.

    Returns:
        Rows → step, in ascending order, the last being the whole budget. Steps are rows as well, but exact multiples of
        the first one, so that successive halving, which multiplies, meets them.
    """
    budget = n_epochs * n_rows
    common, share = math.lcm(*batch_sizes), budget / n_reports
    grid = common if common <= share else max(batch_sizes)
    steps = {}
    for number in range(1, n_reports):
        epoch, within = divmod(number * share, n_rows)
        nearest = min(round(within / grid) * grid, n_rows)  # an epoch's end is always one
        rows = int(epoch) * n_rows + nearest
        if 0 < rows < budget:
            steps[rows] = number * (budget // n_reports)
    return steps | {budget: budget}
