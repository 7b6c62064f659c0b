"""How a run is started: names and places of the file, what is attached on Kaggle or missing."""

import dataclasses
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import runs
from runs import PLAIN, QUICK, SCRIPT, Patch, Printed, copied, data_of, plan_of, run_here

import cmi_pipeline as cmi

COMPETITION = "cmi-detect-behavior-with-sensor-data"


def test_an_argument_wins(plain: Path, tmp_path: Path, capsys: Printed) -> None:
    where = {"CMI_DATA_DIR": str(data_of(plain)), "PLAN_ONLY": "off"}
    words = ("PLAN_ONLY=yes", "LGBM_LR=0.5")
    assert run_here(copied(plain, tmp_path / "out"), *words, **where, **QUICK) is None
    printed = capsys.readouterr().out
    assert plan_of(printed)["lgbm", "all"] == ("train", "LGBM_LR 0.1 → 0.5")
    assert "fit  " not in printed
    assert "--plan" in (run_here(tmp_path / "no", "--plan") or "")  # refused
    assert not (tmp_path / "no").exists()


def test_what_would_be_found_out_late_is_found_out_by_the_plan(plain: Path, tmp_path: Path) -> None:
    """A package that is installed and cannot be imported; settings that leave nothing to blend."""
    out, where = tmp_path / "out", {"CMI_DATA_DIR": str(data_of(plain)), "PLAN_ONLY": "1", **QUICK}
    (tmp_path / "torch.py").write_text("raise OSError('a library of it is missing')\n")
    done = runs.run(out, **(where | {"USE_TORCH": "1", "PYTHONPATH": str(tmp_path)}))
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert re.search("torch does not start: .*missing.*USE_TORCH=0", line), done.stderr
    assert "No member takes part" in (run_here(out, **(where | {"USE_LGBM": "0"})) or "")
    refused = run_here(out, ENSEMBLE_WEIGHTS="catboost:1", **where) or ""
    assert re.search("ENSEMBLE_WEIGHTS.*lgbm, torch, keras", refused)
    assert not list(tmp_path.glob("out/*_models"))


@pytest.mark.parametrize("name", ["cmi-v0.91", "-"])
def test_the_file_runs_under_any_name_from_anywhere(plain: Path, tmp_path: Path, name: str) -> None:
    """With python -P and from standard input; its jobs' processes know it, or are done without."""
    (place := tmp_path / "scripts [1]").mkdir()
    script = shutil.copy(SCRIPT, place / name)
    copied(runs.ROOT / "kaggle_evaluation", tmp_path / "kaggle_evaluation")
    few = {"CMI_DATA_DIR": str(data_of(plain)), "CMI_WORKERS": "2", "LGBM_ROUNDS": "3", **QUICK}
    env = runs.environment(tmp_path / "out", **few)
    env["PYTHONPATH"] += f":{tmp_path}"
    words = "python", "-P", "-" if name == "-" else script
    with script.open() as file:
        printed = runs.good(runs.call(*words, stdin=file, cwd=tmp_path, env=env))
    assert "lgbm/imu/fold01" in printed
    assert ("backend=threading" in printed) == (name == "-")
    runs.check_submission(tmp_path / "out", data_of(plain))


def test_an_edited_file_is_executed(tmp_path: Path, capsys: Printed, monkeypatch: Patch) -> None:
    script = tmp_path / "cmi_pipeline.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    for module in ("cmi_pipeline", "__main__"):
        monkeypatch.setitem(sys.modules, module, sys.modules[module])
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = SCRIPT.read_text()
    for title in ("first", "second"):
        script.write_text(text.replace("plan, train or reuse", title, 1))
        runpy.run_path(str(script), run_name="__main__")
        assert title in capsys.readouterr().out


def test_a_run_that_nobody_reads_has_not_ended_well(plain: Path, tmp_path: Path) -> None:
    """Into `head`; but without any output it goes on, as a daemon does."""
    where = {"CMI_DATA_DIR": str(data_of(plain)), "PLAN_ONLY": "1", **QUICK}
    env = runs.environment(tmp_path / "out", **where)
    for shell, status in (("{ $0 $1; echo $? >&2; } | head -1", "1"), ("$0 $1 >&-; echo $? >&2", "0"),
                          ("{ $0 $1 --help; echo $? >&2; } | head -1", "0")):  # fmt: skip
        done = runs.call("sh", "-c", shell, "python", SCRIPT, env=env)
        *stopped, code = done.stderr.split("\n")[:-1]
        assert code == status, done.stderr
        assert [line[:22] for line in stopped] == ["cmi_pipeline: stopped."] * int(status)


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: Patch) -> Path:
    for name in ("input", "working"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(cmi, f"KAGGLE_{name.upper()}", tmp_path / name)
    return tmp_path / "input"


def plan_there(kaggle: Path, capsys: Printed, **settings: str) -> str:
    """What a plan prints; it writes to Kaggle's own folder."""
    where = {"OUTPUT_PATH": "", "PLAN_ONLY": "1", **QUICK}
    assert run_here(kaggle.parent / "unused", **(where | settings)) is None
    assert not (kaggle.parent / "unused").exists()
    return capsys.readouterr().out


@pytest.mark.parametrize("below", [COMPETITION, f"competitions/{COMPETITION}"])
def test_the_competition_is_found(plain: Path, kaggle: Path, capsys: Printed, below: str) -> None:
    """What a bundle brings along sorts before it, and has all the files too."""
    (kaggle / below).parent.mkdir(exist_ok=True)
    (kaggle / below).symlink_to(data_of(plain))
    bundle = copied(plain, kaggle / "a-bundle", "lgbm_models", "checkpoints")
    copied(data_of(plain), kaggle / "a-half" / COMPETITION, "test_demographics.csv")
    printed = plan_there(kaggle, capsys)
    assert f"data {kaggle / below}" in printed
    assert f"passed over: {data_of(bundle)} " in printed
    assert (kaggle.parent / "working" / "folds.csv").is_file()


def test_nothing_is_simulated_where_something_is_attached(plain: Path, kaggle: Path) -> None:
    assert "attached: nothing" in (run_here(kaggle.parent / "out", **QUICK) or "")
    (kaggle / "titanic").mkdir()
    for with_bundle in (False, True):
        if with_bundle:
            copied(plain, kaggle / "a-bundle")
        line = run_here(kaggle.parent / "out", **QUICK) or ""
        assert "test.csv" in line
        assert "titanic" in line
        assert not list(kaggle.parent.glob("out/*simulated*"))


def test_a_bundle_is_reused_or_named(plain: Path, kaggle: Path, capsys: Printed) -> None:
    shutil.copytree(data_of(plain), kaggle / COMPETITION)
    for name in ("last-week", "older"):
        copied(plain, kaggle / name, "simulated-*", "checkpoints", "oof")
    (kaggle / "older" / "lgbm_models" / "imu" / "fold01.txt").unlink()
    spoilt = kaggle / "last-week" / "lgbm_models"
    for note in spoilt.glob("*/fold??.json"):
        note.write_text(note.read_text().replace('"LGBM_LEAVES": 20', '"LGBM_LEAVES": 5'))
    printed = plan_there(kaggle, capsys)
    plan = plan_of(printed)
    assert plan["lgbm", "all"] == ("reuse", "everything matches")
    assert plan["lgbm", "imu"][0] == "train"
    assert f"{spoilt / 'imu'}: LGBM_LEAVES 5 → 20" in printed
    older = kaggle / "older" / "lgbm_models" / "imu"
    assert f"{older}: fold01.txt is absent or was changed after training" in printed


def test_without_training_data_and_models_a_run_fails(plain: Path, tmp_path: Path) -> None:
    data = copied(data_of(plain), tmp_path / "data", "train.csv")
    for zipped in (False, True):
        if zipped:
            (data / "train.csv.zip").write_bytes(b"PK")
        line = run_here(tmp_path / "out", CMI_DATA_DIR=str(data), **QUICK) or ""
        assert str(data / "train.csv") in line
        assert ("train.csv.zip" in line) == zipped
    assert not (tmp_path / "out" / "submission.parquet").exists()
    served = copied(plain, tmp_path / "served")
    assert run_here(served, CMI_DATA_DIR=str(data), **QUICK) is None  # with models it serves


def test_a_run_of_fallbacks_fails(plain: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    def failing(*_: object) -> None:
        raise ValueError("planted")

    broken = dataclasses.replace(cmi.MEMBERS["lgbm"], predict=failing)
    monkeypatch.setitem(cmi.MEMBERS, "lgbm", broken)
    out = copied(plain, tmp_path / "out")
    line = run_here(out, SERVE_ONLY="1", CMI_DATA_DIR=str(data_of(plain)), **PLAIN) or ""
    assert "16 fallbacks in 16 answers" in line
    assert "planted" in line
