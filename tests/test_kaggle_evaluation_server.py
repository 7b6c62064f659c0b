"""Client and server over real gRPC, mostly in separate processes: life cycle, limits, abuse."""

import os
import socket
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

from kaggle_evaluation.cmi_inference_server import CMIInferenceServer
from kaggle_evaluation.core import base_gateway, relay
from kaggle_evaluation.core.base_gateway import GatewayRuntimeErrorType as Kind

ROOT = Path(__file__).resolve().parents[1]
METHOD = "/kaggle_evaluation_client.KaggleEvaluationService/Send"

SERVER = """
import os, sys, threading, time
import numpy as np
from kaggle_evaluation.core import relay
from kaggle_evaluation.cmi_inference_server import CMIInferenceServer

def echo(*args, **kwargs):
    return [list(args), kwargs]

def fail(text):
    raise ValueError(text)

def fail_with_a_lone_surrogate():
    raise ValueError(chr(0xd800))

def leave(status):
    sys.exit(status)

def die():
    os._exit(3)

def slow(seconds):
    time.sleep(seconds)
    return threading.current_thread() is threading.main_thread()

relay.GRPC_PORTS = [int(port) for port in sys.argv[1].split(",")]
functions = echo, fail, fail_with_a_lone_surrogate, leave, die, slow
server = CMIInferenceServer(*functions)
if "KAGGLE_IS_COMPETITION_RERUN" in os.environ:
    threading.Timer(0.5, lambda: print(server.server.port, flush=True)).start()
server.serve()
print(server.server.port, flush=True)
sys.stdin.read()
"""


def free_ports(n: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def server_process(ports: str, **environment: str) -> Iterator[str]:
    """A server in a process of its own; the line it prints when it is up."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", SERVER, ports]
    process = subprocess.Popen(command, env=environment, text=True, **pipes)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server that stays up for the whole file, whatever is done to it."""
    with server_process(str(free_ports(1)[0])) as line:
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


def test_the_published_constants():
    assert list(relay.GRPC_PORTS) == [50051, *(60053 + i for i in range(10))]
    assert (relay.STARTUP_LIMIT_SECONDS, relay.DEFAULT_DEADLINE_SECONDS) == (900, 3600)


def test_values_reach_the_function_and_come_back_also_far_beyond_the_default_limit(client):
    table = np.random.default_rng(0).normal(size=(5000, 332))
    frame = pl.DataFrame(table, schema=[f"c{i}" for i in range(332)])
    args, kwargs = client.send("echo", 1, "x", None, (2.5, [True]), frame, key={"n": [1]})
    assert args[:4] == [1, "x", None, (2.5, [True])]
    assert args[4].equals(frame)
    assert kwargs == {"key": {"n": [1]}}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (("fail", ""), ""),
        (("fail", "two\nlines"), "two\nlines"),
        (("leave", 1), "SystemExit: 1"),
        (("fail",), "fail() missing 1 required positional argument: 'text'"),
        (("fail_with_a_lone_surrogate",), "\\ud800"),
    ],
)
def test_exceptions_reach_the_client_with_their_text(client, call, text):
    with pytest.raises(grpc.RpcError) as caught:
        client.send(*call)
    assert caught.value.code() is grpc.StatusCode.UNKNOWN
    assert caught.value.details() == f"Exception calling application: {text}"
    assert client.send("echo") == [[], {}]


@pytest.mark.parametrize("text", ["é" * 60_000, "x" * 9000 + "%" * 3000])
def test_texts_too_long_for_a_header_are_cut(client, text):
    """gRPC itself would report RESOURCE_EXHAUSTED, or nothing at all."""
    with pytest.raises(grpc.RpcError) as caught:
        client.send("fail", text)
    assert caught.value.code() is grpc.StatusCode.UNKNOWN
    assert text[:500] in caught.value.details()


def test_pings_during_a_long_call_are_no_attack(port):
    """Without the right option the server ends the call after a few pings, here after 5.5 s."""
    options = [("grpc.keepalive_time_ms", 1100), ("grpc.http2.max_pings_without_data", 0)]
    request = relay.Client().serialize_request("slow", 6.5)
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        assert channel.unary_unary(METHOD)(request.SerializeToString())


def test_the_first_call_has_no_deadline_and_later_ones_have(client):
    """Functions do not run in the main thread, as `slow` tells."""
    client.endpoint_deadline_seconds = 0.3
    assert client.send("slow", 0.8) is False
    with pytest.raises(relay.GRPCDeadlineError):
        client.send("slow", 0.8)


def meaning(error: Exception) -> base_gateway.GatewayRuntimeError:
    """What a gateway makes of it."""
    with pytest.raises(base_gateway.GatewayRuntimeError) as caught:
        base_gateway.BaseGateway().handle_server_error(error, "predict")
    return caught.value


@pytest.mark.usefixtures("own_ports")
def test_no_server_within_the_limit(monkeypatch):
    monkeypatch.setattr(relay, "STARTUP_LIMIT_SECONDS", 1)
    text = "Failed to connect to server after waiting 1 seconds"
    with pytest.raises(RuntimeError, match=text) as caught:
        relay.Client().send("predict")
    assert meaning(caught.value).error_type is Kind.SERVER_NEVER_STARTED


def test_a_server_that_dies_in_a_call(own_ports):
    with server_process(",".join(map(str, own_ports))):
        client = relay.Client()
        client.send("echo")
        with pytest.raises(grpc.RpcError) as caught:
            client.send("die")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert meaning(caught.value).error_type is Kind.SERVER_CONNECTION_FAILED
    assert "UNAVAILABLE" in meaning(caught.value).error_details


def test_a_port_that_accepts_and_never_answers_costs_little(own_ports, monkeypatch):
    monkeypatch.setattr(relay, "CONNECT_LIMIT_SECONDS", 0.5)
    with server_process(str(own_ports[1])), socket.create_server(("127.0.0.1", own_ports[0])):
        started = time.monotonic()
        client = relay.Client("127.0.0.1")
        assert client.send("echo") == [[], {}]
        assert time.monotonic() - started < 8
        client.close()


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


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_next_free_port_is_taken(own_ports, address):
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        holder = socket.create_server((address, own_ports[0]), family=family)
    except OSError:
        pytest.skip(f"this machine has no {address}")
    with holder:
        first, second = relay.define_server(print), relay.define_server(print)
        first.start()
        second.start()
        assert (first.port, second.port) == (own_ports[1], own_ports[2])
        with pytest.raises(ValueError, match="taken"):
            relay.define_server(print)
        second.stop(0).wait(5)
        first.stop(0).wait(5)


@pytest.mark.parametrize("text", ["http", "0", "65536", "-1", "1.5"])
def test_a_prescribed_port_that_is_none(monkeypatch, text):
    monkeypatch.setenv("KAGGLE_EVALUATION_PORT", text)
    with pytest.raises(ValueError, match="KAGGLE_EVALUATION_PORT"):
        relay.define_server(print)


def test_only_the_rerun_without_a_prescribed_port_listens_beyond_the_loopback_address(
    own_ports, port
):
    """All of 127.0.0.0/8 is this machine: a server for 127.0.0.1 alone does not answer there."""
    assert accepts("127.0.0.1", port)
    assert not accepts("127.0.0.2", port)
    rerun = {"KAGGLE_IS_COMPETITION_RERUN": ""}
    with server_process(str(own_ports[0]), **rerun) as line:
        assert accepts("127.0.0.2", int(line))
    with server_process("1", **rerun, KAGGLE_EVALUATION_PORT=str(own_ports[1])) as line:
        assert int(line) == own_ports[1]
        assert accepts("127.0.0.1", own_ports[1])
        assert not accepts("127.0.0.2", own_ports[1])


def test_listeners_are_checked():
    class Callable:
        def __call__(self) -> None: ...

        def method(self) -> str:
            return "method"

    for listeners in ((), (1,), (lambda: 1,), (Callable(),)):
        with pytest.raises(ValueError, match=r"listener"):
            CMIInferenceServer(*listeners)
    assert CMIInferenceServer(Callable().method).client is None


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


def request_with(payload: bytes) -> bytes:
    """echo(payload), in bytes."""
    return b"\x0a\x04echo\x12" + bytes([len(payload)]) + payload


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 50,  # no message
        b"\x0a\xff\xff\xff\xff\x07abc",  # a name of 2 GiB
        b"\x0a\x02\xff\xfe",  # a name that is no UTF-8
        b"",  # no name
        b"\x0a\x04echo\x12\x00",  # an empty payload
        request_with(b"\x92\x01\x02\x0a\x00"),  # a dataclass of a later core
        request_with(b"\x52\x08\xff\xff\xff\xff\xff\xff\xff\x7f"),  # an Arrow message of 2 GiB
        request_with(b"\x62\x0cPAR1\xff\xff\xff\x7fPAR1"),  # a Parquet footer of 2 GiB
        request_with(b"\x6a\x12\x80\x04\x95cos\nsystem\n(S'1'\n"),  # a pickle
    ],
)
def test_malformed_messages_are_refused_and_the_server_serves_on(client, port, content):
    with pytest.raises(grpc.RpcError) as caught:
        raw_call(port, content)
    assert caught.value.code().name in ("UNKNOWN", "INTERNAL")
    with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
        raw_call(port, content, METHOD.replace("Send", "Run"))
    assert client.send("echo", 1) == [[1], {}]


def test_random_bytes_on_the_port_leave_the_server_serving(client, port):
    rng = np.random.default_rng(0)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for start in (b"", b"GET / HTTP/1.1\r\n\r\n", preface, preface + b"\xff\xff\xff\x00\x00"):
        for _ in range(5):
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            with connection, suppress(OSError):
                connection.sendall(start + rng.bytes(2000))
    assert client.send("echo") == [[], {}]
