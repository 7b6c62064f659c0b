"""Nothing lost, nothing let in: kills, stale files, full disks, hostile bundles and recordings."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from test_road import QUICK, ROOT, SMALL, clean_environment, good, plan_of, planned, run

import cmi_pipeline as cmi

ALIKE = {"SUBJECT_ASSIGNMENT": "0"}  # answers do not depend on the order of the questions
Frames = tuple[pl.DataFrame, pl.DataFrame]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of LightGBM alone, for reading only."""
    out = tmp_path_factory.mktemp("plain") / "out"
    good(run(out, **QUICK, **ALIKE))
    return out


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder but locks and logs, with what it holds."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {
        str(p.relative_to(folder)): cmi.digest(p.read_bytes())
        for p in files
        if "logs" not in p.parts
    }


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It failed with a single line that holds these words."""
    assert done.returncode == 1, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cmi_pipeline: "), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in last, (word, last)


def same_outcome(one: Path, other: Path, members: tuple[str, ...]) -> None:
    """Models' opinions, weights and answers of two folders are equal; Keras to 1e-6."""
    names = [f"oof_{m}_{mode}_{kind}.npy" for m in members for mode in ("all", "imu")
             for kind in ("proba", "composite")]  # fmt: skip
    for name in ("y_true.npy", *names):
        a, b = (np.load(folder / "oof" / name) for folder in (one, other))
        if "keras" in name:
            np.testing.assert_allclose(a, b, atol=1e-6)
        else:
            assert a.tobytes() == b.tobytes(), name
    a, b = (
        json.loads((folder / "ensemble" / "weights.json").read_text()) for folder in (one, other)
    )
    for mode in ("all", "imu"):
        assert a["modes"][mode]["parts"] == b["modes"][mode]["parts"]
        assert a["modes"][mode]["kind"] == b["modes"][mode]["kind"]
        np.testing.assert_allclose(
            a["modes"][mode]["weights"], b["modes"][mode]["weights"], atol=1e-6
        )
        assert a["figures"][mode] == pytest.approx(b["figures"][mode], abs=1e-6)
    assert (a["labels"], a["majority"], a["wearer"]) == (b["labels"], b["majority"], b["wearer"])
    answers = [pl.read_parquet(f / "submission.parquet").sort("sequence_id") for f in (one, other)]
    assert answers[0].equals(answers[1])


# ---- kills ---------------------------------------------------------------------------------------


class Running:
    """A run in a process group of its own, its lines as they come."""

    def __init__(self, out: Path, **settings: str) -> None:
        env = {**clean_environment(), **SMALL, "OUTPUT_PATH": str(out), **settings}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "cmi_pipeline.py")], cwd=out.parent, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout
        self.lines = iter(self.process.stdout.readline, "")
        self.seen: list[str] = []

    def until(self, pattern: str) -> str:
        """Wait for a line that matches, and return it."""
        for line in self.lines:
            self.seen.append(line)
            if re.search(pattern, line):
                return line
        pytest.fail(f"ended before {pattern}:\n" + "".join(self.seen[-30:]))

    def kill(self) -> None:
        """SIGKILL for all of its processes."""
        with_children = os.getpgid(self.process.pid)
        os.killpg(with_children, signal.SIGKILL)
        assert self.process.wait(30) == -signal.SIGKILL, "it had ended by itself"
        assert self.process.stdout
        self.process.stdout.close()


def kill_along(
    out: Path, moments: list[tuple[str, float]], rng: np.random.Generator, **settings: str
) -> list[str]:
    """Start and kill a run once for every moment; the lines that were the signals.

    A moment is a pattern and the most seconds to wait after a line that matches it, or a later one.
    """
    hit = []
    for i, (_, wait) in enumerate(moments):
        running = Running(out, **settings)
        hit.append(running.until("|".join(pattern for pattern, _ in moments[i:])))
        time.sleep(rng.uniform(0, wait))
        running.kill()
    return hit


MOMENTS = [
    (r"data +found=", 0.6),  # simulating
    (r"simulated ", 0.4),
    (r"demo ", 0.2),  # reading and caching
    (r"data +folder=", 0.02),
    (r"plan +member=keras +mode=imu", 0.5),  # features
    (r"fit +job=lgbm/all/fold00", 1.0),
    (r"fit +job=lgbm/all/fold01", 0.3),
    (r"member +member=lgbm +mode=all", 0.2),
    (r"fit +job=lgbm/imu/fold01", 0.2),
    (r"fit +job=torch/all/fold00", 3.0),
    (r"torch +job=torch/all/fold00", 1.0),
    (r"torch +job=torch/all/fold01", 1.0),
    (r"member +member=torch +mode=all", 0.5),
    (r"torch +job=torch/imu/fold01", 0.5),
    (r"batch +job=keras/all/fold00", 8.0),
    (r"epoch +job=keras/all/fold00 +n=1", 0.5),
    (r"member +member=keras +mode=all", 2.0),
    (r"epoch +job=keras/imu/fold01 +n=2", 0.5),
    (r"member +member=keras +mode=imu|blend +mode=all", 0.2),
    (r"result |loaded ", 1.0),
]
STAGES = ("data ", "simulated", "demo", "plan", "job=lgbm", "member=lgbm", "job=torch", "member=torch",
          "batch", "epoch", "member=keras", "blend|member=keras +mode=imu", "result|loaded")  # fmt: skip


@pytest.mark.slow
def test_twenty_kills_change_nothing(road: tuple[Path, str], tmp_path: Path) -> None:
    """One training, killed in every stage, ends as the undisturbed one did."""
    whole, out = copied(road[0], tmp_path / "whole"), tmp_path / "out"
    good(run(whole, **ALIKE))
    hit = kill_along(out, MOMENTS, np.random.default_rng(9), **ALIKE)
    assert len(hit) == 20
    for stage in STAGES:
        assert any(re.search(stage, line) for line in hit), (stage, hit)
    printed = good(run(out, **ALIKE))
    assert set(plan_of(printed).values()) == {("reuse", "everything matches")}
    same_outcome(whole, out, ("lgbm", "torch", "keras"))
    assert not list(out.rglob("*.part*"))


def test_three_kills_change_nothing(plain: Path, tmp_path: Path) -> None:
    moments = [(r"data +found=", 0.6), (r"fit +job=lgbm/all/fold01", 0.3), (r"member .*imu", 0.4)]
    out = tmp_path / "out"
    kill_along(out, moments, np.random.default_rng(5), **QUICK, **ALIKE)
    printed = good(run(out, **QUICK, **ALIKE))
    assert plan_of(printed)["lgbm", "all"] == ("reuse", "everything matches")
    same_outcome(plain, out, ("lgbm",))


DIE_WRITING = """
import os, signal, sys
left = int(sys.argv[1])
def fsync(file, real=os.fsync):
    global left
    left -= 1
    if not left:
        os.ftruncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    real(file)
os.fsync = fsync
import cmi_pipeline
sys.exit(cmi_pipeline.start(os.environ, ()))
"""


def die_writing(out: Path, n: int, **settings: str) -> int:
    """A run that is killed in the middle of its n-th file; its exit status."""
    env = {**clean_environment(), **SMALL, "OUTPUT_PATH": str(out), **settings}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", DIE_WRITING, str(n)]
    return subprocess.run(
        command, cwd=out.parent, env=env, capture_output=True, timeout=300
    ).returncode


def test_a_file_half_written_is_never_read_and_goes_with_the_next_run(
    plain: Path, tmp_path: Path
) -> None:
    """Killed in the cache, in a fold's files and in what the run ends with."""
    out = tmp_path / "out"
    halves = []
    for n in (9, 22, 8):
        assert die_writing(out, n, **QUICK, **ALIKE) == -signal.SIGKILL
        (half,) = out.rglob(".*.part")
        assert half.name not in halves, "the next run did not clear it away"
        halves.append(half.name)
    for number in ("1", "2"):
        (out / "lgbm_models" / f".all.{number}.part").mkdir()
        (out / "lgbm_models" / f".all.{number}.part" / "fold00.txt").write_text("half")
    printed = good(run(out, **QUICK, **ALIKE))
    assert printed.count("leftover ") == 3
    assert not list(out.rglob("*.part"))
    same_outcome(plain, out, ("lgbm",))


def test_files_of_others_are_no_leftovers(tmp_path: Path) -> None:
    ours = [".fold00.txt.812.part", "deep/.fold00.31.part.keras"]
    others = ["a.part", ".hidden", ".b.part", "fold00.txt", ".fold.12.partial.d/x"]
    for name in ours + others:
        cmi.write_whole(tmp_path / name, "x")
    target = tmp_path / "target"
    target.mkdir()
    (target / "kept").write_text("x")
    (tmp_path / ".link.7.part").symlink_to(target)
    with cmi.only_run(tmp_path):
        left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left - {".lock"} >= {*others[:4], "target/kept"}
    assert not left & {*ours, ".link.7.part"}


def test_two_runs_at_once_and_after_a_kill(tmp_path: Path) -> None:
    """Workers that outlive their killed run do not hold its lock."""
    out = tmp_path / "out"
    first = Running(out, **QUICK, CMI_WORKERS="2")
    first.until(r"fit +job=")
    one_line(run(out, **QUICK), "Another run is writing to", str(out), "OUTPUT_PATH")
    shared = {"CKPT_BASE_DIR": str(out / "checkpoints")}
    one_line(
        run(tmp_path / "other", **QUICK, **shared), "Another run is writing to", "CKPT_BASE_DIR"
    )
    os.kill(first.process.pid, signal.SIGKILL)  # the parent alone
    first.process.wait(30)
    try:
        assert planned(out, **QUICK)
    finally:
        os.killpg(first.process.pid, signal.SIGKILL)


# ---- stale ---------------------------------------------------------------------------------------

FREE = {  # another value must not train anything again
    "strict": False, "frame_cache": False, "frame_cache_max_mb": 1, "frame_cache_max_items": 3,
    "torch_amp": False, "torch_data_parallel": True, "torch_threads": 2, "keras_threads": 1, "dl_num_workers": 3,
    "keras_mp": False, "keras_policy": "mixed_float16", "keras_jit": True, "ensemble_weights": "lgbm:1",
    "ensemble_w_lgbm": 0.5, "ensemble_w_torch": 0.5, "ensemble_w_keras": 0.5, "ensemble_trials": 3,
    "ensemble_temperature": 2.0, "subject_assignment": False, "log_every_steps": 3,
    "print_every_steps": 3, "feature_log_every": 3, "save_jsonl": False, "use_tqdm": True,
    "cmi_workers": 2, "cmi_backend": "threading", "dask_scheduler": "x", "ray_address": "x",
    "sim_subjects": 7, "sim_test_subjects": 7, "sim_recordings": 7, "fail_if_torch_missing": True,
    "fail_if_keras_missing": True,
}  # fmt: skip
ALL, LGBM, TORCH, KERAS = {"lgbm", "torch", "keras"}, {"lgbm"}, {"torch"}, {"keras"}
BINDING: dict[str, tuple[Any, set[str]]] = {  # another value, and who has to learn again
    "seed": (1, ALL), "n_folds": (3, ALL), "upside_down": (False, ALL),
    "modality_dropout_prob": (0.5, ALL),
    "fixed_pad_len": (64, TORCH | KERAS), "pad_len_percentile": (90.0, TORCH | KERAS),
    "lgbm_rounds": (31, LGBM), "lgbm_lr": (0.2, LGBM), "lgbm_leaves": (7, LGBM),
    "lgbm_es_rounds": (3, LGBM), "lgbm_es_metric": ("score", LGBM), "lgbm_top_features": (9, LGBM),
    "lgbm_feature_fraction": (0.5, LGBM), "lgbm_class_weights": (True, LGBM),
    "torch_max_epochs": (3, TORCH), "torch_batch_size": (8, TORCH), "torch_accum_steps": (2, TORCH),
    "torch_lr": (0.1, TORCH), "torch_weight_decay": (0.1, TORCH), "torch_dropout": (0.1, TORCH),
    "torch_label_smoothing": (0.1, TORCH), "torch_es_patience": (1, TORCH),
    "torch_es_min_delta": (0.1, TORCH), "torch_seeds": (2, TORCH), "use_focal_loss": (True, TORCH),
    "torch_width": (32, TORCH), "torch_tof_images": (True, TORCH), "torch_ema": (0.5, TORCH),
    "torch_mixup_prob": (0.1, TORCH), "torch_stretch_prob": (0.1, TORCH),
    "torch_shift_prob": (0.1, TORCH), "torch_rotate_prob": (0.1, TORCH),
    "torch_time_mask_prob": (0.1, TORCH), "torch_channel_mask_prob": (0.2, TORCH),
    "keras_max_epochs": (3, KERAS), "keras_batch_size": (8, KERAS), "keras_lr": (0.1, KERAS),
    "keras_weight_decay": (0.1, KERAS), "keras_dropout": (0.1, KERAS),
    "keras_label_smoothing": (0.2, KERAS), "keras_class_weight": (0.5, KERAS),
    "keras_augment": (False, KERAS), "keras_width": (32, KERAS), "keras_es_patience": (1, KERAS),
    "keras_rlr_patience": (1, KERAS),
}  # fmt: skip
ROADS = {"cmi_data_dir", "output_path", "ckpt_base_dir", "plan_only", "kaggle_is_competition_rerun",
         "resume", "resume_torch", "resume_keras"} | {
    name.format(m) for m in ALL for name in ("use_{}", "force_train_{}", "{}_bundle_path")
}  # fmt: skip  # tested one by one in test_road.py


def small_config(out: Path) -> cmi.Config:
    (data,) = out.glob("simulated-*")
    env = SMALL | {"OUTPUT_PATH": str(out), "CMI_DATA_DIR": str(data)}
    return cmi.Config.from_env(env)


def actions(out: Path, **changes: Any) -> dict[tuple[str, str], cmi.Step]:
    cfg = dataclasses.replace(small_config(out), **changes)
    return {(s.member, s.mode): s for s in cmi.make_plan(cmi.make_study(cfg), cfg)}


def test_every_setting_is_either_free_or_binding() -> None:
    names = {f.name for f in dataclasses.fields(cmi.Config)}
    assert names == {*FREE, *BINDING, *ROADS}


def test_settings_that_do_not_matter_train_nothing(road: tuple[Path, str], tmp_path: Path) -> None:
    out = copied(road[0], tmp_path / "out")
    for name, value in FREE.items():
        plan = actions(out, **{name: value})
        assert {s.action for s in plan.values()} == {"reuse"}, name


def test_settings_that_matter_are_named_and_train_their_members(
    road: tuple[Path, str], tmp_path: Path
) -> None:
    out = copied(road[0], tmp_path / "out")
    for name, (value, members) in BINDING.items():
        (out / "folds.csv").write_bytes((road[0] / "folds.csv").read_bytes())
        plan = actions(out, **{name: value})
        trained = {member for (member, _), step in plan.items() if step.action != "reuse"}
        assert trained == members, name
        for (member, mode), step in plan.items():
            if member in members and name != "torch_seeds":
                assert name.upper() in step.why, (name, member, mode, step.why)
                assert len(step.todo) == len(step.jobs)


@pytest.mark.parametrize(
    ("package", "member"), [("lightgbm", "lgbm"), ("torch", "torch"), ("keras", "keras"), ("tensorflow", "keras")]
)  # fmt: skip
def test_another_major_version_is_named(
    road: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    member: str,
) -> None:
    out, real = copied(road[0], tmp_path / "out"), cmi.package_version
    major, _, rest = real(package).partition(".")
    for version, action in ((f"{major}.999.9", "reuse"), (f"{int(major) + 1}.{rest}", "train")):
        monkeypatch.setattr(
            cmi, "package_version", lambda p, v=version: v if p == package else real(p)
        )
        plan = actions(out)
        assert {s.action for (m, _), s in plan.items() if m == member} == {action}
        assert {s.action for (m, _), s in plan.items() if m != member} == {"reuse"}
    why = f"major version of {package} {major} → {int(major) + 1}"
    assert plan[member, "all"].why == plan[member, "imu"].why == why


def swapped(text: str) -> str:
    """folds.csv with one subject of each fold exchanged."""
    rows = [line.split(",") for line in text.splitlines()]
    of = {subject: fold for _, subject, fold in rows[1:]}
    chosen = [next(s for s, f in of.items() if f == k) for k in ("0", "1")]
    other = {chosen[0]: "1", chosen[1]: "0"}
    return "\n".join(",".join([i, s, other.get(s, f)]) for i, s, f in rows) + "\n"


def test_other_folds_train_everything(road: tuple[Path, str], tmp_path: Path) -> None:
    out = copied(road[0], tmp_path / "out")
    (out / "folds.csv").write_text(swapped((out / "folds.csv").read_text()))
    plan = planned(out)
    assert set(plan.values()) == {("train", "training rows differ")}


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda t: t.replace(",0\n", ",1\n", 1), "some subject is in two folds"),
        (lambda t: t.replace(",0\n", ",-1\n"), "its folds are not 0 … 1"),
        (lambda t: t.replace(",0\n", ",2\n"), "its folds are not 0 … 1"),
        (lambda t: t[: len(t) // 2], "of other data"),
        (lambda t: t.replace(",0\n", ",zero\n", 1), "cannot be read"),
        (lambda t: t.replace("sequence_id", "id"), "cannot be read"),
        (lambda _: "", "cannot be read"),
        (lambda _: "\0" * 999, "cannot be read"),
    ],
)
def test_a_spoilt_folds_file_is_made_anew(
    road: tuple[Path, str], tmp_path: Path, spoil: Callable[[str], str], why: str
) -> None:
    out, whole = copied(road[0], tmp_path / "out"), (road[0] / "folds.csv").read_text()
    (out / "folds.csv").write_text(spoil(whole))
    printed = good(run(out, PLAN_ONLY="1"))
    assert re.search(rf"folds +path=\S+ +why={why}.* instead=made anew", printed), printed
    assert {action for action, _ in plan_of(printed).values()} == {"reuse"}
    assert (out / "folds.csv").read_text() == whole


def flip(path: Path, at: int = -1000) -> None:
    raw = bytearray(path.read_bytes())
    raw[max(at, -len(raw) // 2)] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "member", "action"),
    [
        ("torch_models/all/fold01.pt", "torch", "resume"),
        ("keras_models/imu/fold00.keras", "keras", "resume"),
        ("lgbm_models/imu/fold01_behavior.txt", "lgbm", "resume"),
    ],
)
def test_a_changed_byte_trains_that_fold_alone(
    road: tuple[Path, str], tmp_path: Path, name: str, member: str, action: str
) -> None:
    out = copied(road[0], tmp_path / "out")
    flip(out / name)
    mode, file = name.split("/")[1:]
    for key, step in actions(out).items():
        if key != (member, mode):
            assert step.action == "reuse"
            continue
        assert (step.action, step.why) == (
            action,
            f"{file} is absent or was changed after training",
        )
        assert [job.stem for job in step.todo] == [file[:6]]


def test_a_spoilt_note_trains_that_fold_alone(road: tuple[Path, str], tmp_path: Path) -> None:
    out = copied(road[0], tmp_path / "out")
    note = out / "torch_models" / "all" / "fold00.json"
    whole = json.loads(note.read_text())
    for text in ("", "{", "[]", "7", "null", '{"fingerprint": []}', "\0" * 99,
                 json.dumps(whole | {"probe": "x"}), json.dumps(whole | {"files": ["x"]}),
                 json.dumps({k: v for k, v in whole.items() if k != "probe"})):  # fmt: skip
        note.write_text(text)
        step = actions(out)["torch", "all"]
        assert "fold00.json cannot be used" in step.why, (text[:50], step.why)
        assert [job.stem for job in step.todo] == ["fold00"]


def test_a_fold_trained_again_is_the_same(road: tuple[Path, str], tmp_path: Path) -> None:
    """And bundle.json, weights.json and the out-of-fold files, however spoilt, are written anew."""
    out = copied(road[0], tmp_path / "out")
    for name in ("torch_models/all/fold01.pt", "torch_models/bundle.json", "oof/y_true.npy",
                 "ensemble/weights.json", "oof/oof_torch_all_proba.npy"):  # fmt: skip
        flip(out / name)
    whole = copied(road[0], tmp_path / "whole")
    printed = good(run(out, USE_KERAS="0", **ALIKE))
    assert printed.count("fit  ") == 1
    good(run(whole, USE_KERAS="0", **ALIKE))
    same_outcome(whole, out, ("lgbm", "torch"))
    bundles = [json.loads((f / "torch_models" / "bundle.json").read_text()) for f in (out, whole)]
    assert bundles[0] == bundles[1]


@pytest.mark.parametrize("spoil", [flip, Path.unlink, lambda p: p.write_bytes(b"")])
def test_a_spoilt_cache_is_read_again(
    road: tuple[Path, str],
    tmp_path: Path,
    spoil: Callable[[Path], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A cache that differs from the file would train on other numbers."""
    out = copied(road[0], tmp_path / "out")
    cfg = small_config(out)
    rec, mark = cmi.cached_recordings(cfg.data_dir, cfg)
    assert "read again" not in capsys.readouterr().out
    for name in ("acc", "subject", "label_gesture", "start"):
        (path,) = out.rglob(f"{name}.npy")
        spoil(path)
        again, same = cmi.cached_recordings(cfg.data_dir, cfg)
        assert "read again" in capsys.readouterr().out
        assert same == mark
        np.testing.assert_array_equal(again.acc, rec.acc)


def test_touched_data_train_nothing_and_a_changed_digit_everything(
    road: tuple[Path, str], tmp_path: Path
) -> None:
    out = copied(road[0], tmp_path / "out")
    (data,) = out.glob("simulated-*")
    os.utime(data / "train.csv", (1, 1))
    assert {s.action for s in actions(out).values()} == {"reuse"}
    path = data / "train_demographics.csv"
    people = pl.read_csv(path)
    people.with_columns(age=pl.col("age") + 1).write_csv(path)
    assert {(s.action, s.why) for s in actions(out).values()} == {("train", "data differ")}


@pytest.mark.parametrize(("member", "name"), [("torch", "fold00.ckpt.pt"), ("keras", "fold00.npz")])
def test_a_spoilt_checkpoint_is_named_and_not_used(
    road: tuple[Path, str], tmp_path: Path, member: str, name: str
) -> None:
    out = copied(road[0], tmp_path / "out")
    (out / f"{member}_models" / "all" / "fold00.json").unlink()
    for content in (b"", b"PK\3\4 nonsense", os.urandom(5000)):
        cmi.write_whole(out / "checkpoints" / member / "all" / name, content)
        step = actions(out)[member, "all"]
        assert step.why == f"none yet; {name} is damaged"


# ---- disks ---------------------------------------------------------------------------------------


def mounted(folder: Path, *how: str) -> bool:
    command = ["mount", *how, str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def used(folder: Path) -> int:
    """Bytes that a folder's files take on a disk of 4 KiB blocks."""
    return sum(-(-p.stat().st_size // 4096) * 4096 + 4096 for p in folder.rglob("*"))


def test_a_full_disk(plain: Path, tmp_path: Path) -> None:
    """Training again needs more room than there is; with room the same command goes on."""
    disk, out = tmp_path / "disk", tmp_path / "disk" / "out"
    disk.mkdir()
    size = used(plain) + 300_000
    if not mounted(disk, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        pytest.skip("no file system can be mounted here")
    try:
        copied(plain, out)
        before = digests(out)
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        again = {"LGBM_LR": "0.09", **QUICK, **ALIKE}
        one_line(run(out, **again), str(out), "No space left on device", "Free some space")
        after = digests(out)
        lost = {name for name in before if after.get(name) != before[name]}
        assert lost <= {"lgbm_models/all/fold00.json"}, lost  # the note of what is trained again
        assert not list(out.rglob("*.part*"))
        ballast.unlink()
        done = run(out, **again, FORCE_TRAIN_LGBM="1")
        assert done.returncode == 0 or "No space" in done.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


LIMITED = """
import resource, os, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
import cmi_pipeline
sys.exit(cmi_pipeline.start(os.environ, ()))
"""


@pytest.mark.parametrize("limit", [100, 20_000, 200_000])
def test_a_file_that_may_not_grow(plain: Path, tmp_path: Path, limit: int) -> None:
    out = copied(plain, tmp_path / "out")
    before = digests(out)
    env = {**clean_environment(), **SMALL, **QUICK, "OUTPUT_PATH": str(out), "LGBM_LR": "0.2",
           "PYTHONPATH": str(ROOT), "SAVE_JSONL": "0"}  # fmt: skip
    command = [sys.executable, "-c", LIMITED, str(limit)]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    one_line(done, str(out), os.strerror(errno.EFBIG), "Free some space")
    after = digests(out)
    kept = [n for n in before if not n.startswith("lgbm_models/all/fold00")]
    assert len(kept) > 20
    assert all(after.get(n) == before[n] for n in kept)
    assert not list(out.rglob("*.part*"))


def test_an_output_folder_that_is_read_only(plain: Path, tmp_path: Path) -> None:
    out = copied(plain, tmp_path / "out")
    if not (mounted(out, "--bind", str(out)) and mounted(out, "-o", "remount,ro,bind")):
        pytest.skip("no file system can be mounted here")
    try:
        one_line(run(out, **QUICK), str(out), "Read-only file system", "set OUTPUT_PATH")
    finally:
        subprocess.run(["umount", str(out)], check=True)
    assert digests(out) == digests(plain)


def test_no_permission(plain: Path, tmp_path: Path) -> None:
    """As a user who may read everything and write nothing; root, too, can be made one."""
    out = copied(plain, tmp_path / "out")
    for path in (out, *out.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    bound = (
        ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    )
    try:
        allowed = (
            subprocess.run([*bound, "touch", str(out / "x")], capture_output=True).returncode == 0
        )
    except FileNotFoundError:
        allowed = True
    if allowed:
        pytest.skip("permissions do not bind here")
    env = {**clean_environment(), **SMALL, **QUICK, "OUTPUT_PATH": str(out)}
    command = [*bound, sys.executable, str(ROOT / "cmi_pipeline.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    one_line(done, str(out), "Permission denied", "Allow writing there")
    assert digests(out) == digests(plain)


@pytest.mark.parametrize("name", [".", "checkpoints", "lgbm_models", "oof", "ensemble"])
def test_a_file_where_a_folder_is_needed(plain: Path, tmp_path: Path, name: str) -> None:
    out = copied(plain, tmp_path / "out")
    shutil.rmtree(out / name)
    (out / name).write_text("I was here first")
    one_line(run(out, **QUICK), str(out / name), "move it away")
    assert (out / name).read_text() == "I was here first"


@pytest.mark.parametrize("name", ["folds.csv", "oof/y_true.npy", ".lock"])
def test_a_folder_where_a_file_is_needed(plain: Path, tmp_path: Path, name: str) -> None:
    out = copied(plain, tmp_path / "out")
    (out / name).unlink()
    (out / name).mkdir()
    one_line(run(out, **QUICK), str(out / name), "move it away")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
def test_three_file_systems(plain: Path, tmp_path: Path) -> None:
    """Data, output and checkpoints on different ones: nothing is renamed across."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        (data,) = plain.glob("simulated-*")
        out = Path(shm) / "out"
        assert os.stat(shm).st_dev != os.stat(tmp_path).st_dev
        where = {"CMI_DATA_DIR": str(data), "CKPT_BASE_DIR": str(tmp_path / "checkpoints")}
        good(run(out, **QUICK, **ALIKE, **where))
        assert (tmp_path / "checkpoints" / "cache").is_dir()
        same_outcome(plain, out, ("lgbm",))


# ---- hostile bundles -----------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


def seal(folder: Path, stem: str) -> None:
    """Write the digests of a model's files as they are now, as whoever changed them would."""
    note = folder / f"{stem}.json"
    content = json.loads(note.read_text())
    files = {end: cmi.digest((folder / f"{stem}{end}").read_bytes()) for end in content["files"]}
    note.write_text(json.dumps(content | {"files": files}))


def load(out: Path, *members: str, strict: bool = True) -> cmi.Served:
    """What serving reads of a folder, for some members."""
    uses: dict[str, Any] = {f"use_{m}": m in members for m in ("lgbm", "torch", "keras")}
    return cmi.load_served(cmi.Config(output_path=out, strict=strict, **uses))


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that must not come into being."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code from a bundle was executed"


@pytest.fixture
def out(road: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the full run's folder, to be spoilt."""
    return copied(road[0], tmp_path / "out")


def live(raw: bytes, marker: Path) -> bytes:
    """The pickle, after making sure that it does what it is there for."""
    pickle.loads(raw).close()
    assert marker.exists()
    marker.unlink()
    return raw


@pytest.mark.parametrize(
    "name", ["lgbm_models/bundle.json", "lgbm_models/all/fold00.json", "ensemble/weights.json"]
)
def test_a_pickle_where_json_is_expected(out: Path, marker: Path, name: str) -> None:
    for protocol in (0, 4):
        raw = live(pickle.dumps(Payload(marker), protocol), marker)
        (out / name).write_bytes(raw)
        with pytest.raises(cmi.DataError, match=f"{name} is not JSON"):
            load(out, "lgbm")
    (out / name).write_text("[" * 200_000)
    with pytest.raises(cmi.DataError, match=f"{name} is not JSON"):
        load(out, "lgbm")


def torch_files(whole: bytes, marker: Path) -> dict[str, bytes]:
    """Files that pose as a network."""
    import torch

    def saved(content: Any, **how: Any) -> bytes:
        file = io.BytesIO()
        torch.save(content, file, **how)
        return file.getvalue()

    stored = torch.load(io.BytesIO(whole), weights_only=True)
    spec, state = stored["spec"], stored["state"]
    first = next(iter(state))
    return {
        "a pickle": live(pickle.dumps(Payload(marker)), marker),
        "code beside weights": saved({"spec": spec, "state": state, "x": Payload(marker)}),
        "code for a tensor": saved({"spec": spec, "state": state | {first: Payload(marker)}}),
        "code, old format": saved(Payload(marker), _use_new_zipfile_serialization=False),
        "a whole module": saved(torch.nn.Linear(2, 2)),
        "half": whole[: len(whole) // 2],
        "nothing": b"",
        "a list": saved([1, 2]),
        "no spec": saved({"state": state}),
        "wide": saved({"spec": spec | {"width": 10**9}, "state": state}),
        "long": saved({"spec": spec | {"pad_len": 10**12}, "state": state}),
        "text for a number": saved({"spec": spec | {"width": "os.system('x')"}, "state": state}),
        "other groups": saved({"spec": spec | {"groups": [["imu", ["x"]]]}, "state": state}),
        "other labels": saved({"spec": spec | {"table": [[0, 0, 10**12]]}, "state": state}),
        "a tensor short": saved(
            {"spec": spec, "state": {k: v for k, v in state.items() if k != first}}
        ),
        "a tensor of another shape": saved(
            {"spec": spec, "state": state | {first: torch.zeros(3)}}
        ),
    }


def test_hostile_torch_files(out: Path, marker: Path) -> None:
    import torch

    path = out / "torch_models" / "all" / "fold01.pt"
    files = torch_files(path.read_bytes(), marker)
    torch.load(io.BytesIO(files["code beside weights"]), weights_only=False)["x"].close()
    assert marker.exists()  # it is what it claims to be
    marker.unlink()
    for name, raw in files.items():
        path.write_bytes(raw)
        seal(path.parent, "fold01")
        with pytest.raises(cmi.DataError, match=str(path)):
            load(out, "torch")
        assert not marker.exists(), name
    served = load(out, "lgbm", "torch", strict=False)
    assert set(served.models) == {"lgbm/all", "lgbm/imu", "lgbm/norot", "torch/imu"}


def test_a_hostile_bundle_stops_the_command_with_a_line(out: Path, marker: Path) -> None:
    """The plan takes it for a good one, since its notes are as they must be."""
    path = out / "torch_models" / "all" / "fold01.pt"
    path.write_bytes(torch_files(path.read_bytes(), marker)["code beside weights"])
    seal(path.parent, "fold01")
    (data,) = out.glob("simulated-*")
    settings = {"TORCH_BUNDLE_PATH": str(out / "torch_models"), "CMI_DATA_DIR": str(data)}
    shutil.copytree(out / "checkpoints", out.parent / "new" / "checkpoints")
    shutil.copy(out / "folds.csv", out.parent / "new")
    done = run(out.parent / "new", USE_LGBM="0", USE_KERAS="0", **settings)
    one_line(done, str(path), "holds more than weights")
    assert plan_of(done.stdout)["torch", "all"] == ("reuse", "everything matches")


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    """A .keras file with another config.json."""
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            raw = old.read(name)
            if name == "config.json":
                config = json.loads(raw)
                raw = json.dumps(edit(config) or config).encode()
            new.writestr(name, raw)
    return made.getvalue()


def layer(config: dict[str, Any], name: str) -> dict[str, Any]:
    return next(x["config"] for x in config["config"]["layers"] if x["name"] == name)


def lambda_network(path: Path, marker: Path) -> bytes:
    """A network saved by Keras itself whose Lambda layer creates the marker."""
    cmi.keras_quietly(1)  # it imports triton first, which TensorFlow makes impossible
    import keras

    source = f"lambda x: (open({str(marker)!r}, 'w').close(), x)[1]"
    net = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(eval(source), name="evil")])
    net.save(path)
    marker.unlink(missing_ok=True)
    keras.models.load_model(path, safe_mode=False)(np.zeros((1, 2)))
    assert marker.exists()  # it is what it claims to be
    marker.unlink()
    return path.read_bytes()


def test_hostile_keras_files(out: Path, marker: Path) -> None:
    path = out / "keras_models" / "all" / "fold01.keras"
    evil = lambda_network(out / "evil.keras", marker)
    with zipfile.ZipFile(io.BytesIO(evil)) as file:
        config = json.loads(file.read("config.json"))
    (code,) = (x for x in config["config"]["layers"] if x["class_name"] == "Lambda")
    whole = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        weights = file.read("model.weights.h5")
    bare = io.BytesIO()
    with zipfile.ZipFile(bare, "w") as file:
        file.writestr("model.weights.h5", weights)
    files = {
        "a Lambda": evil,
        "a pickle": live(pickle.dumps(Payload(marker)), marker),
        "half": whole[: len(whole) // 2],
        "nothing": b"",
        "no config": bare.getvalue(),
        "no layers": edited(path, lambda _: {"config": {}}),
        "a list": edited(path, lambda _: [1]),
        "many rows": edited(path, lambda c: layer(c, "rows").update(batch_shape=[None, 10**12, 1])),
        "text rows": edited(path, lambda c: layer(c, "rows").update(batch_shape=[None, "1", 1])),
        "wide": edited(path, lambda c: layer(c, "imu1_conv1").update(filters=2**40)),
        "narrow": edited(path, lambda c: layer(c, "imu1_conv1").update(filters=16)),
        "other labels": edited(path, lambda c: layer(c, "proba").update(table=[[0, 0, 10**12]])),
        "flat labels": edited(path, lambda c: layer(c, "proba").update(table=7)),
    }
    for name, raw in files.items():
        path.write_bytes(raw)
        seal(path.parent, "fold01")
        with pytest.raises(cmi.DataError, match=r"keras_models"):
            load(out, "keras")
        assert not marker.exists(), name
    path.write_bytes(whole)
    path.write_bytes(edited(path, lambda c: c["config"]["layers"].append(code | {"name": "evil"})))
    seal(path.parent, "fold01")
    assert set(load(out, "keras").models) == {"keras/all", "keras/imu"}  # and nothing was executed


@pytest.mark.parametrize(
    "stems",
    [["../../secret"], ["/etc/passwd"], ["fold00/../fold01"], "fold00", {"fold00": 1}, [0], [None],
     ["fold00\n"], ["fold0٣"], 7],
)  # fmt: skip
def test_names_that_lead_out_of_a_bundle(out: Path, stems: Any) -> None:
    path = out / "lgbm_models" / "bundle.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"modes": {"all": stems}}))
    with pytest.raises(cmi.DataError, match=r"bundle\.json"):
        load(out, "lgbm")


@pytest.mark.parametrize("files", [{"/../../../folds.csv": "x"}, ["x"], {}, None, {".txt": None}])
def test_notes_that_name_other_files(out: Path, files: Any) -> None:
    path = out / "lgbm_models" / "all" / "fold00.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"files": files}))
    with pytest.raises(cmi.DataError, match=r"lgbm_models"):
        load(out, "lgbm")


@pytest.mark.parametrize(
    "labels",
    [[[0, 0, 10**9]], [[0, 0, 10**30]], [[0, 0, -1]], [[0, 0]], [], 7, "x", [[0.5, 0, 1]], [["a", 0, 0]],
     [[0, 0, None]], [[10**6, 0, 0]], [[1, 2, 3], [1]]],
)  # fmt: skip
@pytest.mark.parametrize("name", ["lgbm_models/bundle.json", "ensemble/weights.json"])
def test_labels_that_are_none(out: Path, name: str, labels: Any) -> None:
    content = json.loads((out / name).read_text())
    (out / name).write_text(json.dumps(content | {"labels": labels}))
    with pytest.raises(cmi.DataError, match=name):
        load(out, "lgbm")


def of_all(**entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["modes"]["all"].update(entries)


NAN, INF = float("nan"), float("inf")
SIX = ["lgbm/all", "torch/all", "keras/all", "lgbm/imu", "torch/imu", "keras/imu"]
WEIGHTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "NaN": of_all(weights=[NAN] * 6),
    "infinite": of_all(weights=[INF, 0, 0, 0, 0, 0]),
    "below zero": of_all(weights=[2, -1, 0, 0, 0, 0]),
    "sum 2": of_all(weights=[1, 1, 0, 0, 0, 0]),
    "too few": of_all(weights=[1]),
    "nested": of_all(weights=[[1, 0, 0, 0, 0, 0]]),
    "text": of_all(weights="lgbm"),
    "huge": of_all(weights=[10**400, 0, 0, 0, 0, 0]),
    "no parts": of_all(parts=[], weights=[], knobs=[]),
    "few knobs": of_all(knobs=[]),
    "unknown kind": of_all(kind="__import__('os')"),
    "kind is a list": of_all(kind=["rank"]),
    "temperature 0": of_all(kind="temperature", knobs=[0] * 6),
    "temperature NaN": of_all(kind="temperature", knobs=[NAN] * 6),
    "temperature text": of_all(kind="temperature", knobs=["1"] * 6),
    "rank of 3 classes": of_all(kind="rank", knobs=[[[0, 1]] * 3] * 6),
    "rank of nothing": of_all(kind="rank", knobs=[[]] * 6),
    "rank NaN": of_all(kind="rank", knobs=[[[NAN, NAN]] * 18] * 6),
    "majority 99": lambda c: c.update(majority=99),
    "majority -1": lambda c: c.update(majority=-1),
    "majority text": lambda c: c.update(majority="Wave hello"),
    "majority huge": lambda c: c.update(majority=10**30),
    "no majority": lambda c: c.pop("majority"),
    "marks list": lambda c: c.update(marks=[1]),
    "no modes": lambda c: c.update(modes={}),
    "modes list": lambda c: c.update(modes=[1]),
    "mode unknown": lambda c: c["modes"].update(other=c["modes"]["all"]),
    "mode null": lambda c: c["modes"].update(all=None),
    "wearer short": lambda c: c.update(wearer={"prior": 1, "coefficients": [1.0]}),
    "wearer NaN": lambda c: c.update(wearer={"prior": NAN, "coefficients": [1.0] * 30}),
    "wearer text": lambda c: c.update(wearer="left"),
    "wearer empty": lambda c: c.update(wearer={}),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_none(out: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused in strict mode; else left out, and the default weights answer."""
    path = out / "ensemble" / "weights.json"
    content = json.loads(path.read_text())
    assert content["modes"]["all"]["parts"] == SIX
    WEIGHTS[name](content)
    path.write_text(json.dumps(content))
    with pytest.raises(cmi.DataError, match=f"{path} holds no weights"):
        load(out, "lgbm")
    served = load(out, "lgbm", strict=False)
    assert f"left_out={path}" in capsys.readouterr().out
    assert served.blends["all"].parts == ("lgbm/all",)


TRY_MODELS = """
import sys
from pathlib import Path
import numpy as np
import cmi_pipeline as cmi

folder = Path(sys.argv[1])
table = np.load(folder / "table.npy")
for path in sorted(folder.glob("*.model")):
    (folder / "fold00.txt").write_bytes(path.read_bytes())
    try:
        (model,) = cmi.load_lgbm(folder, ["fold00"], table, cmi.Config())
        for n in (1, 3):
            model.proba(np.random.default_rng(n).normal(size=(n, len(model.names))))
        print(path.stem, "answers", flush=True)
    except cmi.DataError as error:
        print(path.stem, "refused", flush=True)
"""


def nonsense(text: str) -> dict[str, str]:
    """Texts that pose as a booster."""
    head, tree = text.split("\nTree=0\n", 1)
    return {
        "head-then-garbage": head + "\nTree=0\n" + "\x00\x01garbage=1\n" * 500 + "end of trees\n",
        "head-then-nothing": head + "\nend of trees\n",
        "cut": text[: len(text) // 2] + "\nend of trees\n",
        "no-trees": text[: text.index("\nTree=0")],
        "child-far-away": re.sub(r"left_child=\S+", "left_child=1000000", text, count=1),
        "leaf-far-away": re.sub(r"right_child=\S+", "right_child=-1000000", text, count=1),
        "circle": re.sub(r"(left_child=)(\S+) (\S+)", r"\1\2 0", text, count=1),
        "feature-far-away": re.sub(r"split_feature=\d+", "split_feature=99999999", text, count=1),
        "feature-below-zero": re.sub(r"split_feature=\d+", "split_feature=-5", text, count=1),
        "huge-feature": re.sub(r"split_feature=\d+", f"split_feature={10**30}", text, count=1),
        "many-leaves": re.sub(r"num_leaves=\d+", "num_leaves=2000000000", text, count=1),
        "leaves-below-zero": re.sub(r"num_leaves=\d+", "num_leaves=-4", text, count=1),
        "leaves-no-number": re.sub(r"num_leaves=\d+", "num_leaves=many", text, count=1),
        "few-values": re.sub(r"leaf_value=\S+ ", "leaf_value=", text, count=1),
        "categorical": text.replace("num_cat=0", "num_cat=3", 1),
        "linear": text.replace("is_linear=0", "is_linear=1", 1),
        "other-classes": text.replace("num_class=18", "num_class=180000000", 1),
        "other-iteration": text.replace("num_tree_per_iteration=18", "num_tree_per_iteration=3", 1),
        "other-sizes": re.sub(r"tree_sizes=\d+", "tree_sizes=2000000000", text),
        "no-sizes": re.sub(r"tree_sizes=.*\n", "", text),
        "few-features": re.sub(r"max_feature_idx=\d+", "max_feature_idx=1", text),
        "twice": text.replace("num_cat=0", "num_leaves=7\nnum_cat=0", 1),
        "tree-lost": head + "\nTree=1\n" + tree,
    }


def misprints(text: str, n: int, rng: np.random.Generator) -> dict[str, str]:
    """Copies in which a number is another one, or a line is lost or there twice."""
    found = list(re.finditer(r"(?<=[= ])-?\d+(?=[ \n])", text))
    lines = [m.start() for m in re.finditer(r"\n(?=[a-z_]+=)", text)]
    made = {}
    for i in range(n):
        if i % 4:
            spot, value = (
                found[rng.integers(len(found))],
                rng.choice(["-1", "7", "99", "1000000", "nan", ""]),
            )
            made[f"misprint-{i:03d}"] = text[: spot.start()] + value + text[spot.end() :]
        else:
            k = rng.integers(len(lines) - 1)
            line = text[lines[k] : lines[k + 1]]
            made[f"misprint-{i:03d}"] = (
                text[: lines[k]] + line * int(rng.choice([0, 2])) + text[lines[k + 1] :]
            )
    return made


def test_hostile_lightgbm_texts(plain: Path, tmp_path: Path) -> None:
    """LightGBM trusts its files: what it is handed has been checked. It runs in a process of its own,
    which must live."""
    folder = plain / "lgbm_models" / "all"
    text = (folder / "fold00.txt").read_text()
    hostile, misprinted = nonsense(text), misprints(text, 120, np.random.default_rng(3))
    assert all(other != text for other in hostile.values())
    for name, content in {**hostile, **misprinted, "whole": text}.items():
        (tmp_path / f"{name}.model").write_text(content)
    for end in ("_orientation.txt", "_behavior.txt"):
        shutil.copy(folder / f"fold00{end}", tmp_path)
    labels = json.loads((folder.parent / "bundle.json").read_text())["labels"]
    np.save(tmp_path / "table.npy", np.array(labels))
    done = subprocess.run(
        [sys.executable, "-c", TRY_MODELS, str(tmp_path)], capture_output=True, text=True, timeout=300,
        env={**clean_environment(), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]
    verdict = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
    assert verdict.keys() == {*hostile, *misprinted, "whole"}
    assert verdict["whole"] == "answers"
    assert {name for name in hostile if verdict[name] != "refused"} == set()


# ---- hostile recordings --------------------------------------------------------------------------


class Questioned:
    """Two predictors on the same bundle; counts what they were asked."""

    def __init__(self, out: Path) -> None:
        self.tried = self.refused = 0
        self.strict, self.lenient = (
            cmi.Predictor(cmi.Config(output_path=out, strict=strict)) for strict in (True, False)
        )
        (data,) = out.glob("simulated-*")
        test = pl.read_csv(data / "test.csv", infer_schema_length=None)
        self.person = pl.read_csv(data / "test_demographics.csv")
        parts = sorted(
            test.partition_by("sequence_id"), key=lambda f: f["tof_1_v0"].null_count() == len(f)
        )
        self.full, self.imu = parts[0], parts[-1]
        assert self.full["thm_1"].null_count() < len(self.full)
        assert self.imu["thm_1"].is_null().all()

    def answer(self, frame: pl.DataFrame, person: pl.DataFrame) -> str | None:
        """The strict answer, or None if it was refused. The lenient one must be there always, and
        is a fallback exactly where strict refuses."""
        self.tried += 1
        before = self.lenient.fallbacks.total()
        gesture = self.lenient.predict(frame, person)
        assert type(gesture) is str
        assert gesture in cmi.GESTURES
        if self.lenient.fallbacks.total() > before:
            self.refused += 1
            why = "predict was handed|A column of numbers|Of the columns"
            with pytest.raises(cmi.DataError, match=why):
                self.strict.predict(frame, person)
            return None
        assert self.strict.predict(frame, person) == gesture
        return gesture


@pytest.fixture(scope="module")
def questioned(road: tuple[Path, str], request: pytest.FixtureRequest) -> Iterator[Questioned]:
    asked = Questioned(road[0])
    yield asked
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\nhostile recordings: {asked.tried} tried, {asked.refused} refused in strict mode")


def having(frame: pl.DataFrame, value: Any, columns: Iterable[str]) -> pl.DataFrame:
    literal = value if isinstance(value, pl.Expr) else pl.lit(value)
    return frame.with_columns(literal.alias(c) for c in columns)


def one(value: Any, *columns: str) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """The same value in every row of some columns, all sensors by default."""
    return lambda frame: having(frame, value, columns or cmi.SENSORS)


def cast(kind: Any, *columns: str) -> Callable[[pl.DataFrame], pl.DataFrame]:
    return lambda f: f.with_columns(
        pl.col(c).cast(kind, strict=False) for c in columns or cmi.SENSORS
    )


def rows(n: int) -> Callable[[pl.DataFrame], pl.DataFrame]:
    return lambda frame: pl.concat([frame] * (n // max(len(frame), 1) + 1)).head(n)


REFUSED: dict[str, Callable[[pl.DataFrame], pl.DataFrame]] = {
    "zero rows": lambda f: f.clear(),
    "nothing": lambda _: pl.DataFrame(),
    "no id": lambda f: f.drop("sequence_id"),
    "no subject": lambda f: f.drop("subject"),
    "two ids": lambda f: pl.concat([f, having(f, "SEQ_OTHER", ["sequence_id"])]),
    "null id": one(pl.lit(None, pl.String), "sequence_id"),
    "lists": one(pl.lit([1.0, 2.0]), "acc_x"),
    "structs": lambda f: f.with_columns(acc_x=pl.struct(a=pl.lit(1))),
    "bytes": one(b"x", "thm_1"),
}
ANSWERED: dict[str, Callable[[pl.DataFrame], pl.DataFrame]] = {
    "as it is": lambda f: f,
    "one row": rows(1), "two rows": rows(2), "three rows": rows(3), "5,000 rows": rows(5000),
    "rows twice": lambda f: pl.concat([f, f]).sort("sequence_counter"),
    "rows backwards": lambda f: f.reverse(),
    "rows shuffled": lambda f: f.sample(fraction=1, shuffle=True, seed=1),
    "only ids": lambda f: f.select("sequence_id", "subject"),
    "no ToF": lambda f: f.drop(cmi.TOF), "no THM": lambda f: f.drop(cmi.THM),
    "no acceleration": lambda f: f.drop(cmi.ACC), "no rotation": lambda f: f.drop(cmi.ROT),
    "no counter": lambda f: f.drop("sequence_counter", "row_id"),
    "a pixel missing": lambda f: f.drop("tof_3_v17"),
    "more columns": lambda f: f.with_columns(acc_w=1.0, gesture=pl.lit("Wave hello"), x=pl.lit(None)),
    "columns turned round": lambda f: f.select(reversed(f.columns)),
    "text": cast(pl.String), "whole numbers": cast(pl.Int64), "small numbers": cast(pl.Int8),
    "halves": cast(pl.Float32), "truth": cast(pl.Boolean), "Null dtype": cast(pl.Null),
    "words": one("broken"), "empty words": one(""), "dates": one(pl.lit(0).cast(pl.Date)),
    "all null": one(None), "all NaN": one(NAN), "infinite": one(INF), "below infinite": one(-INF),
    "huge": one(3e38), "huge below zero": one(-3e38), "beyond float32": one(1e300),
    "beyond int32": one(2**62), "tiny": one(1e-40), "zero": one(0.0), "constant": one(1.0),
    "acceleration infinite": one(INF, "acc_y"), "acceleration huge": one(3e38, "acc_x"),
    "acceleration zero": one(0.0, *cmi.ACC), "acceleration null": one(None, *cmi.ACC),
    "quaternions zero": one(0.0, *cmi.ROT), "quaternions huge": one(1e30, *cmi.ROT),
    "quaternions tiny": one(1e-30, *cmi.ROT), "quaternions below one": one(-1.0, *cmi.ROT),
    "w missing": one(None, "rot_w"), "rotation null": one(None, *cmi.ROT),
    "ToF 1000": one(1000, *cmi.TOF), "ToF -2.5": one(-2.5, *cmi.TOF), "ToF 254": one(254, *cmi.TOF),
    "ToF 255": one(255, *cmi.TOF), "ToF half": one(0.5, *cmi.TOF), "THM huge": one(1e30, *cmi.THM),
    "subject unknown": one("SUBJ_nobody", "subject"), "subject null": one(pl.lit(None, pl.String), "subject"),
    "subject a number": one(7, "subject"), "subject long": one("x" * 100_000, "subject"),
    "id a number": one(7, "sequence_id"), "id empty": one("", "sequence_id"),
}  # fmt: skip
PEOPLE: dict[str, Callable[[pl.DataFrame], pl.DataFrame]] = {
    "zero rows": lambda p: p.clear(),
    "nothing": lambda _: pl.DataFrame(),
    "two rows": lambda p: pl.concat([p, p]),
    "two that differ": lambda p: pl.concat([p, p.with_columns(handedness=1 - pl.col("handedness"))]),
    "no subject": lambda p: p.drop("subject"),
    "no age": lambda p: p.drop("age"),
    "text in age": one("old", "age"), "infinite age": one(INF, "age"), "huge age": one(1e300, "age"),
    "age below zero": one(-5, "age"), "null": one(None, *cmi.PERSON), "text": one("x", *cmi.PERSON),
    "left hand, as text": one("0", "handedness"), "third hand": one(2, "handedness"),
    "zero height": one(0, "height_cm", "shoulder_to_wrist_cm", "elbow_to_wrist_cm"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["full", "imu"])
def test_recordings_that_are_none_are_refused(questioned: Questioned, kind: str) -> None:
    for name, spoil in REFUSED.items():
        frame = spoil(getattr(questioned, kind))
        assert questioned.answer(frame, questioned.person) is None, name


@pytest.mark.parametrize("kind", ["full", "imu"])
def test_odd_recordings_are_answered(questioned: Questioned, kind: str) -> None:
    for name, spoil in ANSWERED.items():
        frame = spoil(getattr(questioned, kind))
        assert questioned.answer(frame, questioned.person), name
    for name, spoil in PEOPLE.items():
        assert questioned.answer(getattr(questioned, kind), spoil(questioned.person)), name


CELLS = st.sampled_from(
    [None, NAN, INF, -INF, 0.0, -0.0, 1e-40, 1.0, -1.0, 0.5, 249.0, 249.5, 254.0, 255.0, 1e6, -1e6, 1e30,
     -3e38, 3e38, 1e300, 2**62, "", "broken", "1e5", "nan", "inf", True]
)  # fmt: skip
GROUPS = st.sampled_from([cmi.ACC, cmi.ROT, cmi.THM, cmi.TOF[:64], cmi.TOF, cmi.SENSORS])
COLUMNS = st.one_of(
    GROUPS, st.lists(st.sampled_from(cmi.SENSORS), min_size=1, max_size=6, unique=True)
)
KINDS = st.sampled_from([pl.String, pl.Int64, pl.Int8, pl.UInt8, pl.Float32, pl.Boolean, pl.Null])


@st.composite
def damages(draw: st.DrawFn) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """One thing that goes wrong with a frame."""
    columns, value = draw(COLUMNS), draw(CELLS)
    first, length = draw(st.integers(0, 60)), draw(st.integers(1, 60))
    index = pl.int_range(pl.len())
    inside = (index >= first) & (index < first + length)

    def cells(f: pl.DataFrame) -> pl.DataFrame:
        """Some rows get the value; text makes text of the whole column."""
        kind = pl.String if isinstance(value, str) else pl.Float64
        new = pl.lit(value).cast(kind, strict=False)
        return f.with_columns(
            pl.when(inside).then(new).otherwise(pl.col(c).cast(kind, strict=False)).alias(c)
            for c in columns if c in f.columns
        )  # fmt: skip

    kind = draw(KINDS)
    present = lambda f: [c for c in columns if c in f.columns]  # noqa: E731
    return draw(
        st.sampled_from(
            [
                cells, cells, cells,
                lambda f: having(f, value, columns),
                lambda f: f.drop(present(f)),
                # text becomes a truth value only by way of a number
                lambda f: f.with_columns(pl.col(present(f)).cast(pl.Float64, strict=False).cast(kind, strict=False)),
                lambda f: f.slice(first, length),
                lambda f: pl.concat([f] * 3),
                lambda f: f.sample(fraction=1, shuffle=True, with_replacement=True, seed=first),
                lambda f: having(f, value, ["subject"]),
                lambda f: having(f, value, ["sequence_counter"]),
            ]
        )
    )  # fmt: skip


@st.composite
def people(draw: st.DrawFn) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """One thing that goes wrong with demographics."""
    columns, value = (
        draw(st.lists(st.sampled_from(cmi.PERSON), min_size=1, unique=True)),
        draw(CELLS),
    )
    kinds = [
        *PEOPLE.values(),
        lambda p: having(p, value, columns),
        lambda p: having(p, value, ["subject"]),
    ]
    return draw(st.sampled_from(kinds)) if draw(st.booleans()) else lambda p: p


def check_damaged(questioned: Questioned, spoils: list[Any], person: Any, blind: bool) -> None:
    frame = questioned.imu if blind else questioned.full
    for spoil in spoils:
        frame = spoil(frame)
    answer = questioned.answer(frame, person(questioned.person))
    assert (answer is None) == (len(frame) == 0)


DAMAGED = (st.lists(damages(), min_size=1, max_size=4), people(), st.booleans())


@limits(max_examples=100, deadline=None, derandomize=True, database=None)
@given(*DAMAGED)
def test_damaged_recordings(
    questioned: Questioned, spoils: list[Any], person: Any, blind: bool
) -> None:
    """Answered by the models as long as there is a row."""
    check_damaged(questioned, spoils, person, blind)


@pytest.mark.slow
@limits(max_examples=2000, deadline=None, database=None)
@given(*DAMAGED)
def test_many_damaged_recordings(
    questioned: Questioned, spoils: list[Any], person: Any, blind: bool
) -> None:
    check_damaged(questioned, spoils, person, blind)


# ---- determinism ---------------------------------------------------------------------------------


def same_opinions(one: Path, other: Path, *members: str) -> None:
    for member in members:
        for mode in ("all", "imu"):
            name = f"oof_{member}_{mode}_composite.npy"
            a, b = (np.load(folder / "oof" / name) for folder in (one, other))
            if member == "keras":
                np.testing.assert_allclose(a, b, atol=1e-6)
            else:
                assert a.tobytes() == b.tobytes(), name


def same_networks(one: Path, other: Path) -> None:
    """To the last bit of every tensor."""
    for path in sorted(one.glob("torch_models/*/*.pt")):
        a, b = (cmi.torch_read(p)["state"] for p in (path, other / path.relative_to(one)))
        assert a.keys() == b.keys()
        assert all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a), path


def data_of(folder: Path) -> dict[str, str]:
    (data,) = folder.glob("simulated-*")
    return {"CMI_DATA_DIR": str(data)}


def test_a_member_learns_the_same_alone(
    road: tuple[Path, str], plain: Path, tmp_path: Path
) -> None:
    same_opinions(road[0], plain, "lgbm")
    out = tmp_path / "out"
    good(run(out, USE_LGBM="0", USE_KERAS="0", **data_of(road[0])))
    same_opinions(road[0], out, "torch")
    same_networks(road[0], out)


@pytest.mark.parametrize("backend", ["threading", pytest.param("loky", marks=pytest.mark.slow)])
def test_two_workers_learn_the_same(road: tuple[Path, str], tmp_path: Path, backend: str) -> None:
    out = tmp_path / "out"
    good(run(out, USE_KERAS="0", CMI_WORKERS="2", CMI_BACKEND=backend, **data_of(road[0])))
    same_opinions(road[0], out, "lgbm", "torch")
    same_networks(road[0], out)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_two_workers_learn_the_same_with_keras(
    road: tuple[Path, str], tmp_path: Path, backend: str
) -> None:
    out = tmp_path / "out"
    good(run(out, CMI_WORKERS="2", CMI_BACKEND=backend, **data_of(road[0])))
    same_opinions(road[0], out, "lgbm", "torch", "keras")
    same_networks(road[0], out)


@pytest.mark.slow
def test_members_in_another_order_learn_the_same(road: tuple[Path, str], tmp_path: Path) -> None:
    """Keras first, then Torch, then LightGBM, each in a run of its own; then all are reused."""
    out = tmp_path / "out"
    for member in ("KERAS", "TORCH", "LGBM"):
        uses = {f"USE_{m}": str(int(m == member)) for m in ("KERAS", "TORCH", "LGBM")}
        good(run(out, **uses, **data_of(road[0])))
    printed = good(run(out, **data_of(road[0])))
    assert set(plan_of(printed).values()) == {("reuse", "everything matches")}
    same_opinions(road[0], out, "lgbm", "torch", "keras")
    same_networks(road[0], out)
