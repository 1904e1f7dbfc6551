"""The report as text."""

from collections.abc import Sequence
from typing import Any

from .habit_effects import memory_effects, time_effects
from .habit_loop import HABITS
from .machine import GB

_WIDTH = 16
_OF_A_LOSS = ("loss", "hidden", "weight")  # the value, and gradients


def header(machine: dict[str, Any], num_processes: int) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [versions, f"{machine['system']}, CUDA {machine['cuda']}"]
    lines += machine["devices"] or [
        "No GPU was found. The checks run on two CPU processes with a tiny model. That shows only that it works."
    ]
    if len(machine["devices"]) == 1:
        lines.append("With one GPU, only the parts that need a single process run.")
    return "\n".join([*lines, f"processes: {num_processes}"])


def exactness(found: dict[str, Any]) -> str:
    """Describe the gradient errors, by precision and way."""
    errors = found["errors"]
    ways = list(dict.fromkeys(way for by_way in errors.values() for way in by_way))
    rows = [[precision, *(_error(by_way.get(way)) for way in ways)] for precision, by_way in errors.items()]
    return _table(["gradient error", *ways], rows)


def memory_and_speed(found: dict[str, Any]) -> str:
    """Describe the peaks, their estimates and the speeds of each way."""
    ways = list(found["tokens per second"])
    fastest = max(found["tokens per second"].values())
    rows = [
        ["tokens/s", *(f"{found['tokens per second'][way]:,.0f}" for way in ways)],
        ["of the fastest", *(f"{found['tokens per second'][way] / fastest:.2f}" for way in ways)],
        ["peak memory", *(_bytes(found["memory"][way]["peak"]) for way in ways)],
        ["estimated", *(_bytes(found["estimates"].get(way)) for way in ways)],
        ["until update 1", *(_bytes(found["memory"][way]["peak before"]) for way in ways)],
    ]
    kind = "bf16 autocast" if found["autocast"] else "full precision"
    title = f"{found['model']}, {kind}, median of {found['repeats']}"
    return f"{title}\n{_table(['', *ways], rows)}"


def resume(found: dict[str, Any]) -> str:
    """Describe what a kill has changed."""
    return (
        f"killed with SIGKILL, resumed at update {found['resumed at update']} of {found['updates']}: "
        f"{found['differing bits']} differing bits in the weights, {found['differing losses']} differing losses "
        f"(two undisturbed runs: {found['differing bits of two undisturbed runs']} differing bits)"
    )


def habits(found: dict[str, Any]) -> str:
    """Describe how each habit changes the peaks and the time of an epoch."""
    columns = [memory_effects(found["peak"]), memory_effects(found["reserved"]), time_effects(found["seconds"])]
    lines = [f"{'':<30}" + "".join(f"{name:>{_WIDTH}}" for name in ("peak", "reserved", "time"))]
    lines += [f"{habit:<30}" + "".join(f"{column[habit]:>{_WIDTH}}" for column in columns) for habit in HABITS]
    return "\n".join(lines)


def head_losses(found: dict[str, Any]) -> str:
    """Describe the errors, peak and time of each way to compute the loss."""
    ways = found["ways"]
    rows = [
        *([f"error of {name}", *(_error(each["errors"][name]) for each in ways.values())] for name in _OF_A_LOSS),
        ["peak", *(_bytes(each["peak"]) for each in ways.values())],
        ["ms", *(f"{1000 * each['seconds']:.1f}" for each in ways.values())],
    ]
    title = "{} positions, hidden size {}, vocabulary {}".format(*found["sizes"])
    missing = "" if "Liger" in ways else "\nLiger's kernels do not run here, or are not installed (`ftaccum[liger]`)."
    return f"{title}\n{_table(['', *ways], rows)}{missing}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _bytes(value: float | None) -> str:
    return "–" if value is None else f"{value / GB:.2f} GB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"{name:<16}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells) for name, *cells in (head, *rows)]
    return "\n".join(lines)
