"""Write the tables of names in docs/coming_from.md, from the tables in `ftaccum.porting`.

.venv/bin/python scripts/coming_from.py            # rewrite the page's tables
.venv/bin/python scripts/coming_from.py --print    # print them
"""

import argparse
from pathlib import Path

from ftaccum.porting.names import TABLES

PAGE = Path(__file__).parents[1] / "docs" / "coming_from.md"
START = "<!-- The tables from here on are written by scripts/coming_from.py. -->\n"
HEADINGS = {
    "Trainer": "Trainer and TrainingArguments",
    "TRL": "TRL",
    "PyTorch": "PyTorch scripts",
    "Lightning": "Lightning",
    "Axolotl": "Axolotl",
}
ABOVE = {"TRL": "`SFTConfig` and `DPOConfig` have the names of `TrainingArguments`, too."}


def tables() -> str:
    """Return a section with a table for each library."""
    sections = []
    for library, rows in TABLES.items():
        lines = [f"## {HEADINGS[library]}\n", *([f"{ABOVE[library]}\n"] if library in ABOVE else [])]
        lines += [f"| {library} | here | |", "| --- | --- | --- |"]
        for row in rows:
            names = ", ".join(f"`{name}`" for name in row.names.split())
            lines.append(f"| {names} | {row.here or '–'} | {row.note} |".replace("  |", " |"))
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def page() -> str:
    """Return the page with the tables as they are now."""
    above, _, _ = PAGE.read_text(encoding="utf-8").partition(START)
    return f"{above}{START}\n{tables()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the tables instead of writing them")
    if parser.parse_args().print:
        print(tables(), end="")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
