"""Run `verify` on two processes. Print a JSON line of its results for heads, a broken accumulation and batch norm."""

import json
import math
from dataclasses import replace

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ftaccum import Verification, verify
from ftaccum.apps.verify.bench import Bench
from ftaccum.objective.normalizer import LossNormalizer
from heads import HEADS, all_in_float64
from test_verify import BERT, CAUSAL, FEATURES, QUESTIONS, Normed, cross_entropy

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)


def of_head(name: str) -> Verification:
    # Windows have 11 rows, in micro-batches of 2 on each process. In the remainder of 1, one process has no row.
    with all_in_float64():
        found = verify(HEADS[name].model(), HEADS[name].rows(30), batch_size=2, effective_batch_size=11, progress=False)
    assert found.num_processes == 2
    assert {"remainder of 1", "remainder of 4", "remainder of 8"} <= {measured.split for measured in found.splits}
    return found


found = {name: of_head(name) for name in (CAUSAL, BERT, QUESTIONS, "token classification, BERT")}
for each in found.values():
    everywhere = gather_object([(each.splits, each.others, each.floor)])
    assert everywhere[0] == everywhere[1], "all processes are told the same"

normed = verify(Normed(), FEATURES, loss_fn=cross_entropy, batch_size=2, effective_batch_size=8, progress=False)
accumulated = Bench.accumulated
if not state.is_main_process:
    Bench.accumulated = lambda *given: replace(accumulated(*given), loss=math.pi)  # type: ignore[method-assign]
one_is_off = of_head(BERT)
Bench.accumulated = accumulated  # type: ignore[method-assign]
# Without the factor that undoes DDP's mean over processes.
LossNormalizer.for_backward = lambda self, contribution: contribution * self._n_divided_by  # type: ignore[method-assign]
broken = of_head(BERT)
told = {
    "exact": {name: each.exact for name, each in found.items()},
    "errors": [measured.gradient_error for each in found.values() for measured in each.splits],
    "broken": gather_object([broken.exact]),
    "one_is_off": gather_object([one_is_off.exact]),
    "normed": gather_object([normed.exact]),
    "trainer": found[BERT].others[-1].note,
}
if state.is_main_process:
    print("FOUND", json.dumps(told))
state.destroy_process_group()
