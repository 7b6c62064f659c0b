"""The file itself: its map, what importing it costs and does, and where it reads the environment."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import cmi_pipeline as cmi

SOURCE_PATH = Path(cmi.__file__)
SOURCE = SOURCE_PATH.read_text()


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE_PATH.parent, capture_output=True, text=True,
        env={**os.environ, **env}, check=True,
    )  # fmt: skip
    return done.stdout


def test_docstring_lists_the_sections_that_exist() -> None:
    promised = re.findall(r"^ +(\d+ [A-Z].*)$", cmi.__doc__ or "", re.M)
    present = re.findall(r"^# ## (\d+ .*)$", SOURCE, re.M)
    assert promised == present
    assert [int(s.split()[0]) for s in present] == list(range(1, len(present) + 1))


def test_import_loads_nothing_heavy() -> None:
    heavy = (
        "torch",
        "tensorflow",
        "keras",
        "lightgbm",
        "sklearn",
        "scipy",
        "pandas",
        "joblib",
        "grpc",
    )
    out = run_python(f"import sys, cmi_pipeline; print([m for m in {heavy} if m in sys.modules])")
    assert out.strip() == "[]"


def test_import_writes_and_prints_nothing(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(SOURCE_PATH.parent)!r}); import os; os.chdir({str(tmp_path)!r})"
    out = run_python(
        f"{code}; import cmi_pipeline", PYTHONDONTWRITEBYTECODE="1", OUTPUT_PATH=str(tmp_path / "x")
    )
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_worker_process_that_imports_the_file_starts_nothing() -> None:
    code = (
        "import multiprocessing as mp, cmi_pipeline\n"
        "if __name__ == '__main__':\n"
        "    with mp.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(cmi_pipeline.score, ([0, 1], [0, 0])))\n"
    )
    assert float(run_python(code)) == 2 / 3


def test_environment_is_read_in_one_place() -> None:
    """Only the last lines hand os.environ over; nothing else looks at it."""
    tree = ast.parse(SOURCE)
    reads = [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
        or (isinstance(node, ast.Name) and node.id == "getenv")
    ]
    entry = next(
        n.lineno for n in tree.body if isinstance(n, ast.If) and "__main__" in ast.unparse(n.test)
    )
    assert reads
    assert all(line > entry for line in reads) or set(reads) <= allowed_writes(tree) | {
        r for r in reads if r > entry
    }


def allowed_writes(tree: ast.Module) -> set[int]:
    """Lines of `os.environ.setdefault(…)`: TensorFlow takes its settings in no other way."""
    return {
        node.func.value.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "setdefault"
        and isinstance(node.func.value, ast.Attribute)
    }


def test_no_pickle_is_ever_loaded() -> None:
    assert not re.search(
        r"pickle\.(load|loads|Unpickler)\b|import (dill|cloudpickle|joblib\.load)", SOURCE
    )
    assert "allow_pickle=True" not in SOURCE
    assert "weights_only=False" not in SOURCE
    assert "safe_mode=False" not in SOURCE


def test_no_name_of_the_file_is_given_twice() -> None:
    """A constant that a later section gives another value changes what an earlier one does."""
    given: list[str] = []
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            given.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            given += [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    assert len(given) > 500
    assert sorted(n for n in set(given) if given.count(n) > 1) == []


def test_functions_stay_short() -> None:
    long = {
        f"{n.name}, line {n.lineno}": n.end_lineno - n.lineno + 1
        for n in ast.walk(ast.parse(SOURCE))
        if isinstance(n, ast.FunctionDef) and n.end_lineno and n.end_lineno - n.lineno >= 40
    }
    assert long == {}, "functions of more than 40 lines"


def test_one_broad_except_which_predict_uses() -> None:
    broad = [
        node
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or "Exception" in ast.unparse(node.type).replace("Exceptions", ""))
    ]
    assert len(broad) == 1
    (attempt,) = [
        n
        for n in ast.walk(ast.parse(SOURCE))
        if isinstance(n, ast.FunctionDef) and n.name == "attempt"
    ]
    assert attempt.lineno < broad[0].lineno <= (attempt.end_lineno or 0)
