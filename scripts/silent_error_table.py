"""Print, for each kind of use that once gave silently wrong results, its error now or the message that rejects it.

OMP_NUM_THREADS=1 .venv/bin/python scripts/silent_error_table.py [--kind N] [--source SRC]

`--source` imports the package from another checkout's `src`, for example to see the results of an earlier version.
"""

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
TESTS = Path(__file__).resolve().parents[1] / "tests"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", type=int, action="append", help="run only the cases of this kind; can be repeated")
    parser.add_argument("--source", type=Path, help="`src` folder to import ftaccum from")
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    if options.source is not None:
        sys.path.insert(0, str(options.source.resolve()))
    from silent_errors import all_cases

    print("| kind | case | result |\n| --- | --- | --- |")
    for case in all_cases():
        if options.kind and case.kind not in options.kind:
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                result = f"{case.run():.1e}"
        except Exception as error:  # the table shows any error
            result = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(f"| {case.kind} | {case.name} | {result} |", flush=True)


if __name__ == "__main__":
    main()
