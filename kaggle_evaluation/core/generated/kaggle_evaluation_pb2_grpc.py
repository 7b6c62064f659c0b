"""Client stub and server hook of KaggleEvaluationService, as grpc_tools would name them."""

from __future__ import annotations

from typing import Any

import grpc

from . import kaggle_evaluation_pb2 as kaggle__evaluation__pb2

_SERVICE = "kaggle_evaluation_client.KaggleEvaluationService"


class KaggleEvaluationServiceStub:
    """Client side: `stub.Send(request, timeout=seconds)` returns a KaggleEvaluationResponse."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.Send = channel.unary_unary(
            f"/{_SERVICE}/Send",
            request_serializer=kaggle__evaluation__pb2.KaggleEvaluationRequest.SerializeToString,
            response_deserializer=kaggle__evaluation__pb2.KaggleEvaluationResponse.FromString,
        )


class KaggleEvaluationServiceServicer:
    """Server side: override Send."""

    def Send(self, request: Any, context: Any) -> Any:  # noqa: ARG002  # the names are gRPC's
        """Answer one request; this default refuses with the status UNIMPLEMENTED."""
        context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        context.set_details("Method not implemented!")
        raise NotImplementedError("Method not implemented!")


def add_KaggleEvaluationServiceServicer_to_server(
    servicer: KaggleEvaluationServiceServicer, server: grpc.Server
) -> None:
    """Let `server` answer the service's one method with `servicer.Send`."""
    send = grpc.unary_unary_rpc_method_handler(
        servicer.Send,
        request_deserializer=kaggle__evaluation__pb2.KaggleEvaluationRequest.FromString,
        response_serializer=kaggle__evaluation__pb2.KaggleEvaluationResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(_SERVICE, {"Send": send})
    server.add_generic_rpc_handlers((handler,))
