"""The command `ftaccum report`."""

from collections.abc import Sequence
from pathlib import Path

from ...arguments import find_faults
from ...errors import refuse
from ..exit_status import FAILED, OK
from ..options import check_output_file, parse_options
from ..report import check_axis, read_runs

_DESCRIPTION = (
    "Writes one HTML page on runs: curves, results, the settings that differ between them, and versions. The page\n"
    "needs no network. RUN is an output folder. The run may be finished, interrupted or still running:\n"
    "`ftaccum report outputs/a outputs/b --output report.html`."
)


def run(words: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    sources, arguments = parse_options("report", words, _DESCRIPTION)
    refuse(find_faults(arguments))
    runs = read_runs(sources)
    check_axis(arguments.axis, runs)
    output = arguments.output or (str(Path(sources[0], "report.html")) if len(sources) == 1 else "report.html")
    check_output_file("output", output)

    from ...tracking.run_reports import write_report

    try:
        write_report(runs, Path(output).expanduser(), arguments.axis)
    except OSError as error:
        print(f"ftaccum report: {output!r} cannot be written: {error}. Give another `--output`.")
        return FAILED
    print(f"Wrote {output}.")
    return OK
