"""Check for every head of Transformers' auto classes that its accumulated gradient is that of one batch.

The script goes through the auto classes by task. It builds each class from a tiny configuration in float64 without
dropout, and trains it on 9 ragged rows in windows of 6 and 3 (micro-batches of 1 or 2), with fixed weights. It compares
the gradient of each window with that of one batch in plain PyTorch. It exits with status 1 if any class is silently
wrong or crashes.

    .venv/bin/python scripts/sweep_heads.py
    .venv/bin/python scripts/sweep_heads.py --task CAUSAL_LM --only Mixtral
    .venv/bin/python scripts/sweep_heads.py --jobs 4 --json heads.json
    .venv/bin/python scripts/sweep_heads.py --variant "router loss" --router-balance micro_batch
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import transformers

from every_head import KINDS, TASKS, Case, Verdict, cases, check

LANGUAGE_MODELS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT")
FAILED = ("crashed", "SILENTLY WRONG")


def main() -> int:
    options = _options()
    found = [case for task in options.task or TASKS for case in cases(task, options.only)]
    found = [case for case in found if options.variant in (None, case.variant)]
    started, verdicts = time.perf_counter(), []
    for n, verdict in enumerate(_checked(found, options.jobs, options.router_balance), start=1):
        verdicts.append(verdict)
        seconds = time.perf_counter() - started
        print(f"{n}/{len(found)} {seconds:.0f} s {_name(verdict)}: {verdict.kind}", file=sys.stderr, flush=True)
    print(table(verdicts))
    if options.json:
        options.json.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n")
    return int(any(verdict.kind in FAILED for verdict in verdicts))


def table(verdicts: Sequence[Verdict]) -> str:
    """Return a table of tasks, followed by a line for each class that is not simply exact."""
    lines = [_line("task", "classes", "runs", *KINDS), _line(*["---"] * (3 + len(KINDS)))]
    for task in [*dict.fromkeys(verdict.task for verdict in verdicts), ""]:
        of_task = [verdict for verdict in verdicts if task in ("", verdict.task)]
        kinds = Counter(verdict.kind for verdict in of_task)
        name = task.lower().replace("_", " ") or "together"
        lines.append(_line(name, len({v.name for v in of_task}), len(of_task), *(kinds[kind] for kind in KINDS)))
    measured = {verdict.name for verdict in verdicts if verdict.kind != "not buildable"}
    lines += ["", f"{len(measured)} classes were built and trained."]
    for kind in reversed(KINDS[1:]):
        those = [verdict for verdict in verdicts if verdict.kind == kind]
        lines += ["", f"{kind}: {len(those)}"] if those else []
        lines += [f"  {_name(verdict)}: {_shortened(verdict)}" for verdict in those]
    return "\n".join([*lines, *_of_logits(verdicts), *_of_last_layer(verdicts)])


def _of_logits(verdicts: Sequence[Verdict]) -> list[str]:
    """Return how many language models compute logits at labelled positions only, and why others do not."""
    known = [verdict for verdict in verdicts if verdict.logits and verdict.task in LANGUAGE_MODELS]
    if not known:
        return []
    labelled = [verdict for verdict in known if verdict.logits == "at labelled positions only"]
    lines = ["", f"Of {len(known)} language models, {len(labelled)} compute logits at labelled positions only."]
    others = [verdict for verdict in known if verdict not in labelled]
    return lines + [f"  {_name(verdict)}: {verdict.logits}" for verdict in others]


def _of_last_layer(verdicts: Sequence[Verdict]) -> list[str]:
    """Return how many models compute their last layer only where it is read, and why others do not."""
    known = [verdict for verdict in verdicts if verdict.last_layer]
    if not known:
        return []
    reasons = Counter(verdict.last_layer for verdict in known)
    lines = ["", f"Positions at which {len(known)} models compute their last layer:"]
    return lines + [f"  {n}: {reason}" for reason, n in reasons.most_common()]


def _checked(found: Sequence[Case], jobs: int, router_balance: str) -> Iterator[Verdict]:
    checked = partial(check, router_balance=router_balance)
    if jobs == 1:
        _quiet()
        yield from map(checked, found)
        return
    with ProcessPoolExecutor(jobs, initializer=_quiet) as workers:
        yield from workers.map(checked, found)


def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _name(verdict: Verdict) -> str:
    return f"{verdict.task.lower()}, {verdict.name}{f' ({verdict.variant})' if verdict.variant else ''}"


def _shortened(verdict: Verdict, most: int = 240) -> str:
    off = "" if verdict.error is None else f" [gradient {verdict.error:.0e} off]"
    return (verdict.why if len(verdict.why) <= most else verdict.why[:most] + " …") + off


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=list(TASKS), help="task to check, repeatable (default: all)")
    parser.add_argument("--only", default="", metavar="NAME", help="check only classes whose names contain this")
    parser.add_argument(
        "--variant", metavar="NAME", help="check only this variant, such as 'router loss' (default: all)"
    )
    parser.add_argument(
        "--router-balance", choices=["window", "micro_batch"], default="window", help="as in training (default: window)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write all verdicts to")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
