"""Transport: a gRPC client that calls functions by name, and the server that offers them.

Both sides run over an insecure channel without metadata; codec.py says what travels. Constants are
read when they are used, so a caller may patch them:

    import kaggle_evaluation.core.relay as relay
    relay.STARTUP_LIMIT_SECONDS = 5
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import string
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import grpc

from .codec import ENVELOPE_DEPTH, _deserialize, serialize_into
from .codec import _serialize as _serialize  # a name of the original
from .generated import kaggle_evaluation_pb2 as kaggle_evaluation_proto
from .generated import kaggle_evaluation_pb2_grpc as kaggle_evaluation_grpc

GRPC_PORTS = [50051, *range(60053, 60063)]  # tried in this order by both sides
STARTUP_LIMIT_SECONDS = 15 * 60  # s from the first request until some server must have answered
DEFAULT_DEADLINE_SECONDS = 60 * 60  # s for every call but the first, which has no deadline
CONNECT_LIMIT_SECONDS = 3  # s for a port that accepts the connection but never speaks gRPC
_RETRY_SLEEP_SECONDS = 1 / len(GRPC_PORTS)  # s between two ports
_MAX_DETAILS_BYTES = 7000  # of an exception's text; gRPC drops text and status beyond 8192
_UNQUOTED = string.punctuation.replace("%", "") + " "

_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{}],  # all methods
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 1,  # a crash should show soon
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_GRPC_CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", -1),  # unlimited: gRPC's 4 MiB are about 1600 rows
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),  # unlimited
    ("grpc.keepalive_permit_without_calls", 1),
    # At its default of five minutes the server would take the pings above for an attack and kill
    # every call that lasts longer than a few of them.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
]


class GRPCDeadlineError(Exception):
    """A call after the first took longer than `Client.endpoint_deadline_seconds`."""


# ---- client --------------------------------------------------------------------------------------


class Client:
    """Calls functions of an inference server by name.

    Attributes:
        channel_address: host of the server.
        ports: ports to try, in order; None means GRPC_PORTS.
        endpoint_deadline_seconds: limit of every call after the first, in s.
        startup_limit_seconds: limit until the first answer, in s; None: STARTUP_LIMIT_SECONDS.
        channel, stub: the connection in use; None before the first request.
    """

    def __init__(self, channel_address: str = "localhost", ports: Sequence[int] | None = None):
        self.channel_address = channel_address
        self.ports = ports
        self.endpoint_deadline_seconds: float = DEFAULT_DEADLINE_SECONDS
        self.startup_limit_seconds: float | None = None
        self.channel: grpc.Channel | None = None
        self.stub: Any = None
        self._made_first_connection = False

    def send(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call `name(*args, **kwargs)` on the server and return what it returned.

        Raises:
            grpc.RpcError: the function raised (status UNKNOWN), or the connection broke.
            GRPCDeadlineError: no answer within `endpoint_deadline_seconds`.
            RuntimeError: no server within the start-up limit.
            socket.gaierror: the server's host is gone.
            TypeError, ValueError: an argument or the answer is of no kind that can travel.
        """
        response = self._send_with_deadline(self.serialize_request(name, *args, **kwargs))
        return _deserialize(response.payload)

    def serialize_request(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The KaggleEvaluationRequest that `send` would send."""
        request = kaggle_evaluation_proto.KaggleEvaluationRequest(name=name)
        for value in args:
            serialize_into(request.args.add(), value)
        for key, value in kwargs.items():
            # a map entry is one more message around the payload
            serialize_into(request.kwargs[key], value, ENVELOPE_DEPTH + 1)
        return request

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self.channel is not None:
            self.channel.close()

    def _send_with_deadline(self, request: Any) -> Any:
        """Send on the known connection, or look for the server while the start-up limit lasts."""
        if not self._made_first_connection:
            return self._find_server(request)
        try:
            return self.stub.Send(
                request, wait_for_ready=False, timeout=self.endpoint_deadline_seconds
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise GRPCDeadlineError(
                    f"No answer within {self.endpoint_deadline_seconds} s, the limit of every call "
                    "but the first: load models in that one, and do less in the others."
                ) from error
            raise

    def _find_server(self, request: Any) -> Any:
        """Send the first request to one port after the other until one answers; no deadline."""
        limit = self.startup_limit_seconds
        limit = STARTUP_LIMIT_SECONDS if limit is None else limit
        started = time.monotonic()
        while time.monotonic() - started < limit:
            for port in list(GRPC_PORTS if self.ports is None else self.ports):
                response = self._try_port(port, request)
                if response is not None:
                    return response
                self._check_host()
                time.sleep(_RETRY_SLEEP_SECONDS)
        raise RuntimeError(f"Failed to connect to server after waiting {limit} seconds")

    def _try_port(self, port: int, request: Any) -> Any:
        """The response of the server on `port`, which is kept; None if there is no server.

        Raises:
            grpc.RpcError: something answered, but with an error.
        """
        options = [
            *_GRPC_CHANNEL_OPTIONS,
            # Otherwise 20 s pass on a server that was constructed and never started.
            ("grpc.min_reconnect_backoff_ms", int(CONNECT_LIMIT_SECONDS * 1000)),
        ]
        self.channel = grpc.insecure_channel(f"{self.channel_address}:{port}", options=options)
        self.stub = kaggle_evaluation_grpc.KaggleEvaluationServiceStub(self.channel)
        try:
            response = self.stub.Send(request, wait_for_ready=False)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            self.channel.close()
            return None
        self._made_first_connection = True
        return response

    def _check_host(self) -> None:
        """Raise socket.gaierror if the server's host is gone, so that waiting is pointless."""
        socket.gethostbyname(self.channel_address)


# ---- server --------------------------------------------------------------------------------------


class KaggleEvaluationServiceServicer(kaggle_evaluation_grpc.KaggleEvaluationServiceServicer):
    """Answers each request with the listener of that name.

    Attributes:
        listeners_map: the functions by name.
    """

    def __init__(self, listeners: Sequence[Callable[..., Any]]) -> None:
        self.listeners_map = {listener.__name__: listener for listener in listeners}

    def Send(self, request: Any, context: Any) -> Any:  # noqa: ARG002  # gRPC passes both
        """Call the listener. Whatever is raised, gRPC reports it as status UNKNOWN with its text.

        The traceback goes to stderr: gRPC tells it only to its logger, which is mute by default.

        Raises:
            Exception: from the listener, from reading its arguments or writing its answer.
            NotImplementedError: no listener of that name.
            RuntimeError: in place of an exception that gRPC could not report.
        """
        try:
            return self._answer(request)
        except BaseException as error:
            with contextlib.suppress(OSError):  # a closed stderr must not hide the error
                sys.stderr.write(_printable(f"{request.name} failed:\n{_traceback_text(error)}"))
                sys.stderr.flush()
            reported = _reportable(error)
            if reported is error:
                raise
            raise reported from error

    def _answer(self, request: Any) -> Any:
        listener = self.listeners_map.get(request.name)
        if listener is None:
            raise NotImplementedError(f"No listener for {request.name} was registered.")
        args = [_deserialize(payload) for payload in request.args]
        kwargs = {key: _deserialize(payload) for key, payload in request.kwargs.items()}
        response = kaggle_evaluation_proto.KaggleEvaluationResponse()
        serialize_into(response.payload, listener(*args, **kwargs))
        return response


def _traceback_text(error: BaseException) -> str:
    """The traceback from the listener on, without the frames of this file that called it."""
    frames = error.__traceback__
    while frames and frames.tb_next and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def _reportable(error: BaseException) -> Exception:
    """`error` itself, or a RuntimeError that tells the same in a form that reaches the client.

    gRPC would leave the caller waiting for ever after sys.exit() or a panic in polars, which are no
    Exceptions, and would replace a message too long for its headers by one about header sizes.
    """
    text = _printable(str(error))
    if not isinstance(error, Exception):
        text = f"{type(error).__name__}: {text}"
    elif text == str(error) and _header_bytes(text) <= _MAX_DETAILS_BYTES:
        return error
    kept = text
    while (size := _header_bytes(kept)) > _MAX_DETAILS_BYTES:
        kept = kept[: len(kept) * _MAX_DETAILS_BYTES // (size + 1)]
    return RuntimeError(kept if kept == text else f"{kept} … (cut, {len(text)} characters)")


def _printable(text: str) -> str:
    """`text` with lone surrogates, which have no UTF-8, spelt out."""
    return text.encode(errors="backslashreplace").decode()


def _header_bytes(text: str) -> int:
    """Length of `text` as a gRPC header: all but printable ASCII is percent-encoded."""
    return len(urllib.parse.quote(text, safe=_UNQUOTED))


class EvaluationServer(grpc.Server):
    """A gRPC server that takes its port when it starts, frees it when it stops, and starts again.

    The original takes the port when it is constructed. One that never starts then holds the first
    port and accepts connections it never serves.

    Attributes:
        port: the port it listens on; None while it does not.
        servicer: answers the requests.
    """

    def __init__(self, servicer: KaggleEvaluationServiceServicer) -> None:
        self.servicer = servicer
        self.port: int | None = None
        self._lock = threading.Lock()
        self._server: Any = self._new_server()

    def _new_server(self) -> Any:
        """A server with one worker thread, so that calls are answered one after the other."""
        server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=1),
            # gRPC lets several servers share a port by default; ours must own its port.
            options=[*_GRPC_CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)],
        )
        kaggle_evaluation_grpc.add_KaggleEvaluationServiceServicer_to_server(self.servicer, server)
        return server

    def start(self) -> None:
        """Take the first free port and serve.

        Raises:
            ValueError: it serves already, or no port is free.
        """
        with self._lock:
            if self.port is not None:
                raise ValueError("Cannot start: the server has already started. Stop it first.")
            if self._server is None:
                self._server = self._new_server()
            port = _bind_first_free_port(self._server)
            self._server.start()
            self.port = port

    def stop(self, grace: float | None = None) -> threading.Event:
        """Stop serving and free the port; calls in progress get `grace` seconds to finish.

        Returns:
            An event that is set once everything has ended.
        """
        with self._lock:
            server, started = self._server, self.port is not None
            self._server, self.port = None, None
        if started:
            return server.stop(grace)
        stopped = threading.Event()
        stopped.set()
        return stopped

    def wait_for_termination(self, timeout: float | None = None) -> bool:
        """Block until the server stops, or for `timeout` seconds.

        Returns:
            True if the time ran out.
        """
        server = self._server
        return False if server is None else bool(server.wait_for_termination(timeout))

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Any) -> None:
        """Serve further methods, until the next stop."""
        self._server.add_generic_rpc_handlers(generic_rpc_handlers)

    def add_insecure_port(self, address: str) -> int:
        """Listen on one more address, until the next stop. Returns its port."""
        return int(self._server.add_insecure_port(address))

    def add_secure_port(self, address: str, server_credentials: Any) -> int:
        """Listen on one more address with TLS, until the next stop. Returns its port."""
        return int(self._server.add_secure_port(address, server_credentials))


def define_server(*endpoint_listeners: Callable[..., Any]) -> EvaluationServer:
    """A server, not yet started, that offers each function under its name.

    Raises:
        ValueError: no function, one that cannot be called or has no name, or no free port.
    """
    if not endpoint_listeners:
        raise ValueError("Pass at least one endpoint listener, such as the function `predict`.")
    for listener in endpoint_listeners:
        if not callable(listener):
            raise ValueError(f"Endpoint listeners must be functions, got {listener!r}.")
        if getattr(listener, "__name__", "<lambda>") == "<lambda>":
            raise ValueError(
                f"Endpoint listeners must be named, got {listener!r}. Define it with `def`."
            )
    if not any(_is_free(port) for port in _ports_to_listen_on()):
        raise ValueError(_no_free_port())
    return EvaluationServer(KaggleEvaluationServiceServicer(endpoint_listeners))


def _ports_to_listen_on() -> list[int]:
    """GRPC_PORTS, or the one that KAGGLE_EVALUATION_PORT asks for.

    Raises:
        ValueError: the variable is no port number.
    """
    text = os.getenv("KAGGLE_EVALUATION_PORT")
    if not text:
        return list(GRPC_PORTS)
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ValueError(f"KAGGLE_EVALUATION_PORT={text!r} is no port number from 1 to 65535.")
    return [int(text)]


def _listens_to_all() -> bool:
    """Only in Kaggle's re-run does the gateway sit in another container."""
    rerun = os.getenv("KAGGLE_IS_COMPETITION_RERUN") is not None
    return rerun and not os.getenv("KAGGLE_EVALUATION_PORT")


def _bind_first_free_port(server: Any) -> int:
    """Let `server` listen on the first port it can have, and return that port.

    Raises:
        ValueError: no port is free.
    """
    for port in _ports_to_listen_on():
        if not _is_free(port):  # asked first because gRPC logs an error for a port in use
            continue
        hosts = ["[::]"] if _listens_to_all() else ["127.0.0.1", "[::1]"]
        # Without IPv6 the second one cannot be bound, and the name localhost does not lead to it.
        hosts = hosts if _has_ipv6_loopback() or hosts == ["[::]"] else hosts[:1]
        with contextlib.suppress(RuntimeError):  # another process was faster
            if all(server.add_insecure_port(f"{host}:{port}") == port for host in hosts):
                return port
    raise ValueError(_no_free_port())


def _no_free_port() -> str:
    return (
        f"All ports an inference server may use are taken: {_ports_to_listen_on()}. "
        "End other servers or notebooks on this machine."
    )


def _has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _is_free(port: int) -> bool:
    """Whether no socket listens on `port` of the loopback interface, IPv4 or IPv6."""
    families = [(socket.AF_INET, "127.0.0.1")]
    if _has_ipv6_loopback():
        families.append((socket.AF_INET6, "::1"))
    for family, host in families:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A port whose last connections are still fading out (TIME_WAIT) counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                return False
    return True
