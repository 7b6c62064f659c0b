"""Python values on the wire: bytes worked out by hand, and every kind there and back."""

import io
import re
import struct
import subprocess
import sys
import tokenize

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from google.protobuf.internal import api_implementation
from hypothesis import example, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal, assert_series_equal
from runs import ROOT

from kaggle_evaluation.core import relay
from kaggle_evaluation.core.generated import kaggle_evaluation_pb2 as pb

SIXTY_FOUR_BITS = st.integers(-(2**63), 2**63 - 1)
ROUNDED = [0.1, 1e300, -1e300, 1e-60, -0.0, float("inf"), -float("inf")]
PLAIN = st.none() | st.booleans() | SIXTY_FOUR_BITS | st.floats() | st.text(max_size=20)
SCALARS = [np.float64(1e300), np.float32(0.1), np.float16(2), np.int8(-1), np.uint64(2**64 - 1)]
SCALARS += [np.bool_(1), np.complex64(1j), np.float64("nan")]
ARRAYS = [np.zeros((0, 3)), np.arange(6, dtype=">i4").reshape(2, 3), np.array(["a", "ü€😀"])]
ARRAYS += [np.array(7), np.array([("x", 1)], dtype=[("name", "U5"), ("n", "<i8")])]
ARRAYS += [np.asfortranarray(np.random.default_rng(0).normal(size=(4, 5))), np.array([np.nan])]
OTHER_PACKAGE = """
from google.protobuf import descriptor_pb2, descriptor_pool
file = descriptor_pb2.FileDescriptorProto(
    name="kaggle_evaluation.proto", package="kaggle_evaluation_client", syntax="proto3")
field = file.message_type.add(name="Payload").field.add(name="other", number=1, label=1, type=9)
descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
"""
OURS = """
from kaggle_evaluation.core import relay
request = relay.Client().serialize_request("predict", 1, "x", k=2.5)
expected = "0a07707265646963741202180212030a01781a0a0a016b12052500002040"
assert request.SerializeToString().hex() == expected
"""
PURE = {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}


def there_and_back(value: object) -> object:
    """What the other side receives."""
    wire = relay._serialize(value).SerializeToString()
    return relay._deserialize(pb.Payload.FromString(wire))


def refused(payload: object, error: type[Exception] | tuple, text: str | None = None) -> None:
    with pytest.raises(error, match=text):
        relay._deserialize(payload)


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def blob(field: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def by_hand(value: object) -> bytes:
    """The Payload of a plain value, written without protobuf."""
    match value:
        case str():
            return blob(1, value.encode())
        case bool():
            return b"\x10" + bytes([value])
        case int():
            return b"\x18" + varint(value * 2 if value >= 0 else -value * 2 - 1)
        case float():
            with np.errstate(over="ignore"):
                return b"\x25" + np.float32(value).astype("<f4").tobytes()
        case None:
            return b"\x28\x01"
        case list() | tuple():
            items = b"".join(blob(1, by_hand(item)) for item in value)
            return blob(6 if isinstance(value, list) else 7, items)
        case dict():
            entries = (blob(1, k.encode()) + blob(2, by_hand(v)) for k, v in value.items())
            return blob(8, b"".join(blob(1, entry) for entry in entries))
    raise AssertionError(value)


def deeper(inner: st.SearchStrategy) -> st.SearchStrategy:
    """A map has one entry: maps have no order."""
    lists, keys = st.lists(inner, max_size=4), st.text(max_size=5)
    return lists | lists.map(tuple) | st.dictionaries(keys, inner, max_size=1)


@settings(max_examples=200, deadline=None)
@given(st.recursive(PLAIN, deeper, max_leaves=12))
@example(["", False, 0, 0.0, None, [], (), {}, -1])  # defaults are sent too
@example(ROUNDED)
@example([*ROUNDED, float("nan")])
def test_plain_values_have_the_bytes_worked_out_by_hand_and_are_read_from_them(value):
    wire = by_hand(value)
    assert by_hand(relay._deserialize(pb.Payload.FromString(wire))) == wire
    if "nan" not in repr(value):  # it may carry any bits
        assert relay._serialize(value).SerializeToString() == wire


def test_byte_streams():
    for content, wire in (b"", "7a00"), (b"\x00\xff", "7a0200ff"):
        assert relay._serialize(io.BytesIO(content)).SerializeToString().hex() == wire
        assert there_and_back(io.BytesIO(content)).getvalue() == content


def test_numpy_scalars_and_arrays_keep_type_shape_and_precision():
    for scalar in SCALARS:
        received = there_and_back(scalar)
        assert relay._serialize(scalar).WhichOneof("value") == "numpy_scalar_value"
        assert (type(received), repr(received)) == (type(scalar), repr(scalar))
    for array in ARRAYS:
        received = there_and_back(array)
        assert type(received) is np.ndarray
        assert (received.dtype, received.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(received, array)


def npy_header(text: str) -> bytes:
    body = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


@pytest.mark.parametrize("member", ["numpy_array_value", "numpy_scalar_value"])
def test_npy_blobs_that_lie_are_refused(member):
    lies = (
        npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,)}"),
        npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}") + bytes(8),
        npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + b"cposix\nsystem\n",
        npy_header("__import__('os').abort()"), npy_header("(" * 100), b"",
        b"PK\x03\x04" + bytes(100), b"\x93NUMPY\x09\x09" + bytes(100),
    )  # fmt: skip
    for content in lies:
        refused(pb.Payload(**{member: content}), (ValueError, tokenize.TokenError))


def test_polars_frames_and_their_columns_survive():
    columns = {"x": ["ü€😀", "", None], "ü€😀": [-(2**63), None, 5], 'a "quoted" name': [2**64 - 1] * 3,
               "a,b": [0.1, None, float("inf")], "\n": [True, None, False], " ": [None] * 3,
               "[0]": [[1], [], None], "days": pl.Series([19000, None, 0]).cast(pl.Date)}  # fmt: skip
    kinds = {"a,b": pl.Float32, 'a "quoted" name': pl.UInt64}
    frame = pl.DataFrame(columns, schema_overrides=kinds)
    for whole in (frame, frame.head(0), pl.DataFrame()):
        received = there_and_back(whole)
        assert received.schema == whole.schema
        assert_frame_equal(received, whole)
        for series in whole.iter_columns():
            assert_series_equal(there_and_back(series), series)


def test_pandas_frames_and_their_columns_survive_without_their_index():
    columns = {"text": ["ü€😀", "", None], "ü": [0.1, None, float("inf")], "n": [1, 2, 3]}
    expected = pd.DataFrame(columns)
    frame = expected.set_index(pd.Index([3, 4, 5]))
    pd.testing.assert_frame_equal(there_and_back(frame), expected)
    for name in frame:
        pd.testing.assert_series_equal(there_and_back(frame[name]), expected[name])


def test_names_categories_and_subclasses():
    names = [there_and_back(kind([1, 2])).name for kind in (pd.Series, pl.Series)]
    assert names == ["0", ""]
    letters = pl.DataFrame({"c": ["b", "a", None]}, schema={"c": pl.Categorical})
    assert there_and_back(letters)["c"].cast(pl.String).to_list() == ["b", "a", None]
    label = type("Label", (str,), {})("Wave hello")
    assert repr(there_and_back([label, True, 1])) == "['Wave hello', True, 1]"
    assert type(there_and_back(label)) is str
    several = {"b": [1], "a": {"d": "", "c": None}, "": ()}
    assert there_and_back(several) == several


def test_polars_frames_travel_as_an_arrow_stream_with_large_strings():
    payload = relay._serialize(pl.DataFrame({"name": ["a", None], "empty": [None, None]}))
    table = pa.ipc.open_stream(payload.polars_dataframe_value).read_all()
    assert table.schema.field("name").type == pa.large_string()
    assert payload.polars_dataframe_value.startswith(b"\xff\xff\xff\xff")
    assert relay._serialize(pl.Series(["a"])).polars_series_value.startswith(b"PAR1")
    assert relay._serialize(pd.Series(["a"])).pandas_series_value.startswith(b"PAR1")
    assert relay._serialize(pd.DataFrame({"a": [1]})).pandas_dataframe_value.startswith(b"PAR1")


def test_layouts_of_other_cores_are_read_and_wrong_offsets_refused():
    """Later ones send a polars series as an Arrow stream; others do not compress."""
    buffer, table = io.BytesIO(), pa.table({"s": pa.array(["abcdefg"], pa.large_string())})
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    stream = buffer.getvalue()
    received = relay._deserialize(pb.Payload(polars_series_value=stream))
    assert_series_equal(received, pl.Series("s", ["abcdefg"]))
    frame = pd.DataFrame({"a": [1.5, None]})
    raw = frame.to_parquet(index=False, compression=None)
    received = relay._deserialize(pb.Payload(pandas_dataframe_value=raw))
    pd.testing.assert_frame_equal(received, frame)
    good, bad = (np.array([0, end], dtype="<i8").tobytes() for end in (7, 2**40))
    assert stream.count(good) == 1
    refused(pb.Payload(polars_dataframe_value=stream.replace(good, bad)), pa.ArrowInvalid)


def lists(n: int) -> list:
    return [] if n == 0 else [lists(n - 1)]


def dicts(n: int) -> dict:
    return {} if n == 0 else {"k": dicts(n - 1)}


ENDLESS: list = []
ENDLESS.append(ENDLESS)
FORMLESS = (
    ({1: 2}, TypeError, "keys must be str"),
    (2**63, ValueError, "range"),
    (np.array([{}], dtype=object), ValueError, "allow_pickle=False"),
    (np.bytes_(b"x"), AssertionError, r"str\(label\)"),
    (np.datetime64("2025-01-01"), AssertionError, r"str\(label\)"),
    (pl.DataFrame({"c": ["a"]}, schema={"c": pl.Enum(["a"])}), TypeError, "Column 'c'"),
    (pl.DataFrame({"c": [{1}]}, schema={"c": pl.Object}), TypeError, "Column 'c'"),
    (lists(60), ValueError, "nested more deeply"),
    (dicts(40), ValueError, "nested more deeply"),
    (ENDLESS, ValueError, "nested more deeply"),
    *((x, TypeError, re.escape(str(type(x)))) for x in (b"x", {1}, 1j, pl.LazyFrame(), object())),
)


def test_values_without_a_form_on_the_wire_are_refused():
    for value, error, text in FORMLESS:
        for sent in (value, [{"deep": (value,)}]):
            with pytest.raises(error, match=text):
                relay._serialize(sent)


def test_nesting_ends_where_readers_give_up():
    # protobuf in pure Python, all that 3.20 has here, copies a map once more per level
    fast = api_implementation.Type() != "python"
    for deepest in (lists(48), dicts(31 if fast else 5)):
        response = blob(1, relay._serialize(deepest).SerializeToString())
        received = pb.KaggleEvaluationResponse.FromString(response)
        assert relay._deserialize(received.payload) == deepest


@pytest.mark.parametrize("implementation", [{}, PURE])
def test_another_file_of_the_same_name_does_not_clash_and_import_is_light(implementation):
    light = "import sys, kaggle_evaluation.cmi_inference_server\n"
    light += "assert not {'pandas', 'polars', 'pyarrow'} & {*sys.modules}"
    for code in (OTHER_PACKAGE + OURS, light + OURS + OTHER_PACKAGE):
        environment = {"PYTHONPATH": str(ROOT), **implementation}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
