"""What every gateway shares: its errors, the generic check of answers, result files, file sharing.

A gateway fails with one GatewayRuntimeError. Its type is what Kaggle maps to the message that a
participant sees; its details are for the host, and in a local run for you.
"""

from __future__ import annotations

import enum
import json
import os
import pathlib
import shutil
import socket
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import numpy as np

from . import relay
from .codec import is_a

if TYPE_CHECKING:  # heavy; imported for real inside the functions that need it
    import polars as pl

IS_RERUN = os.getenv("KAGGLE_IS_COMPETITION_RERUN") is not None  # an empty value counts too
_FILE_SHARE_DIR = "/kaggle/shared/"
_MAX_DETAILS = 8000  # characters in result.json
_PANDAS_TABLES = (is_a("pandas", "DataFrame"), is_a("pandas", "Series"))
_POLARS_TABLES = (is_a("polars", "DataFrame"), is_a("polars", "Series"))
_RAISED = "Exception calling application: "  # how gRPC reports a function that raised


class GatewayRuntimeErrorType(enum.Enum):
    """Why a run failed. The numbers are part of result.json."""

    UNSPECIFIED = 0
    SERVER_NEVER_STARTED = 1
    SERVER_CONNECTION_FAILED = 2
    SERVER_RAISED_EXCEPTION = 3
    SERVER_MISSING_ENDPOINT = 4
    GATEWAY_RAISED_EXCEPTION = 5
    INVALID_SUBMISSION = 6
    GRPC_DEADLINE_EXCEEDED = 7


class GatewayRuntimeError(Exception):
    """A failed run.

    Attributes:
        error_type: the class of failure.
        error_details: sentence, exception text or traceback; None if there is none.
    """

    def __init__(
        self, error_type: GatewayRuntimeErrorType, error_details: str | None = None
    ) -> None:
        self.error_type = error_type
        self.error_details = error_details


class BaseGateway:
    """The part of a gateway that knows nothing about its competition.

    Attributes:
        client: calls the inference server.
        server: a server of the gateway's own, stopped at the end of a run; normally None.
        data_paths: files to read instead of the competition's.
        file_share_dir: folder under which `share_files` mirrors files.
        target_column_name: column of submission.parquet for answers that are plain values.
        row_id_column_name: the same for row ids.
        output_dir: folder for submission.parquet and result.json.
    """

    def __init__(
        self,
        data_paths: Sequence[str | pathlib.Path] | None = None,
        file_share_dir: str | None = _FILE_SHARE_DIR,
        target_column_name: str | None = None,
    ) -> None:
        self.client = relay.Client("inference_server" if IS_RERUN else "localhost")
        self.server: Any = None
        self.data_paths = data_paths
        keep = bool(file_share_dir) or not os.path.exists("/kaggle")
        self.file_share_dir = file_share_dir if keep else _FILE_SHARE_DIR
        self.target_column_name = target_column_name
        self.row_id_column_name = "row_id"
        self.output_dir = pathlib.Path()
        self._shared_a_file = False

    # ---- answers -----------------------------------------------------------------------------

    def validate_prediction_batch(self, prediction_batch: Any, row_ids: Any) -> None:
        """Check that an answer has one row per row id.

        Args:
            prediction_batch: int, float, str, bool or np.int_, which count as one row, or a pandas
                or polars DataFrame or Series.
            row_ids: anything with a length; a single str or int counts as one row.

        Raises:
            GatewayRuntimeError: INVALID_SUBMISSION, or GATEWAY_RAISED_EXCEPTION without row ids.
        """
        invalid = GatewayRuntimeErrorType.INVALID_SUBMISSION
        if prediction_batch is None:
            raise GatewayRuntimeError(invalid, "No prediction received: predict returned None.")
        n_expected = 1 if isinstance(row_ids, str | int) else len(row_ids)
        if n_expected == 0:
            raise GatewayRuntimeError(
                GatewayRuntimeErrorType.GATEWAY_RAISED_EXCEPTION, "Missing row ids for the batch."
            )
        if isinstance(prediction_batch, int | float | str | bool | np.int_):
            n_received = 1
        elif any(is_table(prediction_batch) for is_table in (*_PANDAS_TABLES, *_POLARS_TABLES)):
            n_received = len(prediction_batch)
        else:
            raise GatewayRuntimeError(
                invalid, f"Invalid prediction data type, received: {type(prediction_batch)}"
            )
        if n_received != n_expected:
            raise GatewayRuntimeError(
                invalid,
                f"Invalid predictions: expected {n_expected} rows but received {n_received}",
            )

    def handle_server_error(self, exception: Exception, endpoint: str) -> NoReturn:
        """Raise what a failed call of `endpoint` means for the run.

        Raises:
            GatewayRuntimeError: one of the four SERVER types, or GRPC_DEADLINE_EXCEEDED.
            Exception: `exception` itself if the server is not to blame.
        """
        kinds, text = GatewayRuntimeErrorType, str(exception)
        never_started = "Failed to connect to server after waiting"
        if isinstance(exception, socket.gaierror) or (
            isinstance(exception, RuntimeError) and never_started in text
        ):
            raise _with_note(kinds.SERVER_NEVER_STARTED, text) from None
        if isinstance(exception, relay.GRPCDeadlineError):
            raise _with_note(kinds.GRPC_DEADLINE_EXCEEDED, text) from None
        if f"No listener for {endpoint} was registered" in text:
            raise GatewayRuntimeError(
                kinds.SERVER_MISSING_ENDPOINT, f"Server did not register a listener for {endpoint}"
            ) from None
        if not isinstance(exception, grpc.RpcError):
            raise exception
        if _RAISED in text:
            raise GatewayRuntimeError(
                kinds.SERVER_RAISED_EXCEPTION, _exception_text(exception)
            ) from None
        raise GatewayRuntimeError(kinds.SERVER_CONNECTION_FAILED, text) from None

    # ---- results -----------------------------------------------------------------------------

    def write_submission(self, predictions: Any, row_ids: Any) -> pathlib.Path:
        """Write submission.parquet: the row ids, then the predictions. Overwrites.

        Args:
            predictions: batches as `predict` returned them.
            row_ids: the row ids of each batch, in the same order.

        Raises:
            IndexError: there are no batches.
        """
        import polars as pl

        ids = _stack(row_ids, self.row_id_column_name)
        answers = _stack(predictions, self.target_column_name or "prediction")
        path = self.output_dir / "submission.parquet"
        pl.concat([ids, answers], how="horizontal").write_parquet(path)
        return path

    def write_result(self, error: GatewayRuntimeError | None = None) -> None:
        """Write result.json: success, or type and details of the failure."""
        result: dict[str, Any] = {"Succeeded": error is None}
        if error is not None:
            details = error.error_details
            result["ErrorType"] = error.error_type.value
            result["ErrorName"] = error.error_type.name
            result["ErrorDetails"] = str(details)[:_MAX_DETAILS] if details else None
        (self.output_dir / "result.json").write_text(json.dumps(result))

    # ---- file sharing ------------------------------------------------------------------------

    def share_files(self, input_paths: Sequence[str | pathlib.Path]) -> list[str]:
        """Mirror files and folders under `file_share_dir`, where the inference server sees them.

        /kaggle/input/x.csv becomes /kaggle/shared/kaggle/input/x.csv. In the re-run by a bind
        mount, in the default folder by a copy if that fails; elsewhere by a symbolic link.

        Raises:
            GatewayRuntimeError: GATEWAY_RAISED_EXCEPTION for a path that is missing, not
                normalised, goes through `..`, or is named twice, or a share folder in use.
        """
        share_dir = self._prepared_share_dir()
        sources = [_checked_path(path) for path in input_paths]
        if len(set(sources)) != len(sources):
            raise _file_error(f"Duplicate paths in {sources}: share each only once.")
        targets = [os.path.join(share_dir, source.lstrip(os.sep)) for source in sources]
        for source, target in zip(sources, targets, strict=True):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if not IS_RERUN:
                os.symlink(source, target)
            else:
                self._mount(source, target)
        return targets

    def _prepared_share_dir(self) -> str:
        """`file_share_dir`, which must be absent or empty before the first file."""
        if not self.file_share_dir:
            raise _file_error("file_share_dir is not set: pass a folder to mirror files in.")
        if not self._shared_a_file:
            if os.path.exists(self.file_share_dir) and (
                not os.path.isdir(self.file_share_dir) or os.listdir(self.file_share_dir)
            ):
                raise _file_error(
                    f"file_share_dir {self.file_share_dir} must be an empty directory."
                )
            os.makedirs(self.file_share_dir, exist_ok=True)
            self._shared_a_file = True
        return self.file_share_dir

    def _mount(self, source: str, target: str) -> None:
        """Bind mount; a copy where that fails, but only within the default folder."""
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        else:
            pathlib.Path(target).touch()
        try:
            subprocess.run(["mount", "--bind", source, target], check=True)
        except (OSError, subprocess.CalledProcessError):
            if self.file_share_dir != _FILE_SHARE_DIR:
                raise
            if os.path.isdir(source):
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copy2(source, target)


def _with_note(kind: GatewayRuntimeErrorType, note: str) -> GatewayRuntimeError:
    """An error without details, as the original has it, whose traceback says more."""
    error = GatewayRuntimeError(kind)
    error.add_note(note)
    return error


def _exception_text(error: grpc.RpcError) -> str:
    """The text of an exception raised in the server, out of the gRPC error that reports it.

    A text of several lines comes with the whole gRPC error around it, as in the original.
    """
    details = str(error.details())
    if not details.startswith(_RAISED) or "\n" in details:
        return str(error)
    return details.removeprefix(_RAISED)


def _file_error(details: str) -> GatewayRuntimeError:
    return GatewayRuntimeError(GatewayRuntimeErrorType.GATEWAY_RAISED_EXCEPTION, details)


def _checked_path(path: str | pathlib.Path) -> str:
    """`path` as an absolute str.

    Raises:
        GatewayRuntimeError: it is no path, missing, not normalised, or goes through `..`.
    """
    if not isinstance(path, str | pathlib.Path):
        raise _file_error(f"Paths to share must be of type str or pathlib.Path, got {type(path)}.")
    if os.pardir in str(path):
        raise _file_error(f"Path to share contains {os.pardir}: {path}")
    if str(path) != os.path.normpath(path):
        raise _file_error(f"Path to share {path} must be normalized. See `os.path.normpath`.")
    if not os.path.exists(path):
        raise _file_error(f"Path to share {path} does not exist.")
    return os.path.abspath(path)


def _stack(batches: Any, column_name: str) -> pl.DataFrame:
    """Batches below each other; plain values become the column `column_name`."""
    import polars as pl

    batches = batches if isinstance(batches, list) else [batches]
    if any(is_pandas(batches[0]) for is_pandas in _PANDAS_TABLES):
        import pandas as pd

        joined = pd.concat(batches, ignore_index=True)
        return pl.from_pandas(pd.DataFrame(joined).rename(columns={0: column_name}))
    if isinstance(batches[0], pl.DataFrame):
        return pl.concat(batches, how="vertical_relaxed")
    if isinstance(batches[0], pl.Series):
        frames = [series.to_frame(series.name or column_name) for series in batches]
        return pl.concat(frames, how="vertical_relaxed")
    values = [value.item() if isinstance(value, np.generic) else value for value in batches]
    return pl.DataFrame({column_name: values})
