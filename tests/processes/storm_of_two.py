"""Run a small storm on one process and on two, and kill processes at moments that it may miss. With the argument
"sharded", run one on two processes with sharded weights. This script starts its own processes, because a launcher would
end the survivors."""

import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from forking import Team
from storm import storm, table
from storm_driver import LOST, Weather, work

# Collective operations before the first window and after the last one.
MOMENTS = ["ftaccum.training.build_objective.measured_objective", "ftaccum.training.run.write_outputs"]


def dies_at(moment: str, folder: Path) -> Callable[[int], int]:
    def end(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def run(rank: int) -> int:
        if rank == 0:
            return work("growing", folder, 0, 0, rank)
        with patch(moment, end):
            return work("growing", folder, 0, 0, rank)

    return run


def main(folder: Path) -> None:
    draw = random.Random(0)
    weathers = [Weather(1, 0, saves=0.4, asks=0.2, damages=0.5), Weather(2, 0, saves=0.2, asks=0.0, damages=0.0)]
    kinds = [["carried"], ["growing"]]
    tallies = [
        storm(weather, kills, kind, draw, folder / f"on-{weather.processes}")
        for weather, kills, kind in zip(weathers, (5, 2), kinds, strict=True)
    ]
    print(table(weathers, tallies))
    assert [tally.faults for tally in tallies] == [[], []]
    assert all(tally.kills for tally in tallies)
    for moment in MOMENTS:
        resolve_name(moment)  # an error in only one process would leave the other waiting to connect
        there = folder / moment
        there.mkdir()
        team = Team(dies_at(moment, there), [there / f"{rank}.log" for rank in range(2)])
        try:
            assert team.over(60), f"one process dies in {moment}, and the other waits for it"
        finally:
            team.end()  # a process that stays would keep the tests' output open
        assert team.statuses == {0: LOST, 1: -signal.SIGKILL}, (there / "0.log").read_text()


def sharded(folder: Path) -> None:
    weather = Weather(2, 0, saves=0.7, asks=0.0, damages=0.4)
    tally = storm(weather, 4, ["sharded"], random.Random(0), folder)
    print(table([weather], [tally]))
    assert tally.faults == []
    assert tally.kills


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        (sharded if "sharded" in sys.argv else main)(Path(folder))
