"""Write the text that the teaching pages print, from their notebooks as executed by the build of the site.

    python scripts/teaching_outputs.py docs/_build/jupyter_execute/teaching docs/teaching/outputs [--check]

A page's file has every printed text, every table and every value that its prose shows, in order. Figures, and cells
with the tag `varies`, are left out. With `--check` nothing is written: a file that would change is shown as a diff, and
the exit status is 1.
"""

import difflib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_GLUED = "application/papermill.record/"  # the values that `glue` keeps, by the type of each


def texts_of(notebook: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts that a notebook's cells print or show."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and "varies" not in cell["metadata"].get("tags", ()):
            yield from filter(None, map(_text, cell["outputs"]))


def _text(output: Mapping[str, Any]) -> str:
    """Return an output as text; empty for figures and for what is written to stderr."""
    if output["output_type"] == "stream":
        return _joined(output["text"]) if output["name"] == "stdout" else ""
    data = output.get("data", {})
    name = output.get("metadata", {}).get("scrapbook", {}).get("name", "")
    kinds = {kind.removeprefix(_GLUED): _joined(text) for kind, text in data.items() if isinstance(text, str | list)}
    if any(kind.startswith("image/") for kind in kinds):
        return ""
    text = kinds.get("text/plain", "")
    return f"{name} = {text}" if name and text else text


def _joined(text: str | list[str]) -> str:
    lines = (text if isinstance(text, str) else "".join(text)).splitlines()
    return "\n".join(map(str.rstrip, lines)).rstrip("\n")  # tables as text end with spaces


def main() -> int:
    executed, outputs, *options = sys.argv[1:]
    new = {
        f"{path.stem}.txt": "\n\n".join(texts_of(json.loads(path.read_text(encoding="utf-8")))) + "\n"
        for path in sorted(Path(executed).glob("*.ipynb"))
    }
    folder = Path(outputs)
    old = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}
    changed = sorted(name for name in {*new, *old} if new.get(name) != old.get(name))
    for name in changed:
        lines = (old.get(name, "").splitlines(True), new.get(name, "").splitlines(True))
        sys.stdout.writelines(difflib.unified_diff(*lines, f"{folder / name}, as committed", f"{name}, as executed"))
    if "--check" not in options:
        folder.mkdir(parents=True, exist_ok=True)
        for name in changed:
            (folder / name).write_text(new[name], encoding="utf-8") if name in new else (folder / name).unlink()
        return 0
    print(f"{len(new)} teaching pages executed, {len(changed)} outputs differ from {folder}.")
    if changed:
        print("Run scripts/docs, look at the changes, and commit them.")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
