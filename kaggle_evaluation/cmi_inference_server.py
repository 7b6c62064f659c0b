"""Inference server of "CMI - Detect Behavior with Sensor Data": what a notebook imports.

from kaggle_evaluation.cmi_inference_server import CMIInferenceServer

server = CMIInferenceServer(predict)      # predict(sequence, demographics) -> one of 18 str
if os.getenv("KAGGLE_IS_COMPETITION_RERUN"):
    server.serve()
else:
    server.run_local_gateway(data_paths=("test.csv", "test_demographics.csv"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .cmi_gateway import CMIGateway
from .core import templates


class CMIInferenceServer(templates.InferenceServer):
    """Offers `predict(sequence, demographics)`, two polars DataFrames, to the gateway."""

    def _get_gateway_for_test(
        self,
        data_paths: Sequence[str | Path] | None,
        file_share_dir: str | None = None,  # noqa: ARG002  # this competition shares no files
    ) -> CMIGateway:
        return CMIGateway(data_paths)
