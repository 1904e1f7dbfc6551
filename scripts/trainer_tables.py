"""The tables of scripts/bench_trainer.py."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from jobs import Job
from peers import NAMES
from trainer_runs import Counts, Timing

TRAINERS = ("trainer", "trainer-group", "trainer-rebalance")
OTHERS = ("sft", "sft-packed", "bare")

Round = Mapping[str, Timing]
Seconds = Callable[[Timing], float]


@dataclass(frozen=True)
class Measure:
    """A time that is compared.

    Attributes:
        heading: of its column.
        of: returns it.
    """

    heading: str
    of: Seconds

    def values(self, rounds: Sequence[Round], name: str) -> list[float]:
        return [self.of(times[name]) for times in rounds]

    def ratios(self, rounds: Sequence[Round], slower: str, name: str) -> list[float]:
        """Return how many times as fast as another one a contender is in each round."""
        return [self.of(times[slower]) / self.of(times[name]) for times in rounds]

    def best_trainer(self, rounds: Sequence[Round]) -> str | None:
        """Return the mode of `Trainer` with the smallest median."""
        ran = [name for name in TRAINERS if name in rounds[0]]
        return min(ran, key=lambda name: median(self.values(rounds, name)), default=None)


WHOLE = Measure("whole call, s", lambda timing: timing.whole)
STEADY = Measure("an update in steady state, s", lambda timing: timing.steady or float("nan"))


def times(rounds: Sequence[Round]) -> Iterator[str]:
    """Yield a table of how fast each contender is relative to the others, as medians of the rounds' ratios."""
    names = list(rounds[0])
    measures = [WHOLE]
    if all(timing.steady is not None for found in rounds for timing in found.values()):
        measures.append(STEADY)
    headings, columns = [""], [[NAMES[name] for name in names]]
    for measure in measures:
        headings.append(measure.heading)
        columns.append([f"{median(measure.values(rounds, name)):.2f}" for name in names])
        for baseline, heading in _baselines(measure, rounds).items():
            headings.append(heading)
            columns.append([spread(measure.ratios(rounds, baseline, name)) for name in names])
    yield from rows(headings, zip(*columns, strict=True))


def details(job: Job, counts: Mapping[str, Counts], rounds: Sequence[Round], peaks: Mapping[str, int]) -> Iterator[str]:
    """Yield a table of the parts of the time, the counts and the memory of each contender."""
    headings = [
        "", "updates", "before training, s", "self-check, s", "audits, % of the whole call",
        "audits, % of the steady state", "padded per token", "passes", "waits an update, model's own",
        "peak memory, MB",
    ]  # fmt: skip
    yield from rows(headings, (_details(name, job, counts, rounds, peaks) for name in rounds[0]))


def _details(
    name: str, job: Job, counts: Mapping[str, Counts], rounds: Sequence[Round], peaks: Mapping[str, int]
) -> list[str]:
    own, count = [found[name] for found in rounds], counts.get(name)
    waits = () if count is None else (count.waits - count.waits_in_model, count.waits_in_model)
    return [
        NAMES[name],
        str(own[0].updates),
        f"{median(timing.before for timing in own):.2f}",
        f"{median(timing.self_check for timing in own):.2f}",
        _share([(timing.audits, timing.whole) for timing in own]),
        _share([(timing.steady_audits, timing.steady) for timing in own]),
        "–" if count is None else f"{count.positions / count.tokens:.2f}",
        "–" if count is None else str(count.passes),
        ", ".join(f"{n / job.updates:.1f}" for n in waits) or "–",
        f"{peaks[name] / 1e6:.0f}" if name in peaks else "–",
    ]


def rows(headings: Sequence[str], cells: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |\n|{' --- |' * len(headings)}"
    for row in cells:
        yield f"| {' | '.join(row)} |"


def extent(values: Sequence[float]) -> str:
    return f"{min(values):.2f}–{max(values):.2f}" if values else "–"


def spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({extent(values)})"


def _baselines(measure: Measure, rounds: Sequence[Round]) -> dict[str, str]:
    """Return the contenders to compare with, with the headings of their columns."""
    best = measure.best_trainer(rounds)
    found = {"trainer": f"× {NAMES['trainer']}"}
    if best is not None:
        found.setdefault(best, f"× its best, {NAMES[best].partition(', ')[2]}")
    found |= {name: f"× {NAMES[name]}" for name in OTHERS}
    return {name: heading for name, heading in found.items() if name in rounds[0]}


def _share(parts: Sequence[tuple[float | None, float | None]]) -> str:
    shares = [(part or 0.0) / whole for part, whole in parts if whole]
    return f"{median(shares):.1%}" if shares and any(shares) else "–"
