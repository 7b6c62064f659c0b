"""The file itself: its map, what importing it costs and does, its size, its rules, its documents."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import cmi_pipeline as cmi

ROOT = Path(cmi.__file__).parent
SOURCE = (ROOT / "cmi_pipeline.py").read_text()
TREE = ast.parse(SOURCE)
HEAVY = ("torch", "tensorflow", "keras", "lightgbm", "sklearn", "scipy", "pandas", "joblib", "grpc")
HEAVY += ("matplotlib",)


def nodes(*kinds: type) -> list:
    return [node for node in ast.walk(TREE) if isinstance(node, kinds)]


def test_docstring_lists_the_sections_that_exist() -> None:
    promised = re.findall(r" (\d+ [A-Z].*?)(?=  |$)", cmi.__doc__ or "", re.M)
    promised.sort(key=lambda line: int(line.split()[0]))  # three columns
    present = re.findall(r"^# ## (\d+ .*)$", SOURCE, re.M)
    assert promised == present
    assert [int(s.split()[0]) for s in present] == list(range(1, len(present) + 1))


def test_import_is_light_and_silent_and_writes_nothing(tmp_path: Path) -> None:
    code = f"import sys, cmi_pipeline; print([m for m in {HEAVY} if m in sys.modules])"
    env = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "N_FOLDS": "oops"}
    command = [sys.executable, "-c", code]
    out = subprocess.check_output(command, cwd=tmp_path, text=True, env={**os.environ, **env})
    assert out == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_environment_is_read_in_one_place() -> None:
    """One function hands os.environ over; TensorFlow's own settings may be written."""
    named = r"environb?\b|getenv"
    reads = [n for n in nodes(ast.Attribute, ast.Name) if re.search(named, ast.unparse(n))]
    written = {n.lineno for n in nodes(ast.Call) if "environ.setdefault" in ast.unparse(n.func)}
    written |= {n.lineno for n in nodes(ast.Assign) if "os.environ[" in ast.unparse(n.targets[0])}
    (reader,) = {n.lineno for n in reads if "environment" not in ast.unparse(n)} - written
    assert "return {**SETTINGS, **os.environ}" in SOURCE.splitlines()[reader - 1]


def test_nothing_that_runs_code_is_ever_loaded() -> None:
    loading = r"pickle\.(load|loads|Unpickler)\b|joblib\.load\b|import (dill|cloudpickle)"
    allowing = r"allow_pickle=True|weights_only=False|safe_mode=False|(?<![\w.])(eval|exec)\("
    for path in (ROOT / "cmi_pipeline.py", *(ROOT / "kaggle_evaluation").rglob("*.py")):
        assert not re.search(f"{loading}|{allowing}", path.read_text()), path


def test_functions_are_short_and_import_nothing_and_broad_excepts_are_few() -> None:
    functions = [f for f in nodes(ast.FunctionDef) if f.name != "torch_classes"]  # holds classes
    lengths = {f"{f.name}, line {f.lineno}": f.end_lineno - f.lineno + 1 for f in functions}
    assert {name: n for name, n in lengths.items() if n > 40} == {}
    assert sorted(lengths.values())[len(lengths) // 2] <= 12
    inside = [n for f in functions for n in ast.walk(f) if type(n) in (ast.Import, ast.ImportFrom)]
    assert [ast.unparse(n) for n in inside] == []
    caught = [ast.unparse(h.type) if h.type else "Exception" for h in nodes(ast.ExceptHandler)]
    assert len([kind for kind in caught if re.search(r"\b(Base)?Exception\b", kind)]) <= 3


def test_files_stay_as_short_as_was_promised() -> None:
    for name, most in {"cmi_pipeline.py": 4600, "README.md": 250}.items():
        assert len((ROOT / name).read_text().splitlines()) <= most


def test_the_list_of_settings_is_the_one_that_the_file_makes() -> None:
    table = "\n".join(cmi.settings_table())
    assert table in (ROOT / "docs" / "settings.md").read_text(), "make docs/settings.md anew"
    assert "\n| N_FOLDS | 5 |" in table
