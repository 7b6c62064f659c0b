"""The score, and dry runs of notebooks that succeed or fail in every way Kaggle tells apart."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from made import GESTURES, OTHERS, TARGETS
from sklearn.metrics import f1_score
from test_kaggle_evaluation_gateway import answering
from test_score import plain_score

from kaggle_evaluation import dry_run
from kaggle_evaluation.core import relay
from kaggle_evaluation.metric import competition_score

SENSORS = ["thm_1", "thm_2", "tof_1_v0", "tof_5_v63"]
T1, T2, N1, N2 = *TARGETS[:2], *OTHERS[:2]
CODE = st.integers(0, 17)
NOTEBOOK = """
import os, sys, time
import polars as pl
{before}
from kaggle_evaluation.cmi_inference_server import CMIInferenceServer

calls = 0

def predict(sequence, demographics):
    global calls
    calls += 1
    open("scratch.txt", "a").write(sequence["sequence_id"][0])
    {predict}
    return "Text on phone" if sequence["thm_1"].is_null().all() else "{target}"

{serve}
"""
SERVE = """
server = CMIInferenceServer(predict)
if os.getenv("KAGGLE_IS_COMPETITION_RERUN"):
    server.serve()
"""
SHOWN = {1: "Notebook Inference Server Never Started", 6: "Submission Scoring Error"}
SERVER_ERROR = "Notebook Inference Server Error"
STALLS = "time.sleep(0 if calls == 1 else 60)"
TEXT = "return sequence['thm_1'].mean() + 'x'"
DIES = "The notebook ended with status 1 before it served. "
SERVES_ANOTHER = SERVE.replace("(predict)", "(print)")
WRONG = {
    "nowhere notebook.py": "is missing", "empty notebook.py": "no rows",
    "{} missing.py": "no Python script", "{} --truth no.csv notebook.py": "--truth",
    "{} --truth half.csv notebook.py": "lacks 3 recordings",
    "{} --truth twice.csv notebook.py": "more than one",
    "{} --working-dir nowhere notebook.py": "--working-dir",
}  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(CODE, CODE), min_size=1, max_size=40))
def test_scores_agree_with_scikit_learn(pairs):
    truth, prediction = np.array(pairs).T
    total = plain_score(truth, prediction)
    binary = f1_score(truth < 8, prediction < 8, zero_division=0)
    score = competition_score(*([GESTURES[code] for code in side] for side in (truth, prediction)))
    assert tuple(score) == pytest.approx((total, binary, 2 * total - binary))


def test_what_cannot_be_scored():
    wrong = ([], []), ([T1], [T1, T1]), ([T1], ["?"]), ([T1], [None]), (["?"], [T1])
    for truth, prediction in wrong:
        with pytest.raises(ValueError, match="score"):
            competition_score(truth, prediction)


@pytest.fixture
def test_dir(tmp_path: Path) -> Path:
    """Four recordings of 60 rows, the last without values of thm and tof."""
    folder = tmp_path / "a[2025]*b"
    folder.mkdir()
    lines = [",".join(["row_id", "sequence_id", "sequence_counter", "subject", "acc_x", *SENSORS])]
    for name in "ABCD":
        values = "28.5,29.0,-1.0,7.0" if name != "D" else ",,,"
        lines += [f"{name}_{i},{name},{i},S,0.5,{values}" for i in range(60)]
    (folder / "test.csv").write_text("\n".join(lines) + "\n")
    (folder / "test_demographics.csv").write_text("subject,age\nS,30\n")
    return folder


def options(test_dir: Path, *arguments: str) -> dry_run.Options:
    return dry_run.parse_options(["--test-dir", str(test_dir), *arguments, "notebook.py"])


def test_half_of_the_recordings_lose_their_sensors_and_labels_go(test_dir, tmp_path):
    given, chosen = pl.read_csv(test_dir / "test.csv", glob=False), set()
    given.with_columns(gesture=pl.lit(T1), phase=pl.lit("x")).write_csv(test_dir / "test.csv")
    for seed in range(12):
        names = dry_run.write_test_files(options(test_dir, "--seed", str(seed)), tmp_path)
        assert names == ["A", "B", "C", "D"]
        written = pl.read_csv(tmp_path / "test.csv")
        blind = written.filter(pl.all_horizontal(pl.col(SENSORS).is_null()))
        lost = set(blind["sequence_id"])
        assert len(lost) == 2
        assert "D" in lost
        chosen |= lost
        kept = ~pl.col("sequence_id").is_in(list(lost))
        assert written.filter(kept).equals(given.filter(kept))
        assert written.drop(SENSORS).equals(given.drop(SENSORS))
    assert chosen == set("ABCD")
    dry_run.write_test_files(options(test_dir, "--all-sensors"), tmp_path)
    assert pl.read_csv(tmp_path / "test.csv").equals(given)


def dry_run_of(
    test_dir: Path, *arguments: str, before: str = "", predict: str = "", serve: str = SERVE
) -> tuple[int, str, dict]:
    """Exit status, output and result.json of a dry run of NOTEBOOK with these parts."""
    notebook = test_dir.parent / "notebook.py"
    notebook.write_text(NOTEBOOK.format(before=before, predict=predict, serve=serve, target=T1))
    kept = test_dir.parent / "kept[1]*"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KAGGLE_")}
    done = runs.dry_run(test_dir, "--output-dir", kept, *arguments, notebook, env=environment)
    assert not done.stderr, done.stderr
    assert not (runs.ROOT / "scratch.txt").exists()
    result = kept / "result.json"
    return done.returncode, done.stdout, json.loads(result.read_text())


def test_a_notebook_that_passes_is_scored(test_dir):
    truth = test_dir.parent / "t[1]*.parquet"  # it may have a row per sample, and other recordings
    rows = {"sequence_id": list("AABCDX"), "gesture": [T1, T1, T1, T1, N1, N2]}
    pl.DataFrame(rows).write_parquet(truth)
    status, output, result = dry_run_of(test_dir, "--truth", str(truth), "--seed", "1")
    assert (status, result) == (0, {"Succeeded": True})
    kept = test_dir.parent / "kept[1]*" / "submission.parquet"
    submission = pl.read_parquet(kept, glob=False)
    assert sorted(submission["sequence_id"]) == list("ABCD")
    answers = dict(submission.rows())
    assert sorted(answers.values()) == [T1, T1, "Text on phone", "Text on phone"]
    gestures = [{"D": N1}.get(name, T1) for name in answers]
    expected = competition_score(gestures, list(answers.values())).total
    assert f"score        {expected:.5f}" in output
    assert re.search(r"verdict +passed: 4 valid answers", output)
    assert "recordings=4  imu_only=2" in output
    assert "for 3500 recordings of 9h00m" in output


@pytest.mark.parametrize(
    ("parts", "arguments", "number", "cause", "remedy"),
    [
        ({"serve": "print('no server')"}, "", 1, "ran to its end and never served", r"serve\(\)"),
        ({"before": "raise ImportError('no a')"}, "", 1, DIES + "ImportError: no a$", "Mend that"),
        ({"before": "os.kill(os.getpid(), 9)"}, "", 1, r"ended by signal 9 \(Killed\)", "Mend"),
        ({"before": "time.sleep(60)"}, "--startup-limit 2", 1, "within 2.0s, while", "load models"),
        ({"predict": "os._exit(7)"}, "", 1, "status 7 in the first call, which Kaggle", "memory"),
        ({"predict": "calls > 1 and os._exit(7)"}, "", 2, "call 2, .*ended with status 7", "crash"),
        ({"predict": TEXT}, "--text-columns", 3, "In call 1, .*TypeError: ", "traceback"),
        ({"serve": SERVES_ANOTHER}, "", 4, "no function named predict", "Pass a function named"),
        ({"predict": "return 'wave hello'"}, "", 6, "none of the 18", "spelt exactly"),
        ({"predict": STALLS}, "--response-limit 1", 7, "call 2, .*within 1.0s, the", "first call"),
        ({"predict": "time.sleep(60)"}, "--run-limit 5", 1, "limit of 5.0s, with 0 of 4", "faster"),
    ],
)
def test_a_notebook_that_fails(test_dir, parts, arguments, number, cause, remedy):
    status, output, result = dry_run_of(test_dir, *arguments.split(), **parts)
    assert status == 1
    assert (result["Succeeded"], result["ErrorType"]) == (False, number)
    shown = "Notebook Timeout" if "--run-limit" in arguments else SHOWN.get(number, SERVER_ERROR)
    verdict = rf'verdict +failed: {result["ErrorName"]} \({number}\). Kaggle would show "{shown}"'
    assert re.search(verdict, output)
    assert re.search(rf"cause +.*{cause}", output, re.M)
    assert re.search(rf"remedy +.*{remedy}", output)
    assert bool(result["ErrorDetails"]) == ("] details " in output)


def test_ctrl_c_ends_the_notebook_and_says_one_line(test_dir):
    pid_file, notebook = test_dir.parent / "pid", test_dir.parent / "notebook.py"
    wait = f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    notebook.write_text(NOTEBOOK.format(before="", predict=wait, serve=SERVE, target=T1))
    command = [sys.executable, "-m", "kaggle_evaluation.dry_run", "--test-dir", str(test_dir)]
    how = {"cwd": runs.ROOT, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    with subprocess.Popen([*command, str(notebook)], text=True, **how) as process:
        until = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert (process.returncode, said.count("\n")) == (130, 1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_a_slow_first_call_and_a_server_on_a_usual_port_are_no_failures(test_dir):
    slow = {"predict": "time.sleep(2 if calls == 1 else 0)"}
    usual = {"before": "del os.environ['KAGGLE_EVALUATION_PORT']"}  # as another package's server
    status, output, _ = dry_run_of(test_dir, "--response-limit", "1", **slow, **usual)
    assert status == 0, output


def test_servers_elsewhere_are_not_asked(test_dir):
    """Neither one that waits on a usual port nor one that comes up beside a starting notebook."""
    started = test_dir.parent / "started"
    servers = [relay.define_server(answering(T1)) for _ in range(2)]

    def start_the_other() -> None:
        while not started.exists():
            time.sleep(0.02)
        servers[1].start()

    servers[0].start()
    threading.Thread(target=start_the_other, daemon=True).start()
    serve = f"open({str(started)!r}, 'w'); time.sleep(4)"
    status, _, result = dry_run_of(test_dir, serve=serve)
    assert servers[1].port
    for server in servers:
        server.stop(0)
    assert (status, result["ErrorType"]) == (1, 1)


def test_wrong_arguments(test_dir, monkeypatch, capsys):
    monkeypatch.chdir(test_dir.parent)
    Path("notebook.py").write_text("")
    Path("half.csv").write_text(f"sequence_id,gesture\nA,{T1}\n")
    Path("twice.csv").write_text(f"sequence_id,gesture\nA,{T1}\nA,{T2}\n")
    Path("empty").mkdir()
    for name in ("test.csv", "test_demographics.csv"):
        Path("empty", name).write_text("sequence_id,subject\n")
    for arguments, text in WRONG.items():
        assert dry_run.main(f"--test-dir {arguments}".format(test_dir.name).split()) == 2
        assert text in capsys.readouterr().err
