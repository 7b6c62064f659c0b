"""Gateway of "CMI - Detect Behavior with Sensor Data": one recording per call, one gesture back."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core import base_gateway, templates
from .core.base_gateway import GatewayRuntimeError, GatewayRuntimeErrorType

if TYPE_CHECKING:  # heavy; imported for real inside the functions that need it
    import polars as pl

COMPETITION = "cmi-detect-behavior-with-sensor-data"
INPUT_DIRS = (f"/kaggle/input/{COMPETITION}", f"/kaggle/input/competitions/{COMPETITION}")
RESPONSE_LIMIT_SECONDS = 30 * 60  # s for every call after the first
TEXT_COLUMNS = ("row_id", "sequence_id", "subject")  # all others hold numbers
INFERENCE_ROWS = 100  # rows from which polars derives the column types

TARGET_GESTURES = (
    "Above ear - pull hair",
    "Cheek - pinch skin",
    "Eyebrow - pull hair",
    "Eyelash - pull hair",
    "Forehead - pull hairline",
    "Forehead - scratch",
    "Neck - pinch skin",
    "Neck - scratch",
)
NON_TARGET_GESTURES = (
    "Drink from bottle/cup",
    "Feel around in tray and pull out an object",
    "Glasses on/off",
    "Pinch knee/leg skin",
    "Pull air toward your face",
    "Scratch knee/leg skin",
    "Text on phone",
    "Wave hello",
    "Write name in air",
    "Write name on leg",
)


class CMIGateway(templates.Gateway):
    """Sends each recording of test.csv, with its subject's demographics, in random order.

    Attributes:
        target_gestures, non_target_gestures, all_gestures: the 8, the 10 and the 18 answers.
        test_path, demographics_path: files to read; set by `unpack_data_paths`.
        original_dtypes: True: column types as the original reads them, where a column without a
            value in its first 100 rows is String, numbers further down included. False: such a
            column is Float64. None: True in the re-run, which must not be kinder than Kaggle's.
            Set from KAGGLE_EVALUATION_ORIGINAL_DTYPES (1, 0 or unset).
        order_seed: fixes the order of the recordings; None: a new order in every run.
    """

    test_path: str | Path
    demographics_path: str | Path

    def __init__(self, data_paths: Sequence[str | Path] | None = None) -> None:
        super().__init__(data_paths, file_share_dir=None, target_column_name="gesture")
        self.row_id_column_name = "sequence_id"
        self.target_gestures = list(TARGET_GESTURES)
        self.non_target_gestures = list(NON_TARGET_GESTURES)
        self.all_gestures = self.target_gestures + self.non_target_gestures
        self.original_dtypes = _flag_from_env("KAGGLE_EVALUATION_ORIGINAL_DTYPES")
        self.order_seed: int | None = None
        self.set_response_timeout_seconds(RESPONSE_LIMIT_SECONDS)

    def unpack_data_paths(self) -> None:
        """Set `test_path` and `demographics_path` from `data_paths`, or to Kaggle's files.

        Those lie in the first of INPUT_DIRS as in the original, since 2026 also in the second.
        """
        if self.data_paths:
            self.test_path, self.demographics_path = self.data_paths[:2]
        else:
            mounted = [folder for folder in INPUT_DIRS if os.path.isdir(folder)]
            folder = mounted[0] if mounted else INPUT_DIRS[0]
            self.test_path = f"{folder}/test.csv"
            self.demographics_path = f"{folder}/test_demographics.csv"

    def generate_data_batches(self) -> Iterator[tuple[tuple[pl.DataFrame, pl.DataFrame], Any]]:
        """Yield ((recording, demographics of its subject), its sequence_id) per recording.

        A recording has all rows of its id in file order and all columns of test.csv. Demographics
        have no rows if the subject is unknown.
        """
        import polars as pl

        test = self._read_csv(self.test_path)
        demographics = self._read_csv(self.demographics_path)
        row = pl.int_range(pl.len(), dtype=pl.UInt32).alias("row")
        rows_of = test.select("sequence_id", row).group_by("sequence_id", maintain_order=True)
        recordings = rows_of.agg("row").rows()
        seed = time.time_ns() if self.order_seed is None else self.order_seed
        random.Random(seed).shuffle(recordings)
        self.progress.total = len(recordings)
        for sequence_id, rows in recordings:
            sequence = test[rows]
            subject = sequence["subject"][0]
            of_subject = demographics.filter(pl.col("subject") == subject)
            yield (sequence, of_subject), pl.Series("sequence_id", [sequence_id])

    def validate_prediction_batch(self, prediction: Any, row_ids: Any) -> None:
        """Check that the answer is one of the 18 gestures, as a str.

        Raises:
            GatewayRuntimeError: INVALID_SUBMISSION.
        """
        invalid = GatewayRuntimeErrorType.INVALID_SUBMISSION
        if not isinstance(prediction, str):
            raise GatewayRuntimeError(
                invalid, f"Invalid prediction type: predict must return str, got {type(prediction)}"
            )
        if prediction not in self.all_gestures:
            raise GatewayRuntimeError(
                invalid, f'Invalid prediction: "{prediction}" is none of the 18 gestures.'
            )
        super().validate_prediction_batch(prediction, row_ids)

    def _read_csv(self, path: str | Path) -> pl.DataFrame:
        """Read a CSV file with the column types that `original_dtypes` asks for."""
        import polars as pl

        original = self.original_dtypes
        if base_gateway.IS_RERUN if original is None else original:
            return pl.read_csv(path, glob=False)
        return read_csv_with_numbers(path)


def read_csv_with_numbers(path: str | Path) -> pl.DataFrame:
    """Read a CSV file so that every column without values, and every late starter, holds numbers.

    Columns with a value in the first 100 rows get the type that polars gives them by itself.
    """
    import polars as pl

    try:
        head = pl.read_csv(path, n_rows=INFERENCE_ROWS, glob=False)
        numbers = dict.fromkeys(_valueless_columns(head), pl.Float64)
        return pl.read_csv(path, schema_overrides=numbers, glob=False)
    except pl.exceptions.ComputeError:  # further down, fractions among integers, or text
        frame = pl.read_csv(path, infer_schema_length=None, glob=False)
        return frame.cast(dict.fromkeys(_valueless_columns(frame), pl.Float64))


def _valueless_columns(frame: pl.DataFrame) -> list[str]:
    """Names of the number columns without a single value."""
    return [
        column.name
        for column in frame
        if column.name not in TEXT_COLUMNS and column.null_count() == len(column)
    ]


def _flag_from_env(name: str) -> bool | None:
    """True for 1 or true, False for 0 or false, None if the variable is unset or empty.

    Raises:
        ValueError: any other value.
    """
    text = os.getenv(name, "").lower()
    if text not in ("", "0", "1", "false", "true"):
        raise ValueError(f"{name}={text!r} cannot be read. Use 1, 0, or leave it unset.")
    return text in ("1", "true") if text else None
