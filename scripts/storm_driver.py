"""One run through the storm: struck, looked at, and started again, until it has come to its end."""

import random
import re
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from forking import Team
from ftaccum import LostProcessError, Preempted
from storm_runs import KINDS, Differences, train

_PREEMPTED, _BY_HAND, LOST = 75, 130, 3  # exit statuses
_ASKING: dict[int, int] = {signal.SIGTERM: _PREEMPTED, signal.SIGUSR1: _PREEMPTED, signal.SIGINT: _BY_HAND}
_PATIENCE = 60.0  # seconds after which what should have ended by itself is taken to hang
_SAVE = 0.03  # seconds that a save takes
_JOINED = "The processes have found each other."
_MARK = "struck"  # an empty file in a checkpoint that has been damaged

_GOES_ON = re.compile(r"^Goes on after update \d+, from (.+?): ", re.MULTILINE)
_BEGINS_ANEW = re.compile(r"^ *0/\d+ ", re.MULTILINE)  # the table's line of the loss before the first update
_PASSED_OVER = re.compile(r"^(.+?) is damaged \(.+\), and is passed over\.$", re.MULTILINE)
_STOPPED = re.compile(r"^Stopped after update (\d+), as asked", re.MULTILINE)


@dataclass(frozen=True)
class Weather:
    """
    Attributes:
        processes, workers: of each run.
        saves, asks, damages: the shares of blows that are aimed at a save, that ask to stop instead of killing, and
            after which the newest checkpoint is damaged.
    """

    processes: int
    workers: int
    saves: float
    asks: float
    damages: float


@dataclass
class Tally:
    """What has happened.

    Attributes:
        waits: seconds until the other process had ended by itself, for each time that one was killed.
        faults: sentences about what should not have happened.
    """

    kills: int = 0
    in_saves: int = 0
    before_any: int = 0
    damaged: int = 0
    stopped: int = 0
    resumed: int = 0
    anew: int = 0
    passed_over: int = 0
    runs: int = 0
    waits: list[float] = field(default_factory=list)
    unlike: Differences = field(default_factory=Differences)
    faults: list[str] = field(default_factory=list)


@dataclass
class Run:
    """A run of one kind in a folder of its own."""

    kind: str
    folder: Path
    weather: Weather
    tally: Tally
    draw: random.Random
    _starts: int = 0

    def undisturbed(self) -> float:
        """The whole run at once. Returns the seconds that it took."""
        started = time.monotonic()
        self._start(None)
        return time.monotonic() - started

    def struck(self, kills: int, seconds: float, reference: Path) -> None:
        """The run, with blows until so many kills are counted, and what it came to held against another's.

        Args:
            seconds: that a run takes.
            reference: the folder of a run that nothing happened to.
        """
        self.tally.runs += 1
        try:
            while not self._start(seconds if self.tally.kills < kills else None):
                seconds *= 1.05  # with other work on the machine, a start may take longer than the whole run did
        except RuntimeError as error:
            self._fault(str(error))
            return
        unlike = Differences.between(reference, self.folder, self.weather.processes)
        self.tally.unlike += unlike
        if unlike != Differences():
            self._fault(f"ended otherwise than one that nothing happened to: {unlike}.")

    def _start(self, seconds: float | None) -> bool:
        """One start, with a blow within these seconds, if any.

        Returns:
            Whether the run came to its end.

        Raises:
            RuntimeError: where it has not, and nothing happened to it: it would not the next time, either.
        """
        marked = [path for path in self._checkpoints() if (path / _MARK).exists()]
        sound = [path for path in self._checkpoints() if path not in marked]
        self._starts += 1
        logs = [self.folder / f"start-{self._starts}.{rank}.log" for rank in range(self.weather.processes)]
        # What goes on from a checkpoint must not depend on what the process and the model were before.
        born = self._starts if sound else 0
        team = Team(partial(work, self.kind, self.folder, self.weather.workers, born), logs)
        try:
            blow = None if seconds is None else self._blow(team, logs, seconds)
            blow = self._waited(team, blow)
        finally:
            team.end()
        said = logs[0].read_text()
        self._check_beginning(said, sound, marked)
        is_over = not any(team.statuses.values())
        if blow is None:
            if not is_over:
                raise RuntimeError(f"A start that nothing happened to has not come to the run's end: see {logs[0]}.")
            return True
        expected = self._after_kill(blow) if blow.number == signal.SIGKILL else self._after_asking(blow, said)
        for rank, status in team.statuses.items():
            if status not in expected[rank]:
                self._fault(f"ended with status {status} instead of one of {expected[rank]} in {logs[rank].name}.")
        return is_over

    def _blow(self, team: Team, logs: list[Path], seconds: float) -> "_Blow | None":
        """Strikes at a moment within these seconds. Returns None where the run had ended before."""
        draw, folder = self.draw, self.folder / "outputs" / "checkpoints"
        asks = draw.random() < self.weather.asks
        number = draw.choice(list(_ASKING)) if asks else signal.SIGKILL
        ranks = list(range(self.weather.processes))
        victims = [draw.choice(ranks)] if asks or draw.random() < 0.5 else ranks
        aimed = not asks and draw.random() < self.weather.saves
        team.over(draw.uniform(0, seconds))
        if aimed and team.until(lambda: any(folder.glob(".*.partial")), seconds):
            team.over(draw.uniform(0, _SAVE))
        if not all(_JOINED in log.read_text() for log in logs):
            # One process would wait for the others to come; a launcher ends it.
            number, victims = signal.SIGKILL, ranks
        hit = [rank for rank in victims if team.send(rank, number)]
        return _Blow(number, hit) if hit else None

    def _waited(self, team: Team, blow: "_Blow | None") -> "_Blow | None":
        """Waits for the end of a start. Returns the blow, if it hit anything that had not ended in that moment."""
        struck = time.monotonic()
        if not team.over(_PATIENCE):
            self._fault(f"did not end within {_PATIENCE:.0f} s in start {self._starts}, after {blow}.")
            for rank in range(self.weather.processes):
                team.send(rank, signal.SIGKILL)
            team.over(_PATIENCE)
        if blow is None or blow.number != signal.SIGKILL:
            return blow
        hit = [rank for rank in blow.hit if team.statuses[rank] == -signal.SIGKILL]
        if 0 < len(hit) < self.weather.processes:
            self.tally.waits.append(time.monotonic() - struck)
        return _Blow(blow.number, hit) if hit else None

    def _check_beginning(self, said: str, sound: list[Path], marked: list[Path]) -> None:
        """Whether a start, as far as it got, went on from the newest sound checkpoint, and told of damaged ones."""
        went_on = _GOES_ON.search(said)
        began_anew = went_on is None and _BEGINS_ANEW.search(said) is not None
        if not went_on and not began_anew:
            return
        self.tally.resumed += went_on is not None
        self.tally.anew += began_anew and self._starts > 1
        told = {Path(path) for path in _PASSED_OVER.findall(said)}
        self.tally.passed_over += len(told)
        if (Path(went_on[1]) if went_on else None) != (sound[-1] if sound else None):
            self._fault(f"began in start {self._starts} at {went_on and went_on[1]}, and {sound[-1:]} was sound.")
        if told != {path for path in marked if not sound or path > sound[-1]}:
            self._fault(f"told in start {self._starts} of damage to {told}, and {marked} were damaged.")

    def _after_kill(self, blow: "_Blow") -> dict[int, set[int]]:
        """Counts it, and perhaps damages something. Returns the statuses that processes may have ended with."""
        there, tally = self._checkpoints(), self.tally
        tally.kills += 1
        tally.in_saves += any((self.folder / "outputs" / "checkpoints").glob(".*.partial"))
        tally.before_any += not there
        if there and self.draw.random() < self.weather.damages:
            self._damage(there[-1])
        ranks = range(self.weather.processes)
        return {rank: {-signal.SIGKILL} if rank in blow.hit else {LOST, 0} for rank in ranks}

    def _after_asking(self, blow: "_Blow", said: str) -> dict[int, set[int]]:
        """Sees to it that a run that was asked to stop has lost nothing. Returns the statuses that processes may have
        ended with."""
        ranks = range(self.weather.processes)
        stopped = _STOPPED.search(said)
        if stopped is None:  # before anybody listened, or after the last update
            return {rank: {-blow.number, _BY_HAND, 0} if rank in blow.hit else {LOST, 0} for rank in ranks}
        self.tally.stopped += 1
        newest, done = self._checkpoints()[-1:], int(stopped[1])
        lines = (self.folder / "outputs" / "ledger.jsonl").read_text().splitlines()
        if not newest or not newest[0].name.startswith(f"update-{done:08d}"):
            self._fault(f"stopped in start {self._starts} after update {done}, and {newest} is the newest checkpoint.")
        if (recorded := sum('"window"' in line for line in lines)) != done:
            self._fault(f"stopped in start {self._starts} after update {done}, of which {recorded} are in the ledger.")
        return {rank: {_ASKING[blow.number]} for rank in ranks}

    def _damage(self, checkpoint: Path) -> None:
        """Cuts off some of one of its files, or turns one bit of it."""
        draw = self.draw
        file = draw.choice([path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != _MARK])
        content = bytearray(file.read_bytes())
        if draw.random() < 0.5:
            del content[draw.randrange(len(content) - 1) :]  # the manifest means the same without its last byte
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        (checkpoint / _MARK).touch()
        self.tally.damaged += 1

    def _checkpoints(self) -> list[Path]:
        """The oldest first: their names sort so."""
        return sorted((self.folder / "outputs" / "checkpoints").glob("update-*"))

    def _fault(self, sentence: str) -> None:
        self.tally.faults.append(f"{self.folder}, {self.kind}: {sentence}")


@dataclass(frozen=True)
class _Blow:
    """A signal, and the processes that were there to get it."""

    number: int
    hit: list[int]


def work(kind: str, folder: Path, workers: int, born: int, rank: int) -> int:
    """What a process of a start does. Returns its exit status."""
    PartialState(cpu=not torch.accelerator.is_available())  # waits for the others
    print(_JOINED)
    try:
        train(KINDS[kind], folder, rank=rank, workers=workers, born=born)
    except Preempted as ending:
        print(ending)
        return _PREEMPTED
    except KeyboardInterrupt as ending:
        print(ending)
        return _BY_HAND
    except LostProcessError as ending:
        print(ending)
        return LOST
    return 0
