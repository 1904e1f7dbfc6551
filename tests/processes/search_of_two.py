"""A search in which each trial is run by two processes, as `two_processes` starts them.

search_of_two.py FOLDER            a search whose trials are pruned in the middle, in turn with some that finish
search_of_two.py FOLDER PROCESS    that process fails by itself in the second trial
"""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from optuna.pruners import BasePruner
from torch import nn

import ftaccum.apps.search.processes
from ftaccum import Result
from searching import Layer, quick

folder, failing = sys.argv[1], sys.argv[2:]
state = PartialState(cpu=True)
assert state.num_processes == 2
made = 0


class EveryOther(BasePruner):
    """Knows the study on the first process alone."""

    def prune(self, study: Any, trial: Any) -> bool:
        assert study is not None
        assert state.is_main_process
        return trial.number % 2 == 1 and len(trial.intermediate_values) == 3


def factory() -> nn.Module:
    global made
    made += 1
    if made == 2 and failing == [str(state.process_index)]:
        raise MemoryError("of this process alone")
    if made == 3:
        raise ValueError("on both")
    return Layer()


ftaccum.apps.search.processes._OUTCOMES_WITHIN = datetime.timedelta(seconds=2)
study = quick(
    model_factory=factory, output_dir=folder, n_trials=5, n_reports=4, pruner=EveryOther(), refit=True, batch_size=2
)
facts = [(t.state.name, t.user_attrs["effective_batch_size"], t.user_attrs["rows"]) for t in study.trials]
print(json.dumps({"process": state.process_index, "trials": facts, "value": study.best_value, "made": made}))
state.wait_for_everyone()
if state.is_main_process:
    assert Result.load(Path(folder) / "best").num_processes == 2
state.destroy_process_group()
