"""Python values on the wire: bytes worked out by hand, and every kind there and back."""

import io
import math
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
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal, assert_series_equal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from kaggle_evaluation.core import relay  # noqa: E402
from kaggle_evaluation.core.generated import kaggle_evaluation_pb2 as pb  # noqa: E402


def there_and_back(value: object) -> object:
    """What the other side receives."""
    wire = relay._serialize(value).SerializeToString()
    return relay._deserialize(pb.Payload.FromString(wire))


def same(a: object, b: object) -> bool:
    """Equal in type and value, element by element; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b or (a != a and b != b)


# ---- bytes worked out by hand ------------------------------------------------------------------


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
            return b"\x25" + narrow_bytes(value)
        case None:
            return b"\x28\x01"
        case list() | tuple():
            items = b"".join(blob(1, by_hand(item)) for item in value)
            return blob(6 if isinstance(value, list) else 7, items)
        case dict():
            entries = (blob(1, k.encode()) + blob(2, by_hand(v)) for k, v in value.items())
            return blob(8, b"".join(blob(1, entry) for entry in entries))
    raise AssertionError(value)


def narrow_bytes(value: float) -> bytes:
    with np.errstate(over="ignore"):
        return np.float32(value).astype("<f4").tobytes()


def narrowed(value: object) -> object:
    """`value` with its floats rounded to 32 bits, as the wire has them."""
    if isinstance(value, float):
        return struct.unpack("<f", narrow_bytes(value))[0]
    if isinstance(value, list | tuple):
        return type(value)(narrowed(item) for item in value)
    if isinstance(value, dict):
        return {key: narrowed(item) for key, item in value.items()}
    return value


SIXTY_FOUR_BITS = st.integers(-(2**63), 2**63 - 1)
PLAIN = st.none() | st.booleans() | SIXTY_FOUR_BITS | st.floats() | st.text(max_size=20)


def nested(dict_size: int) -> st.SearchStrategy[object]:
    return st.recursive(
        PLAIN,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
            | st.dictionaries(st.text(max_size=5), inner, max_size=dict_size)
        ),
        max_leaves=12,
    )


# NaN may carry any bits, so it is left to the other test; one key, as maps have no order.
@settings(max_examples=150, deadline=None)
@given(nested(dict_size=1).filter(lambda value: "nan" not in repr(value)))
def test_plain_values_have_the_bytes_worked_out_by_hand(value):
    assert relay._serialize(value).SerializeToString() == by_hand(value)


@settings(max_examples=150, deadline=None)
@given(nested(dict_size=4))
def test_plain_values_written_by_hand_are_read(value):
    assert same(relay._deserialize(pb.Payload.FromString(by_hand(value))), narrowed(value))


def test_check_vector_of_a_request():
    request = relay.Client().serialize_request("predict", 1, "x", k=2.5)
    expected = "0a07707265646963741202180212030a01781a0a0a016b12052500002040"
    assert request.SerializeToString().hex() == expected


@pytest.mark.parametrize(
    ("value", "wire"),
    [
        ("", "0a00"),
        (False, "1000"),
        (0, "1800"),
        (0.0, "2500000000"),
        (None, "2801"),
        ([], "3200"),
        ((), "3a00"),
        ({}, "4200"),
        (-1, "1801"),
        (io.BytesIO(), "7a00"),
        (io.BytesIO(b"\x00\xff"), "7a0200ff"),
    ],
)
def test_defaults_are_sent_too(value, wire):
    assert relay._serialize(value).SerializeToString().hex() == wire


def test_floats_are_cut_to_32_bits():
    sent = [0.1, 1e300, -1e300, 1e-60, math.inf, -math.inf, math.nan, -0.0]
    received = there_and_back(sent)
    assert received[:6] == [0.10000000149011612, math.inf, -math.inf, 0.0, math.inf, -math.inf]
    assert math.isnan(received[6])
    assert math.copysign(1, received[7]) == -1


def test_the_messages_are_those_of_the_proto_file():
    text = (ROOT / "kaggle_evaluation" / "core" / "kaggle_evaluation.proto").read_text()
    text = re.sub(r"//.*", "", text)
    written = {}
    for name, body in re.findall(r"message (\w+) \{((?:[^{}]|\{[^{}]*\})*)\}", text):
        written[name] = set(re.findall(r"([\w<>, ]*\w>?) (\w+) = (\d+);", body))
    loaded = {
        name: {(type_name(field), field.name, str(field.number)) for field in message.fields}
        for name, message in pb.DESCRIPTOR.message_types_by_name.items()
    }
    assert {n: {(t.strip(), f, i) for t, f, i in fields} for n, fields in written.items()} == loaded
    oneof = pb.Payload.DESCRIPTOR.oneofs_by_name["value"]
    assert [field.number for field in oneof.fields] == list(range(1, 16))
    assert re.search(r"package (\w+);", text)[1] == pb.DESCRIPTOR.package
    assert pb.DESCRIPTOR.services_by_name["KaggleEvaluationService"].methods[0].name == "Send"


def type_name(field: object) -> str:
    scalars = {8: "bool", 2: "float", 9: "string", 12: "bytes", 18: "sint64"}
    if field.message_type is None:
        return scalars[field.type]
    if field.message_type.GetOptions().map_entry:
        return f"map<string, {field.message_type.fields_by_name['value'].message_type.name}>"
    # how to ask for "repeated" changed between protobuf versions; a list has no presence
    repeated = not field.has_presence
    return ("repeated " if repeated else "") + field.message_type.name


# ---- numpy -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scalar",
    [np.float64(1e300), np.float32(0.1), np.float16(2), np.int8(-1), np.uint64(2**64 - 1),
     np.bool_(1), np.complex64(1j), np.float64("nan")],
)  # fmt: skip
def test_numpy_scalars_keep_type_and_precision(scalar):
    received = there_and_back(scalar)
    assert relay._serialize(scalar).WhichOneof("value") == "numpy_scalar_value"
    assert same(received, scalar)


@pytest.mark.parametrize(
    "scalar", [np.str_("Text on phone"), np.bytes_(b"x"), np.datetime64("2025-01-01")]
)
def test_other_numpy_scalars_are_refused_without_text_but_with_a_note(scalar):
    with pytest.raises(AssertionError) as caught:
        relay._serialize(scalar)
    assert str(caught.value) == ""
    assert "str(label)" in caught.value.__notes__[0]


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


def test_arrays_of_objects_are_neither_sent_nor_read():
    with pytest.raises(ValueError, match="allow_pickle=False"):
        relay._serialize(np.array([{}], dtype=object))
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Refused"):
        relay._deserialize(pb.Payload(numpy_array_value=buffer.getvalue()))


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
    with pytest.raises((ValueError, tokenize.TokenError)):
        relay._deserialize(pb.Payload(**{member: content}))


# ---- pandas and polars -------------------------------------------------------------------------

COLUMNS = {
    pl.String: st.none() | st.text(max_size=6),
    pl.Int64: st.none() | SIXTY_FOUR_BITS,
    pl.UInt64: st.none() | st.integers(0, 2**64 - 1),
    pl.Float64: st.none() | st.floats(),
    pl.Float32: st.none() | st.floats(width=32),
    pl.Boolean: st.none() | st.booleans(),
    pl.Null: st.none(),
    pl.Date: st.none() | st.dates(),
    pl.List(pl.Int64): st.none() | st.lists(SIXTY_FOUR_BITS, max_size=3),
}


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)  # of columns


@st.composite
def polars_frames(draw: st.DrawFn) -> pl.DataFrame:
    names = draw(st.lists(NAMES, unique=True, max_size=5))
    rows = draw(st.integers(0, 5))
    series = []
    for name in names:
        dtype = draw(st.sampled_from(list(COLUMNS)))
        all_null = draw(st.booleans())
        cell = st.none() if all_null else COLUMNS[dtype]
        cells = draw(st.lists(cell, min_size=rows, max_size=rows))
        series.append(pl.Series(name, cells, dtype=dtype))
    return pl.DataFrame(series)


@settings(max_examples=100, deadline=None)
@given(polars_frames())
def test_polars_frames_survive(frame):
    received = there_and_back(frame)
    assert received.schema == frame.schema
    assert_frame_equal(received, frame)


@settings(max_examples=50, deadline=None)
@given(polars_frames().filter(lambda frame: frame.width > 0))
def test_polars_series_survive(frame):
    for series in frame.iter_columns():
        assert_series_equal(there_and_back(series), series)


@st.composite
def pandas_frames(draw: st.DrawFn) -> pd.DataFrame:
    kinds = {"float64": st.floats(), "int64": SIXTY_FOUR_BITS, "bool": st.booleans(),
             "str": st.none() | st.text(max_size=6)}  # fmt: skip
    names = draw(st.lists(NAMES, unique=True, min_size=1, max_size=4))
    rows = draw(st.integers(0, 5))
    index = range(10, 10 + rows)
    columns = {}
    for name in names:
        kind = draw(st.sampled_from(list(kinds)))
        cells = draw(st.lists(kinds[kind], min_size=rows, max_size=rows))
        columns[name] = pd.Series(cells, index, dtype=None if kind == "str" else kind)
    return pd.DataFrame(columns)


def cells_of(frame: pd.DataFrame) -> dict:
    """Cells by column. None stands for every missing text, which pandas may store in three ways."""
    cells = {name: frame[name].tolist() for name in frame}
    text = [name for name in frame if not pd.api.types.is_numeric_dtype(frame[name])]
    return cells | {n: [c if isinstance(c, str) else None for c in cells[n]] for n in text}


@settings(max_examples=75, deadline=None)
@given(pandas_frames())
def test_pandas_frames_survive_without_their_index(frame):
    received = there_and_back(frame)
    assert list(received.index) == list(range(len(frame)))
    assert same(cells_of(received), cells_of(frame))
    numbers = frame.select_dtypes(["number", "bool"]).columns
    assert (received.dtypes[numbers] == frame.dtypes[numbers]).all()
    series = there_and_back(frame[frame.columns[0]])
    assert type(series) is pd.Series
    assert same(cells_of(series.to_frame()), cells_of(frame.iloc[:, :1]))


def test_unnamed_series():
    assert there_and_back(pd.Series([1, 2])).name == "0"
    assert there_and_back(pl.Series([1, 2])).name == ""


def test_polars_frames_travel_as_an_arrow_stream_with_large_strings():
    payload = relay._serialize(pl.DataFrame({"name": ["a", None], "empty": [None, None]}))
    table = pa.ipc.open_stream(payload.polars_dataframe_value).read_all()
    assert table.schema.field("name").type == pa.large_string()
    assert payload.polars_dataframe_value.startswith(b"\xff\xff\xff\xff")
    assert relay._serialize(pl.Series(["a"])).polars_series_value.startswith(b"PAR1")
    assert relay._serialize(pd.Series(["a"])).pandas_series_value.startswith(b"PAR1")
    assert relay._serialize(pd.DataFrame({"a": [1]})).pandas_dataframe_value.startswith(b"PAR1")


def test_a_polars_series_in_the_layout_of_later_cores_is_read():
    buffer = io.BytesIO()
    table = pa.table({"s": ["x", None]})
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    received = relay._deserialize(pb.Payload(polars_series_value=buffer.getvalue()))
    assert_series_equal(received, pl.Series("s", ["x", None]))


def test_blobs_without_compression_are_read():
    frame = pd.DataFrame({"a": [1.5, None]})
    raw = frame.to_parquet(index=False, compression=None)
    received = relay._deserialize(pb.Payload(pandas_dataframe_value=raw))
    pd.testing.assert_frame_equal(received, frame)


@pytest.mark.parametrize(
    "series", [pl.Series("c", ["a"], dtype=pl.Enum(["a"])), pl.Series("c", [{1}], dtype=pl.Object)]
)
def test_polars_columns_without_a_wire_type_are_refused(series):
    with pytest.raises(TypeError, match="Column 'c'"):
        relay._serialize(series.to_frame())


def test_categories_survive():
    frame = pl.DataFrame({"c": ["b", "a", None]}, schema={"c": pl.Categorical})
    assert there_and_back(frame)["c"].cast(pl.String).to_list() == ["b", "a", None]


def test_an_arrow_stream_with_wrong_offsets_is_refused():
    """Such offsets would make a reader that trusts them leave its memory."""
    table = pa.table({"s": pa.array(["abcdefg"], pa.large_string())})
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    good, bad = (np.array([0, end], dtype="<i8").tobytes() for end in (7, 2**40))
    assert buffer.getvalue().count(good) == 1
    lie = buffer.getvalue().replace(good, bad)
    with pytest.raises(pa.ArrowInvalid):
        relay._deserialize(pb.Payload(polars_dataframe_value=lie))


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"x", {1}, 1j, pl.LazyFrame(), object(), frozenset(), range(3)])
def test_other_types_are_refused_by_name(value):
    with pytest.raises(TypeError, match=re.escape(str(type(value)))):
        relay._serialize(value)
    with pytest.raises(TypeError):
        relay._serialize([{"deep": (value,)}])


def test_subclasses_travel_as_what_they_are():
    class Label(str):
        __slots__ = ()

    assert same(there_and_back(Label("Wave hello")), "Wave hello")
    assert same(there_and_back([True, 1]), [True, 1])


def test_dict_keys_must_be_text():
    with pytest.raises(TypeError, match="keys must be str"):
        relay._serialize({1: 2})


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30])
def test_integers_beyond_64_bits_are_refused(number):
    with pytest.raises(ValueError, match="range"):
        relay._serialize(number)


def test_nesting_ends_where_readers_give_up():
    def lists(n: int) -> object:
        return [] if n == 0 else [lists(n - 1)]

    def dicts(n: int) -> object:
        return {} if n == 0 else {"k": dicts(n - 1)}

    # protobuf in pure Python, all that 3.20 has here, copies a map once more per level
    fast = api_implementation.Type() != "python"
    for deepest in (lists(48), dicts(31 if fast else 5)):
        response = blob(1, relay._serialize(deepest).SerializeToString())
        received = pb.KaggleEvaluationResponse.FromString(response)
        assert relay._deserialize(received.payload) == deepest
    endless: list = []
    endless.append(endless)
    for too_deep in (lists(60), dicts(40), endless):
        with pytest.raises(ValueError, match="nested more deeply"):
            relay._serialize(too_deep)


def test_an_unset_payload_is_refused():
    with pytest.raises(TypeError, match="no member"):
        relay._deserialize(pb.Payload())


@pytest.mark.parametrize(
    ("number", "name"), [(16, "unknown"), (17, "enum"), (18, "dataclass"), (19, "pydantic")]
)
def test_members_of_later_cores_are_refused_by_number(number, name):
    later = pb.Payload.FromString(blob(number, blob(1, b"module") + blob(2, b"Class")))
    with pytest.raises(TypeError, match=f"member {number} .*{name}.*later core"):
        relay._deserialize(later)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(range(9, 15)), st.binary(max_size=200), st.sampled_from([b"", b"PAR1"]))
def test_random_blobs_raise_and_nothing_worse(field, content, start):
    payload = pb.Payload.FromString(blob(field, start + content))
    with pytest.raises(Exception):  # noqa: B017, PT011  # whatever the reader of the kind raises
        relay._deserialize(payload)


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
    try:
        str(relay._deserialize(pb.Payload(**{member: bytes(blob)})))
    except Exception:
        pass
print("alive")
"""


def test_damaged_blobs_raise_and_leave_the_process_alive():
    """polars' own Parquet reader would abort it, and its panics are no Exceptions."""
    done = subprocess.run(
        [sys.executable, "-c", DAMAGE], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "alive\n", done.stderr[-2000:]


# ---- beside other packages ---------------------------------------------------------------------

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
assert request.SerializeToString().hex().startswith("0a0770726564696374")
"""


@pytest.mark.parametrize("code", [OTHER_PACKAGE + OURS, OURS + OTHER_PACKAGE])
@pytest.mark.parametrize("implementation", ["", "python"])
def test_another_file_of_the_same_name_does_not_clash(code, implementation):
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    if implementation:
        environment["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = implementation
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def test_import_is_light():
    heavy = ("pandas", "polars", "pyarrow")
    code = f"""
import sys, kaggle_evaluation.cmi_inference_server
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
