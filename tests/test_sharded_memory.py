"""The bytes that a process holds of a sharded model: its share, and nothing whole that is left behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "launching.md"
START, BETWEEN, BEFORE, AFTER = "before the first pass", "between passes", "before the step", "after the step"
SMALL = 0.01  # of the weights: step counts, losses, buffers

Moments = dict[str, dict[str, float]]


def shares(moments: dict[str, dict[str, int]], whole: int) -> Moments:
    return {m: {kind: n_bytes / whole for kind, n_bytes in kinds.items()} for m, kinds in moments.items()}


def check_shares(moments: Moments, part: float, between: float, kept: float) -> None:
    """Check that a run holds `part` of each tensor, the gradients between passes, and `kept` besides."""
    for moment in (START, BETWEEN, BEFORE, AFTER):
        assert moments[moment]["weights"] == pytest.approx(part, abs=SMALL), moment
        assert moments[moment]["other"] == pytest.approx(kept if moment != START else 0, abs=SMALL), moment
    assert moments[START]["gradients"] == moments[AFTER]["gradients"] == 0
    assert moments[START]["moments"] < SMALL
    assert moments[BETWEEN]["gradients"] == pytest.approx(between)
    assert moments[BEFORE]["gradients"] == pytest.approx(part)
    assert moments[AFTER]["moments"] == pytest.approx(2 * part)


@pytest.mark.slow
@pytest.mark.processes
def test_each_process_holds_its_share_and_nothing_whole(two_processes: Callable[..., str]) -> None:
    said = two_processes("bytes_of_two.py", "--json")
    for found in json.loads(said.partition("FOUND ")[2].splitlines()[0]):  # on each process
        whole = found["whole copies"][START]["weights"]
        runs = {way: shares(moments, whole) for way, moments in found.items()}
        for way, part, between in (("whole copies", 1, 1), ("sharded, each", 0.5, 0.5), ("sharded, last", 0.5, 1)):
            check_shares(runs[way], part, between, kept=0)
            check_shares(runs[f"{way}, with everything"], part, between, kept=part)  # the best weights
        # The count itself notices a whole copy, and a block that stays gathered.
        assert runs["whole weights kept"][BETWEEN]["other"] == pytest.approx(1, abs=SMALL)
        assert runs["a block left gathered"][BETWEEN]["other"] > 0.1


@pytest.mark.slow
@pytest.mark.processes
def test_the_docs_show_the_table_that_the_script_prints(two_processes: Callable[..., str]) -> None:
    said = two_processes("bytes_of_two.py")
    table = "\n".join(line for line in said.splitlines() if line.startswith("| "))
    assert table in PAGE.read_text(encoding="utf-8")
    assert len(table.splitlines()) == 7
