"""Client and server over real gRPC, mostly in separate processes: life cycle, limits, abuse."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc
import numpy as np
import polars as pl
import pytest
from runs import ROOT, free_ports

from kaggle_evaluation.core import relay

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

def slow(seconds):
    time.sleep(seconds)
    return threading.current_thread() is threading.main_thread()

relay.GRPC_PORTS = [int(port) for port in sys.argv[1].split(",")]
functions = echo, fail, fail_with_a_lone_surrogate, leave, slow
server = CMIInferenceServer(*functions)
if "KAGGLE_IS_COMPETITION_RERUN" in os.environ:
    threading.Timer(0.5, lambda: print(server.server.port, flush=True)).start()
server.serve()
print(server.server.port, flush=True)
sys.stdin.read()
"""
MISSING = "fail() missing 1 required positional argument: 'text'"
RAISED = (("fail", ""), ""), (("fail", "two\nlines"), "two\nlines"), (("fail",), MISSING)
RAISED += (("leave", 1), "SystemExit: 1"), (("fail_with_a_lone_surrogate",), "\\ud800")


@contextmanager
def server_process(ports: str, **environment: str) -> Iterator[int]:
    """A server in a process of its own; its port when it is up."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", SERVER, ports]
    process = subprocess.Popen(command, env=environment, text=True, **pipes)
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server that stays up for the whole file, whatever is done to it."""
    with server_process(str(free_ports(1)[0])) as port:
        yield port


@pytest.fixture
def client(port: int) -> Iterator[relay.Client]:
    client = relay.Client(ports=[port])
    yield client
    client.close()


@pytest.fixture
def own_ports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    ports = free_ports(3)
    monkeypatch.setattr(relay, "GRPC_PORTS", ports)
    return ports


def accepts(host: str, port: int) -> bool:
    with suppress(OSError):
        socket.create_connection((host, port), timeout=2).close()
        return True
    return False


def test_values_reach_the_function_and_come_back_also_far_beyond_the_default_limit(client):
    table = np.random.default_rng(0).normal(size=(5000, 332))
    frame = pl.DataFrame(table, schema=[f"c{i}" for i in range(332)])
    args, kwargs = client.send("echo", 1, "x", None, (2.5, [True]), frame, key={"n": [1]})
    assert args[:4] == [1, "x", None, (2.5, [True])]
    assert args[4].equals(frame)
    assert kwargs == {"key": {"n": [1]}}


def test_exceptions_reach_the_client_with_their_text(client):
    """Cut if it is too long for a header: gRPC itself would report RESOURCE_EXHAUSTED, or nothing."""
    for call, text in RAISED:
        with pytest.raises(grpc.RpcError) as caught:
            client.send(*call)
        assert caught.value.code() is grpc.StatusCode.UNKNOWN
        assert caught.value.details() == f"Exception calling application: {text}"
    for text in ("é" * 60_000, "x" * 9000 + "%" * 3000):
        with pytest.raises(grpc.RpcError) as caught:
            client.send("fail", text)
        assert caught.value.code() is grpc.StatusCode.UNKNOWN
        assert text[:500] in caught.value.details()
    assert client.send("echo") == [[], {}]


def test_pings_during_a_long_call_are_no_attack(port):
    """Without the right option the server ends the call after a few pings, here after 5.5 s."""
    options = [("grpc.keepalive_time_ms", 1100), ("grpc.http2.max_pings_without_data", 0)]
    request = relay.Client().serialize_request("slow", 6.5)
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        answer = channel.unary_unary(METHOD)(request.SerializeToString())
    assert answer == bytes.fromhex("0a021000")  # no


def test_the_first_free_port_is_taken_from_start_to_stop_and_again(own_ports):
    def predict() -> str:
        return "here"

    with socket.create_server(("127.0.0.1", own_ports[0])):
        server, second = relay.define_server(predict), relay.define_server(print)
        for _ in range(2):
            server.start()
            second.start()
            assert (server.port, second.port) == (own_ports[1], own_ports[2])
            with pytest.raises(ValueError, match="already started"):
                server.start()
            with pytest.raises(ValueError, match="taken"):
                relay.define_server(print)
            client = relay.Client(ports=own_ports[1:])
            assert client.send("predict") == "here"
            client.close()
            assert server.wait_for_termination(0.01) is True
            assert server.stop(0).wait(5)
            assert server.wait_for_termination() is False
            assert not accepts("127.0.0.1", own_ports[1])
            second.stop(0).wait(5)


def test_only_the_rerun_listens_beyond_the_loopback_address(own_ports, port):
    """All of 127.0.0.0/8 is this machine: a server for 127.0.0.1 alone does not answer there."""
    assert accepts("127.0.0.1", port)
    assert not accepts("127.0.0.2", port)
    rerun = {"KAGGLE_IS_COMPETITION_RERUN": ""}
    with server_process(str(own_ports[0]), **rerun) as beyond:
        assert accepts("127.0.0.2", beyond)
    with server_process("1", **rerun, KAGGLE_EVALUATION_PORT=str(own_ports[1])) as prescribed:
        assert prescribed == own_ports[1]
        assert accepts("127.0.0.1", own_ports[1])
        assert not accepts("127.0.0.2", own_ports[1])


def request_with(payload: bytes) -> bytes:
    return b"\x0a\x04echo\x12" + bytes([len(payload)]) + payload


def test_malformed_messages_are_refused_and_the_server_serves_on(client, port):
    malformed = {
        "no message": b"\xff" * 50,
        "a name of 2 GiB": b"\x0a\xff\xff\xff\xff\x07abc",
        "a name that is no UTF-8": b"\x0a\x02\xff\xfe",
        "no name": b"",
        "an empty payload": b"\x0a\x04echo\x12\x00",
        "a dataclass of a later core": request_with(b"\x92\x01\x02\x0a\x00"),
        "an Arrow message of 2 GiB": request_with(b"\x52\x08\xff\xff\xff\xff\xff\xff\xff\x7f"),
        "a Parquet footer of 2 GiB": request_with(b"\x62\x0cPAR1\xff\xff\xff\x7fPAR1"),
        "a pickle": request_with(b"\x6a\x12\x80\x04\x95cos\nsystem\n(S'1'\n"),
    }
    for name, content in malformed.items():
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(METHOD)(content, timeout=20)
            assert caught.value.code().name in ("UNKNOWN", "INTERNAL"), name
    assert client.send("echo", 1) == [[1], {}]
