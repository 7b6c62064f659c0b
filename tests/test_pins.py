"""Models that were trained with one set of releases serve with the others. CMI_PYTHONS names an
interpreter of each set, separated by colons, as .ci/run does."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from runs import ALIKE, SCRIPT, call, check_submission, copied, environment, good

import cmi_simulator

PYTHONS = [path for path in os.environ.get("CMI_PYTHONS", "").split(":") if path]
pytestmark = pytest.mark.skipif(len(PYTHONS) < 2, reason="CMI_PYTHONS names no two interpreters")
FEW = {**ALIKE, "LGBM_ROUNDS": "5", "TORCH_MAX_EPOCHS": "1"}
Answers = dict[str, str]
Trained = Callable[[str], tuple[Path, Answers]]


def run_by(python: str, out: Path, **settings: str) -> Answers:
    env = environment(out, **FEW, TF_CPP_MIN_LOG_LEVEL="3", **settings)
    good(call(python, SCRIPT, cwd=out.parent, env=env))
    return dict(pl.read_parquet((out / "submission.parquet").read_bytes()).iter_rows())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "simulated"
    cmi_simulator.simulate(folder, subjects=4, test_subjects=1, recordings_per_subject=18, seed=4)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    done = dict[str, tuple[Path, Answers]]()

    def of(python: str) -> tuple[Path, Answers]:
        if python not in done:
            out = tmp_path_factory.mktemp("trained") / "out"
            done[python] = out, run_by(python, out, CMI_DATA_DIR=str(data))
        return done[python]

    return of


@pytest.mark.parametrize(("trainer", "server"), [*itertools.permutations(PYTHONS, 2)])
def test_others_serve(data: Path, trained: Any, trainer: str, server: str, tmp_path: Path) -> None:
    """Without a fallback; nearly all answers are the same, for the last digits may differ."""
    folder, before = trained(trainer)
    out = copied(folder, tmp_path / "out", "submission.parquet", "checkpoints", "logs")
    after = run_by(server, out, CMI_DATA_DIR=str(data), SERVE_ONLY="1")
    check_submission(out, data)
    log = (out / "logs" / "run.log").read_text()
    assert "fallbacks=0" in log
    loaded = "lgbm/all,lgbm/imu,lgbm/norot,torch/all,torch/imu,keras/all,keras/imu"
    assert f"models={loaded} " in log
    same = sum(after[name] == gesture for name, gesture in before.items())
    assert same >= 0.9 * len(before)
