"""Every benchmark by its name, and what to do with the rows that it leaves.

    python -m benchmarks list
    python -m benchmarks run NAME [OPTIONS]       # the same as python -m benchmarks.NAME OPTIONS
    python -m benchmarks plot FILE.csv [--x rows V k]
    python -m benchmarks compare OLD.csv NEW.csv

`plot` prints the tables of a CSV and draws its pictures beside it. `compare` prints the medians
of two; the exit status is 1 if something got worse by more than the spread of both.
"""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent


def scripts() -> dict[str, str]:
    """Name -> the question, for every script of this folder; none of them is imported."""
    found = {}
    for path in sorted(FOLDER.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":\n    sys.exit(' in text and path.stem != "__main__":
            words = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
            name = ".".join(path.relative_to(FOLDER).with_suffix("").parts)
            found[name] = re.match(r".*?(?:[.?:](?= |$)|$)", words)[0]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the scripts and what each one asks")
    run = commands.add_parser("run", help="run a script", add_help=False)
    run.add_argument("name", choices=scripts())
    run.add_argument("options", nargs=argparse.REMAINDER)
    plotted = commands.add_parser("plot", help="tables and pictures of a CSV")
    plotted.add_argument("file", type=Path)
    plotted.add_argument("--x", nargs="+", choices=("rows", "V", "k"), default=("rows", "V", "k"))
    compared = commands.add_parser("compare", help="what changed between two CSVs")
    compared.add_argument("old", type=Path)
    compared.add_argument("new", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "list":
        for name, question in scripts().items():
            print(f"{name:<24}{question}")
        return 0
    if given.command == "run":
        # Some scripts set the environment before they import torch: it must not be there yet.
        sys.argv = [given.name, *given.options]
        runpy.run_module(f"benchmarks.{given.name}", run_name="__main__", alter_sys=True)
        return 0  # not reached: a script ends by sys.exit
    from benchmarks import plot, tables

    try:
        if given.command == "plot":
            rows = tables.read(given.file)
            print(tables.tables(rows, given.x))
            for picture in plot.plot(rows, given.file, given.x):
                print("picture:", picture)
            return 0
        table, worse = tables.compare(tables.read(given.old), tables.read(given.new))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(table)
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
