"""The score, and dry runs of notebooks that succeed or fail in every way Kaggle tells apart."""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from kaggle_evaluation import dry_run  # noqa: E402
from kaggle_evaluation.metric import competition_score  # noqa: E402

TARGETS = [
    "Above ear - pull hair", "Cheek - pinch skin", "Eyebrow - pull hair", "Eyelash - pull hair",
    "Forehead - pull hairline", "Forehead - scratch", "Neck - pinch skin", "Neck - scratch",
]  # fmt: skip
OTHERS = [
    "Drink from bottle/cup", "Feel around in tray and pull out an object", "Glasses on/off",
    "Pinch knee/leg skin", "Pull air toward your face", "Scratch knee/leg skin", "Text on phone",
    "Wave hello", "Write name in air", "Write name on leg",
]  # fmt: skip
SENSORS = ["thm_1", "thm_2", "tof_1_v0", "tof_5_v63"]

# ---- the score ---------------------------------------------------------------------------------

T1, T2, N1, N2 = TARGETS[0], TARGETS[1], OTHERS[0], OTHERS[1]


@pytest.mark.parametrize(
    ("truth", "prediction", "score"),
    [
        ([T1, T2, N1, N2], [T1, T2, N2, N1], 1.0),
        ([T1, T2], [T1, T1], (1 + (2 / 3 + 0) / 2) / 2),
        ([N1, N2], [N2, N2], 0.5),
        ([T1, T2, N1], [N1, N1, N1], 1 / 12),
        (["Eyebrow - pull hair"] * 3, ["Forehead - pull hairline"] * 3, 0.5),
        (["Eyebrow - pull hair"] * 3, ["Text on phone"] * 3, 0.0),
    ],
)
def test_scores_worked_out_by_hand(truth, prediction, score):
    assert competition_score(truth, prediction).total == pytest.approx(score, abs=1e-12)


GESTURE = st.sampled_from(TARGETS + OTHERS)


@settings(max_examples=40, deadline=None)  # the oracle takes long to import
@given(st.lists(st.tuples(GESTURE, GESTURE), min_size=1, max_size=40))
def test_scores_agree_with_scikit_learn(pairs):
    metrics = pytest.importorskip("sklearn.metrics", reason="the oracle is not installed")
    truth, prediction = map(list, zip(*pairs, strict=True))
    binary = metrics.f1_score(
        [t in TARGETS for t in truth], [p in TARGETS for p in prediction], zero_division=0
    )
    nine = [[g if g in TARGETS else "non_target" for g in side] for side in (truth, prediction)]
    macro = metrics.f1_score(*nine, average="macro", zero_division=0)
    score = competition_score(truth, prediction)
    assert tuple(score) == pytest.approx(((binary + macro) / 2, binary, macro))


@pytest.mark.parametrize(
    ("truth", "prediction"),
    [([], []), ([T1], [T1, T1]), ([T1], ["?"]), ([T1], [None]), (["?"], [T1])],
)
def test_what_cannot_be_scored(truth, prediction):
    with pytest.raises(ValueError, match="score"):
        competition_score(truth, prediction)


# ---- test files --------------------------------------------------------------------------------


@pytest.fixture
def test_dir(tmp_path: Path) -> Path:
    """Four recordings of 60 rows, the last without values of thm and tof."""
    folder = tmp_path / "test"
    folder.mkdir()
    lines = [",".join(["row_id", "sequence_id", "sequence_counter", "subject", "acc_x", *SENSORS])]
    for name in "ABCD":
        values = "28.5,29.0,-1.0,7.0" if name != "D" else ",,,"
        lines += [f"{name}_{i},{name},{i},S,0.5,{values}" for i in range(60)]
    (folder / "test.csv").write_text("\n".join(lines) + "\n")
    (folder / "test_demographics.csv").write_text("subject,age\nS,30\n")
    return folder


def options(test_dir: Path, **changes: object) -> dry_run.Options:
    notebook = test_dir.parent / "notebook.py"
    arguments = ["--test-dir", str(test_dir), str(notebook)]
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
        arguments += [flag] if value is True else [flag, str(value)]
    return dry_run.parse_options(arguments)


def imu_only(table: pl.DataFrame) -> set[str]:
    return {
        name
        for (name,), rows in table.group_by("sequence_id")
        if rows.select(SENSORS).null_count().sum_horizontal().sum() == 4 * rows.height
    }


def test_half_of_the_recordings_lose_their_sensors(test_dir, tmp_path):
    chosen = set()
    for seed in range(12):
        names = dry_run.write_test_files(options(test_dir, seed=seed), tmp_path)
        assert names == ["A", "B", "C", "D"]
        written = pl.read_csv(tmp_path / "test.csv")
        lost = imu_only(written)
        assert len(lost) == 2
        assert "D" in lost
        chosen |= lost
        kept = ~pl.col("sequence_id").is_in(list(lost))
        assert written.filter(kept).equals(pl.read_csv(test_dir / "test.csv").filter(kept))
        assert written.drop(SENSORS).equals(pl.read_csv(test_dir / "test.csv").drop(SENSORS))
    assert chosen == set("ABCD")


def test_all_sensors_can_be_kept(test_dir, tmp_path):
    dry_run.write_test_files(options(test_dir, all_sensors=True), tmp_path)
    assert imu_only(pl.read_csv(tmp_path / "test.csv")) == {"D"}


def test_sensors_can_be_made_to_arrive_as_text(test_dir, tmp_path, capsys):
    dry_run.write_test_files(options(test_dir, text_columns=True), tmp_path)
    written = pl.read_csv(tmp_path / "test.csv")
    assert {written.schema[name] for name in SENSORS} == {pl.String}
    assert "arrive as text: 4 of 4" in capsys.readouterr().out


def test_labels_are_removed(test_dir, tmp_path, capsys):
    table = pl.read_csv(test_dir / "test.csv").with_columns(gesture=pl.lit(T1), phase=pl.lit("x"))
    table.write_csv(test_dir / "test.csv")
    dry_run.write_test_files(options(test_dir), tmp_path)
    assert not {"gesture", "phase"} & set(pl.read_csv(tmp_path / "test.csv").columns)
    assert "removed label columns: phase, gesture" in capsys.readouterr().out


def test_the_truth_may_have_a_row_per_sample(tmp_path):
    table = pl.DataFrame({"sequence_id": ["A", "A", "B", "X"], "gesture": [T1, T1, N1, N2]})
    table.write_csv(tmp_path / "t.csv")
    table.write_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        assert dry_run.read_truth(tmp_path / name, ["B", "A"]) == {"A": T1, "B": N1}


# ---- dry runs ----------------------------------------------------------------------------------

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


def dry_run_of(
    test_dir: Path, *arguments: str, before: str = "", predict: str = "", serve: str = SERVE
) -> tuple[int, str, dict]:
    """Exit status, output and result.json of a dry run of NOTEBOOK with these parts."""
    notebook = test_dir.parent / "notebook.py"
    notebook.write_text(
        NOTEBOOK.format(before=before, predict=predict, serve=serve, target=TARGETS[0])
    )
    kept = test_dir.parent / "kept"
    command = [sys.executable, "-m", "kaggle_evaluation.dry_run", "--test-dir", str(test_dir)]
    command += ["--output-dir", str(kept), *arguments, str(notebook)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KAGGLE_")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert not done.stderr, done.stderr
    assert not (ROOT / "scratch.txt").exists()
    result = kept / "result.json"
    return done.returncode, done.stdout, json.loads(result.read_text())


def test_a_notebook_that_passes_is_scored(test_dir):
    truth = test_dir.parent / "truth.csv"
    pl.DataFrame({"sequence_id": list("ABCD"), "gesture": [T1, T1, T1, N1]}).write_csv(truth)
    status, output, result = dry_run_of(test_dir, "--truth", str(truth), "--seed", "1")
    assert (status, result) == (0, {"Succeeded": True})
    submission = pl.read_parquet(test_dir.parent / "kept" / "submission.parquet")
    assert sorted(submission["sequence_id"]) == list("ABCD")
    answers = dict(submission.rows())
    assert sorted(answers.values()) == [T1, T1, "Text on phone", "Text on phone"]
    gestures = [{"D": N1}.get(name, T1) for name in answers]
    expected = competition_score(gestures, list(answers.values())).total
    assert f"score        {expected:.5f}" in output
    assert re.search(r"verdict +passed: 4 valid answers", output)
    assert "recordings=4  imu_only=2" in output


@pytest.mark.parametrize(
    ("parts", "arguments", "number", "shown", "text"),
    [
        ({"serve": "print('no server here')"}, (), 1, "Never Started", "no server here"),
        ({"before": "raise ImportError('no such thing')"}, (), 1, "Never Started", "no such thing"),
        (
            {"before": "time.sleep(60)"},
            ("--startup-limit", "2"),
            1,
            "Never Started",
            "serve() first",
        ),
        ({"predict": "os._exit(7)"}, (), 1, "Never Started", "died in the first call"),
        ({"predict": "calls > 1 and os._exit(7)"}, (), 2, "Server Error", "status 7"),
        ({"predict": "1 / 0"}, (), 3, "Inference Server Error", "division by zero"),
        (
            {"predict": "return sequence['thm_1'].mean() + 'x'"},
            ("--text-columns",),
            3,
            "Inference Server Error",
            "Traceback",
        ),
        (
            {"predict": "import numpy; return numpy.array(['Wave hello'])[0]"},
            (),
            3,
            "Inference Server Error",
            "str(label)",
        ),
        (
            {"serve": SERVE.replace("(predict)", "(print)")},
            (),
            4,
            "Inference Server Error",
            "named",
        ),
        ({"predict": "return None"}, (), 6, "Submission Scoring Error", "NoneType"),
        ({"predict": "return 'wave hello'"}, (), 6, "Submission Scoring Error", '"wave hello"'),
        (
            {"predict": "time.sleep(0 if calls == 1 else 60)"},
            ("--response-limit", "1"),
            7,
            "Inference Server Error",
            "took too long",
        ),
        ({"predict": "time.sleep(60)"}, ("--run-limit", "5"), 1, "Notebook Timeout", "limit"),
    ],
)
def test_a_notebook_that_fails(test_dir, parts, arguments, number, shown, text):
    status, output, result = dry_run_of(test_dir, *arguments, **parts)
    assert status == 1
    assert (result["Succeeded"], result["ErrorType"]) == (False, number)
    assert re.search(rf"verdict +failed: {result['ErrorName']} \({number}\)", output)
    assert shown in output
    assert text in output


def test_a_slow_first_call_is_no_failure_and_late_loading_neither(test_dir):
    status, output, _ = dry_run_of(
        test_dir, "--response-limit", "1", predict="time.sleep(2 if calls == 1 else 0)"
    )
    assert status == 0, output


def test_a_server_elsewhere_is_not_asked(test_dir):
    """A notebook without a server fails, though another server waits on the usual port."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("127.0.0.1", 50051))
            holder.listen()
        except OSError:
            pass  # someone else holds it, which serves the purpose
        status, _, result = dry_run_of(test_dir, "--startup-limit", "2", serve="time.sleep(60)")
    assert (status, result["ErrorType"]) == (1, 1)


def test_a_port_is_known_by_the_session_that_holds_it():
    """Another run's server may come up on a usual port while the notebook is still starting."""
    hold = "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1]); input()"
    with subprocess.Popen(
        [sys.executable, "-uc", hold], start_new_session=True, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        port = int(process.stdout.readline())
        assert dry_run.listens(port, process.pid)
        assert not dry_run.listens(port, os.getsid(0))
        assert not dry_run.listens(dry_run.free_port(), process.pid)
        client = dry_run.NotebookClient(process, [port])
        with socket.create_server(("127.0.0.1", 0)) as foreign:
            assert client._try_port(foreign.getsockname()[1], None) is None
        assert not client.reached
        process.communicate("\n")


def test_a_server_of_another_package_is_found_on_the_usual_ports(test_dir):
    """Such a server knows nothing of the port this package hands over."""
    status, output, _ = dry_run_of(test_dir, before="del os.environ['KAGGLE_EVALUATION_PORT']")
    assert status == 0, output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--test-dir", "nowhere", "notebook.py"], "is missing"),
        (["--test-dir", "test", "missing.py"], "no Python script"),
        (["--test-dir", "test", "test/test.csv"], "no Python script"),
        (["--test-dir", "test", "--truth", "no.csv", "notebook.py"], "--truth"),
        (["--test-dir", "test", "--truth", "half.csv", "notebook.py"], "lacks 3 recordings"),
        (["--test-dir", "test", "--truth", "twice.csv", "notebook.py"], "more than one"),
        (["--test-dir", "test", "--working-dir", "nowhere", "notebook.py"], "--working-dir"),
        (["--test-dir", "empty", "notebook.py"], "no rows"),
    ],
)
def test_wrong_arguments(test_dir, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(test_dir.parent)
    Path("notebook.py").write_text("")
    Path("half.csv").write_text(f"sequence_id,gesture\nA,{T1}\n")
    Path("twice.csv").write_text(f"sequence_id,gesture\nA,{T1}\nA,{T2}\n")
    Path("empty").mkdir()
    for name in ("test.csv", "test_demographics.csv"):
        Path("empty", name).write_text("sequence_id,subject\n")
    assert dry_run.main(arguments) == 2
    assert text in capsys.readouterr().err


def test_usage():
    for arguments, status in ((["--help"], 0), ([], 2)):
        command = [sys.executable, "-m", "kaggle_evaluation.dry_run", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status
        assert "--test-dir" in done.stdout + done.stderr


def test_every_error_type_has_a_verdict():
    assert len(dry_run.VERDICTS) == 8
    assert all(remedy.endswith(".") for _, remedy in dry_run.VERDICTS.values())
    assert textwrap.dedent(dry_run.__doc__).startswith("Run a notebook")
