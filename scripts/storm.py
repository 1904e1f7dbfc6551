"""Kill runs repeatedly at random moments, and check that they end exactly like undisturbed runs.

The script kills small runs (scripts/storm_runs.py) with SIGKILL at random moments, some in the middle of a save. After
some kills it truncates a file of the newest checkpoint or flips one bit in it. It asks some runs to stop instead (with
SIGTERM, SIGINT or SIGUSR1 to one of the processes). It restarts each run with `resume="auto"` until the run ends, in
processes with other initial weights and random numbers. Then it compares the run with an undisturbed run of the same
settings, to the last bit: every weight and buffer on every process, and every number of the result and the ledger
except times.

It also checks that each start resumes from the newest sound checkpoint and reports damaged ones, that a run asked to
stop loses no update, and that the other of two processes ends on its own. It measures how long that takes.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/storm.py                               # 100 kills on one process
    OMP_NUM_THREADS=1 .venv/bin/python scripts/storm.py --processes 1 2 --workers 2   # and 100 on two

Prints a table, and exits with status 1 if anything differs or goes wrong.
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
    """Run all kinds in turn until this many kills have been made."""
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
        "stopped on request by a signal": [t.stopped for t in tallies],
        "resumed from a checkpoint": [t.resumed for t in tallies],
        "started anew": [t.anew for t in tallies],
        "damaged checkpoints skipped": [t.passed_over for t in tallies],
        "most seconds until the other process ended": longest,
        "runs": [t.runs for t in tallies],
        "**differing weights and buffers**": [t.unlike.weights for t in tallies],
        "**differing ledger entries**": [t.unlike.entries for t in tallies],
        "**differing numbers of the result**": [t.unlike.numbers for t in tallies],
        "**faults in total, including these**": [len(t.faults) for t in tallies],
    }
    lines = [["", *columns[0]], ["---", *columns[1]], *([name, *map(str, cells)] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills in total, over all runs (default 100)")
    parser.add_argument(
        "--processes", type=int, nargs="+", choices=(1, 2), default=[1], help="of each run (default 1); 1 2 for both"
    )
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of runs (default: all)")
    parser.add_argument("--workers", type=int, default=0, help="worker processes that collate rows (default 0)")
    parser.add_argument("--saves", type=float, default=0.3, help="share of kills aimed at a save (default 0.3)")
    parser.add_argument("--asks", type=float, default=0.15, help="share of signals that ask to stop (default 0.15)")
    parser.add_argument("--damages", type=float, default=0.2, help="share of kills that damage a file (default 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and signals; the machine's timing still varies")
    parser.add_argument("--folder", type=Path, help="folder for the runs; failed runs stay there (default: a new one)")
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
