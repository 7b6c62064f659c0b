"""Make cmi.ipynb of cells.py, or say whether it is what cells.py makes.

    python notebook/make_notebook.py            # writes notebook/cmi.ipynb, without outputs
    python notebook/make_notebook.py --check    # writes nothing; exit status 1 if they differ

A line `# %% [markdown]` begins a text, whose lines are comments, and `# %%` begins code. Cells are
kept in a Python file because that can be read, compared and linted.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("cells.py")
NOTEBOOK = Path(__file__).with_name("cmi.ipynb")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def cell(number: int, is_text: bool, body: str) -> dict[str, Any]:
    """One cell, as nbformat 4.5 stores it."""
    text = re.sub(r"^# ?", "", body.strip(), flags=re.M) if is_text else body.strip()
    kind = {"cell_type": "markdown"} if is_text else {"cell_type": "code", "execution_count": None}
    common = {"id": f"cell-{number:02}", "metadata": {}}
    outputs: dict[str, Any] = {} if is_text else {"outputs": []}
    return kind | common | outputs | {"source": text.splitlines(keepends=True)}


def notebook(source: str) -> str:
    """The whole .ipynb of a source in percent format; what stands above its first cell is left."""
    _, *parts = re.split(r"^# %%( \[markdown\])?\n", source, flags=re.M)
    bodies = zip(parts[::2], parts[1::2], strict=True)
    cells = [cell(n, bool(mark), body) for n, (mark, body) in enumerate(bodies, 1)]
    content = {
        "cells": cells,
        "metadata": {"kernelspec": KERNEL, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing: do they agree?")
    made = notebook(SOURCE.read_text("utf-8"))
    if not parser.parse_args(arguments).check:
        NOTEBOOK.write_text(made, "utf-8")
    elif not NOTEBOOK.is_file() or NOTEBOOK.read_text("utf-8") != made:
        sys.stderr.write(
            f"{NOTEBOOK} is not what {SOURCE} makes: python notebook/make_notebook.py\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
