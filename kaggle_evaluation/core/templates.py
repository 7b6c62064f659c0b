"""Templates of the two classes a competition fills in: its gateway and its inference server."""

from __future__ import annotations

import abc
import contextlib
import os
import pathlib
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from . import base_gateway, relay
from .base_gateway import GatewayRuntimeError, GatewayRuntimeErrorType
from .progress import Progress

_initial_import_time = time.time()  # s since the epoch
_issued_startup_time_warning = False
_STOP_SECONDS = 5  # s that a stopping server may take until its port is free


class Gateway(base_gateway.BaseGateway, abc.ABC):
    """Asks the inference server about every batch of test data and writes the answers to a file.

    Attributes:
        timeout_seconds: limit of every call after the first, in s; set by
            `set_response_timeout_seconds`.
        show_progress: whether `run` prints progress lines; by default outside the re-run.
        progress: counts calls and answers.
    """

    timeout_seconds: float

    def __init__(
        self,
        data_paths: Sequence[str | pathlib.Path] | None = None,
        file_share_dir: str | None = base_gateway._FILE_SHARE_DIR,
        target_column_name: str | None = None,
    ) -> None:
        super().__init__(data_paths, file_share_dir, target_column_name)
        self.show_progress = not base_gateway.IS_RERUN
        self.progress = Progress()

    @abc.abstractmethod
    def unpack_data_paths(self) -> None:
        """Store the entries of `data_paths`, or the competition's own files, in attributes."""
        raise NotImplementedError

    @abc.abstractmethod
    def generate_data_batches(self) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Yield the arguments of each `predict` call, and the row ids its answer is for."""
        raise NotImplementedError

    def get_all_predictions(self) -> tuple[list[Any], list[Any]]:
        """Ask about every batch, one after the other, checking each answer before the next.

        Returns:
            The answers, and the row ids of each.
        """
        predictions, all_row_ids = [], []
        for data_batch, row_ids in self.generate_data_batches():
            self.progress.begin(_first_row_id(row_ids))
            prediction = self.predict(*data_batch)
            self.validate_prediction_batch(prediction, row_ids)
            self.progress.end(prediction)
            predictions.append(prediction)
            all_row_ids.append(row_ids)
        return predictions, all_row_ids

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Call the participant's `predict`.

        Raises:
            GatewayRuntimeError: see `handle_server_error`.
        """
        try:
            return self.client.send("predict", *args, **kwargs)
        except Exception as error:  # noqa: BLE001  # re-raised, translated
            self.handle_server_error(error, "predict")

    def set_response_timeout_seconds(self, timeout_seconds: float) -> None:
        """Give every call after the first `timeout_seconds` s."""
        self.timeout_seconds = timeout_seconds
        self.client.endpoint_deadline_seconds = timeout_seconds

    def run(self) -> None:
        """Ask about all test data and write submission.parquet; in the re-run also result.json.

        Raises:
            GatewayRuntimeError: the run failed. Not in the re-run, where result.json says so.
        """
        error = self.run_without_raising()
        if base_gateway.IS_RERUN:
            self.write_result(error)
        elif error:
            raise error

    def run_without_raising(self) -> GatewayRuntimeError | None:
        """Ask about all test data and write submission.parquet; return the error, if any."""
        self.progress = Progress()
        try:
            with self.progress if self.show_progress else contextlib.nullcontext():
                self.unpack_data_paths()
                self.write_submission(*self.get_all_predictions())
            return None
        except GatewayRuntimeError as error:
            return error
        except Exception:  # noqa: BLE001  # whatever it is, it has a class in result.json
            return GatewayRuntimeError(
                GatewayRuntimeErrorType.GATEWAY_RAISED_EXCEPTION, traceback.format_exc()
            )
        finally:
            self.client.close()
            if self.server:
                self.server.stop(0)


class InferenceServer(abc.ABC):
    """What a notebook constructs: offers functions to the gateway.

    Attributes:
        server: the gRPC server; takes its port when it starts.
        client: a client of the server's own; None.
        gateway: the gateway of the latest local run.
    """

    gateway: Any

    def __init__(self, *endpoint_listeners: Callable[..., Any]) -> None:
        """Register functions under their names; the gateway calls the one named `predict`.

        Raises:
            ValueError: no function, one without a name, or all ports are taken.
        """
        self.server = relay.define_server(*endpoint_listeners)
        self.client = None

    @abc.abstractmethod
    def _get_gateway_for_test(
        self, data_paths: Sequence[str | pathlib.Path] | None, file_share_dir: str | None = None
    ) -> Any:
        """The competition's gateway, reading `data_paths`."""
        raise NotImplementedError

    def serve(self) -> None:
        """Start answering. In the re-run this never returns, elsewhere at once."""
        if self.server.port is None:
            self.server.start()
        if os.getenv("KAGGLE_IS_COMPETITION_RERUN") is not None:
            self.server.wait_for_termination()

    def run_local_gateway(
        self,
        data_paths: Sequence[str | pathlib.Path] | None = None,
        file_share_dir: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Let a gateway in this process question this server, and write submission.parquet.

        May be called again. Other servers on this machine are never asked.

        Args:
            data_paths: test.csv and test_demographics.csv; None: those of the competition.
            file_share_dir: folder for shared files; this competition has none.

        Raises:
            GatewayRuntimeError: the run failed. The traceback of `predict` goes to stderr.
            TypeError: arguments that the competition's gateway does not take.
        """
        _warn_if_started_late()
        if self.server.port is None:
            self.server.start()
        try:
            self.gateway = self._get_gateway_for_test(data_paths, file_share_dir, *args, **kwargs)
            self.gateway.client.ports = [self.server.port]
            self.gateway.run()
        except Exception as error:
            raise error from None
        finally:
            self.server.stop(0).wait(_STOP_SECONDS)


def _first_row_id(row_ids: Any) -> str:
    """A name for a batch."""
    values = np.ravel(np.asarray(row_ids))
    return str(values[0]) if len(values) else "batch without row ids"


def _warn_if_started_late() -> None:
    """Warn, once, when the re-run's gateway would have given up waiting by now."""
    global _issued_startup_time_warning
    elapsed = time.time() - _initial_import_time
    if elapsed > relay.STARTUP_LIMIT_SECONDS and not _issued_startup_time_warning:
        warnings.warn(
            f"{int(elapsed)} seconds elapsed before server startup. The gateway of the hidden "
            f"re-run waits for {relay.STARTUP_LIMIT_SECONDS}. Start the server first and load "
            "models in the first predict call, which has no deadline.",
            category=RuntimeWarning,
            stacklevel=3,
        )
        _issued_startup_time_warning = True
