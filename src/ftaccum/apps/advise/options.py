"""The options of `ftaccum advise`. This module does not load torch."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any

from ...arguments import find_faults, read_settings
from ...errors import refuse
from ...fields import Flag, PositiveInt, Rule, Text, is_int, is_number, select_fields, setting
from ...settings.runtime import Runtime

_check = partial(setting, group="checks")

Share = Annotated[float, Rule(lambda v: is_number(v) and 0 < v <= 1, "a number above 0, up to 1")]
Orders = Annotated[int, Rule(lambda v: is_int(v) and v >= 2, "an integer of 2 or more")]

AdviseRuntime = select_fields("AdviseRuntime", Runtime, ("num_workers", "verbosity"))


@dataclass
class AdviseOptions:
    """The options of `ftaccum advise` besides those of the Runtime."""

    check: Flag = _check(False, "continue the run's checkpoint at half, the same and twice the batch, and compare them")
    share: Share = _check(0.05, "share of the run's rows that each of these continuations trains on")
    seeds: Orders = _check(3, "how often to repeat each continuation, each time with the rows in another order")
    checkpoint: Text | None = _check(
        None, "checkpoint to continue, by its name in RUN/checkpoints or by its path; none: the newest"
    )
    json: Text | None = setting(
        None, "file to write the figures of the check to, as JSON; none: only print them", group="output"
    )
    batch_size: PositiveInt | None = setting(
        None, "rows per micro-batch on one process; none: as many as the run had", group="size of an update"
    )


def checked(options: AdviseOptions, runtime: Any) -> tuple[AdviseOptions, dict[str, Any]]:
    """Return the options with their values parsed, and the given settings of the Runtime by name.

    Raises:
        SettingsError: with a sentence for each fault, also for options that have no effect without `--check`.
    """
    options, parsed = read_settings(AdviseOptions, vars(options)), read_settings(type(runtime), vars(runtime))
    given = [f.name for kind in (options, parsed) for f in fields(kind) if getattr(kind, f.name) != f.default]
    unused = [] if options.check else [name for name in given if name != "verbosity"]
    refuse(
        find_faults(options)
        + find_faults(parsed)
        + [f"`--{name}` belongs to the check. Add `--check`, or leave it out." for name in unused]
    )
    return options, dict(vars(parsed))
