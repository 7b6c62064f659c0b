"""The competition's score: half the F1 of target against non-target, half the macro F1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .cmi_gateway import NON_TARGET_GESTURES, TARGET_GESTURES


class Score(NamedTuple):
    """The score and its two halves, each from 0 to 1."""

    total: float
    binary_f1: float  # target against non-target
    macro_f1: float  # over the targets and all non-targets as one class


def competition_score(truth: Sequence[str], prediction: Sequence[str]) -> Score:
    """Compare gestures position by position.

    The macro F1 is over the classes that occur in truth or prediction, nine at most.

    Raises:
        ValueError: different lengths, nothing to compare, or an entry that is no gesture.
    """
    if len(truth) != len(prediction) or not truth:
        raise ValueError(
            f"Cannot score {len(prediction)} predictions against {len(truth)} true gestures: "
            "one of each per recording is needed."
        )
    pairs = [(_collapsed(t), _collapsed(p)) for t, p in zip(truth, prediction, strict=True)]
    binary = _f1([(t != "non_target", p != "non_target") for t, p in pairs], cls=True)
    classes = {gesture for pair in pairs for gesture in pair}
    macro = sum(_f1(pairs, cls) for cls in sorted(classes)) / len(classes)
    return Score((binary + macro) / 2, binary, macro)


def _collapsed(gesture: str) -> str:
    """The gesture if it is a target, non_target for the ten others."""
    if gesture in TARGET_GESTURES:
        return gesture
    if gesture in NON_TARGET_GESTURES:
        return "non_target"
    raise ValueError(f"{gesture!r} is none of the 18 gestures and cannot be scored.")


def _f1(pairs: Sequence[tuple[object, object]], cls: object) -> float:
    """F1 of one class; 0 where it occurs on neither side."""
    hits = sum(t == cls and p == cls for t, p in pairs)
    occurrences = sum((t == cls) + (p == cls) for t, p in pairs)
    return 2 * hits / occurrences if occurrences else 0.0
