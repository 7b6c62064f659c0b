"""Client and server over real gRPC, mostly in separate processes: life cycle, limits, abuse."""

import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import numpy as np
import polars as pl
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from kaggle_evaluation.cmi_inference_server import CMIInferenceServer  # noqa: E402
from kaggle_evaluation.core import base_gateway, relay, templates  # noqa: E402
from kaggle_evaluation.core.base_gateway import GatewayRuntimeErrorType as Kind  # noqa: E402

METHOD = "/kaggle_evaluation_client.KaggleEvaluationService/Send"

SERVER = """
import os, sys, threading, time
import numpy as np
from kaggle_evaluation.core import relay
from kaggle_evaluation.cmi_inference_server import CMIInferenceServer

def echo(*args, **kwargs):
    return [list(args), kwargs]

def size(frame):
    return frame.shape

def fail(text):
    raise ValueError(text)

def leave(status):
    sys.exit(status)

def die():
    os._exit(3)

def slow(seconds):
    time.sleep(seconds)
    return threading.current_thread() is threading.main_thread()

def label():
    return np.array(["Wave hello"])[0]

relay.GRPC_PORTS = [int(port) for port in sys.argv[1].split(",")]
server = CMIInferenceServer(echo, size, fail, leave, die, slow, label)
if len(sys.argv) == 2:
    if "KAGGLE_IS_COMPETITION_RERUN" in os.environ:
        threading.Timer(0.5, lambda: print(server.server.port, flush=True)).start()
    server.serve()
    print(server.server.port, flush=True)
else:
    print("constructed", flush=True)
sys.stdin.read()
"""


def free_ports(n: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def server_process(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server in a process of its own, and the line it prints when it is up."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server that stays up for the whole file, whatever is done to it."""
    with server_process(str(free_ports(1)[0])) as (_, line):
        yield int(line)


@pytest.fixture
def client(port: int) -> Iterator[relay.Client]:
    client = relay.Client(ports=[port])
    yield client
    client.close()


@pytest.fixture
def own_ports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Three free ports as the ones to be tried in this process."""
    ports = free_ports(3)
    monkeypatch.setattr(relay, "GRPC_PORTS", ports)
    return ports


def raw_call(port: int, content: bytes, method: str = METHOD) -> bytes:
    """Send bytes that need not be a message."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        return channel.unary_unary(method)(content, timeout=20)


def accepts(host: str, port: int) -> bool:
    with suppress(OSError):
        socket.create_connection((host, port), timeout=2).close()
        return True
    return False


# ---- calls -------------------------------------------------------------------------------------


def test_the_published_constants():
    assert list(relay.GRPC_PORTS) == [50051, *(60053 + i for i in range(10))]
    assert (relay.STARTUP_LIMIT_SECONDS, relay.DEFAULT_DEADLINE_SECONDS) == (900, 3600)


def test_values_reach_the_function_and_come_back(client):
    frame = pl.DataFrame({"a": [1, None], "b": ["ü", ""]})
    args, kwargs = client.send("echo", 1, "x", None, (2.5, [True]), frame, key={"n": [1]})
    assert args[:4] == [1, "x", None, (2.5, [True])]
    assert args[4].equals(frame)
    assert kwargs == {"key": {"n": [1]}}


def test_messages_far_beyond_the_default_limit_pass(client):
    table = np.random.default_rng(0).normal(size=(5000, 332))
    frame = pl.DataFrame(table, schema=[f"c{i}" for i in range(332)])
    assert client.send("size", frame) == (5000, 332)


def test_functions_run_outside_the_main_thread(client):
    assert client.send("slow", 0) is False


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        (("fail", "boom"), "UNKNOWN", "boom"),
        (("fail", ""), "UNKNOWN", ""),
        (("fail", "two\nlines"), "UNKNOWN", "two\nlines"),
        (("nobody",), "UNKNOWN", "No listener for nobody was registered."),
        (("label",), "UNKNOWN", ""),
        (("leave", 1), "UNKNOWN", "SystemExit: 1"),
        (("fail",), "UNKNOWN", "fail() missing 1 required positional argument: 'text'"),
    ],
)
def test_exceptions_reach_the_client_with_their_text(client, call, code, text):
    with pytest.raises(grpc.RpcError) as caught:
        client.send(*call)
    assert caught.value.code().name == code
    assert caught.value.details() == f"Exception calling application: {text}"
    assert client.send("echo") == [[], {}]


@pytest.mark.parametrize("text", ["x" * 60_000, "é" * 60_000, "\ud800", "x" * 9000 + "%" * 3000])
def test_texts_too_long_for_a_header_are_cut(client, text):
    """gRPC itself would report RESOURCE_EXHAUSTED, or nothing at all."""
    sent = text.encode(errors="backslashreplace").decode()
    with pytest.raises(grpc.RpcError) as caught:
        client.send("fail", sent)
    assert caught.value.code() is grpc.StatusCode.UNKNOWN
    assert sent[:500] in caught.value.details()


def test_an_error_with_a_lone_surrogate_is_reported(own_ports, monkeypatch):
    # gRPC logs it as it is, which pytest-xdist cannot pass on
    monkeypatch.setattr(logging.getLogger("grpc._server"), "disabled", True)

    def fail() -> None:
        raise ValueError("\ud800")

    server = relay.define_server(fail)
    server.start()
    client = relay.Client(ports=own_ports[:1])
    with pytest.raises(grpc.RpcError, match=r"\\ud800"):
        client.send("fail")
    client.close()
    server.stop(0)


def test_pings_during_a_long_call_are_no_attack(port):
    """Without the right option the server ends the call after a few pings, here after 5.5 s."""
    options = [("grpc.keepalive_time_ms", 1100), ("grpc.http2.max_pings_without_data", 0)]
    request = relay.Client().serialize_request("slow", 6.5)
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        assert channel.unary_unary(METHOD)(request.SerializeToString())


# ---- limits ------------------------------------------------------------------------------------


def test_the_first_call_has_no_deadline_and_later_ones_have(client):
    client.endpoint_deadline_seconds = 0.3
    assert client.send("slow", 0.8) is False
    with pytest.raises(relay.GRPCDeadlineError):
        client.send("slow", 0.8)


def test_no_server_within_the_limit(own_ports, monkeypatch):
    monkeypatch.setattr(relay, "STARTUP_LIMIT_SECONDS", 1)
    client = relay.Client()
    with pytest.raises(RuntimeError, match="Failed to connect to server after waiting 1 seconds"):
        client.send("predict")
    assert len(own_ports) == 3
    gateway = base_gateway.BaseGateway()
    with pytest.raises(base_gateway.GatewayRuntimeError) as caught:
        gateway.handle_server_error(RuntimeError("Failed to connect to server after waiting"), "p")
    assert caught.value.error_type is Kind.SERVER_NEVER_STARTED


def test_a_host_that_is_gone_ends_the_search_at_once(own_ports):
    assert own_ports
    client = relay.Client("inference-server.invalid")
    with pytest.raises(socket.gaierror):
        client.send("predict")


def test_a_server_that_dies_in_a_call(own_ports):
    with server_process(",".join(map(str, own_ports))):
        client = relay.Client()
        client.send("echo")
        with pytest.raises(grpc.RpcError) as caught:
            client.send("die")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(base_gateway.GatewayRuntimeError) as runtime_error:
            base_gateway.BaseGateway().handle_server_error(caught.value, "predict")
    assert runtime_error.value.error_type is Kind.SERVER_CONNECTION_FAILED
    assert "UNAVAILABLE" in runtime_error.value.error_details


def test_a_port_that_accepts_and_never_answers_costs_little(own_ports, monkeypatch):
    monkeypatch.setattr(relay, "CONNECT_LIMIT_SECONDS", 0.5)
    with server_process(str(own_ports[1])), socket.create_server(("127.0.0.1", own_ports[0])):
        started = time.monotonic()
        client = relay.Client("127.0.0.1")
        assert client.send("echo") == [[], {}]
        assert time.monotonic() - started < 8
        client.close()


# ---- ports -------------------------------------------------------------------------------------


def test_the_port_is_taken_from_start_to_stop_and_again(own_ports):
    def predict() -> str:
        return "here"

    server = relay.define_server(predict)
    assert isinstance(server, grpc.Server)
    assert not accepts("127.0.0.1", own_ports[0])
    for _ in range(2):
        server.start()
        assert server.port == own_ports[0]
        with pytest.raises(ValueError, match="already started"):
            server.start()
        client = relay.Client()
        assert client.send("predict") == "here"
        client.close()
        assert server.wait_for_termination(0.01) is True
        assert server.stop(0).wait(5)
        assert server.wait_for_termination() is False
        assert not accepts("127.0.0.1", own_ports[0])
    assert server.stop(0).wait(0)


def test_the_next_free_port_is_taken(own_ports):
    with socket.create_server(("127.0.0.1", own_ports[0])):
        first, second = relay.define_server(print), relay.define_server(print)
        first.start()
        second.start()
        assert (first.port, second.port) == (own_ports[1], own_ports[2])
        with pytest.raises(ValueError, match="taken"):
            relay.define_server(print)
        second.stop(0).wait(5)
        first.stop(0).wait(5)


def test_a_port_held_with_ipv6_only_counts_as_taken(own_ports):
    try:
        holder = socket.create_server(("::1", own_ports[0]), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with holder:
        server = relay.define_server(print)
        server.start()
        assert server.port == own_ports[1]
        server.stop(0)


def test_constructed_servers_hold_no_port(own_ports):
    argument = ",".join(map(str, own_ports))
    with server_process(argument, "construct") as (_, line):
        assert line == "constructed"
        with server_process(argument) as (_, taken):
            assert int(taken) == own_ports[0]


def test_the_port_can_be_prescribed(own_ports):
    wanted = free_ports(1)[0]
    with server_process(str(own_ports[0]), KAGGLE_EVALUATION_PORT=str(wanted)) as (_, line):
        assert int(line) == wanted


@pytest.mark.parametrize("text", ["http", "0", "65536", "-1", "1.5"])
def test_a_prescribed_port_that_is_none(monkeypatch, text):
    monkeypatch.setenv("KAGGLE_EVALUATION_PORT", text)
    with pytest.raises(ValueError, match="KAGGLE_EVALUATION_PORT"):
        relay.define_server(print)


def test_only_the_rerun_listens_beyond_the_loopback_address(own_ports, port):
    """All of 127.0.0.0/8 is this machine: a server for 127.0.0.1 alone does not answer there."""
    assert accepts("127.0.0.1", port)
    assert not accepts("127.0.0.2", port)
    rerun = {"KAGGLE_IS_COMPETITION_RERUN": ""}
    with server_process(str(own_ports[0]), **rerun) as (_, line):
        assert accepts("127.0.0.2", int(line))
    with server_process("1", **rerun, KAGGLE_EVALUATION_PORT=str(own_ports[1])) as (_, line):
        assert accepts("127.0.0.1", int(line))
        assert not accepts("127.0.0.2", int(line))


# ---- construction ------------------------------------------------------------------------------


def test_listeners_are_checked():
    class Callable:
        def __call__(self) -> None: ...

        def method(self) -> str:
            return "method"

    for listeners in ((), (1,), (lambda: 1,), (Callable(),)):
        with pytest.raises(ValueError, match=r"listener"):
            CMIInferenceServer(*listeners)
    assert CMIInferenceServer(Callable().method).client is None


def test_serve_returns_at_once_outside_the_rerun(own_ports, monkeypatch):
    monkeypatch.delenv("KAGGLE_IS_COMPETITION_RERUN", raising=False)
    server = CMIInferenceServer(print)
    server.serve()
    assert server.server.port == own_ports[0]
    server.serve()
    server.server.stop(0)


def test_serve_blocks_in_the_rerun_even_if_the_variable_is_empty(own_ports, monkeypatch):
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "")
    server = CMIInferenceServer(print)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    assert server.server.port == own_ports[0]
    server.server.stop(0)
    thread.join(5)
    assert not thread.is_alive()


def test_a_late_start_is_warned_about_once(monkeypatch):
    monkeypatch.setattr(templates, "_initial_import_time", time.time() - 10)
    monkeypatch.setattr(templates, "_issued_startup_time_warning", value=False)
    monkeypatch.setattr(relay, "STARTUP_LIMIT_SECONDS", 5)
    with pytest.warns(RuntimeWarning, match="10 seconds elapsed"):
        templates._warn_if_started_late()
    templates._warn_if_started_late()


# ---- abuse -------------------------------------------------------------------------------------


def request_with(payload: bytes) -> bytes:
    """echo(payload), in bytes."""
    return b"\x0a\x04echo\x12" + bytes([len(payload)]) + payload


NPY_OF_A_TERABYTE = b"\x93NUMPY\x01\x00" + struct.pack("<H", 70) + (
    b"{'descr': '<f8', 'fortran_order': False, 'shape': (137438953472,)}".ljust(69) + b"\n"
)  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 50,  # no message
        b"\x0a\xff\xff\xff\xff\x07abc",  # a name of 2 GiB
        b"\x0a\x02\xff\xfe",  # a name that is no UTF-8
        b"",  # no name
        b"\x0a\x04echo\x12\x00",  # an empty payload
        request_with(b"\x92\x01\x02\x0a\x00"),  # a dataclass of a later core
        request_with(b"\x6a" + bytes([len(NPY_OF_A_TERABYTE)]) + NPY_OF_A_TERABYTE),
        request_with(b"\x52\x08\xff\xff\xff\xff\xff\xff\xff\x7f"),  # an Arrow message of 2 GiB
        request_with(b"\x62\x0cPAR1\xff\xff\xff\x7fPAR1"),  # a Parquet footer of 2 GiB
        request_with(b"\x6a\x12\x80\x04\x95cos\nsystem\n(S'1'\n"),  # a pickle
    ],
)
def test_malformed_messages_are_refused_and_the_server_serves_on(client, port, content):
    with pytest.raises(grpc.RpcError) as caught:
        raw_call(port, content)
    assert caught.value.code().name in ("UNKNOWN", "INTERNAL")
    assert client.send("echo", 1) == [[1], {}]


def test_unknown_methods_are_refused(client, port):
    with pytest.raises(grpc.RpcError) as caught:
        raw_call(port, b"", "/kaggle_evaluation_client.KaggleEvaluationService/Run")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert client.send("echo") == [[], {}]


def test_random_bytes_on_the_port_leave_the_server_serving(client, port):
    rng = np.random.default_rng(0)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for start in (b"", b"GET / HTTP/1.1\r\n\r\n", preface, preface + b"\xff\xff\xff\x00\x00"):
        for _ in range(5):
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            with connection, suppress(OSError):
                connection.sendall(start + rng.bytes(2000))
    assert client.send("echo") == [[], {}]
