"""Kill one run, check it and restart it, until it ends."""

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
from ftaccum.tracking.run_record import RunRecord
from storm_runs import KINDS, Differences, train

_PREEMPTED, _BY_HAND, LOST = 75, 130, 3  # exit statuses
_ASKING: dict[int, int] = {signal.SIGTERM: _PREEMPTED, signal.SIGUSR1: _PREEMPTED, signal.SIGINT: _BY_HAND}
_PATIENCE = 60.0  # seconds after which a process that should have ended counts as hanging
_SAVE = 0.03  # seconds that a save takes
_JOINED = "The processes are connected."
_MARK = "struck"  # an empty file that marks a damaged checkpoint

_GOES_ON = re.compile(r"^Resuming after update \d+, from (.+?): ", re.MULTILINE)
_BEGINS_ANEW = re.compile(r"^ *0/\d+ ", re.MULTILINE)  # the table's line for the loss before the first update
_PASSED_OVER = re.compile(r"^Skipped (.+?), which is damaged: .+\.$", re.MULTILINE)
_STOPPED = re.compile(r"^Stopped after update (\d+), as requested", re.MULTILINE)


@dataclass(frozen=True)
class Weather:
    """The configuration of a storm.

    Attributes:
        processes, workers: numbers of processes and of workers of each run.
        saves: share of kills that aim at a save.
        asks: share of signals that ask to stop instead of killing.
        damages: share of kills after which the newest checkpoint is damaged.
    """

    processes: int
    workers: int
    saves: float
    asks: float
    damages: float


@dataclass
class Tally:
    """Counts of everything that happened.

    Attributes:
        waits: for each kill of one process, the seconds until the other had ended on its own.
        faults: one sentence for each thing that went wrong.
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
    """A run of one kind in its own folder."""

    kind: str
    folder: Path
    weather: Weather
    tally: Tally
    draw: random.Random
    _starts: int = 0

    def undisturbed(self) -> float:
        """Do the whole run without signals, and return its seconds."""
        started = time.monotonic()
        self._start(None)
        return time.monotonic() - started

    def struck(self, kills: int, seconds: float, reference: Path) -> None:
        """Do the run with signals until this many kills have been made, and compare it with an undisturbed run.

        Args:
            kills: the number of kills after which the run is left alone.
            seconds: seconds that a whole run takes.
            reference: folder of the undisturbed run.
        """
        self.tally.runs += 1
        try:
            while not self._start(seconds if self.tally.kills < kills else None):
                seconds *= 1.05  # on a busy machine, a start may take longer than the whole run did
        except RuntimeError as error:
            self._fault(str(error))
            return
        unlike = Differences.between(reference, self.folder, self.weather.processes)
        self.tally.unlike += unlike
        if unlike != Differences():
            self._fault(f"ended differently from an undisturbed run: {unlike}.")

    def _start(self, seconds: float | None) -> bool:
        """Start the run once.

        Args:
            seconds: send a signal within these seconds; None for no signal.

        Returns:
            Whether the run ended.

        Raises:
            RuntimeError: if a start without a signal did not end the run, because no later start would either.
        """
        marked = [path for path in self._checkpoints() if (path / _MARK).exists()]
        sound = [path for path in self._checkpoints() if path not in marked]
        self._starts += 1
        logs = [self.folder / f"start-{self._starts}.{rank}.log" for rank in range(self.weather.processes)]
        # A resumed run must not depend on the process's and the model's earlier state.
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
                raise RuntimeError(f"A start without a signal did not end the run: see {logs[0]}.")
            return True
        expected = self._after_kill(blow) if blow.number == signal.SIGKILL else self._after_asking(blow, said)
        for rank, status in team.statuses.items():
            if status not in expected[rank]:
                self._fault(f"ended with status {status} instead of one of {expected[rank]} in {logs[rank].name}.")
        return is_over

    def _blow(self, team: Team, logs: list[Path], seconds: float) -> "_Blow | None":
        """Send a signal within these seconds. Return None if the run had ended before."""
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
            # A single process would wait for its peers to connect, until a launcher ends it.
            number, victims = signal.SIGKILL, ranks
        hit = [rank for rank in victims if team.send(rank, number)]
        return _Blow(number, hit) if hit else None

    def _waited(self, team: Team, blow: "_Blow | None") -> "_Blow | None":
        """Wait for the end of a start. Return the signal, if it reached a process that was still running."""
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
        """Check that a start resumed from the newest sound checkpoint and reported damaged ones, if it got so far."""
        went_on = _GOES_ON.search(said)
        began_anew = went_on is None and _BEGINS_ANEW.search(said) is not None
        if not went_on and not began_anew:
            return
        self.tally.resumed += went_on is not None
        self.tally.anew += began_anew and self._starts > 1
        told = {Path(path) for path in _PASSED_OVER.findall(said)}
        self.tally.passed_over += len(told)
        if (Path(went_on[1]) if went_on else None) != (sound[-1] if sound else None):
            self._fault(f"start {self._starts} resumed from {went_on and went_on[1]} instead of {sound[-1:]}.")
        if told != {path for path in marked if not sound or path > sound[-1]}:
            self._fault(f"start {self._starts} reported damage to {told}, but {marked} were damaged.")

    def _after_kill(self, blow: "_Blow") -> dict[int, set[int]]:
        """Count a kill, and perhaps damage a checkpoint. Return the allowed exit statuses by rank."""
        there, tally = self._checkpoints(), self.tally
        tally.kills += 1
        tally.in_saves += any((self.folder / "outputs" / "checkpoints").glob(".*.partial"))
        tally.before_any += not there
        # Not the only checkpoint of a finished run, which is then refused instead of started again.
        if there and not self._is_finished() and self.draw.random() < self.weather.damages:
            self._damage(there[-1])
        ranks = range(self.weather.processes)
        return {rank: {-signal.SIGKILL} if rank in blow.hit else {LOST, 0} for rank in ranks}

    def _after_asking(self, blow: "_Blow", said: str) -> dict[int, set[int]]:
        """Check that a run that was asked to stop has lost no update. Return the allowed exit statuses by rank."""
        ranks = range(self.weather.processes)
        stopped = _STOPPED.search(said)
        if stopped is None:  # before a handler was installed, or after the last update
            return {rank: {-blow.number, _BY_HAND, 0} if rank in blow.hit else {LOST, 0} for rank in ranks}
        self.tally.stopped += 1
        newest, done = self._checkpoints()[-1:], int(stopped[1])
        lines = (self.folder / "outputs" / "ledger.jsonl").read_text().splitlines()
        if not newest or not newest[0].name.startswith(f"update-{done:08d}"):
            self._fault(f"start {self._starts} stopped after update {done}, but the newest checkpoint is {newest}.")
        if (recorded := sum('"window"' in line for line in lines)) != done:
            self._fault(f"start {self._starts} stopped after update {done}, but the ledger has {recorded} updates.")
        return {rank: {_ASKING[blow.number]} for rank in ranks}

    def _damage(self, checkpoint: Path) -> None:
        """Truncate a random file of a checkpoint, or flip one bit in it."""
        draw = self.draw
        file = draw.choice([path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != _MARK])
        content = bytearray(file.read_bytes())
        if draw.random() < 0.5:
            del content[draw.randrange(len(content) - 1) :]  # without its last byte, the manifest is still valid
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        (checkpoint / _MARK).touch()
        self.tally.damaged += 1

    def _is_finished(self) -> bool:
        """Return whether the run has finished, although its process may have been killed before it ended."""
        record = RunRecord.read(self.folder / "outputs" / "run.json")
        return record is not None and record.finished

    def _checkpoints(self) -> list[Path]:
        """Return the checkpoints, oldest first, which is the order of their names."""
        return sorted((self.folder / "outputs" / "checkpoints").glob("update-*"))

    def _fault(self, sentence: str) -> None:
        self.tally.faults.append(f"{self.folder}, {self.kind}: {sentence}")


@dataclass(frozen=True)
class _Blow:
    """A signal, and the ranks of the processes that it reached."""

    number: int
    hit: list[int]


def work(kind: str, folder: Path, workers: int, born: int, rank: int) -> int:
    """Run one process of a start, and return its exit status."""
    PartialState(cpu=not torch.accelerator.is_available())  # waits for the other processes
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
