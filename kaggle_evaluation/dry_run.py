"""Run a notebook as Kaggle's hidden re-run would, and say what Kaggle would answer.

    python -m kaggle_evaluation.dry_run --test-dir DIR [--truth FILE] NOTEBOOK.py

The notebook runs in a process of its own, in an empty working folder, with the re-run's environment
variable set. The gateway in this process waits for its server within the start-up limit and asks
about every recording of DIR/test.csv: in random order, half of them IMU only, each answer within
the deadline. The exit status is 0 if every answer was valid, 1 if not, 2 for wrong arguments, 130
after Ctrl-C. Linux and macOS; Windows has no process groups.

A notebook that imports kaggle_evaluation finds this package through PYTHONPATH. One that brings
Kaggle's own is questioned as well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .cmi_gateway import RESPONSE_LIMIT_SECONDS, CMIGateway
from .core import relay
from .core.base_gateway import GatewayRuntimeError, GatewayRuntimeErrorType
from .core.progress import Progress, duration, log
from .metric import competition_score

if TYPE_CHECKING:  # heavy; imported for real inside the functions that need it
    import polars as pl

RUN_LIMIT_SECONDS = 9 * 60 * 60  # s, of the whole notebook on Kaggle
HIDDEN_RECORDINGS = 3500  # about as many as the hidden test has
LABEL_COLUMNS = ("sequence_type", "orientation", "behavior", "phase", "gesture")  # train.csv only
LOG_LINES_SHOWN = 40
PROC = Path("/proc")  # where Linux tells of processes and sockets
_KILL_SECONDS = 5  # s between asking the notebook to end and ending it
_END_SECONDS = 2  # s for a process whose connection broke to be seen to have ended


class UsageError(Exception):
    """The arguments, or the files they name, do not allow a dry run."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    notebook: Path
    test_dir: Path
    truth: Path | None
    output_dir: Path | None
    working_dir: Path | None
    seed: int
    all_sensors: bool
    text_columns: bool
    startup_limit: float  # s
    response_limit: float  # s
    run_limit: float  # s


@dataclass(frozen=True)
class Outcome:
    """How the run ended."""

    error: GatewayRuntimeError | None
    timed_out: bool  # the whole run, not one call
    reached: bool  # a server accepted the connection at least once
    exit_status: int | None  # of the notebook; None if it was still serving


# ---- test files ----------------------------------------------------------------------------------


def write_test_files(options: Options, folder: Path) -> list[str]:
    """Write test.csv and test_demographics.csv as the gateway shall read them.

    Returns:
        The sequence ids, in file order.

    Raises:
        UsageError: a file is missing, or test.csv is empty or has no sequence_id.
    """
    import polars as pl

    for name in ("test.csv", "test_demographics.csv"):
        if not (options.test_dir / name).is_file():
            raise UsageError(f"{options.test_dir / name} is missing: --test-dir needs both files.")
    # As text: numbers keep their spelling, so polars infers the same types from the copy.
    test = pl.read_csv(options.test_dir / "test.csv", infer_schema_length=0, glob=False)
    if "sequence_id" not in test.columns or test.is_empty():
        raise UsageError(f"{options.test_dir / 'test.csv'} has no rows or no column sequence_id.")
    if labels := [name for name in LABEL_COLUMNS if name in test.columns]:
        log("test", f"removed label columns: {', '.join(labels)}")
    test = without_some_sensors(test.drop(labels), options)
    test.write_csv(folder / "test.csv")
    demographics = (options.test_dir / "test_demographics.csv").read_bytes()
    (folder / "test_demographics.csv").write_bytes(demographics)
    return test["sequence_id"].unique(maintain_order=True).to_list()


def without_some_sensors(test: pl.DataFrame, options: Options) -> pl.DataFrame:
    """`test` with thm_* and tof_* empty in half of the recordings, chosen by the seed.

    Recordings that are IMU only already count. With `text_columns` these come first in the file,
    where they make the original's type inference read the sensors as text.
    """
    import polars as pl

    sensors = [name for name in test.columns if name.startswith(("thm_", "tof_"))]
    empty = pl.all_horizontal(pl.col(sensors).is_null()) if sensors else pl.lit(value=True)
    state = test.group_by("sequence_id", maintain_order=True).agg(empty.all().alias("imu_only"))
    imu_only = set(state.filter("imu_only")["sequence_id"])
    complete = state.filter(~pl.col("imu_only"))["sequence_id"].to_list()
    n_missing = 0 if options.all_sensors else max(0, len(state) // 2 - len(imu_only))
    imu_only |= set(random.Random(options.seed).sample(complete, min(n_missing, len(complete))))
    chosen = pl.col("sequence_id").is_in(list(imu_only))
    test = test.with_columns(pl.when(~chosen).then(pl.col(sensors)))
    if options.text_columns:
        test = pl.concat([test.filter(chosen), test.filter(~chosen)])
    n_text = sum(test[name].head(100).null_count() == min(100, len(test)) for name in sensors)
    log(
        "test",
        f"recordings={len(state)}  imu_only={len(imu_only)}  rows={len(test)}  "
        f"sensor columns that arrive as text: {n_text} of {len(sensors)}",
    )
    return test


def read_truth(path: Path, sequence_ids: list[str]) -> dict[str, str]:
    """The true gesture of each recording, from a CSV or Parquet file; further rows are ignored.

    Raises:
        UsageError: the file lacks a column or a recording, or contradicts itself.
    """
    import polars as pl

    try:
        read = pl.read_parquet if path.suffix == ".parquet" else pl.read_csv
        table = read(path, glob=False)
        pairs = table.select("sequence_id", "gesture").unique().rows()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UsageError(
            f"--truth {path} cannot be read: {error}. It needs the columns sequence_id and gesture."
        ) from None
    truth = dict(pairs)
    if len(truth) < len(pairs):
        raise UsageError(f"--truth {path} gives a recording more than one gesture.")
    if missing := [name for name in sequence_ids if name not in truth]:
        raise UsageError(f"--truth {path} lacks {len(missing)} recordings, such as {missing[0]}.")
    return {name: truth[name] for name in sequence_ids}


# ---- the notebook --------------------------------------------------------------------------------


@contextlib.contextmanager
def notebook_process(
    options: Options, working_dir: Path, log_path: Path, port: int
) -> Iterator[subprocess.Popen[bytes]]:
    """The notebook in a process group of its own, which ends with the context."""
    package_parent = str(Path(__file__).resolve().parents[1])
    search_path = [package_parent, *filter(None, [os.getenv("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search_path),
        "PYTHONUNBUFFERED": "1",
        "KAGGLE_IS_COMPETITION_RERUN": "1",
        "KAGGLE_EVALUATION_PORT": str(port),
    }
    with log_path.open("wb") as log_file:
        process = subprocess.Popen(
            [sys.executable, str(options.notebook.resolve())],
            cwd=working_dir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all it started, gently first."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def time_limit(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """End the process after `seconds`, unless the context ends before; the event tells which."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        end_group(process)

    timer = threading.Timer(seconds, expire)
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()


class NotebookClient(relay.Client):
    """Looks for the notebook's server while the notebook lives.

    It is on the port that this package was told to take, or, if the notebook brings another
    package, on one of the usual ports that nobody held before, held by the notebook's own session.
    """

    def __init__(self, process: subprocess.Popen[bytes], ports: Sequence[int]) -> None:
        super().__init__("localhost", ports)
        self._process = process
        self.reached = False

    def _try_port(self, port: int, request: Any) -> Any:
        """Skip ports without a listener, which saves gRPC's half second of retries."""
        try:
            socket.create_connection((self.channel_address, port), timeout=1).close()
        except OSError:
            return None
        if not listens(port, self._process.pid):
            return None
        self.reached = True
        return super()._try_port(port, request)

    def _check_host(self) -> None:
        """A notebook that has ended is a container that has gone."""
        if self._process.poll() is not None:
            raise socket.gaierror(f"The notebook ended with status {self._process.returncode}.")


def listens(port: int, session: int) -> bool:
    """Does a process of this session hold the port? True where the system does not tell."""
    if (PROC / "net" / "tcp").exists():
        holders = list(holders_by_proc(port))
    elif shutil.which("lsof"):  # macOS
        holders = holders_by_lsof(port)
    else:
        return True
    for holder in holders:
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(holder) == session:
                return True
    return False


def holders_by_proc(port: int) -> Iterator[int]:
    """Ids of the processes that listen on the port, as Linux tells."""
    tables = [table for name in ("tcp", "tcp6") if (table := PROC / "net" / name).exists()]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    held = {f"socket:[{row[9]}]" for row in rows
            if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}  # fmt: skip
    for process in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(os.readlink(fd) in held for fd in (process / "fd").iterdir()):
                yield int(process.name)


def holders_by_lsof(port: int) -> list[int]:
    """The same, as `lsof` tells, which macOS has."""
    command = ["lsof", "-nP", "-t", f"-iTCP:{port}", "-sTCP:LISTEN"]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return [int(word) for word in found.stdout.split()]


def free_port() -> int:
    """A port on which nothing listens, neither with IPv4 nor with IPv6."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = int(probe.getsockname()[1])
        if relay._is_free(port):
            return port


# ---- the run -------------------------------------------------------------------------------------


def run(options: Options, folder: Path, output_dir: Path) -> tuple[CMIGateway, Outcome]:
    """Start the notebook and question it about the test files in `folder`."""
    port = free_port()
    others = [other for other in relay.GRPC_PORTS if relay._is_free(other)]
    working_dir = options.working_dir or folder / "working"
    working_dir.mkdir(exist_ok=True)
    gateway = CMIGateway((folder / "test.csv", folder / "test_demographics.csv"))
    gateway.output_dir, gateway.order_seed, gateway.show_progress = output_dir, options.seed, True
    if gateway.original_dtypes is None:
        gateway.original_dtypes = True
    log("notebook", f"started {options.notebook} in {working_dir}")
    log_path = output_dir / "notebook.log"
    with notebook_process(options, working_dir, log_path, port) as process:
        gateway.client = client = NotebookClient(process, [port, *others])
        client.startup_limit_seconds = options.startup_limit
        gateway.set_response_timeout_seconds(options.response_limit)
        with time_limit(process, options.run_limit) as expired:
            error = gateway.run_without_raising()
        timed_out = error is not None and expired.is_set()
        if error and error.error_type is GatewayRuntimeErrorType.SERVER_CONNECTION_FAILED:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
        outcome = Outcome(error, timed_out, client.reached, process.poll())
    gateway.write_result(error)
    return gateway, outcome


# ---- the verdict ---------------------------------------------------------------------------------

TRACEBACK = "Traceback (most recent call last):"
SHORT = 300  # characters of an error's text that stand in one line


class Verdict(NamedTuple):
    """What Kaggle's page shows, why, and what to do about it; names in braces are filled in."""

    shown: str
    cause: str
    remedy: str


_SERVER_ERROR = "Notebook Inference Server Error"
_NEVER_STARTED = "Notebook Inference Server Never Started"
RUN_TOO_LONG = Verdict(
    "Notebook Timeout",
    "The whole run exceeded its limit of {run_limit}, with {done} of {total} recordings answered.",
    f"Answer faster: Kaggle gives about {HIDDEN_RECORDINGS} recordings "
    f"{duration(RUN_LIMIT_SECONDS)} together.",
)
STILL_STARTING = Verdict(
    _NEVER_STARTED,
    "No server was up within {startup_limit}, while the notebook {ending}.",
    "Construct the server and call serve() first; load models in the first predict call, which "
    "has no limit.",
)
NEVER_SERVED = Verdict(
    _NEVER_STARTED,
    "The notebook ran to its end and never served.",
    "Pass predict to CMIInferenceServer and call its serve(), which does not return where "
    "KAGGLE_IS_COMPETITION_RERUN is set.",
)
DIED_BEFORE = Verdict(
    _NEVER_STARTED,
    "The notebook {ending} before it served. {last_words}",
    "Mend that first: it came before any server.",
)
DIED_IN_FIRST_CALL = Verdict(
    _NEVER_STARTED,
    "The notebook {ending} in the first call, which Kaggle takes for a server that never was up.",
    "Look for lack of memory and native crashes in the output below.",
)
NUMPY_LABEL = Verdict(
    _SERVER_ERROR,
    "In {call}, predict returned a numpy scalar that is no number and cannot be sent. {last_words}",
    "Return str(label): what is taken out of a numpy array of strings is np.str_, no plain str.",
)
NO_TEXT = Verdict(
    _SERVER_ERROR,
    "In {call}, predict raised an exception without text, or returned np.str_. {last_words}",
    "Return str(label), and look for a traceback in the output below.",
)
GATEWAY_FAILED = Verdict(
    "an error on Kaggle's side",
    "The gateway itself failed.",
    "Check the files in --test-dir.",
)
VERDICTS = {  # of the kinds of error that tell enough by themselves
    GatewayRuntimeErrorType.SERVER_CONNECTION_FAILED: Verdict(
        _SERVER_ERROR,
        "The connection broke in {call}; the notebook {ending}.",
        "Look for lack of memory and native crashes in the output below.",
    ),
    GatewayRuntimeErrorType.SERVER_RAISED_EXCEPTION: Verdict(
        _SERVER_ERROR,
        "In {call}, predict raised, or returned what cannot be sent. {last_words}",
        "Mend predict: the traceback is in the output below.",
    ),
    GatewayRuntimeErrorType.SERVER_MISSING_ENDPOINT: Verdict(
        _SERVER_ERROR,
        "The server offers no function named predict.",
        "Pass a function named predict to CMIInferenceServer.",
    ),
    GatewayRuntimeErrorType.INVALID_SUBMISSION: Verdict(
        "Submission Scoring Error",
        "The answer to {call}, is none of the 18 gestures as a str.",
        "Return one of the 18 gestures as a plain str, spelt exactly as in train.csv.",
    ),
    GatewayRuntimeErrorType.GRPC_DEADLINE_EXCEEDED: Verdict(
        _SERVER_ERROR,
        "No answer to {call}, within {response_limit}, the limit of every call but the first.",
        "Load models in the first call, which has no limit, and do less in the others.",
    ),
}


def verdict_on(outcome: Outcome, output: str) -> Verdict:
    """The verdict on a run that failed, whose notebook printed `output`."""
    assert outcome.error is not None
    kind, status = outcome.error.error_type, outcome.exit_status
    if outcome.timed_out:
        return RUN_TOO_LONG
    if kind is GatewayRuntimeErrorType.SERVER_NEVER_STARTED:
        if status is None:
            return STILL_STARTING
        if outcome.reached:
            return DIED_IN_FIRST_CALL
        return DIED_BEFORE if status else NEVER_SERVED
    if kind is GatewayRuntimeErrorType.SERVER_RAISED_EXCEPTION and not outcome.error.error_details:
        return NUMPY_LABEL if "str(label)" in last_words(output) else NO_TEXT
    return VERDICTS.get(kind, GATEWAY_FAILED)


def ended(status: int | None) -> str:
    """How a process ended, as the end of a sentence."""
    if status is None:
        return "was still running"
    if status < 0:
        return f"was ended by signal {-status} ({signal.strsignal(-status)})"
    return f"ended with status {status}"


def last_words(output: str) -> str:
    """The exception that the output ends with, or else its last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    if not lines:
        return "It printed nothing."
    words = lines[-1:]
    if TRACEBACK in lines:
        after = lines[len(lines) - lines[::-1].index(TRACEBACK) :]
        text = [line for line in after if not line.startswith(" ")]
        words = text if len(text) <= 3 else words  # more is what was printed after the exception
    return " ".join(line.strip() for line in words)[:SHORT]


def print_failure(outcome: Outcome, options: Options, progress: Progress, output: str) -> None:
    """Say what Kaggle would show, why, what to do, and how the notebook's output ended."""
    assert outcome.error is not None
    kind, details = outcome.error.error_type, outcome.error.error_details
    verdict = verdict_on(outcome, output)
    log("verdict", f'failed: {kind.name} ({kind.value}). Kaggle would show "{verdict.shown}".')
    cause = verdict.cause.format(
        call=f"call {progress.done + 1}, for {progress.current[1] if progress.current else '?'}",
        done=progress.done,
        ending=ended(outcome.exit_status),
        last_words=last_words(output),
        response_limit=duration(options.response_limit),
        run_limit=duration(options.run_limit),
        startup_limit=duration(options.startup_limit),
        total=progress.total,
    )
    log("cause", cause)
    if details:
        log("details", details)
    log("remedy", verdict.remedy)
    lines = output.splitlines()
    log("output", f"last {min(LOG_LINES_SHOWN, len(lines))} of {len(lines)} lines:")
    for line in lines[-LOG_LINES_SHOWN:]:
        log("|", line)


def print_success(gateway: CMIGateway, truth: dict[str, str] | None) -> None:
    """Say how many answers were valid, how long the hidden test would take, and the score."""
    import polars as pl

    progress = gateway.progress
    log("verdict", f"passed: {progress.done} valid answers. Kaggle would go on to the score.")
    slowest, name = progress.slowest
    others = (progress.seconds - slowest) / max(progress.done - 1, 1)
    hidden = slowest + others * (HIDDEN_RECORDINGS - 1)
    log(
        "time",
        f"slowest={duration(slowest)} {name}  others={others:.3g}s each  about "
        f"{duration(hidden)} for {HIDDEN_RECORDINGS} recordings of {duration(RUN_LIMIT_SECONDS)}",
    )
    if hidden > RUN_LIMIT_SECONDS:
        log("warning", 'at this rate the hidden test would end as "Notebook Timeout"')
    if truth is not None:
        answers = pl.read_parquet(gateway.output_dir / "submission.parquet", glob=False)
        true_gestures = [truth[sequence_id] for sequence_id in answers["sequence_id"]]
        score = competition_score(true_gestures, answers["gesture"].to_list())
        log(
            "score",
            f"{score.total:.5f}  binary_f1={score.binary_f1:.5f}  macro_f1={score.macro_f1:.5f}",
        )


# ---- entry ---------------------------------------------------------------------------------------


def parse_options(argv: Sequence[str] | None) -> Options:
    """Read the command line. Exits with status 2 if it cannot be read."""
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m kaggle_evaluation.dry_run",
        description=first,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("notebook", type=Path, metavar="NOTEBOOK.py", help="the notebook, as a script")
    add("--test-dir", type=Path, required=True, help="has test.csv and test_demographics.csv")
    add("--truth", type=Path, help="CSV or Parquet with sequence_id and gesture: print the score")
    add("--output-dir", type=Path, help="keep submission.parquet, result.json and notebook.log")
    add("--working-dir", type=Path, help="run the notebook here, not in an empty folder")
    add("--seed", type=int, default=0, help="choice of IMU-only recordings, and order (default 0)")
    add("--all-sensors", action="store_true", help="make no recording IMU only")
    add(
        "--text-columns",
        action="store_true",
        help="put IMU-only recordings first, so that thm and tof arrive as text",
    )
    for name, limit, until in (
        ("--startup-limit", relay.STARTUP_LIMIT_SECONDS, "the server must be up"),
        ("--response-limit", RESPONSE_LIMIT_SECONDS, "a call after the first must be answered"),
        ("--run-limit", RUN_LIMIT_SECONDS, "all must be done"),
    ):
        text = f"seconds until {until} (default {limit})"
        add(name, type=float, default=limit, metavar="SECONDS", help=text)
    return Options(**vars(parser.parse_args(argv)))


def checked(options: Options) -> Options:
    """`options`, whose paths exist.

    Raises:
        UsageError: the notebook is missing or no script, a folder is missing, or the system
            cannot end a process with all it started.
    """
    if not hasattr(os, "killpg"):
        raise UsageError(
            "A dry run starts and ends the notebook as a process group, which Windows has not: "
            "use Linux, macOS or WSL."
        )
    if not options.notebook.is_file() or options.notebook.suffix != ".py":
        raise UsageError(
            f"{options.notebook} is no Python script. For an .ipynb file run "
            "`jupyter nbconvert --to script` first."
        )
    if options.working_dir and not options.working_dir.is_dir():
        raise UsageError(f"--working-dir {options.working_dir} is no folder.")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Do the dry run that the arguments describe. Returns the exit status."""
    try:
        options = checked(parse_options(argv))
        with tempfile.TemporaryDirectory(prefix="dry_run_", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            output_dir = options.output_dir or folder / "output"
            output_dir.mkdir(parents=True, exist_ok=True)
            sequence_ids = write_test_files(options, folder)
            truth = read_truth(options.truth, sequence_ids) if options.truth else None
            gateway, outcome = run(options, folder, output_dir)
            if outcome.error:
                output = (output_dir / "notebook.log").read_text(errors="replace")
                print_failure(outcome, options, gateway.progress, output)
                return 1
            print_success(gateway, truth)
            return 0
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted: the notebook was ended, and there is no verdict.\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
