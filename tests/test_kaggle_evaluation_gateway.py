"""The gateway: batches, checks, result files, file sharing; and whole local runs."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from made import ACC, GESTURES, PERSON, ROT, THM, TOF
from runs import free_ports

from kaggle_evaluation.cmi_gateway import CMIGateway
from kaggle_evaluation.cmi_inference_server import CMIInferenceServer
from kaggle_evaluation.core import base_gateway, relay
from kaggle_evaluation.core.base_gateway import GatewayRuntimeError
from kaggle_evaluation.core.base_gateway import GatewayRuntimeErrorType as Kind

SENSORS = [*THM, *TOF]
HEADER = ["row_id", "sequence_id", "sequence_counter", "subject", *ACC, *ROT, *SENSORS]
PEOPLE = "SUBJ_A,1,25,1,1,165.0,52,23.0\nSUBJ_B,0,13,0,1,177.5,52,27.0\n"
DEMOGRAPHICS = ",".join(["subject", *PERSON]) + "\n" + PEOPLE
RAISED, INVALID = Kind.SERVER_RAISED_EXCEPTION, Kind.INVALID_SUBMISSION
TRACEBACK = r"predict failed:\nTraceback"


def write_lines(folder: Path, lines: list[str], demographics: str) -> tuple[str, str]:
    folder.mkdir(exist_ok=True)
    paths = folder / "test.csv", folder / "test_demographics.csv"
    paths[0].write_text("\n".join(lines) + "\n")
    paths[1].write_text(demographics)
    return str(paths[0]), str(paths[1])


def write_files(folder: Path, *recordings: tuple[str, str, int, int]) -> tuple[str, str]:
    """The two files, with (sequence_id, subject, rows, sensors) recordings."""
    lines = [",".join(HEADER)]
    for sequence, subject, n_rows, sensors in recordings:
        rest = ["28.5"] * 5 + ["-1.0"] * 320 if sensors else [""] * 325
        for counter in range(n_rows):
            motion = [f"{0.25 * (counter + 1):.2f}"] * 7
            row = [f"{sequence}_{counter:06}", sequence, str(counter), subject, *motion, *rest]
            lines.append(",".join(row))
    return write_lines(folder, lines, DEMOGRAPHICS)


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Three small recordings; the current directory is empty and takes the result files."""
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    three = ("SEQ_1", "SUBJ_A", 4, 1), ("SEQ_2", "SUBJ_B", 3, 0), ("SEQ_3", "SUBJ_X", 1, 1)
    return write_files(tmp_path / "data", *three)


@pytest.fixture(autouse=True)
def own_ports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    ports = free_ports(2)
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


def test_published_attributes():
    gateway = CMIGateway()
    assert gateway.target_gestures + gateway.non_target_gestures == gateway.all_gestures == GESTURES
    assert (gateway.timeout_seconds, gateway.client.endpoint_deadline_seconds) == (1800, 1800)
    gateway.unpack_data_paths()
    assert gateway.test_path == "/kaggle/input/cmi-detect-behavior-with-sensor-data/test.csv"
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


def test_types_of_columns_that_start_late(tmp_path, monkeypatch):
    """The original reads as text what has no value in the first 100 rows."""
    recordings = ("SEQ_1", "SUBJ_A", 120, False), ("SEQ_2", "SUBJ_B", 2, True)
    paths = write_files(tmp_path / "a[2025]*b", *recordings)
    cases = (0, "", 0), (1, "1", 0), (1, "true", 0), (1, "", 1), (0, "0", 1)
    for text, variable, is_rerun in cases:
        monkeypatch.setenv("KAGGLE_EVALUATION_ORIGINAL_DTYPES", variable)
        monkeypatch.setattr(base_gateway, "IS_RERUN", is_rerun)
        batches = batches_of(CMIGateway(paths))
        for sequence, _ in batches.values():
            assert {sequence.schema[name] for name in SENSORS} == {(pl.Float64, pl.String)[text]}
            assert sequence.schema["acc_x"] == pl.Float64
        assert batches["SEQ_2"][0]["thm_1"].to_list() == 2 * [(28.5, "28.5")[text]]
    monkeypatch.setenv("KAGGLE_EVALUATION_ORIGINAL_DTYPES", "maybe")
    with pytest.raises(ValueError, match="KAGGLE_EVALUATION_ORIGINAL_DTYPES='maybe'"):
        CMIGateway()


def test_columns_that_change_after_the_rows_polars_looks_at(tmp_path):
    """Where the original stops with an error, the local gateway reads on."""
    for late, dtype in {"0.5": pl.Float64, "word": pl.String, "7": pl.Int64, "": pl.Int64}.items():
        lines = ["sequence_id,subject,value,empty", "s,A,1,", *["s,A,2,"] * 150, f"s,A,{late},"]
        paths = write_lines(tmp_path, lines, "subject\nA\n")
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


def test_files_are_mirrored_under_the_share_folder(tmp_path):
    (source := tmp_path / "input").mkdir()
    (source / "a.csv").write_text("1")
    gateway = base_gateway.BaseGateway(file_share_dir=str(tmp_path / "shared"))
    mirrored = gateway.share_files([source / "a.csv"])
    assert mirrored == [f"{tmp_path}/shared{source}/a.csv"]
    assert Path(mirrored[0]).read_text() == "1"
    for wrong in (tmp_path / "missing", f"{source}/../input", f"{source}//a.csv", b"/a"):
        error = failure(gateway.share_files, [wrong])
        assert error.error_type is Kind.GATEWAY_RAISED_EXCEPTION


def answering(answer: object = "Wave hello") -> Callable[..., object]:
    def predict(_sequence: object, _demographics: object) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return predict


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
    lines = capsys.readouterr().out.splitlines()
    (first,), last = [line for line in lines if "done=1/3" in line], lines[-1]
    assert "eta" not in first, "models are loaded for the first answer: it tells no pace"
    assert re.search(r"done=3/3  rate=\S+/s  eta=0.0s  slowest=\S+s SEQ_[123]  answers: ", last)
    assert f"{GESTURES[1]} 2, {GESTURES[0]} 1" in last


def test_a_server_runs_again_and_is_itself_asked_where_another_one_serves(paths, own_ports):
    other, server = CMIInferenceServer(answering("Text on phone")), CMIInferenceServer(answering())
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


@pytest.mark.parametrize(
    ("answer", "kind", "details", "stderr"),
    [
        (ValueError("boom"), RAISED, r"boom", TRACEBACK + r"(?!.*_answer).*raise answer"),
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


def test_faults_of_the_files_are_the_gateways(paths):
    files = {"": "No such file", "a,b\n1,2\n": "sequence_id", "sequence_id,subject\n": "IndexError"}
    for written, text in files.items():
        if written:
            Path("test.csv").write_text(written)
        error = failure(CMIInferenceServer(answering()).run_local_gateway, ("test.csv", paths[1]))
        assert error.error_type is Kind.GATEWAY_RAISED_EXCEPTION
        assert text in error.error_details
        assert "Traceback" in error.error_details


def test_the_rerun_writes_result_json_and_returns(paths, monkeypatch):
    monkeypatch.setattr(base_gateway, "IS_RERUN", value=True)
    failed = {"Succeeded": False, "ErrorType": 3, "ErrorName": "SERVER_RAISED_EXCEPTION"}
    failed["ErrorDetails"] = "boom"
    for answer, result in ("Wave hello", {"Succeeded": True}), (ValueError("boom"), failed):
        server = CMIInferenceServer(answering(answer))
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
    gateway.write_result(GatewayRuntimeError(Kind.INVALID_SUBMISSION, "x" * 9000))
    assert result_json()["ErrorDetails"] == "x" * 8000
