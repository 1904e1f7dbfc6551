"""A storm: runs that are killed at any moment, again and again, and must end as if nothing had happened to them.

Small runs (scripts/storm_runs.py) are struck by SIGKILL at random moments, some of them in the middle of a save; after
some blows a file of the newest checkpoint is cut short or has one bit turned; some are asked to stop instead (SIGTERM,
SIGINT or SIGUSR1 to one of the processes). Each is started again with `resume="auto"`, in a process that begins with
other weights and other random numbers, until it ends. What it came to is held against a run of the same settings that
nothing happened to: every weight and buffer on every process and every number of the result and of the ledger, but
times, to the last bit.

Looked at as well: that each start goes on from the newest checkpoint that is sound, and tells of those that are not;
that a run that was asked to stop has lost no update; that of two processes the one that is left ends by itself, and how
long that takes.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/storm.py                               # 100 kills on one process
    OMP_NUM_THREADS=1 .venv/bin/python scripts/storm.py --processes 1 2 --workers 2   # and 100 on two

Prints a table, and exits with 1 where anything differs or went otherwise than it should.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from storm_driver import Run, Tally, Weather
from storm_runs import KINDS


def storm(weather: Weather, kills: int, kinds: list[str], draw: random.Random, folder: Path) -> Tally:
    """Runs of all kinds in turn, until so many kills are counted."""
    tally, references = Tally(), dict[str, float]()
    while tally.kills < kills:
        kind = kinds[tally.runs % len(kinds)]
        reference = folder / f"{kind}-undisturbed"
        if kind not in references:
            references[kind] = _run(kind, reference, weather, tally, draw).undisturbed()
        run = _run(kind, folder / f"{kind}-{tally.runs + 1}", weather, tally, draw)
        faults = len(tally.faults)
        run.struck(kills, references[kind], reference)
        if len(tally.faults) == faults:
            shutil.rmtree(run.folder)
        _progress(f"{weather.processes} process(es), {tally.runs} runs, {tally.kills} kills: {tally.faults[faults:]}")
    return tally


def _run(kind: str, folder: Path, weather: Weather, tally: Tally, draw: random.Random) -> Run:
    folder.mkdir(parents=True)
    return Run(kind, folder, weather, tally, draw)


def table(weathers: list[Weather], tallies: list[Tally]) -> str:
    columns = [[f"{w.processes} process" + "es" * (w.processes > 1) for w in weathers], ["---"] * len(weathers)]
    longest = [f"{max(t.waits):.1f}" if t.waits else "–" for t in tallies]
    rows: dict[str, list[Any]] = {
        "kills": [t.kills for t in tallies],
        "in the middle of a save": [t.in_saves for t in tallies],
        "before the first checkpoint": [t.before_any for t in tallies],
        "checkpoints damaged": [t.damaged for t in tallies],
        "stopped, as asked by a signal": [t.stopped for t in tallies],
        "gone on from a checkpoint": [t.resumed for t in tallies],
        "begun anew": [t.anew for t in tallies],
        "damaged checkpoints passed over": [t.passed_over for t in tallies],
        "seconds until the other process had ended, at most": longest,
        "runs": [t.runs for t in tallies],
        "**differing weights and buffers**": [t.unlike.weights for t in tallies],
        "**differing ledger entries**": [t.unlike.entries for t in tallies],
        "**differing numbers of the result**": [t.unlike.numbers for t in tallies],
        "**anything amiss, these included**": [len(t.faults) for t in tallies],
    }
    lines = [["", *columns[0]], ["---", *columns[1]], *([name, *map(str, cells)] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="over as many runs as it takes (default 100)")
    parser.add_argument(
        "--processes", type=int, nargs="+", choices=(1, 2), default=[1], help="of each run; 1 2 for both"
    )
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of runs, in turn; all")
    parser.add_argument("--workers", type=int, default=0, help="processes of a run that collate rows (default 0)")
    parser.add_argument("--saves", type=float, default=0.3, help="share of kills aimed at a save (default 0.3)")
    parser.add_argument("--asks", type=float, default=0.15, help="share of blows that ask to stop (default 0.15)")
    parser.add_argument("--damages", type=float, default=0.2, help="share of kills that damage a file (default 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and blows; the machine has a say in it, too")
    parser.add_argument("--folder", type=Path, help="for the runs; what went amiss stays there (default: a new one)")
    return parser.parse_args()


def main() -> int:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="storm-")) if options.folder is None else options.folder
    draw = random.Random(options.seed)
    weathers = [Weather(n, options.workers, options.saves, options.asks, options.damages) for n in options.processes]
    tallies = [
        storm(weather, options.kills, options.kinds, draw, folder / f"on-{weather.processes}") for weather in weathers
    ]
    print(table(weathers, tallies))
    faults = [sentence for tally in tallies for sentence in tally.faults]
    for sentence in faults:
        _progress(sentence)
    if not faults:
        shutil.rmtree(folder)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
