"""Prepare packaged models and data by name, and print their paths: `python recipes/packaged minilm movies`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this folder there, from which the package cannot be imported.
    sys.path[0] = str(Path(__file__).parents[1])
    import packaged

    sources = {source.__name__.rpartition(".")[2]: source for source in packaged._SOURCES}
    if not sys.argv[1:] or not set(sys.argv[1:]) <= set(sources):
        sys.exit(f"usage: python recipes/packaged NAME …, with names of {', '.join(sources)}")
    for name in sys.argv[1:]:
        packaged.prepare(*sources[name].PATHS)
        print(*sources[name].PATHS, sep="\n")
