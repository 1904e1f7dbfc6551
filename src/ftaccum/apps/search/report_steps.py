"""Where trials are compared: after how many rows. Pure integers."""

import math
from collections.abc import Sequence


def milestones(n_rows: int, n_epochs: int, batch_sizes: Sequence[int], n_reports: int) -> dict[int, int]:
    """After which numbers of rows trials are evaluated, and the step that each is reported as.

    An update cannot be left halfway, so trials of unlike effective batches only stand at the same row where an update
    of each of them ends: at multiples of their least common multiple within an epoch, and at an epoch's end. Of these
    the nearest to each equal share of the budget is taken. Where batches have no such multiple within a share, it is
    the largest batch's, and the others report at their first update that gets there, less than one of their batches
    later.

    Args:
        n_rows: of an epoch.
        batch_sizes: effective batches of all candidates.
        n_reports: equal shares of the budget, `n_epochs * n_rows` rows.

    Returns:
        Rows → step, in ascending order, the last being the whole budget. Steps are rows as well, but exact multiples of
        the first one: what successive halving multiplies meets them.
    """
    budget = n_epochs * n_rows
    common, share = math.lcm(*batch_sizes), budget / n_reports
    grid = common if common <= share else max(batch_sizes)
    found = {}
    for number in range(1, n_reports):
        epoch, within = divmod(number * share, n_rows)
        nearest = min(round(within / grid) * grid, n_rows)  # of the epoch's end, there is one always
        rows = int(epoch) * n_rows + nearest
        if 0 < rows < budget:
            found[rows] = number * (budget // n_reports)
    return found | {budget: budget}
