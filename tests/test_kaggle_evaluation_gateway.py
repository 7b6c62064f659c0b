"""The gateway: batches, checks, result files, file sharing; and whole local runs."""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from kaggle_evaluation import cmi_gateway  # noqa: E402
from kaggle_evaluation.cmi_gateway import CMIGateway  # noqa: E402
from kaggle_evaluation.cmi_inference_server import CMIInferenceServer  # noqa: E402
from kaggle_evaluation.core import base_gateway, progress, relay  # noqa: E402
from kaggle_evaluation.core.base_gateway import GatewayRuntimeError  # noqa: E402
from kaggle_evaluation.core.base_gateway import GatewayRuntimeErrorType as Kind  # noqa: E402

GESTURES = """
    Above ear - pull hair|Cheek - pinch skin|Eyebrow - pull hair|Eyelash - pull hair
    Forehead - pull hairline|Forehead - scratch|Neck - pinch skin|Neck - scratch
    Drink from bottle/cup|Feel around in tray and pull out an object|Glasses on/off
    Pinch knee/leg skin|Pull air toward your face|Scratch knee/leg skin|Text on phone
    Wave hello|Write name in air|Write name on leg
"""
GESTURES = [name.strip() for name in re.split(r"[|\n]", GESTURES) if name.strip()]
SENSORS = [f"thm_{i}" for i in range(1, 6)] + [
    f"tof_{i}_v{j}" for i in range(1, 6) for j in range(64)
]
MOTION = ["acc_x", "acc_y", "acc_z", "rot_w", "rot_x", "rot_y", "rot_z"]
HEADER = ["row_id", "sequence_id", "sequence_counter", "subject", *MOTION, *SENSORS]
DEMOGRAPHICS = """subject,adult_child,age,sex,handedness,height_cm,shoulder_to_wrist_cm,elbow_to_wrist_cm
SUBJ_A,1,25,1,1,165.0,52,23.0
SUBJ_B,0,13,0,1,177.5,52,27.0
"""


def csv_rows(sequence: str, subject: str, n_rows: int, sensors: bool) -> Iterator[str]:
    for counter in range(n_rows):
        motion = [f"{0.25 * (counter + 1):.2f}"] * len(MOTION)
        rest = ["28.5"] * 5 + ["-1.0"] * 320 if sensors else [""] * 325
        row = [f"{sequence}_{counter:06}", sequence, str(counter), subject, *motion, *rest]
        yield ",".join(row)


def write_files(folder: Path, *recordings: tuple[str, str, int, bool]) -> tuple[str, str]:
    """test.csv with (sequence_id, subject, rows, sensors) recordings, and its demographics."""
    rows = itertools.chain.from_iterable(csv_rows(*recording) for recording in recordings)
    paths = folder / "test.csv", folder / "test_demographics.csv"
    paths[0].write_text("\n".join([",".join(HEADER), *rows]) + "\n")
    paths[1].write_text(DEMOGRAPHICS)
    return str(paths[0]), str(paths[1])


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Three small recordings; the current directory is empty and takes the result files."""
    (tmp_path / "data").mkdir()
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
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
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


# ---- batches -----------------------------------------------------------------------------------


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
    types = [sequence.schema[name] for name in ("subject", "sequence_counter", "thm_1")]
    assert types == [pl.String, pl.Int64, pl.Float64]


def test_rows_keep_file_order_when_recordings_are_interleaved(tmp_path):
    names = ["B", "A", "B", "A", "A"]
    rows = [f"{i},{name},{9 - i},S" for i, name in enumerate(names)]
    (tmp_path / "t.csv").write_text(
        "\n".join(["row_id,sequence_id,sequence_counter,subject", *rows])
    )
    (tmp_path / "d.csv").write_text("subject,age\nS,1\n")
    batches = batches_of(CMIGateway([tmp_path / "t.csv", tmp_path / "d.csv"]))
    assert batches["A"][0]["row_id"].to_list() == [1, 3, 4]
    assert batches["B"][0]["sequence_counter"].to_list() == [9, 7]


def test_the_order_is_new_in_every_run_unless_it_is_fixed(tmp_path):
    paths = write_files(tmp_path, *((f"SEQ_{i:03}", "SUBJ_A", 1, False) for i in range(60)))
    orders = [list(batches_of(CMIGateway(paths))) for _ in range(2)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    fixed = CMIGateway(paths), CMIGateway(paths)
    for gateway in fixed:
        gateway.order_seed = 1
    assert list(batches_of(fixed[0])) == list(batches_of(fixed[1])) != sorted(orders[0])


@pytest.fixture
def late_sensors(tmp_path: Path) -> tuple[str, str]:
    """120 rows without sensors, then some with; the original reads those as text."""
    recordings = [("SEQ_1", "SUBJ_A", 120, False), ("SEQ_2", "SUBJ_B", 2, True)]
    return write_files(tmp_path, *recordings)


@pytest.mark.parametrize(
    ("variable", "rerun", "dtype"),
    [
        (None, False, pl.Float64),
        ("1", False, pl.String),
        ("true", False, pl.String),
        (None, True, pl.String),
        ("0", True, pl.Float64),
    ],
)
def test_types_of_columns_that_start_late(late_sensors, monkeypatch, variable, rerun, dtype):
    if variable is not None:
        monkeypatch.setenv("KAGGLE_EVALUATION_ORIGINAL_DTYPES", variable)
    monkeypatch.setattr(base_gateway, "IS_RERUN", rerun)
    batches = batches_of(CMIGateway(late_sensors))
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
    ("late", "dtype"),
    [("0.5", pl.Float64), ("word", pl.String), ("7", pl.Int64), ("", pl.Int64)],
)
def test_columns_that_change_after_the_rows_polars_looks_at(tmp_path, late, dtype):
    """Where the original stops with an error, the local gateway reads on."""
    rows = ["s,1,", *["s,2,"] * 150, f"s,{late},"]
    (tmp_path / "t.csv").write_text("\n".join(["sequence_id,value,empty", *rows]))
    frame = cmi_gateway.read_csv_with_numbers(tmp_path / "t.csv")
    assert frame.schema == {"sequence_id": pl.String, "value": dtype, "empty": pl.Float64}
    assert frame.height == 152


def test_ordinary_files_are_read_as_polars_reads_them(paths):
    for path in paths:
        plain = pl.read_csv(path)
        assert cmi_gateway.read_csv_with_numbers(path).equals(plain)
        assert cmi_gateway.read_csv_with_numbers(path).schema == plain.schema


# ---- checks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gesture", GESTURES)
def test_every_gesture_is_valid(gesture):
    CMIGateway().validate_prediction_batch(gesture, pl.Series(["SEQ_1"]))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (None, "NoneType"),
        (1, "int"),
        (["Wave hello"], "list"),
        (pl.Series(["Wave hello"]), "Series"),
        (pd.DataFrame({"gesture": ["Wave hello"]}), "DataFrame"),
        ("wave hello", '"wave hello"'),
        ("Wave hello ", '"Wave hello "'),
        ("", '""'),
    ],
)
def test_everything_else_is_an_invalid_submission(answer, text):
    error = failure(CMIGateway().validate_prediction_batch, answer, pl.Series(["SEQ_1"]))
    assert error.error_type is Kind.INVALID_SUBMISSION
    assert text in error.error_details


@pytest.mark.parametrize(
    ("answer", "row_ids", "kind"),
    [
        (None, [1], Kind.INVALID_SUBMISSION),
        ({"a": 1}, [1], Kind.INVALID_SUBMISSION),
        ([1], [1], Kind.INVALID_SUBMISSION),
        (1, [1, 2], Kind.INVALID_SUBMISSION),
        (pl.DataFrame({"a": [1, 2]}), [1], Kind.INVALID_SUBMISSION),
        (pd.Series([], dtype=float), [1], Kind.INVALID_SUBMISSION),
        (1, [], Kind.GATEWAY_RAISED_EXCEPTION),
    ],
)
def test_the_generic_check_refuses(answer, row_ids, kind):
    gateway = base_gateway.BaseGateway()
    error = failure(gateway.validate_prediction_batch, answer, pl.Series(row_ids))
    assert error.error_type is kind


@pytest.mark.parametrize(
    "answer",
    [1, 1.5, "x", True, np.int_(1), np.float64(1), pl.Series([1]), pd.DataFrame({"a": [1]})],
)
def test_the_generic_check_accepts(answer):
    for row_ids in (pl.Series(["a"]), pd.DataFrame({"id": [1]}), ["a"], "a", 1):
        base_gateway.BaseGateway().validate_prediction_batch(answer, row_ids)


# ---- errors and result files -------------------------------------------------------------------


def test_error_types_and_their_numbers():
    expected = """UNSPECIFIED SERVER_NEVER_STARTED SERVER_CONNECTION_FAILED
        SERVER_RAISED_EXCEPTION SERVER_MISSING_ENDPOINT GATEWAY_RAISED_EXCEPTION
        INVALID_SUBMISSION GRPC_DEADLINE_EXCEEDED"""
    assert {kind.name: kind.value for kind in Kind} == {
        name: number for number, name in enumerate(expected.split())
    }
    error = GatewayRuntimeError(Kind.INVALID_SUBMISSION, "why")
    assert (error.error_type, error.error_details) == (Kind.INVALID_SUBMISSION, "why")
    assert str(error) == "(<GatewayRuntimeErrorType.INVALID_SUBMISSION: 6>, 'why')"
    assert GatewayRuntimeError(Kind.UNSPECIFIED).error_details is None


@pytest.mark.parametrize(
    ("details", "written"),
    [("x" * 9000, "x" * 8000), ("", None), (None, None), ('a "quote"\n', 'a "quote"\n')],
)
def test_result_json_of_a_failure(paths, details, written):
    CMIGateway(paths).write_result(GatewayRuntimeError(Kind.INVALID_SUBMISSION, details))
    assert json.loads(Path("result.json").read_text()) == {
        "Succeeded": False,
        "ErrorType": 6,
        "ErrorName": "INVALID_SUBMISSION",
        "ErrorDetails": written,
    }


def test_errors_that_are_not_the_servers_pass_through():
    with pytest.raises(KeyError):
        CMIGateway().handle_server_error(KeyError("x"), "predict")
    kind = failure(CMIGateway().handle_server_error, relay.GRPCDeadlineError(), "predict")
    assert (kind.error_type, kind.error_details) == (Kind.GRPC_DEADLINE_EXCEEDED, None)
    kind = failure(CMIGateway().handle_server_error, socket.gaierror(), "predict")
    assert (kind.error_type, kind.error_details) == (Kind.SERVER_NEVER_STARTED, None)


@pytest.mark.parametrize(
    ("predictions", "row_ids", "expected"),
    [
        (["a", "b"], [pl.Series("id", [1]), pl.Series("id", [2])], {"id": [1, 2], "y": ["a", "b"]}),
        ([np.int_(3)], [pl.DataFrame({"id": [1]})], {"id": [1], "y": [3]}),
        (
            [pd.Series([1, 2], name="p")],
            [pd.Series([7, 8], name="id")],
            {"id": [7, 8], "p": [1, 2]},
        ),
        (
            [pd.DataFrame({"p": [1.5]})] * 2,
            [pd.Series([7])] * 2,
            {"row_id": [7, 7], "p": [1.5] * 2},
        ),
        (pl.DataFrame({"p": [1]}), pl.DataFrame({"id": [2]}), {"id": [2], "p": [1]}),
    ],
)
def test_submissions_of_any_kind(tmp_path, predictions, row_ids, expected):
    gateway = base_gateway.BaseGateway(target_column_name="y")
    gateway.output_dir = tmp_path
    gateway.write_submission(predictions, row_ids)
    assert pl.read_parquet(tmp_path / "submission.parquet").to_dict(as_series=False) == expected


# ---- file sharing ------------------------------------------------------------------------------


def test_files_are_mirrored_under_the_share_folder(tmp_path):
    source = tmp_path / "input" / "a.csv"
    source.parent.mkdir()
    source.write_text("1")
    gateway = base_gateway.BaseGateway(file_share_dir=str(tmp_path / "shared"))
    (mirrored,) = gateway.share_files([source])
    assert mirrored == f"{tmp_path}/shared{source}"
    assert Path(mirrored).read_text() == "1"
    folder = tmp_path / "other"
    folder.mkdir()
    assert gateway.share_files([str(folder)]) == [f"{tmp_path}/shared{folder}"]


def test_files_are_copied_in_the_rerun_where_mounting_fails(tmp_path, monkeypatch):
    def no_mount(*_args: object, **_kwargs: object) -> None:
        raise FileNotFoundError("mount")

    source = tmp_path / "input"
    source.mkdir()
    (source / "a.csv").write_text("1")
    monkeypatch.setattr(base_gateway, "IS_RERUN", value=True)
    monkeypatch.setattr(base_gateway.subprocess, "run", no_mount)
    monkeypatch.setattr(base_gateway, "_FILE_SHARE_DIR", f"{tmp_path}/default/")
    gateway = base_gateway.BaseGateway(file_share_dir=f"{tmp_path}/default/")
    shared = gateway.share_files([source, str(source / "a.csv")][:1])
    assert (Path(shared[0]) / "a.csv").read_text() == "1"
    with pytest.raises(FileNotFoundError):
        base_gateway.BaseGateway(file_share_dir=f"{tmp_path}/elsewhere").share_files([source])


def test_paths_that_cannot_be_shared(tmp_path):
    (tmp_path / "a").write_text("1")
    cases = [
        [tmp_path / "missing"],
        [f"{tmp_path}/x/../a"],
        [f"{tmp_path}//a"],
        [f"{tmp_path}/a/"],
        [b"/a"],
        [tmp_path / "a", str(tmp_path / "a")],
    ]
    for number, paths in enumerate(cases):
        gateway = base_gateway.BaseGateway(file_share_dir=str(tmp_path / f"shared{number}"))
        assert failure(gateway.share_files, paths).error_type is Kind.GATEWAY_RAISED_EXCEPTION
    for folder in (str(tmp_path), None):
        gateway = base_gateway.BaseGateway(file_share_dir=folder)
        error = failure(gateway.share_files, [tmp_path / "a"])
        assert "file_share_dir" in error.error_details


# ---- local runs --------------------------------------------------------------------------------


def one_gesture(_sequence: pl.DataFrame, _demographics: pl.DataFrame) -> str:
    return "Wave hello"


one_gesture.__name__ = "predict"


def test_a_local_run_writes_the_submission_in_the_order_of_the_calls(paths, capsys):
    asked = []

    def predict(sequence: pl.DataFrame, demographics: pl.DataFrame) -> str:
        asked.append(sequence["sequence_id"][0])
        return GESTURES[len(demographics)]

    server = CMIInferenceServer(predict)
    assert server.run_local_gateway(data_paths=paths) is None
    submission = pl.read_parquet("submission.parquet")
    assert submission.schema == {"sequence_id": pl.String, "gesture": pl.String}
    assert submission["sequence_id"].to_list() == asked
    expected = {"SEQ_1": GESTURES[1], "SEQ_2": GESTURES[1], "SEQ_3": GESTURES[0]}
    assert dict(submission.rows()) == expected
    assert not Path("result.json").exists()
    assert isinstance(server.gateway, CMIGateway)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"done=3/3  rate=\S+/s  eta=0.0s  slowest=0.\ds SEQ_[123]  answers: ", last)
    assert f"{GESTURES[1]} 2, {GESTURES[0]} 1" in last


def test_a_server_runs_twice_and_after_serve(paths, own_ports):
    server = CMIInferenceServer(one_gesture)
    server.serve()
    assert server.server.port == own_ports[0]
    for _ in range(2):
        server.run_local_gateway(paths)
        assert server.server.port is None
        os.remove("submission.parquet")


def test_its_own_server_is_asked_where_another_one_serves(paths, own_ports):
    def predict(_sequence: object, _demographics: object) -> str:
        return "Text on phone"

    other = CMIInferenceServer(predict)
    other.serve()
    CMIInferenceServer(one_gesture).run_local_gateway(paths)
    assert pl.read_parquet("submission.parquet")["gesture"].unique().to_list() == ["Wave hello"]
    assert other.server.port == own_ports[0]
    other.server.stop(0)


def raising(error: Exception) -> Callable[..., str]:
    def predict(_sequence: object, _demographics: object) -> str:
        raise error

    return predict


def returning(value: object) -> Callable[..., object]:
    def predict(_sequence: object, _demographics: object) -> object:
        return value

    return predict


@pytest.mark.parametrize(
    ("listener", "kind", "details"),
    [
        (raising(ValueError("boom")), Kind.SERVER_RAISED_EXCEPTION, r"boom"),
        (
            raising(ValueError('a "quoted" ü word')),
            Kind.SERVER_RAISED_EXCEPTION,
            r'a "quoted" ü word',
        ),
        (raising(ValueError()), Kind.SERVER_RAISED_EXCEPTION, r""),
        (raising(ValueError("a\nb")), Kind.SERVER_RAISED_EXCEPTION, r"(?s)<_Inactive.*: a\nb.*>"),
        (raising(ValueError("x" * 20_000)), Kind.SERVER_RAISED_EXCEPTION, r"x{5000,} … \(cut.*"),
        (returning(np.array(GESTURES)[0]), Kind.SERVER_RAISED_EXCEPTION, r""),
        (returning({1, 2}), Kind.SERVER_RAISED_EXCEPTION, r"Type <class 'set'> cannot be sent.*"),
        (returning(None), Kind.INVALID_SUBMISSION, r".*NoneType.*"),
        (returning("Hello"), Kind.INVALID_SUBMISSION, r'.*"Hello".*'),
        (print, Kind.SERVER_MISSING_ENDPOINT, r".*predict.*"),
    ],
)
def test_what_fails_in_a_local_run(paths, capfd, listener, kind, details):
    server = CMIInferenceServer(listener)
    error = failure(server.run_local_gateway, paths)
    assert error.error_type is kind
    assert re.fullmatch(details, error.error_details)
    assert error.__suppress_context__
    assert not Path("submission.parquet").exists()
    assert server.server.port is None
    captured = capfd.readouterr()
    assert re.search(r"stopped +done=0/3.*failed at SEQ_", captured.out)
    if kind is Kind.SERVER_RAISED_EXCEPTION:
        assert "predict failed:\nTraceback" in captured.err
    if "boom" in details:
        assert "raise error" in captured.err
        assert "_answer" not in captured.err


def test_the_note_about_numpy_labels_is_printed(paths, capfd):
    failure(CMIInferenceServer(returning(np.str_("Wave hello"))).run_local_gateway, paths)
    assert "becomes a plain str with str(label)" in capfd.readouterr().err


def test_a_call_beyond_its_deadline(paths, monkeypatch):
    calls = itertools.count()

    def predict(_sequence: object, _demographics: object) -> str:
        time.sleep(0.5 if next(calls) in (0, 2) else 0)
        return "Wave hello"

    monkeypatch.setattr(cmi_gateway, "RESPONSE_LIMIT_SECONDS", 0.3)
    error = failure(CMIInferenceServer(predict).run_local_gateway, paths)
    assert (error.error_type, error.error_details) == (Kind.GRPC_DEADLINE_EXCEEDED, None)
    assert next(calls) == 3


def test_faults_of_the_files_are_the_gateways(paths, tmp_path):
    server = CMIInferenceServer(one_gesture)
    (tmp_path / "nothing.csv").write_text("sequence_id,subject\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for name, text in (
        ("missing.csv", "No such file"),
        ("other.csv", "sequence_id"),
        ("nothing.csv", "IndexError"),
    ):
        error = failure(server.run_local_gateway, (tmp_path / name, paths[1]))
        assert error.error_type is Kind.GATEWAY_RAISED_EXCEPTION
        assert text in error.error_details
        assert "Traceback" in error.error_details


def test_surplus_arguments_are_refused(paths):
    server = CMIInferenceServer(one_gesture)
    with pytest.raises(TypeError):
        server.run_local_gateway(paths, None, "more")
    server.run_local_gateway(paths)


def test_the_rerun_writes_result_json_and_returns(paths, monkeypatch):
    monkeypatch.setattr(base_gateway, "IS_RERUN", value=True)
    for listener, succeeded in ((one_gesture, True), (raising(ValueError("boom")), False)):
        server = CMIInferenceServer(listener)
        server.serve()
        gateway = CMIGateway(paths)
        assert gateway.client.channel_address == "inference_server"
        gateway.client.channel_address = "localhost"
        assert gateway.run() is None
        result = json.loads(Path("result.json").read_text())
        assert result["Succeeded"] is succeeded
        server.server.stop(0)
    assert result == {
        "Succeeded": False,
        "ErrorType": 3,
        "ErrorName": "SERVER_RAISED_EXCEPTION",
        "ErrorDetails": "boom",
    }


def test_the_rerun_without_its_other_container(paths, monkeypatch):
    monkeypatch.setattr(base_gateway, "IS_RERUN", value=True)
    gateway = CMIGateway(paths)
    gateway.client.channel_address = "inference-server.invalid"
    gateway.run()
    result = json.loads(Path("result.json").read_text())
    assert (result["ErrorType"], result["ErrorDetails"]) == (1, None)


# ---- progress ----------------------------------------------------------------------------------


def test_no_silence_while_a_call_lasts(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.4)
    with progress.Progress() as counter:
        counter.total = 3
        counter.begin("SEQ_1")
        counter.end("Wave hello")
        counter.begin("SEQ_2")
        time.sleep(1.4)
        counter.end("Wave hello")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) in (4, 5)  # after the first answer, 2 or 3 in between, at the end
    assert re.search(r"done=1/3 .* waiting=1\.\ds for SEQ_2  answers: Wave hello 1", lines[-2])
    assert re.search(r"done=2/3 .* slowest=1\.\ds SEQ_2  answers: Wave hello 2", lines[-1])


def test_the_promised_interval():
    assert progress.INTERVAL_SECONDS <= 30


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (59.94, "59.9s"), (61, "1m01s"), (3599.6, "1h00m"), (7620, "2h07m")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


# ---- the package -------------------------------------------------------------------------------

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
    shutil.copytree(
        ROOT / "kaggle_evaluation", target, ignore=shutil.ignore_patterns("__pycache__")
    )
    code = textwrap.dedent(NOTEBOOK.format(package=package, alone=package != "kaggle_evaluation"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib")}
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert pl.read_parquet("submission.parquet").height == 3


def test_only_relative_imports_and_no_path_tricks():
    for path in (ROOT / "kaggle_evaluation").rglob("*.py"):
        code = path.read_text()
        assert "sys.path" not in code, path
        assert not re.search(r"^\s*(import|from) kaggle_evaluation", code.split('"""')[2], re.M), (
            path
        )
        assert not re.search(r"\b(eval|exec|pickle\.loads?)\(", code), path


@pytest.mark.skipif("CMI_REAL_DATA" not in os.environ, reason="CMI_REAL_DATA names no folder")
@pytest.mark.usefixtures("paths")
def test_the_public_test_files():
    folder = Path(os.environ["CMI_REAL_DATA"])
    files = folder / "test.csv", folder / "test_demographics.csv"
    CMIInferenceServer(one_gesture).run_local_gateway(files)
    submission = pl.read_parquet("submission.parquet")
    assert sorted(submission["sequence_id"]) == ["SEQ_000001", "SEQ_000011"]
    assert batches_of(CMIGateway(files))["SEQ_000001"][0].columns == HEADER
