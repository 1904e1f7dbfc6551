"""Declarations that settings share: the groups of help pages, and the reasons why a search cannot vary a setting."""

from functools import partial

from ..fields import setting

training = partial(setting, group="length of training")
size = partial(setting, group="size of an update")
asked_size = partial(size, sizes_update=True, in_plan=True, in_verify=True, decided_by_search=True)
optimization = partial(setting, group="optimization")
evaluation = partial(setting, group="evaluation")
speed = partial(setting, group="speed and memory")
cut = partial(speed, matters_to_rounding=True, in_verify=True)
precision = partial(setting, group="precision")
check = partial(setting, group="checks")
repeat = partial(setting, group="reproducibility")
output = partial(setting, group="checkpoints and output")
logging = partial(setting, group="logging")

# Reasons why `search` cannot vary an argument.
DECIDES_BEST = "it decides which trial is the best"
SAME_ROWS = "every trial trains on the same rows, in the same order and within the same budget of rows"
OWN_ARGUMENT = "it is an argument of the search itself"
FROM_STEPS = "the effective batch sizes to try follow from `accumulation_steps`"
FIXED_BATCH = "the physical batch of a search is fixed"

data = partial(setting, group="model and data", in_verify=True, unsearchable=SAME_ROWS)
loss = partial(data, group="loss", unsearchable="it changes the validation loss, by which trials are compared")
