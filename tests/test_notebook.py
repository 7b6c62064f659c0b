"""The same file as a notebook: no error cell, the figures of the script."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import PLAIN, ROOT, SCRIPT, data_of, environment, same_outcome

for package in ("jupytext", "nbformat", "nbclient", "ipykernel"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """README's command, in a folder that has everything but the script."""
    path = tmp_path_factory.mktemp("notebook") / "notebook.ipynb"
    command = [sys.executable, "-m", "jupytext", "--to", "notebook", "--output"]
    subprocess.run([*command, str(path), str(SCRIPT)], check=True, capture_output=True)
    shutil.copy(ROOT / "cmi_simulator.py", path.parent)
    shutil.copytree(ROOT / "kaggle_evaluation", path.parent / "kaggle_evaluation")
    return path


EXECUTE = """
import nbformat, sys
from nbclient import NotebookClient
path, done = sys.argv[1:]
notebook = nbformat.read(path, as_version=4)
try:
    NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
finally:
    nbformat.write(notebook, done)
"""


def executed(notebook: Path, out: Path, **settings: str) -> tuple[str, list[Any]]:
    """What the notebook prints at its end in a kernel of this environment, and what a reader would
    take for a failure."""
    done = out.with_suffix(".ipynb")
    subprocess.run(
        [sys.executable, "-c", EXECUTE, str(notebook), str(done)], cwd=notebook.parent,
        env=environment(out, **settings), capture_output=True, timeout=1800,
    )  # fmt: skip
    cells = importlib.import_module("nbformat").read(done, as_version=4).cells
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    errors = [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    return "".join(o["text"] for o in outputs if o.get("name") == "stdout"), errors


def test_the_notebook_reaches_the_figures_of_the_script(
    notebook: Path, plain: Path, tmp_path: Path
) -> None:
    """Its workers are threads, since processes could not import its classes: the log says so."""
    settings = PLAIN | {"CMI_DATA_DIR": str(data_of(plain)), "CMI_BACKEND": "loky"}
    printed, errors = executed(notebook, tmp_path / "out", **settings)
    assert errors == []
    assert re.search(r"note +backend=threading  why=.*import", printed)
    same_outcome(plain, tmp_path / "out", "lgbm")


def test_a_mistake_is_one_clear_line_in_a_notebook_too(notebook: Path, tmp_path: Path) -> None:
    printed, errors = executed(notebook, tmp_path / "out", N_FOLDS="9", **PLAIN)
    shown = [o for o in errors if o.output_type == "error"]
    assert [o.ename for o in shown] == ["SystemExit"]
    assert shown[0].evalue == "cmi_pipeline: 5 subjects cannot fill 9 folds; set N_FOLDS=5."
    assert "fit  " not in printed
