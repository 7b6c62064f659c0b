"""Nothing lost, nothing let in: kills, stale files, full disks, hostile bundles and recordings."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
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
    "torch_amp": False, "torch_data_parallel": True, "torch_threads": 2, "dl_num_workers": 3,
    "keras_mp": False, "keras_policy": "float16", "keras_jit": True, "ensemble_weights": "lgbm:1",
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


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


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


def test_no_permission(plain: Path, open_folder: Path) -> None:
    """As a user who may read everything and write nothing."""
    out = copied(plain, open_folder / "out")
    for path in (out, *out.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    user: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
    try:
        subprocess.run([sys.executable, "-c", "import cmi_pipeline"], check=True, cwd=ROOT, **user)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no other user can run Python here")
    env = {
        **clean_environment(),
        **SMALL,
        **QUICK,
        "OUTPUT_PATH": str(out),
        "HOME": str(open_folder),
    }
    command = [sys.executable, str(ROOT / "cmi_pipeline.py")]
    done = subprocess.run(
        command, cwd=open_folder, env=env, capture_output=True, text=True, timeout=300, **user
    )
    one_line(done, str(out), "Permission denied", "Allow writing there")
    for path in (out, *out.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
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
