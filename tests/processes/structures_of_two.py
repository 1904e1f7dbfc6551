"""Train every structure on two processes. Print a JSON line {structure, way of summing: largest relative error}.

Only one process has the row that takes the rare branch.
"""

import copy
import itertools
import json
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from exactness import window_errors
from ftaccum import DivergedError, test_fine_tuning
from heads import all_in_float64
from structures import STRUCTURES, with_a_narrow_weight
from test_nonfinite import BAD, Normed, infinite_loss, infinite_rows, points, run
from training_passes import in_self_check, is_training_pass

state = PartialState(cpu=True)
assert state.num_processes == 2, "torchrun was to start two"
torch.set_num_threads(1)
SIZES = {"num_processes": 2, "batch_size": 1, "gradient_accumulation_steps": 3}


def unlike(model: nn.Module) -> float:
    """Return how far any weight is from its mean over the processes, at most."""
    weights = nn.utils.parameters_to_vector(p.double() for p in model.parameters())
    return float((weights - torch.stack(gather_object([weights])).mean(0)).abs().max())


found = {}
with all_in_float64():
    for name, structure in STRUCTURES.items():
        for wide in (False, True):
            model = with_a_narrow_weight(structure.model()) if wide else structure.model()
            rare: list[int] = []
            if name == "conditional branches":
                model.rare.register_full_backward_hook(
                    lambda *_, rare=rare: None if in_self_check() else rare.append(1)
                )
            arguments = {"accumulate_in_fp32": wide, **SIZES, **structure.arguments}
            errors = window_errors(model, structure.rows(), **arguments)
            found[f"{name}, {'apart' if wide else 'by DDP'}"] = max(gather_object(errors))
            if name == "conditional branches":
                rare.clear()
                window_errors(model, structure.rows(), audit=False, **arguments)
                # Both processes compute the reference gradient. Only one trains on the rare row.
                assert sorted(gather_object([len(rare)])) == [1, 2]

    # Differing weights become those of the first process.
    structure = STRUCTURES["frozen weights"]
    model = with_a_narrow_weight(structure.model())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + state.process_index)
    errors = window_errors(model, structure.rows(), accumulate_in_fp32=True, **SIZES)
    found["weights of the first process"] = max(gather_object([errors])[0])
    found["weights alike"] = unlike(model)

    # An update that overflows on one process is skipped on both.
    model = with_a_narrow_weight(structure.model())
    factors = itertools.chain([float("inf")], itertools.repeat(1.0))

    def overflow(_: nn.Module, __: Any, outputs: Any) -> None:
        if is_training_pass() and state.process_index:
            outputs.loss = outputs.loss * next(factors)

    model.register_forward_hook(overflow)
    result = test_fine_tuning(
        model, train_data=structure.rows(), batch_size=1, gradient_accumulation_steps=3, accumulate_in_fp32=True,
        n_epochs=1, validation_split=0.0, progress=False, audit=False,
    )  # fmt: skip
    assert gather_object([result.skipped_steps, result.optimizer_steps]) == [1, 1, 1, 1]
    found["alike where one process overflows"] = unlike(model)

    # So is an update whose loss is not finite on one process, even with a finite gradient. Both processes report the
    # row and restore their buffers.
    for rows, loss in ((points(), nn.CrossEntropyLoss()), (infinite_rows(), infinite_loss)):
        model = Normed()
        before = copy.deepcopy(model.state_dict())
        try:
            run(model, rows, loss_fn=loss, effective_batch_size=24, on_nonfinite="error")
        except DivergedError as error:
            (said,) = {*gather_object([str(error)])}
        assert f"Rows whose own loss is not finite: row {BAD} of `train_data`" in said
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert gather_object([run(model, rows, loss_fn=loss, effective_batch_size=12).skipped_steps]) == [1, 1]
        found[f"alike where {loss} is not finite on one process"] = unlike(model)
if state.is_main_process:
    print("ERRORS", json.dumps(found))
state.destroy_process_group()
