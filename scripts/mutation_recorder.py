"""Pytest plugins for mutation tests: record which test runs which line, and run chosen tests in a given order."""

import time
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
from coverage import Coverage


class Recorder:
    """A plugin that records the duration and outcome of each test, and which lines of the target files it runs.

    Attributes:
        seconds: CPU seconds by test, with setup and teardown. Tests that failed, were skipped or are slow are missing.
        lines: tests that run a line, by file and line.
    """

    def __init__(self, targets: Sequence[Path], scratch: Path, slowest: float) -> None:
        self._coverage = Coverage(
            data_file=str(scratch), include=[f"{t}/*" if t.is_dir() else str(t) for t in targets], config_file=False
        )
        self._slowest = slowest
        self._passed: dict[str, bool] = {}
        self._all_seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._coverage.switch_context(item.nodeid)
        began = time.process_time()
        try:
            return (yield)
        finally:
            self._all_seconds[item.nodeid] = time.process_time() - began

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._passed[report.nodeid] = self._passed.get(report.nodeid, True) and report.passed

    def start(self) -> None:
        self._coverage.start()

    def stop(self) -> None:
        self._coverage.stop()

    @property
    def seconds(self) -> dict[str, float]:
        return {
            test: took for test, took in self._all_seconds.items() if self._passed.get(test) and took <= self._slowest
        }

    @property
    def failed(self) -> list[str]:
        return [test for test, passed in self._passed.items() if not passed]

    def lines(self, root: Path) -> dict[str, dict[int, list[str]]]:
        data = self._coverage.get_data()
        return {
            str(Path(file).relative_to(root)): {
                line: [test for test in tests if test] for line, tests in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }


class Selection:
    """A plugin that runs only the chosen tests, in the given order.

    Attributes:
        failed: the tests that failed.
    """

    def __init__(self, tests: Sequence[str]) -> None:
        self.failed: set[str] = set()
        self._rank = {test: n for n, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._rank), key=lambda item: self._rank[item.nodeid]
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)
