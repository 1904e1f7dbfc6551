"""A search in which each trial is run by two processes, as `two_processes` starts them.

search_of_two.py FOLDER            a search that prunes every other trial in the middle; one trial is reassigned to
                                   another worker before it starts
search_of_two.py FOLDER PROCESS    only that process fails, in the second trial
"""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from optuna.pruners import BasePruner
from optuna.trial import TrialState
from torch import nn

import ftaccum.apps.search.processes
from ftaccum import Result
from ftaccum.apps.search.trial_record import StudyTrialRecord
from searching import Layer, quick

folder, failing = sys.argv[1], sys.argv[2:]
state = PartialState(cpu=True)
assert state.num_processes == 2
made = 0
start = StudyTrialRecord.start


class EveryOther(BasePruner):
    """A pruner of every other trial. It runs only on the first process."""

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


def start_too_late(record: StudyTrialRecord, attributes: Any) -> None:
    if record._trial.number == 4:
        record._study.tell(4, state=TrialState.FAIL)  # as another worker does if this one seems dead
    start(record, attributes)


StudyTrialRecord.start = start_too_late  # type: ignore[method-assign]
ftaccum.apps.search.processes._OUTCOMES_WITHIN = datetime.timedelta(seconds=2)
study = quick(
    model_factory=factory, output_dir=folder, n_trials=5, n_reports=4, pruner=EveryOther(), refit=True, batch_size=2
)
trials = [(t.state.name, t.user_attrs.get("effective_batch_size"), t.user_attrs.get("rows")) for t in study.trials]
print(json.dumps({"process": state.process_index, "trials": trials, "value": study.best_value, "made": made}))
state.wait_for_everyone()
if state.is_main_process:
    assert Result.load(Path(folder) / "best").num_processes == 2
state.destroy_process_group()
