"""Python values on the wire: bytes worked out by hand, and every kind there and back."""

import io
import re
import struct
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from google.protobuf.internal import api_implementation
from hypothesis import example, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal, assert_series_equal
from polars.testing.parametric import column, dataframes

from kaggle_evaluation.core import relay
from kaggle_evaluation.core.generated import kaggle_evaluation_pb2 as pb

ROOT = Path(__file__).resolve().parents[1]


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


SIXTY_FOUR_BITS = st.integers(-(2**63), 2**63 - 1)
ROUNDED = [0.1, 1e300, -1e300, 1e-60, -0.0, float("inf"), -float("inf")]
PLAIN = st.none() | st.booleans() | SIXTY_FOUR_BITS | st.floats() | st.text(max_size=20)


NESTED = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=1)  # maps have no order
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(NESTED)
@example(ROUNDED)
@example([*ROUNDED, float("nan")])
def test_plain_values_have_the_bytes_worked_out_by_hand_and_are_read_from_them(value):
    wire = by_hand(value)
    assert by_hand(relay._deserialize(pb.Payload.FromString(wire))) == wire
    if "nan" not in repr(value):  # it may carry any bits
        assert relay._serialize(value).SerializeToString() == wire


def test_defaults_are_sent_too():
    values = ["", False, 0, 0.0, None, [], (), {}, -1, io.BytesIO(), io.BytesIO(b"\x00\xff")]
    wires = "0a00 1000 1800 2500000000 2801 3200 3a00 4200 1801 7a00 7a0200ff"
    assert [relay._serialize(value).SerializeToString().hex() for value in values] == wires.split()
    assert there_and_back(values[-1]).getvalue() == b"\x00\xff"
    several = {"b": [1], "a": {"d": "", "c": None}, "": ()}
    assert there_and_back(several) == several


def test_the_members_and_their_numbers():
    names = """str bool int float none list tuple dict pandas_dataframe polars_dataframe
        pandas_series polars_series numpy_array numpy_scalar bytes_io"""
    members = [(f"{name}_value", number) for number, name in enumerate(names.split(), 1)]
    assert [(field.name, field.number) for field in pb.Payload.DESCRIPTOR.fields] == members
    messages = pb.DESCRIPTOR.message_types_by_name.values()
    loaded = {(field.name, str(field.number)) for message in messages for field in message.fields}
    proto = ROOT / "kaggle_evaluation" / "core" / "kaggle_evaluation.proto"
    assert set(re.findall(r"(\w+) = (\d+);", proto.read_text())) == loaded


@pytest.mark.parametrize(
    "scalar",
    [np.float64(1e300), np.float32(0.1), np.float16(2), np.int8(-1), np.uint64(2**64 - 1),
     np.bool_(1), np.complex64(1j), np.float64("nan")],
)  # fmt: skip
def test_numpy_scalars_keep_type_and_precision(scalar):
    received = there_and_back(scalar)
    assert relay._serialize(scalar).WhichOneof("value") == "numpy_scalar_value"
    assert (type(received), repr(received)) == (type(scalar), repr(scalar))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 3)),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.random.default_rng(0).normal(size=(4, 5))),
        np.array(["a", "ü€😀"]),
        np.array(7),
        np.array([("x", 1)], dtype=[("name", "U5"), ("n", "<i8")]),
        np.array([np.nan, np.inf]),
    ],
)
def test_arrays_survive(array):
    received = there_and_back(array)
    assert type(received) is np.ndarray
    assert (received.dtype, received.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(received, array)


def npy_header(text: str) -> bytes:
    body = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


@pytest.mark.parametrize(
    "content",
    [
        npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,)}"),
        npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}") + bytes(8),
        npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + b"cposix\nsystem\n",
        npy_header("__import__('os').abort()"),
        npy_header("(" * 100),
        b"PK\x03\x04" + bytes(100),
        b"\x93NUMPY\x09\x09" + bytes(100),
        b"",
    ],
)
@pytest.mark.parametrize("member", ["numpy_array_value", "numpy_scalar_value"])
def test_npy_blobs_that_lie_are_refused(content, member):
    refused(pb.Payload(**{member: content}), (ValueError, tokenize.TokenError))


# each kind under a name that is hard to carry
NAMES = ["x", "ü€😀", 'a "quoted" name', "a,b", "\n", " ", "0", "a.b", "[0]"]
DTYPES = [pl.String, pl.Int64, pl.UInt64, pl.Float64, pl.Float32, pl.Boolean, pl.Null, pl.Date]
DTYPES += [pl.List(pl.Int64)]
COLUMNS = [column(*pair, allow_null=True) for pair in zip(NAMES, DTYPES, strict=True)]


@settings(max_examples=50, deadline=None)
@given(dataframes(COLUMNS, max_size=5))
@example(pl.DataFrame({"text": ["ü€😀", "", None], "days": pl.Series([None] * 3, dtype=pl.Date)}))
@example(pl.DataFrame())
def test_polars_frames_and_their_columns_survive(frame):
    received = there_and_back(frame)
    assert received.schema == frame.schema
    assert_frame_equal(received, frame)
    for series in frame.iter_columns():
        assert_series_equal(there_and_back(series), series)


PANDAS = [pl.String, pl.Float64, pl.Int64, pl.Boolean]


@settings(max_examples=50, deadline=None)
@given(dataframes([column(str(dtype), dtype) for dtype in PANDAS], max_size=5), st.integers(0, 9))
@example(pl.DataFrame({"text": ["ü€😀", "", None], "ü": [0.1, None, float("inf")]}), 3)
def test_pandas_frames_and_their_columns_survive_without_their_index(table, first):
    frame = table.to_pandas()
    expected = frame.copy()
    frame.index += first
    pd.testing.assert_frame_equal(there_and_back(frame), expected)
    for name in frame:
        pd.testing.assert_series_equal(there_and_back(frame[name]), expected[name])


def test_names_categories_and_subclasses():
    assert there_and_back(pd.Series([1, 2])).name == "0"
    assert there_and_back(pl.Series([1, 2])).name == ""
    letters = pl.DataFrame({"c": ["b", "a", None]}, schema={"c": pl.Categorical})
    assert there_and_back(letters)["c"].cast(pl.String).to_list() == ["b", "a", None]

    class Label(str):
        __slots__ = ()

    assert repr(there_and_back([Label("Wave hello"), True, 1])) == "['Wave hello', True, 1]"
    assert type(there_and_back(Label("Wave hello"))) is str


def test_polars_frames_travel_as_an_arrow_stream_with_large_strings():
    payload = relay._serialize(pl.DataFrame({"name": ["a", None], "empty": [None, None]}))
    table = pa.ipc.open_stream(payload.polars_dataframe_value).read_all()
    assert table.schema.field("name").type == pa.large_string()
    assert payload.polars_dataframe_value.startswith(b"\xff\xff\xff\xff")
    assert relay._serialize(pl.Series(["a"])).polars_series_value.startswith(b"PAR1")
    assert relay._serialize(pd.Series(["a"])).pandas_series_value.startswith(b"PAR1")
    assert relay._serialize(pd.DataFrame({"a": [1]})).pandas_dataframe_value.startswith(b"PAR1")


def arrow_stream(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def test_layouts_of_other_cores_are_read():
    """Later ones send a polars series as an Arrow stream; others do not compress."""
    stream = arrow_stream(pa.table({"s": ["x", None]}))
    received = relay._deserialize(pb.Payload(polars_series_value=stream))
    assert_series_equal(received, pl.Series("s", ["x", None]))
    frame = pd.DataFrame({"a": [1.5, None]})
    raw = frame.to_parquet(index=False, compression=None)
    received = relay._deserialize(pb.Payload(pandas_dataframe_value=raw))
    pd.testing.assert_frame_equal(received, frame)


def test_an_arrow_stream_with_wrong_offsets_is_refused():
    """Such offsets would make a reader that trusts them leave its memory."""
    stream = arrow_stream(pa.table({"s": pa.array(["abcdefg"], pa.large_string())}))
    good, bad = (np.array([0, end], dtype="<i8").tobytes() for end in (7, 2**40))
    assert stream.count(good) == 1
    refused(pb.Payload(polars_dataframe_value=stream.replace(good, bad)), pa.ArrowInvalid)


@pytest.mark.parametrize("value", [b"x", {1}, 1j, pl.LazyFrame(), object(), frozenset(), range(3)])
def test_other_types_are_refused_by_name(value):
    with pytest.raises(TypeError, match=re.escape(str(type(value)))):
        relay._serialize(value)
    with pytest.raises(TypeError):
        relay._serialize([{"deep": (value,)}])


def lists(n: int) -> list:
    return [] if n == 0 else [lists(n - 1)]


def dicts(n: int) -> dict:
    return {} if n == 0 else {"k": dicts(n - 1)}


ENDLESS: list = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ({1: 2}, TypeError, "keys must be str"),
        (2**63, ValueError, "range"),
        (-(2**63) - 1, ValueError, "range"),
        (10**30, ValueError, "range"),
        (np.array([{}], dtype=object), ValueError, "allow_pickle=False"),
        (np.bytes_(b"x"), AssertionError, r"str\(label\)"),
        (np.datetime64("2025-01-01"), AssertionError, r"str\(label\)"),
        (pl.DataFrame({"c": ["a"]}, schema={"c": pl.Enum(["a"])}), TypeError, "Column 'c'"),
        (pl.DataFrame({"c": [{1}]}, schema={"c": pl.Object}), TypeError, "Column 'c'"),
        (lists(60), ValueError, "nested more deeply"),
        (dicts(40), ValueError, "nested more deeply"),
        (ENDLESS, ValueError, "nested more deeply"),
    ],
)
def test_values_without_a_form_on_the_wire_are_refused(value, error, text):
    with pytest.raises(error, match=text):
        relay._serialize(value)


def test_nesting_ends_where_readers_give_up():
    # protobuf in pure Python, all that 3.20 has here, copies a map once more per level
    fast = api_implementation.Type() != "python"
    for deepest in (lists(48), dicts(31 if fast else 5)):
        response = blob(1, relay._serialize(deepest).SerializeToString())
        received = pb.KaggleEvaluationResponse.FromString(response)
        assert relay._deserialize(received.payload) == deepest


def test_no_member_and_members_of_later_cores_are_refused():
    refused(pb.Payload(), TypeError, "no member")
    for number, name in ((16, "unknown"), (17, "enum"), (18, "dataclass"), (19, "pydantic")):
        later = pb.Payload.FromString(blob(number, blob(1, b"module") + blob(2, b"Class")))
        refused(later, TypeError, f"member {number} .*{name}.*later core")


DAMAGE = """
import random
import numpy as np, pandas as pd, polars as pl
from kaggle_evaluation.core import relay
from kaggle_evaluation.core.generated import kaggle_evaluation_pb2 as pb

rng = random.Random(0)
text = ["xyz", None, "q"] * 40
values = [pl.DataFrame({"a": text, "b": [[1], [2, 3], None] * 40}), pl.Series("s", text),
          pd.DataFrame({"a": [1.5, None] * 50}), pd.Series(text), np.arange(50)]
for turn in range(300):
    payload = relay._serialize(values[turn % len(values)])
    member = payload.WhichOneof("value")
    blob = bytearray(getattr(payload, member))
    for _ in range(rng.choice((1, 2, 5))):
        blob[rng.randrange(len(blob))] = rng.choice((0, 127, 255, rng.randrange(256)))
    if turn % 3 == 0:
        blob = rng.choice((b"", b"PAR1")) + rng.randbytes(200)
    try:
        str(relay._deserialize(pb.Payload(**{member: bytes(blob)})))
    except Exception:
        continue
    assert turn % 3, "random bytes were read"
print("alive")
"""


def test_damaged_blobs_raise_and_leave_the_process_alive():
    """polars' own Parquet reader would abort it, and its panics are no Exceptions."""
    done = subprocess.run(
        [sys.executable, "-c", DAMAGE], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "alive\n", done.stderr[-2000:]


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


@pytest.mark.parametrize("code", [OTHER_PACKAGE + OURS, OURS + OTHER_PACKAGE])
@pytest.mark.parametrize("implementation", ["", "python"])
def test_another_file_of_the_same_name_does_not_clash(code, implementation):
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    if implementation:
        environment["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = implementation
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def test_import_is_light():
    code = "import sys, kaggle_evaluation.cmi_inference_server; "
    code += "print([name for name in ('pandas', 'polars', 'pyarrow') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
