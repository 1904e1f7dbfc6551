"""Mutation tests: `scripts/mutation --seed 0 --n 200 --workers 2`.

One process imports torch and Transformers once. Each mutant is tested in a fork of it, which imports `ftaccum` from a
private copy of the tree with one changed file. Each result is written at once, so that a restart can resume.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mutants import Equivalent, Exclusions, Mutant, draw, files_of

ROOT = Path(__file__).parents[1]
PASSING = 0.95  # share of the non-equivalent mutants that must be killed
_KILLED = ("killed", "on two", "timeout")  # killed by a fast test, a test on two processes, a time limit
_LOOK_EVERY = 0.05  # seconds
_STARTING = 60.0  # seconds for a fork to import ftaccum and collect tests
_TEST_TIMEOUT = 30  # seconds per test; fails a mutant that loops forever
_TWO_PROCESSES_TIMEOUT = 180.0
_UNCHANGED_TIMEOUT = 1800.0
_HARNESS_FAILED, _NO_TESTS = 70, 5  # exit statuses; the second is from pytest
_THIRD_PARTY = (
    "pytest",
    "_pytest",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "hypothesis",
    "peft",
)
_COPIED = ("src", "tests", "scripts", "recipes", "docs", "pyproject.toml", "README.md", "constraints.txt")


@dataclass(frozen=True)
class Settings:
    """The contents of `mutation.yaml` and `mutation_equivalent.yaml`."""

    packages: list[str]
    tests: list[str]
    markers: str
    slowest_test: float
    seconds_of_tests: float
    on_two_processes: list[str]
    exclude: Exclusions
    equivalent: list[Equivalent]

    @classmethod
    def read(cls) -> "Settings":
        table = yaml.safe_load((ROOT / "scripts" / "mutation.yaml").read_text())
        equivalent = yaml.safe_load((ROOT / "scripts" / "mutation_equivalent.yaml").read_text())
        table["exclude"] = Exclusions(**table["exclude"])
        table["packages"] = [package for package in table["packages"] if (ROOT / "src" / package).exists()]
        return cls(**table, equivalent=[Equivalent(**entry) for entry in equivalent])

    def test_files(self) -> list[str]:
        return list(dict.fromkeys(str(p.relative_to(ROOT)) for glob in self.tests for p in sorted(ROOT.glob(glob))))


@dataclass(frozen=True)
class Baseline:
    """Measurements on the unchanged tree.

    Attributes:
        seconds: CPU seconds of each test that passed.
        lines: tests that run a line, by file and line (as text, because JSON keys are text).
        modules: third-party modules that the tests imported.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[str, list[str]]]
    modules: list[str]
    failed: list[str]

    def tests_for(self, mutant: Mutant, seconds: float) -> list[str]:
        """Return the tests that run a line of the mutant, fastest first, for at most this many seconds in total."""
        # Parameter defaults are on lines that no test runs; fall back to the whole function.
        found = self._running(mutant.file, mutant.lines) or self._running(mutant.file, mutant.function_lines)
        chosen: list[str] = []
        for test in self.in_order(found & self.seconds.keys()):
            seconds -= self.seconds[test]
            if seconds < 0:
                break
            chosen.append(test)
        return chosen

    def in_order(self, tests: Iterable[str]) -> list[str]:
        return sorted(tests, key=lambda test: (self.seconds[test], test))

    def _running(self, file: str, lines: tuple[int, int]) -> set[str]:
        by_line, (first, last) = self.lines.get(file, {}), lines
        return {test for line in range(first, last + 1) for test in by_line.get(str(line), ())}


@dataclass
class Fork:
    """A child process that works on one tree."""

    tree: Path
    process: int
    began: float
    timeout: float
    mutant: Mutant | None = None
    on_two: bool = False
    timed_out: bool = False

    def ended(self) -> int | None:
        """Return the exit status if the process has ended, else None. Kill it when its time is up."""
        process, status = os.waitpid(self.process, os.WNOHANG)
        if process:
            self._kill_group()
            return os.waitstatus_to_exitcode(status)
        if not self.timed_out and time.monotonic() - self.began > self.timeout:
            self.timed_out = True
            self._kill_group()
        return None

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process, signal.SIGKILL)


def fork(tree: Path, work: Callable[[], int], log: Path, timeout: float, mutant: Mutant | None = None) -> Fork:
    """Start `work` in a child process with its own process group, in the folder `tree`."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        _live_as_child(tree, work, log)
    return Fork(tree, process, time.monotonic(), timeout, mutant)


def _live_as_child(tree: Path, work: Callable[[], int], log: Path) -> None:
    status = _HARNESS_FAILED
    try:
        os.setsid()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(tree)
        sys.path[:0] = [str(tree / "src")]
        os.environ["PYTHONPATH"] = os.pathsep.join([str(tree / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(":")
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_pytest(tree: Path, arguments: Sequence[str], plugin: object) -> int:
    """Run pytest in this process, on the tree's copy of `ftaccum`."""
    import pytest

    ignored = ["-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    base = tree / "tmp"
    status = int(pytest.main([*ignored, "-q", "--basetemp", str(base), *arguments], plugins=[plugin]))
    where = sys.modules["ftaccum"].__file__ if "ftaccum" in sys.modules else None
    assert where is None or Path(where).is_relative_to(tree), f"tested {where} instead of {tree}"
    return status


def record(tree: Path, settings: Settings, answer: Path) -> int:
    """Run all fast tests on the unchanged tree, and write a `Baseline` to `answer`."""
    from mutation_recorder import Recorder

    targets = [tree / "src" / package for package in settings.packages]
    recorder = Recorder(targets, tree / ".coverage", settings.slowest_test)
    recorder.start()
    status = run_pytest(tree, ["-m", settings.markers, *settings.test_files()], recorder)
    recorder.stop()
    modules = [
        name for name, module in sys.modules.items() if name.split(".")[0] in _THIRD_PARTY and module is not None
    ]
    lines = {file: {str(n): tests for n, tests in by_line.items()} for file, by_line in recorder.lines(tree).items()}
    baseline = Baseline(recorder.seconds, lines, modules, recorder.failed)
    answer.write_text(json.dumps(vars(baseline)))
    return 0 if status in (0, 1) else status


def control(tree: Path, baseline: Baseline, answer: Path) -> int:
    """Run the tests on the unchanged tree in the order used for mutants, and write the failing ones to `answer`.

    A test that depends on earlier tests would seem to kill every mutant.
    """
    from mutation_recorder import Selection

    tests = baseline.in_order(baseline.seconds)
    selection = Selection(tests)
    status = run_pytest(tree, ["-o", f"timeout={_TEST_TIMEOUT}", *_files(tests)], selection)
    answer.write_text(json.dumps(sorted(selection.failed)))
    return 0 if status in (0, 1) else status


def _files(tests: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(test.split("::")[0] for test in tests))


def check(tree: Path, mutant: Mutant, tests: Sequence[str], stamp: int) -> int:
    """Write the mutant into the tree, and run its tests until one fails."""
    from mutation_recorder import Selection

    path = tree / mutant.file
    path.write_text(mutant.source)
    os.utime(path, (stamp, stamp))  # else Python may reuse the byte code of a mutant of equal size and age
    return run_pytest(tree, ["-x", "-o", f"timeout={_TEST_TIMEOUT}", *_files(tests)], Selection(tests))


def check_on_two(tree: Path, tests: Sequence[str]) -> int:
    """Run the tests on two processes on the mutant that `check` wrote into the tree."""
    return run_pytest(tree, ["-x", "-m", "processes", *tests], object())


def copy_tree(into: Path) -> Path:
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, into / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            into.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)
    return into


def digest(paths: Iterable[Path]) -> str:
    """Return a checksum of all Python files below these paths."""
    checksum = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            checksum.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return checksum.hexdigest()[:12]


def import_third_parties(modules: Iterable[str]) -> None:
    """Import the modules that the tests need, so that forks need not."""
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


@dataclass
class Campaign:
    """The mutants of one draw, their verdicts so far, and the trees that they are tested in."""

    settings: Settings
    baseline: Baseline
    results: Path
    scratch: Path
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    _stamp: int = 10**9  # modification time of the changed file, different for each mutant

    def run(self, mutants: Sequence[Mutant], workers: int) -> None:
        """Test the mutants that have no verdict yet."""
        waiting = [mutant for mutant in mutants if mutant.key not in self.verdicts]
        free = [copy_tree(self.scratch / f"tree{n}") for n in range(min(workers, len(waiting)))]
        running: list[Fork] = []
        while waiting or running:
            while waiting and free:
                running.append(self._start(free, waiting.pop(0)))
            for child in [*running]:
                if (status := child.ended()) is not None:
                    running.remove(child)
                    if (following := self._go_on(child, status)) is not None:
                        running.append(following)
                    else:
                        free.append(child.tree)
            time.sleep(_LOOK_EVERY)

    def _start(self, free: list[Path], mutant: Mutant) -> Fork:
        tests = self.baseline.tests_for(mutant, self.settings.seconds_of_tests)
        self._stamp += 1
        tree, stamp = free.pop(), self._stamp
        expected = sum(self.baseline.seconds[test] for test in tests)
        shutil.rmtree(tree / "tmp", ignore_errors=True)
        return fork(tree, lambda: check(tree, mutant, tests, stamp), tree / "log", 3 * expected + _STARTING, mutant)

    def _go_on(self, child: Fork, status: int) -> Fork | None:
        """Record the verdict or, if all fast tests passed, start the tests on two processes."""
        mutant, tree = child.mutant, child.tree
        assert mutant is not None
        log = (tree / "log").read_text(errors="replace")
        if status == _HARNESS_FAILED:
            raise RuntimeError(f"The harness failed on\n{mutant}\n{log}")
        survived = status in (0, _NO_TESTS) and not child.timed_out
        if survived and not child.on_two:
            work = lambda: check_on_two(tree, self.settings.on_two_processes)
            return replace(fork(tree, work, tree / "log", _TWO_PROCESSES_TIMEOUT, mutant), on_two=True)
        shutil.copy2(ROOT / mutant.file, tree / mutant.file)
        by = next((line for line in log.splitlines() if line.startswith(("FAILED", "ERROR"))), f"exit status {status}")
        verdict = "timeout" if child.timed_out else "survived" if survived else "on two" if child.on_two else "killed"
        self._write(mutant, verdict, time.monotonic() - child.began, by)
        return None

    def _write(self, mutant: Mutant, verdict: str, seconds: float, by: str) -> None:
        entry = {"key": mutant.key, "verdict": verdict, "seconds": round(seconds, 1), "by": by, "mutant": str(mutant)}
        self.verdicts[mutant.key] = entry
        with self.results.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{len(self.verdicts):4} {verdict:8} {seconds:5.1f} s  {mutant.file}:{mutant.lines[0]}", flush=True)

    def report(self, mutants: Sequence[Mutant]) -> bool:
        """Print the table and the survivors, and return whether enough mutants were killed."""
        equivalent = {m.key: e for m in mutants for e in self.settings.equivalent if e.matches(m)}
        survived = [m for m in mutants if self.verdicts[m.key]["verdict"] == "survived"]
        print(
            f"\n{'package':28}{'mutants':>8}{'killed':>8}{'on two':>8}{'timeout':>8}{'equivalent':>12}{'survived':>10}"
        )
        for package in [*dict.fromkeys(m.package for m in mutants), "all"]:
            here = [m for m in mutants if package in (m.package, "all")]
            counts = {v: sum(self.verdicts[m.key]["verdict"] == v for m in here) for v in _KILLED}
            known = sum(m in survived and m.key in equivalent for m in here)
            left = len(here) - sum(counts.values()) - known
            print(f"{package:28}{len(here):8}{''.join(f'{n:8}' for n in counts.values())}{known:12}{left:10}")
        for mutant in survived:
            if mutant.key in equivalent:
                print(f"\nequivalent: {mutant}\n  {equivalent[mutant.key].reason}")
        for mutant in survived:
            if mutant.key not in equivalent:
                print(f"\nsurvived ({self.verdicts[mutant.key]['by']}): {mutant}")
        counted = [m for m in mutants if m not in survived or m.key not in equivalent]
        killed = len(mutants) - len(survived)
        print(f"\n{killed} of {len(counted)} non-equivalent mutants were killed: {killed / len(counted):.1%}")
        return killed >= PASSING * len(counted)


def measure_baseline(settings: Settings, scratch: Path, cache: Path) -> Baseline:
    """Return the baseline, which is measured once for each version of the source and the tests."""
    if not cache.exists():
        tree, answer, log = copy_tree(scratch / "unchanged"), scratch / "answer.json", scratch / "unchanged.log"
        print("Measuring which test runs which line …", flush=True)
        wait(fork(tree, lambda: record(tree, settings, answer), log, _UNCHANGED_TIMEOUT), log)
        baseline = Baseline(**json.loads(answer.read_text()))
        import_third_parties(baseline.modules)
        print("Running the tests in the order used for mutants …", flush=True)
        wait(fork(tree, lambda: control(tree, baseline, answer), log, _UNCHANGED_TIMEOUT), log)
        failed = json.loads(answer.read_text())
        seconds = {test: took for test, took in baseline.seconds.items() if test not in failed}
        cache.write_text(json.dumps(vars(replace(baseline, seconds=seconds, failed=[*baseline.failed, *failed]))))
    return Baseline(**json.loads(cache.read_text()))


def wait(child: Fork, log: Path) -> None:
    """Wait for a child, and raise RuntimeError if it fails."""
    while (status := child.ended()) is None:
        time.sleep(_LOOK_EVERY)
    if status != 0:
        raise RuntimeError(log.read_text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/mutation", description="Check how many mutants the fast tests kill.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=200, help="mutants to draw")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--package", help="draw from this package only, such as ftaccum/planning")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "mutation")
    parser.add_argument("--retry", action="store_true", help="test survivors again, after changes to the tests")
    return parser.parse_args()


def main() -> int:
    arguments, settings = parse(), Settings.read()
    arguments.results.mkdir(parents=True, exist_ok=True)
    packages = [arguments.package] if arguments.package else settings.packages
    files = {package: files_of(ROOT, package, settings.exclude) for package in packages}
    mutants = draw(files, arguments.n, arguments.seed)
    sizes = {package: sum(len(file.mutations) for file in found) for package, found in files.items()}
    print(f"{len(mutants)} mutants of {sizes}", flush=True)

    src, tests = digest([ROOT / "src"]), digest([ROOT / "tests", ROOT / "scripts" / "mutation.yaml"])
    results = arguments.results / f"{src}-seed{arguments.seed}.jsonl"
    entries = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    verdicts = {entry["key"]: entry for entry in entries}
    if arguments.retry:
        verdicts = {key: entry for key, entry in verdicts.items() if entry["verdict"] != "survived"}

    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import_third_parties(["torch", "transformers", "accelerate", "pytest"])
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        baseline = measure_baseline(settings, Path(scratch), arguments.results / f"{src}-{tests}.json")
        import_third_parties(baseline.modules)
        for test in baseline.failed:
            print(f"ignored, because it fails or is skipped on the unchanged tree: {test}")
        campaign = Campaign(settings, baseline, results, Path(scratch), verdicts)
        campaign.run(mutants, arguments.workers)
    return 0 if campaign.report(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
