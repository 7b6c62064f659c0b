"""The same file as a notebook: headings, no error cell, the figures of the script."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_road import QUICK, ROOT, SMALL, clean_environment, good, run

import cmi_pipeline as cmi

for package in ("jupytext", "nbformat", "nbclient", "ipykernel"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """README's command, in a folder that has everything but the script."""
    folder = tmp_path_factory.mktemp("notebook")
    path = folder / "notebook.ipynb"
    command = [sys.executable, "-m", "jupytext", "--to", "notebook", "--output", str(path)]
    subprocess.run([*command, str(ROOT / "cmi_pipeline.py")], check=True, capture_output=True)
    shutil.copy(ROOT / "cmi_simulator.py", folder)
    shutil.copytree(ROOT / "kaggle_evaluation", folder / "kaggle_evaluation")
    return path


def cells(path: Path) -> list[Any]:
    return list(importlib.import_module("nbformat").read(path, as_version=4).cells)


EXECUTE = """
import nbformat, sys
from nbclient import NotebookClient
path, done = sys.argv[1:]
notebook = nbformat.read(path, as_version=4)
try:
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
finally:
    nbformat.write(notebook, done)
"""


def executed(notebook: Path, out: Path, **settings: str) -> list[Any]:
    """Cells of the notebook after it ran in a kernel of this environment, beside its file."""
    outer = {k: v for k, v in clean_environment().items() if k != "PYTHONPATH"}
    env = {**outer, **SMALL, **QUICK, "OUTPUT_PATH": str(out), **settings}
    done = out.with_suffix(".ipynb")
    subprocess.run(
        [sys.executable, "-c", EXECUTE, str(notebook), str(done)], cwd=notebook.parent, env=env,
        capture_output=True, timeout=500,
    )  # fmt: skip
    return cells(done)


def printed(cell: Any) -> str:
    return "".join(o["text"] for o in cell.outputs if o.get("name") == "stdout")


def errors(ran: list[Any]) -> list[Any]:
    """Outputs that a reader would take for a failure."""
    outputs = [o for cell in ran for o in cell.get("outputs", [])]
    return [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_sections_are_headings_in_order(notebook: Path) -> None:
    texts = [c.source for c in cells(notebook) if c.cell_type == "markdown"]
    headings = [m[1] for t in texts if (m := re.match(r"## (\d+ .+)", t))]
    assert headings == re.findall(r"^ +(\d+ [A-Z].*)$", cmi.__doc__ or "", re.M)
    assert 10 <= len(headings) <= 14
    assert texts[0].startswith((cmi.__doc__ or "").split("\n")[0])
    code = [c.source for c in cells(notebook) if c.cell_type == "code"]
    assert not any(re.search(r"^# (##|%%)", source, re.M) for source in code)


def results(text: str) -> list[tuple[str, ...]]:
    """Name and scores of every line of the result table."""
    return re.findall(r"result +what=(.+?) +all=(\S+)  imu=(\S+)  mixed=(\S+)", text)


@pytest.mark.parametrize(
    "members",
    [("lgbm",), pytest.param(("lgbm", "torch", "keras"), marks=pytest.mark.slow)],
    ids=len,
)
def test_the_notebook_reaches_the_figures_of_the_script(
    notebook: Path, tmp_path: Path, members: tuple[str, ...]
) -> None:
    use = {f"USE_{m.upper()}": str(int(m in members)) for m in cmi.MEMBERS}
    ran = executed(notebook, tmp_path / "notebook", **use)
    script = good(run(tmp_path / "script", **use))
    assert errors(ran) == []
    table = results(printed(ran[-1]))
    assert table == results(script)
    assert [line[0] for line in table][0:-3] == list(members)
    names = sorted(p.name for p in (tmp_path / "script" / "oof").glob("*.npy"))
    routes = sum(len(cmi.MEMBERS[m].modes) for m in members)  # beside them the blends' and y_true
    assert len(names) == 2 * routes + len({r for m in members for r in cmi.MEMBERS[m].modes}) + 1
    for name in names:
        pair = [np.load(tmp_path / where / "oof" / name) for where in ("script", "notebook")]
        np.testing.assert_allclose(*pair, rtol=0, atol=1e-5 if "keras" in name else 0, err_msg=name)
    assert (tmp_path / "notebook" / "submission.parquet").is_file()


def test_workers_of_a_notebook_are_threads(notebook: Path, tmp_path: Path) -> None:
    """Processes could not import its classes; the log says what was done instead."""
    ran = executed(notebook, tmp_path / "out", CMI_WORKERS="2")
    assert errors(ran) == []
    assert re.search(r"note +backend=threading  why=.*notebook", printed(ran[-1]))
    assert len(results(printed(ran[-1]))) == 4


def test_a_mistake_is_one_clear_line_in_a_notebook_too(notebook: Path, tmp_path: Path) -> None:
    ran = executed(notebook, tmp_path / "out", N_FOLDS="9")
    shown = [o for o in errors(ran) if o.output_type == "error"]
    assert [o.ename for o in shown] == ["SystemExit"]
    assert shown[0].evalue == "cmi_pipeline: 5 subjects cannot fill 9 folds; set N_FOLDS=5."


def test_readme_names_the_command() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "`jupytext --to notebook cmi_pipeline.py`" in text
