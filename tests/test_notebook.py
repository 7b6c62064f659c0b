"""The same file as a notebook, and notebook/cmi.ipynb, which imports it."""

import base64
import importlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import PLAIN, QUICK, ROOT, SCRIPT, call, data_of, environment, good

for package in ("jupytext", "nbformat", "nbclient", "ipykernel"):
    pytest.importorskip(package)
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
Outputs = tuple[list[Any], list[Any], str]
COMPANION = ROOT / "notebook" / "cmi.ipynb"
IN_THIS_PROCESS = """
import json
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in json.load(open({path!r}))["cells"]:
    if cell["cell_type"] == "code":
        shell.run_cell("".join(cell["source"])).raise_error()
        print("over:", cell["id"])
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """README's command, in a folder that has everything but the script."""
    path = tmp_path_factory.mktemp("notebook") / "notebook.ipynb"
    good(call("python", "-m", "jupytext", "--to", "notebook", "--output", path, SCRIPT))
    shutil.copy(ROOT / "cmi_simulator.py", path.parent)
    shutil.copytree(ROOT / "kaggle_evaluation", path.parent / "kaggle_evaluation")
    return path


def executed(notebook: Path, out: Path, **settings: str) -> Outputs:
    """All outputs in a kernel, those that a reader would take for a failure, what is printed."""
    done = out.with_suffix(".ipynb")
    env = environment(out, **settings)
    call("python", "-c", EXECUTE, notebook, done, cwd=notebook.parent, env=env)
    cells = importlib.import_module("nbformat").read(done, as_version=4).cells
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    errors = [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    return outputs, errors, "".join(o["text"] for o in outputs if o.get("name") == "stdout")


def test_the_notebook_has_the_scripts_figures(notebook: Path, plain: Path, tmp_path: Path) -> None:
    """Its workers are threads, since processes could not import its classes: the log says so."""
    settings = PLAIN | {"CMI_DATA_DIR": str(data_of(plain)), "CMI_BACKEND": "loky"}
    settings["CMI_WORKERS"] = "2"
    _, errors, _ = executed(notebook, tmp_path / "out", **settings)
    assert errors == []
    log = (tmp_path / "out" / "logs" / "run.log").read_text()
    assert re.search(r"note +backend=threading  why=.*import", log)
    runs.same_outcome(plain, tmp_path / "out", "lgbm")


def test_a_mistake_is_one_clear_line_in_a_notebook_too(notebook: Path, tmp_path: Path) -> None:
    _, errors, printed = executed(notebook, tmp_path / "out", N_FOLDS="9", **PLAIN)
    shown = [o for o in errors if o.output_type == "error"]
    assert [o.ename for o in shown] == ["SystemExit"]
    assert shown[0].evalue == "cmi_pipeline: 5 subjects cannot fill 9 folds; set N_FOLDS=5."
    assert "fit  " not in printed


def test_the_companion_is_what_its_command_makes(tmp_path: Path) -> None:
    """And --check notices a change; nothing that a run left is stored."""
    folder = Path(shutil.copytree(COMPANION.parent, tmp_path / "notebook"))
    check = "python", folder / "make_notebook.py", "--check"
    good(call(*check, cwd=tmp_path))
    cells = importlib.import_module("nbformat").read(folder / "cmi.ipynb", as_version=4).cells
    assert len(cells) <= 25
    assert all(not c.outputs and c.execution_count is None for c in cells if c.cell_type == "code")
    assert max(c.source.count("\n") for c in cells) < 50
    with (folder / "cells.py").open("a") as file:
        file.write("\n# %% [markdown]\n# One more.\n")
    failed = call(*check, cwd=tmp_path)
    assert failed.returncode == 1
    assert "make_notebook.py" in failed.stderr


@pytest.fixture(scope="module")
def companion(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outputs]:
    importlib.import_module("matplotlib.font_manager")  # a first use complains on stderr
    out = tmp_path_factory.mktemp("companion") / "out"
    settings = {"PYTHONPATH": "", "STRICT": "1", "SIM_RECORDINGS": "24", **QUICK}
    settings["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    return out, executed(COMPANION, out, **settings)


def test_the_companion_runs_and_draws(companion: tuple[Path, Outputs]) -> None:
    out, (outputs, errors, printed) = companion
    assert errors == []
    assert printed.index("plan  ") < printed.index("lgbm/imu/fold01") < printed.index("submission ")
    runs.check_submission(out, data_of(out))
    assert (out / "report" / "index.html").is_file()
    shown = [o["data"]["text/plain"] for o in outputs if "text/plain" in o.get("data", {})]
    rows = json.loads((out / "oof" / "scores.json").read_text())["rows"]
    (nested,) = (r["score"] for r in rows if (r["kind"], r["mode"]) == ("nested", "mixed"))
    assert any(re.search(rf"blend nested +┆.*┆ {round(nested, 3)}", text) for text in shown)
    # motion, gestures, temperatures, two of ToF, curves, board, confusion, blend: none is empty,
    # and all stand on white, so that a dark page shows them too
    image = importlib.import_module("matplotlib.image")
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 9
    for picture in pictures:
        pixels = image.imread(io.BytesIO(base64.b64decode(picture)))
        assert pixels.shape[1] > 600
        assert (pixels[0, 0] == 1).all()
        assert len({*map(tuple, (pixels[::7, ::7, :3] * 15).astype(int).reshape(-1, 3))}) > 10


def test_the_companion_serves_first(companion: tuple[Path, Outputs], tmp_path: Path) -> None:
    """The gateway of the dry run gets its answers in the cell of the settings, the second."""
    out, _ = companion
    driver, data = tmp_path / "driver.py", data_of(out)
    driver.write_text(IN_THIS_PROCESS.format(path=str(COMPANION)))
    words = "--working-dir", COMPANION.parent, "--output-dir", tmp_path / "kept", driver
    env = environment(out, PYTHONPATH="", STRICT="1", **QUICK)
    done = runs.dry_run(data, *words, env=env)
    log = (tmp_path / "kept" / "notebook.log").read_text()
    assert done.returncode == 0, done.stdout[-3000:] + log[-3000:]
    runs.check_submission(tmp_path / "kept", data)
    assert re.findall("^over: (.*)", log, re.M) == ["cell-02"]


def test_the_companion_is_pushed_like_the_script() -> None:
    """The same card, competition and shut internet; it attaches the script and is a notebook."""
    places = (folder / "kernel-metadata.json" for folder in (COMPANION.parent, ROOT))
    own, script = (json.loads(path.read_text()) for path in places)
    assert (COMPANION.parent / own["code_file"]) == COMPANION
    assert (own["kernel_type"], own["kernel_sources"]) == ("notebook", [script["id"]])
    assert own["id"].split("/")[1] == own["title"].lower().replace(" ", "-")
    others = {"id", "title", "code_file", "kernel_type", "kernel_sources"}
    assert all(own[k] == script[k] for k in own.keys() | script.keys() if k not in others)
    assert own["machine_shape"] == "NvidiaTeslaT4"
