"""The gateway: batches, checks, result files, file sharing; and whole local runs."""

import ast
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

from kaggle_evaluation import cmi_gateway
from kaggle_evaluation.cmi_gateway import CMIGateway
from kaggle_evaluation.cmi_inference_server import CMIInferenceServer
from kaggle_evaluation.core import base_gateway, progress, relay, templates
from kaggle_evaluation.core.base_gateway import GatewayRuntimeError
from kaggle_evaluation.core.base_gateway import GatewayRuntimeErrorType as Kind

ROOT = Path(__file__).resolve().parents[1]
GESTURES = """
    Above ear - pull hair|Cheek - pinch skin|Eyebrow - pull hair|Eyelash - pull hair
    Forehead - pull hairline|Forehead - scratch|Neck - pinch skin|Neck - scratch
    Drink from bottle/cup|Feel around in tray and pull out an object|Glasses on/off
    Pinch knee/leg skin|Pull air toward your face|Scratch knee/leg skin|Text on phone
    Wave hello|Write name in air|Write name on leg
"""
GESTURES = [name.strip() for name in re.split(r"[|\n]", GESTURES) if name.strip()]
SENSORS = [f"thm_{i}" for i in range(1, 6)]
SENSORS += [f"tof_{i}_v{j}" for i in range(1, 6) for j in range(64)]
MOTION = ["acc_x", "acc_y", "acc_z", "rot_w", "rot_x", "rot_y", "rot_z"]
HEADER = ["row_id", "sequence_id", "sequence_counter", "subject", *MOTION, *SENSORS]
DEMOGRAPHICS = "subject,adult_child,age,sex,handedness,height_cm,shoulder_to_wrist_cm,"
DEMOGRAPHICS += "elbow_to_wrist_cm\nSUBJ_A,1,25,1,1,165.0,52,23.0\nSUBJ_B,0,13,0,1,177.5,52,27.0\n"


def write_lines(folder: Path, lines: list[str], demographics: str) -> tuple[str, str]:
    """test.csv and test_demographics.csv."""
    folder.mkdir(exist_ok=True)
    paths = folder / "test.csv", folder / "test_demographics.csv"
    paths[0].write_text("\n".join(lines) + "\n")
    paths[1].write_text(demographics)
    return str(paths[0]), str(paths[1])


def write_files(folder: Path, *recordings: tuple[str, str, int, bool]) -> tuple[str, str]:
    """The two files, with (sequence_id, subject, rows, sensors) recordings."""
    lines = [",".join(HEADER)]
    for sequence, subject, n_rows, sensors in recordings:
        rest = ["28.5"] * 5 + ["-1.0"] * 320 if sensors else [""] * 325
        for counter in range(n_rows):
            motion = [f"{0.25 * (counter + 1):.2f}"] * len(MOTION)
            row = [f"{sequence}_{counter:06}", sequence, str(counter), subject, *motion, *rest]
            lines.append(",".join(row))
    return write_lines(folder, lines, DEMOGRAPHICS)


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Three small recordings; the current directory is empty and takes the result files."""
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    return write_files(
        tmp_path / "data",
        ("SEQ_1", "SUBJ_A", 4, True),
        ("SEQ_2", "SUBJ_B", 3, False),
        ("SEQ_3", "SUBJ_X", 1, True),
    )


@pytest.fixture(autouse=True)
def own_ports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Free ports as the ones to be tried, whatever else runs on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as two:
        ports = [probe.getsockname()[1] for probe in (one, two)]
    monkeypatch.setattr(relay, "GRPC_PORTS", ports)
    monkeypatch.delenv("KAGGLE_IS_COMPETITION_RERUN", raising=False)
    return ports


def batches_of(gateway: CMIGateway) -> dict[str, tuple[pl.DataFrame, pl.DataFrame]]:
    gateway.unpack_data_paths()
    return {row_ids[0]: batch for batch, row_ids in gateway.generate_data_batches()}


def failure(call: Callable[..., object], *args: object) -> GatewayRuntimeError:
    with pytest.raises(GatewayRuntimeError) as caught:
        call(*args)
    return caught.value


def result_json() -> dict[str, object]:
    return json.loads(Path("result.json").read_text())


def test_attributes_as_published():
    gateway = CMIGateway()
    assert gateway.target_gestures == GESTURES[:8]
    assert gateway.non_target_gestures == GESTURES[8:]
    assert gateway.all_gestures == GESTURES
    assert (gateway.timeout_seconds, gateway.client.endpoint_deadline_seconds) == (1800, 1800)
    assert (gateway.target_column_name, gateway.server) == ("gesture", None)
    gateway.unpack_data_paths()
    folder = "/kaggle/input/cmi-detect-behavior-with-sensor-data"
    assert gateway.test_path == f"{folder}/test.csv"
    assert gateway.demographics_path == f"{folder}/test_demographics.csv"
    gateway.set_response_timeout_seconds(7)
    assert (gateway.timeout_seconds, gateway.client.endpoint_deadline_seconds) == (7, 7)


def test_a_recording_has_all_its_rows_and_columns_and_its_subject(paths):
    batches = batches_of(CMIGateway(paths))
    assert sorted(batches) == ["SEQ_1", "SEQ_2", "SEQ_3"]
    sequence, demographics = batches["SEQ_2"]
    assert sequence.columns == HEADER
    assert sequence["row_id"].to_list() == ["SEQ_2_000000", "SEQ_2_000001", "SEQ_2_000002"]
    assert sequence["acc_x"].to_list() == [0.25, 0.5, 0.75]
    assert sequence.select(SENSORS).null_count().row(0) == (3,) * 325
    assert demographics.row(0) == ("SUBJ_B", 0, 13, 0, 1, 177.5, 52, 27.0)
    assert batches["SEQ_3"][1].shape == (0, 8)
    assert (sequence.schema, demographics.schema) == tuple(pl.read_csv(p).schema for p in paths)


def test_rows_keep_file_order_when_recordings_are_interleaved(tmp_path):
    rows = [f"{i},{name},{9 - i},S" for i, name in enumerate("BABAA")]
    lines = ["row_id,sequence_id,sequence_counter,subject", *rows]
    batches = batches_of(CMIGateway(write_lines(tmp_path, lines, "subject,age\nS,1\n")))
    assert batches["A"][0]["row_id"].to_list() == [1, 3, 4]
    assert batches["B"][0]["sequence_counter"].to_list() == [9, 7]


def test_the_order_is_new_in_every_run_unless_it_is_fixed(tmp_path):
    paths = write_files(tmp_path, *((f"SEQ_{i:03}", "SUBJ_A", 1, False) for i in range(60)))
    orders = []
    for seed in (None, None, 1, 1):
        gateway = CMIGateway(paths)
        gateway.order_seed = seed
        orders.append(list(batches_of(gateway)))
    assert orders[0] != orders[1]
    assert orders[2] == orders[3] != sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize(
    ("variable", "is_rerun", "dtype"),
    [
        ("", False, pl.Float64),
        ("1", False, pl.String),
        ("true", False, pl.String),
        ("", True, pl.String),
        ("0", True, pl.Float64),
    ],
)
def test_types_of_columns_that_start_late(tmp_path, monkeypatch, variable, is_rerun, dtype):
    """The original reads as text what has no value in the first 100 rows."""
    monkeypatch.setenv("KAGGLE_EVALUATION_ORIGINAL_DTYPES", variable)
    monkeypatch.setattr(base_gateway, "IS_RERUN", is_rerun)
    recordings = ("SEQ_1", "SUBJ_A", 120, False), ("SEQ_2", "SUBJ_B", 2, True)
    batches = batches_of(CMIGateway(write_files(tmp_path, *recordings)))
    for sequence, _ in batches.values():
        assert {sequence.schema[name] for name in SENSORS} == {dtype}
        assert sequence.schema["acc_x"] == pl.Float64
    last = batches["SEQ_2"][0]["thm_1"].to_list()
    assert last == (["28.5", "28.5"] if dtype == pl.String else [28.5, 28.5])


def test_a_setting_that_cannot_be_read(monkeypatch):
    monkeypatch.setenv("KAGGLE_EVALUATION_ORIGINAL_DTYPES", "maybe")
    with pytest.raises(ValueError, match="KAGGLE_EVALUATION_ORIGINAL_DTYPES='maybe'"):
        CMIGateway()


@pytest.mark.parametrize(
    ("late", "dtype"), [("0.5", pl.Float64), ("word", pl.String), ("7", pl.Int64), ("", pl.Int64)]
)
def test_columns_that_change_after_the_rows_polars_looks_at(tmp_path, late, dtype):
    """Where the original stops with an error, the local gateway reads on."""
    lines = ["sequence_id,subject,value,empty", "s,A,1,", *["s,A,2,"] * 150, f"s,A,{late},"]
    paths = write_lines(tmp_path / "a[2025]*b", lines, "subject\nA\n")
    frame = batches_of(CMIGateway(paths))["s"][0]
    assert (frame.schema["value"], frame.schema["empty"]) == (dtype, pl.Float64)
    assert frame.height == 152


def test_the_18_gestures_are_valid_and_nothing_else_is():
    check, row_ids = CMIGateway().validate_prediction_batch, pl.Series(["SEQ_1"])
    for gesture in GESTURES:
        check(gesture, row_ids)
    types = (None, 1, ["Wave hello"], pl.Series(["Wave hello"]), pd.DataFrame({"gesture": ["x"]}))
    invalid = [(answer, type(answer).__name__) for answer in types]
    invalid += [(answer, f'"{answer}"') for answer in ("wave hello", "Wave hello ", "")]
    for answer, text in invalid:
        error = failure(check, answer, row_ids)
        assert error.error_type is Kind.INVALID_SUBMISSION
        assert text in error.error_details


def test_the_generic_check_counts_rows():
    check, table = base_gateway.BaseGateway().validate_prediction_batch, pd.DataFrame({"a": [1]})
    for answer in (1, 1.5, "x", True, np.int_(1), np.float64(1), pl.Series([1]), table):
        for row_ids in (pl.Series(["a"]), table, ["a"], "a", 1):
            check(answer, row_ids)
    for answer in (None, {"a": 1}, [1], pl.DataFrame({"a": [1, 2]}), pd.Series([], dtype=float)):
        assert failure(check, answer, ["a"]).error_type is Kind.INVALID_SUBMISSION
    assert failure(check, 1, ["a", "b"]).error_type is Kind.INVALID_SUBMISSION
    assert failure(check, 1, []).error_type is Kind.GATEWAY_RAISED_EXCEPTION


def test_error_types_and_their_numbers():
    names = """UNSPECIFIED SERVER_NEVER_STARTED SERVER_CONNECTION_FAILED
        SERVER_RAISED_EXCEPTION SERVER_MISSING_ENDPOINT GATEWAY_RAISED_EXCEPTION
        INVALID_SUBMISSION GRPC_DEADLINE_EXCEEDED"""
    assert [(kind.value, kind.name) for kind in Kind] == list(enumerate(names.split()))
    error = GatewayRuntimeError(Kind.INVALID_SUBMISSION, "why")
    assert (error.error_type, error.error_details) == (Kind.INVALID_SUBMISSION, "why")
    assert str(error) == "(<GatewayRuntimeErrorType.INVALID_SUBMISSION: 6>, 'why')"
    assert GatewayRuntimeError(Kind.UNSPECIFIED).error_details is None
    with pytest.raises(KeyError):  # not the server's error
        CMIGateway().handle_server_error(KeyError("x"), "predict")


@pytest.mark.parametrize(
    ("details", "written"),
    [("x" * 9000, "x" * 8000), ("", None), (None, None), ('a "quote"\n', 'a "quote"\n')],
)
def test_result_json_of_a_failure(paths, details, written):
    CMIGateway(paths).write_result(GatewayRuntimeError(Kind.INVALID_SUBMISSION, details))
    failed = {"Succeeded": False, "ErrorType": 6, "ErrorName": "INVALID_SUBMISSION"}
    assert result_json() == {**failed, "ErrorDetails": written}


@pytest.mark.parametrize(
    ("predictions", "row_ids", "expected"),
    [
        (["a", "b"], [pl.Series("id", [1]), pl.Series("id", [2])], {"id": [1, 2], "y": ["a", "b"]}),
        ([np.int_(3)], [pl.DataFrame({"id": [1]})], {"id": [1], "y": [3]}),
        ([pd.Series([1], name="p")], [pd.Series([7], name="id")], {"id": [7], "p": [1]}),
        ([pd.DataFrame({"p": [1]})] * 2, [pd.Series([7])] * 2, {"row_id": [7, 7], "p": [1, 1]}),
        (pl.DataFrame({"p": [1]}), pl.DataFrame({"id": [2]}), {"id": [2], "p": [1]}),
    ],
)
def test_submissions_of_any_kind(tmp_path, predictions, row_ids, expected):
    gateway = base_gateway.BaseGateway(target_column_name="y")
    gateway.output_dir = tmp_path
    gateway.write_submission(predictions, row_ids)
    assert pl.read_parquet(tmp_path / "submission.parquet").to_dict(as_series=False) == expected


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with one file."""
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.csv").write_text("1")
    return tmp_path / "input"


def test_files_and_folders_are_mirrored_under_the_share_folder(tmp_path, source):
    gateway = base_gateway.BaseGateway(file_share_dir=str(tmp_path / "shared"))
    (mirrored,) = gateway.share_files([source / "a.csv"])
    assert mirrored == f"{tmp_path}/shared{source}/a.csv"
    assert Path(mirrored).read_text() == "1"
    (tmp_path / "other").mkdir()
    assert gateway.share_files([f"{tmp_path}/other"]) == [f"{tmp_path}/shared{tmp_path}/other"]


def test_files_are_copied_in_the_rerun_where_mounting_fails(tmp_path, source, monkeypatch):
    def no_mount(*_args: object, **_kwargs: object) -> None:
        raise FileNotFoundError("mount")

    monkeypatch.setattr(base_gateway, "IS_RERUN", value=True)
    monkeypatch.setattr(base_gateway.subprocess, "run", no_mount)
    monkeypatch.setattr(base_gateway, "_FILE_SHARE_DIR", f"{tmp_path}/default/")
    gateway = base_gateway.BaseGateway(file_share_dir=f"{tmp_path}/default/")
    (shared,) = gateway.share_files([source])
    assert (Path(shared) / "a.csv").read_text() == "1"
    with pytest.raises(FileNotFoundError):
        base_gateway.BaseGateway(file_share_dir=f"{tmp_path}/elsewhere").share_files([source])


def test_paths_that_cannot_be_shared(tmp_path, source):
    file = f"{source}/a.csv"
    cases = [[tmp_path / "missing"], [f"{source}/../input"], [f"{source}//a.csv"], [f"{file}/"]]
    for number, paths in enumerate([*cases, [b"/a"], [source / "a.csv", file]]):
        gateway = base_gateway.BaseGateway(file_share_dir=str(tmp_path / f"shared{number}"))
        assert failure(gateway.share_files, paths).error_type is Kind.GATEWAY_RAISED_EXCEPTION
    for folder in (str(source), None):  # not empty; none
        gateway = base_gateway.BaseGateway(file_share_dir=folder)
        assert "file_share_dir" in failure(gateway.share_files, [source]).error_details


def answering(answer: object) -> Callable[..., object]:
    """A predict function that returns the answer, or raises it."""

    def predict(_sequence: object, _demographics: object) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return predict


waving = answering("Wave hello")


def test_a_local_run_writes_the_submission_in_the_order_of_the_calls(paths, capsys):
    asked = []

    def predict(sequence: pl.DataFrame, demographics: pl.DataFrame) -> str:
        asked.append(sequence["sequence_id"][0])
        return GESTURES[len(demographics)]

    server = CMIInferenceServer(predict)
    with pytest.raises(TypeError):
        server.run_local_gateway(paths, None, "more")
    assert server.run_local_gateway(data_paths=paths) is None
    submission = pl.read_parquet("submission.parquet")
    assert submission.schema == {"sequence_id": pl.String, "gesture": pl.String}
    assert submission["sequence_id"].to_list() == asked
    expected = {"SEQ_1": GESTURES[1], "SEQ_2": GESTURES[1], "SEQ_3": GESTURES[0]}
    assert dict(submission.rows()) == expected
    assert not Path("result.json").exists()
    assert isinstance(server.gateway, CMIGateway)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"done=3/3  rate=\S+/s  eta=0.0s  slowest=\S+s SEQ_[123]  answers: ", last)
    assert f"{GESTURES[1]} 2, {GESTURES[0]} 1" in last


def test_a_server_runs_again_and_is_itself_asked_where_another_one_serves(paths, own_ports):
    other, server = CMIInferenceServer(answering("Text on phone")), CMIInferenceServer(waving)
    for own in (other, server):
        own.serve()
        own.serve()  # returns at once outside the re-run
    assert [other.server.port, server.server.port] == own_ports
    for _ in range(2):
        server.run_local_gateway(paths)
        assert server.server.port is None
        assert set(pl.read_parquet("submission.parquet")["gesture"]) == {"Wave hello"}
        os.remove("submission.parquet")
    assert other.server.port == own_ports[0]
    other.server.stop(0)


def test_a_late_start_is_warned_about_once(paths, monkeypatch, recwarn):
    monkeypatch.setattr(templates, "_initial_import_time", time.time() - 1000)
    monkeypatch.setattr(templates, "_issued_startup_time_warning", value=False)
    for _ in range(2):
        CMIInferenceServer(waving).run_local_gateway(paths)
    text = "seconds elapsed before server startup. The gateway of the hidden re-run waits for 900."
    assert sum(text in str(warning.message) for warning in recwarn) == 1


@pytest.mark.parametrize("original", ["0", "1"])
@pytest.mark.usefixtures("paths")
def test_a_folder_whose_name_is_a_pattern(tmp_path, monkeypatch, original):
    monkeypatch.setenv("KAGGLE_EVALUATION_ORIGINAL_DTYPES", original)
    files = write_files(tmp_path / "a[2025]*b", ("SEQ_9", "SUBJ_A", 2, True))
    CMIInferenceServer(waving).run_local_gateway(files)
    assert pl.read_parquet("submission.parquet").rows() == [("SEQ_9", "Wave hello")]


RAISED, INVALID = Kind.SERVER_RAISED_EXCEPTION, Kind.INVALID_SUBMISSION
TRACEBACK = r"predict failed:\nTraceback"


@pytest.mark.parametrize(
    ("answer", "kind", "details", "stderr"),
    [
        (ValueError("boom"), RAISED, r"boom", TRACEBACK + r"(?!.*_answer).*raise answer"),
        (ValueError('a "quoted" ü word'), RAISED, r'a "quoted" ü word', TRACEBACK),
        (ValueError(""), RAISED, r"", TRACEBACK),
        (ValueError("a\nb"), RAISED, r"(?s)<_Inactive.*: a\nb.*>", TRACEBACK),
        (ValueError("x" * 20_000), RAISED, r"x{5000,} … \(cut.*", TRACEBACK),
        (np.array(GESTURES)[0], RAISED, r"", r"becomes a plain str with str\(label\)"),
        ({1, 2}, RAISED, r"Type <class 'set'> cannot be sent.*", TRACEBACK),
        (None, INVALID, r".*NoneType.*", ""),
        ("Hello", INVALID, r'.*"Hello".*', ""),
        (print, Kind.SERVER_MISSING_ENDPOINT, r".*predict.*", ""),
    ],
)
def test_what_fails_in_a_local_run(paths, capfd, answer, kind, details, stderr):
    server = CMIInferenceServer(print if answer is print else answering(answer))
    error = failure(server.run_local_gateway, paths)
    assert error.error_type is kind
    assert re.fullmatch(details, error.error_details)
    assert error.__suppress_context__
    assert not Path("submission.parquet").exists()
    assert server.server.port is None
    captured = capfd.readouterr()
    assert re.search(r"stopped +done=0/3.*failed at SEQ_", captured.out)
    assert re.search(stderr, captured.err, re.DOTALL)


def test_a_call_beyond_its_deadline(paths, monkeypatch):
    """Not the first one, which may load models."""
    calls = itertools.count()

    def predict(_sequence: object, _demographics: object) -> str:
        time.sleep(0.5 if next(calls) in (0, 2) else 0)
        return "Wave hello"

    monkeypatch.setattr(cmi_gateway, "RESPONSE_LIMIT_SECONDS", 0.3)
    error = failure(CMIInferenceServer(predict).run_local_gateway, paths)
    assert (error.error_type, error.error_details) == (Kind.GRPC_DEADLINE_EXCEEDED, None)
    assert next(calls) == 3
    assert "within 0.3 s, the limit of every call but the first" in error.__notes__[0]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (None, "No such file"),
        ("a,b\n1,2\n", "sequence_id"),
        ("sequence_id,subject\n", "IndexError"),
    ],
)
def test_faults_of_the_files_are_the_gateways(paths, written, text):
    if written:
        Path("test.csv").write_text(written)
    error = failure(CMIInferenceServer(waving).run_local_gateway, ("test.csv", paths[1]))
    assert error.error_type is Kind.GATEWAY_RAISED_EXCEPTION
    assert text in error.error_details
    assert "Traceback" in error.error_details


def test_the_rerun_writes_result_json_and_returns(paths, monkeypatch):
    monkeypatch.setattr(base_gateway, "IS_RERUN", value=True)
    failed = {"Succeeded": False, "ErrorType": 3, "ErrorName": "SERVER_RAISED_EXCEPTION"}
    failed["ErrorDetails"] = "boom"
    for listener, result in (
        (waving, {"Succeeded": True}),
        (answering(ValueError("boom")), failed),
    ):
        server = CMIInferenceServer(listener)
        server.serve()
        gateway = CMIGateway(paths)
        assert gateway.client.channel_address == "inference_server"
        gateway.client.channel_address = "localhost"
        assert gateway.run() is None
        assert result_json() == result
        server.server.stop(0)
    gateway = CMIGateway(paths)
    gateway.client.channel_address = "inference-server.invalid"  # the other container has gone
    gateway.run()
    assert (result_json()["ErrorType"], result_json()["ErrorDetails"]) == (1, None)


def test_no_silence_while_a_call_lasts(monkeypatch, capsys):
    expected = {0: "0.0s", 59.94: "59.9s", 61: "1m01s", 3599.6: "1h00m", 7620: "2h07m"}
    assert {seconds: progress.duration(seconds) for seconds in expected} == expected
    assert progress.INTERVAL_SECONDS <= 30
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.4)
    with progress.Progress() as counter:
        counter.total = 3
        counter.begin("SEQ_1")
        counter.end("Wave hello")
        counter.begin("SEQ_2")
        time.sleep(1.4)
        counter.end("Wave hello")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 4  # after the first answer, 2 or more in between, at the end
    assert re.search(r"done=1/3 .* waiting=[1-9]\S*s for SEQ_2  answers: Wave hello 1", lines[-2])
    assert re.search(r"done=2/3 .* slowest=[1-9]\S*s SEQ_2  answers: Wave hello 2", lines[-1])


NOTEBOOK = """
import os, sys
from {package}.cmi_inference_server import CMIInferenceServer

def predict(sequence, demographics):
    assert "kaggle_evaluation" not in sys.modules or not {alone}
    return "Wave hello"

server = CMIInferenceServer(predict)
if os.getenv("KAGGLE_IS_COMPETITION_RERUN"):
    server.serve()
else:
    server.run_local_gateway(data_paths=sys.argv[1:])
"""


@pytest.mark.parametrize("package", ["kaggle_evaluation", "vendor.inner.kaggle_evaluation"])
def test_a_notebook_runs_unchanged_also_with_a_copy_in_a_subpackage(paths, tmp_path, package):
    target = tmp_path / "lib" / package.replace(".", "/")
    shutil.copytree(ROOT / "kaggle_evaluation", target)
    code = NOTEBOOK.format(package=package, alone=package != "kaggle_evaluation")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib")}
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert pl.read_parquet("submission.parquet").height == 3


def test_imports_are_relative_and_nothing_is_evaluated_or_unpickled():
    """Also in the modules that no notebook imports; the copy above needs no `sys.path`."""
    for path in (ROOT / "kaggle_evaluation").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        modules = {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        modules |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
        assert not {name.partition(".")[0] for name in modules} & {"kaggle_evaluation", "pickle"}, (
            path
        )
        used = {ast.unparse(node) for node in nodes if isinstance(node, ast.Name | ast.Attribute)}
        assert not used & {"sys.path", "eval", "exec"}, path


@pytest.mark.skipif("CMI_REAL_DATA" not in os.environ, reason="CMI_REAL_DATA names no folder")
@pytest.mark.usefixtures("paths")
def test_the_public_test_files():
    folder = Path(os.environ["CMI_REAL_DATA"])
    files = folder / "test.csv", folder / "test_demographics.csv"
    CMIInferenceServer(waving).run_local_gateway(files)
    submission = pl.read_parquet("submission.parquet")
    assert sorted(submission["sequence_id"]) == ["SEQ_000001", "SEQ_000011"]
    assert batches_of(CMIGateway(files))["SEQ_000001"][0].columns == HEADER
