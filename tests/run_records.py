"""Records of runs, for tests that need only some of their entries."""

from typing import Any

from ftaccum.planning.batch_size import BatchSizes
from ftaccum.tracking.run_record import RunRecord, size_entries


def new_record(sizes: BatchSizes, **entries: Any) -> RunRecord:
    """Return the record of a run."""
    given = {"recipe": {}, "tokens_per_update": None, "amp_enabled": False, "keep_checkpoints": 2, "sources": {}}
    return RunRecord(**size_entries(sizes), **given | entries)
