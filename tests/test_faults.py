"""Nothing is lost and nothing stale is used: kills, changed files and settings, full disks."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import runs
from runs import ALIKE, PLAIN, QUICK, Printed, Road, Running, config, copied, data_of, run_here

import cmi_pipeline as cmi

MOMENTS = """.simulated-*/* simulated-*/test.csv recordings-*.npz folds.csv lgbm_models/all/*
lgbm_models/all/fold01* lgbm_models/imu/fold01* lgbm_models/bundle.json oof/oof_lgbm_*
checkpoints/torch/all/* torch_models/all/*_train.csv torch_models/all/*.pt torch_models/imu/*
oof/oof_torch_* checkpoints/keras/all/* keras_models/all/*_train.csv keras_models/imu/*
oof/oof_keras_* ensemble/weights.json submission.parquet"""  # files just written
FREE = re.compile(  # another value must not train anything again
    "strict|frame_cache|(torch|keras)_(amp|data_par|threads|mp|policy|jit)|dl_num|ensemble|subject_as|"
    "log_|print_|feature_log|save_|use_t|cmi_|dask|ray|sim_|fail_if|plan_only|serve_only|kaggle_is"
)
SHARED = {
    ("lgbm", "torch", "keras"): "seed n_folds upside_down modality_dropout_prob",
    ("torch", "keras"): "fixed_pad_len pad_len_percentile stretch_prob shift_prob jitter_prob "
    "mixup_prob time_mask_prob channel_mask_prob",
    ("torch",): "use_focal_loss",
}  # who has to learn again; of any other setting, whose name it carries
APART = {"cmi_data_dir", "output_path", "ckpt_base_dir", "torch_seeds", "resume", "resume_torch",
         "resume_keras", "no_rotation"} | {  # tested one by one
    form.format(m) for m in cmi.MEMBERS for form in ("use_{}", "force_train_{}", "{}_bundle_path")
}  # fmt: skip
OTHER = {"n_folds": 3, "lgbm_es_metric": "score", "keras_policy": "mixed_float16",
         "ensemble_search": "score", "ensemble_weights": "lgbm:1", "ensemble_temperature": 2.0,
         "subject_assignment": "0", "cmi_backend": "dask"}  # fmt: skip
Plan = dict[tuple[str, str], cmi.PlanItem]
FOLDS: tuple[tuple[Callable[[str], str], str], ...] = (
    (lambda t: t.replace(",0\n", ",1\n", 1), "some subject is in two folds"),
    (lambda t: t.replace(",0\n", ",-1\n"), "its folds are not 0 … 1"),
    (lambda t: t[: len(t) // 2], "of other data"),
    (lambda t: t.replace(",0\n", ",zero\n", 1), "zero"),
    (lambda t: t.replace("sequence_id", "id"), "sequence_id"),
    (lambda _: "\0" * 999, ""),
)


def one_line(text: str | None, *words: str) -> None:
    assert text
    assert text.startswith("cmi_pipeline: ")
    assert text.strip().count("\n") == 0
    assert [word for word in words if word not in text] == [], text


@pytest.mark.slow
def test_twenty_kills_change_nothing(road: Road, tmp_path: Path) -> None:
    """One training, killed in every stage, ends as the undisturbed one did."""
    whole, out = copied(road[0], tmp_path / "whole"), tmp_path / "out"
    runs.good(runs.run(whole, **ALIKE))
    rng, hit, moments = np.random.default_rng(9), set(), MOMENTS.split()
    for i in range(len(moments)):
        running = Running(out, **ALIKE)
        hit.add(running.until(*moments[i:]))  # that or a later one
        time.sleep(rng.uniform(0, 0.5))
        running.kill()
    assert len(hit) > 12, hit
    printed = runs.good(runs.run(out, **ALIKE))
    assert {action for action, _ in runs.plan_of(printed).values()} == {"reuse"}
    runs.same_outcome(whole, out, "lgbm", "torch", "keras")
    assert not list(out.rglob("*.part*"))


def test_kills_and_ctrl_c_change_nothing(plain: Path, tmp_path: Path) -> None:
    """Workers that outlive their killed run do not hold its lock; a folder's name is no pattern."""
    out = tmp_path / "out {a} [2025]*"
    simulating = Running(out, **QUICK, **ALIKE)
    simulating.until(".simulated-*/*")
    simulating.kill()
    training = Running(out, **QUICK, **ALIKE)
    training.until("lgbm_models/all/*.txt")
    training.send(signal.SIGSTOP)
    one_line(run_here(out, **QUICK), "Another run is writing to", str(out), "OUTPUT_PATH")
    shared = {"CKPT_BASE_DIR": str(out / "checkpoints")}
    refused = run_here(tmp_path / "other", **QUICK, **shared)
    one_line(refused, "Another run is writing to", "CKPT_BASE_DIR")
    training.send(signal.SIGCONT)
    training.send(signal.SIGINT)
    assert training.process.wait(600) == 1
    assert "Traceback" not in training.printed
    one_line(training.printed.splitlines()[-1], "stopped", "kept", "the same command goes on")
    again = Running(out, CMI_WORKERS="2", **QUICK, **ALIKE)
    again.until("lgbm_models/imu/*.txt")
    os.kill(again.process.pid, signal.SIGKILL)  # the parent alone
    again.process.wait(300)
    line = run_here(out, **PLAIN)
    with contextlib.suppress(ProcessLookupError):
        again.send(signal.SIGKILL)
    assert line is None
    runs.same_outcome(plain, out, "lgbm")


def learners(name: str) -> set[str]:
    if FREE.match(name):
        return set()
    shared = [members for members, names in SHARED.items() if name in names.split()]
    return set(shared[0]) if shared else {name.split("_")[0]}


def another(name: str, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return OTHER.get(name, value + 16)
    if isinstance(value, float):
        return 0.9 * value or 0.5
    return OTHER.get(name, 1.0 if name.startswith("ensemble_w_") else "1")


def planned(out: Path, data: cmi.TrainingData | None = None, **changes: Any) -> Plan:
    cfg = dataclasses.replace(config(out), **changes)
    plan = cmi.make_plan(data or cmi.make_training_data(cfg), cfg)
    return {(item.member, item.mode): item for item in plan}


@pytest.fixture
def out(road: Road, tmp_path: Path) -> Path:
    return copied(road[0], tmp_path / "out", "report", "logs")


def test_a_setting_trains_those_members_again_that_depend_on_it(out: Path) -> None:
    """And is named by the plan; of those that nothing depends on, none is."""
    data, folds = cmi.make_training_data(config(out)), (out / "folds.csv").read_bytes()
    for name in {f.name for f in dataclasses.fields(cmi.Config)} - APART:
        value = another(name, getattr(config(out), name))
        plan = planned(out, None if name in ("n_folds", "upside_down") else data, **{name: value})
        trained = {item.member for item in plan.values() if item.action != "reuse"}
        assert trained == learners(name), name
        for item in (item for item in plan.values() if item.member in trained):
            assert name.upper() in item.why, (name, item.member, item.why)
            assert item.todo == item.jobs
        (out / "folds.csv").write_bytes(folds)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-min(1000, len(raw) // 2)] ^= 1
    path.write_bytes(raw)


def test_a_changed_byte_trains_that_fold_alone(out: Path) -> None:
    spoilt = {("torch", "all"): "fold01.pt", ("torch", "imu"): "fold00_spec.json",
              ("keras", "imu"): "fold00.keras", ("lgbm", "norot"): "fold01_behavior.txt"}  # fmt: skip
    for (member, mode), file in spoilt.items():
        flip(out / f"{member}_models" / mode / file)
    for part, item in planned(out).items():
        file = spoilt.get(part, "")
        assert item.action == ("resume" if file else "reuse")
        assert not file or item.why == f"{file} is absent or was changed after training"
        assert [job.stem for job in item.todo] == ([file[:6]] if file else [])


def test_a_spoilt_note_trains_that_fold_alone(out: Path) -> None:
    note = out / "torch_models" / "all" / "fold00.json"
    whole, data = json.loads(note.read_text()), cmi.make_training_data(config(out))
    for text in ("", "{", "[]", '{"fingerprint": []}', "\0" * 99, "[" * 200_000,
                 json.dumps(whole | {"probe": "x"}), json.dumps(whole | {"files": ["x"]})):  # fmt: skip
        note.write_text(text)
        item = planned(out, data)["torch", "all"]
        assert "fold00.json" in item.why, (text[:50], item.why)
        assert [job.stem for job in item.todo] == ["fold00"]


def test_a_fold_trained_again_is_the_same(road: Road, out: Path) -> None:
    """And bundle.json and the out-of-fold files, however spoilt, are written anew."""
    for path in (out / "lgbm_models" / "imu").glob("fold00*"):
        path.unlink()
    names = ("torch_models/all/fold01.pt", "torch_models/bundle.json", "oof/y_true.npy",
             "oof/oof_torch_all_composite.npy")  # fmt: skip
    for name in names:
        flip(out / name)
    cfg = config(out, USE_KERAS="0")
    data = cmi.make_training_data(cfg)
    plan = cmi.make_plan(data, cfg)
    todo = [job.name for item in plan for job in item.todo]
    assert todo == ["lgbm/imu/fold00", "torch/all/fold01"]
    cmi.train_members(plan, data, cfg)
    runs.same_answers(road[0], out, "lgbm", "torch")
    for name in (*names[:2], "lgbm_models/imu/fold00.txt"):
        assert (out / name).read_bytes() == (road[0] / name).read_bytes(), name


def test_touched_data_train_nothing_and_a_changed_digit_everything(out: Path) -> None:
    os.utime(data_of(out) / "train.csv", (1, 1))
    assert {item.action for item in planned(out).values()} == {"reuse"}
    path = data_of(out) / "train_demographics.csv"
    pl.read_csv(path).with_columns(age=pl.col("age") + 1).write_csv(path)
    assert {(s.action, s.why) for s in planned(out).values()} == {("train", "data differ")}


def test_a_spoilt_folds_file_is_made_anew(out: Path, capsys: Printed) -> None:
    path = out / "folds.csv"
    whole = path.read_text()
    for spoil, why in FOLDS:
        path.write_text(spoil(whole))
        assert {item.action for item in planned(out).values()} == {"reuse"}
        assert re.search(rf"folds=.*{why}.*instead=made anew", runs.said(capsys))
        assert path.read_text() == whole


def test_a_disk_that_takes_no_more(plain: Path, tmp_path: Path) -> None:
    """Nothing is lost but what is trained again; with room the same command goes on."""
    out, again = copied(plain, tmp_path / "out"), PLAIN | {"LGBM_LR": "0.2"}
    files = (path for path in out.rglob("*") if path.suffix not in (".log", ".jsonl", ""))
    before = {path: path.read_bytes() for path in files}
    start = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
    start += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    env = runs.environment(out, **again)  # no preexec_fn: gRPC's threads would wake in the fork
    done = runs.call("python", "-c", start, runs.SCRIPT, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    one_line(done.stderr, str(out), os.strerror(errno.EFBIG), "Make room")
    lost = [p for p, raw in before.items() if not p.is_file() or p.read_bytes() != raw]
    assert len(before) > 30
    assert {path.parts[len(out.parts)] for path in lost} <= {"lgbm_models"}
    assert not list(out.rglob("*.part*"))
    assert run_here(out, **again) is None
