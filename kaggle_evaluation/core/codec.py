"""Python values as Payload messages and back: the 15 kinds of the wire format.

KINDS is the whole contract, one row per kind. Writing tries its tests from top to bottom, so the
order matters: np.float64 is also a float, and True is also an int. pandas, polars and pyarrow are
imported by the rows that need them. Nothing that is read is unpickled or evaluated, and what a blob
declares about its own size is compared with its real size before memory is asked for.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .generated import kaggle_evaluation_pb2 as pb

MAX_MESSAGE_DEPTH = 100  # protobuf readers refuse more messages within each other
ENVELOPE_DEPTH = 2  # request or response, and the payload in it
_LATER_KINDS = {17: "enum", 18: "dataclass", 19: "pydantic model"}  # of cores 1.4.0 and later


class Kind(NamedTuple):
    """One member of Payload's oneof. It holds a plain value, or a message that is filled in."""

    member: str
    fits: Callable[[Any], bool]  # is this Python value of the kind?
    read: Callable[[Any], Any]  # what the member holds → value
    write: Callable[[Any], Any] | None = None  # value → what the member is set to
    fill: Callable[[Any, Any, int], None] | None = None  # (message in the member, value, depth)


def _serialize(data: Any) -> Any:
    """Turn a Python value into a Payload message.

    Raises:
        TypeError: no kind fits, a dict key is no str, or a polars column has no wire type.
        ValueError: an int beyond 64 bits, an array of objects, or values nested too deeply.
        AssertionError: a numpy scalar that is neither number nor bool, such as np.str_. Without
            text, as in the original: the gateway then reports an error without details.
    """
    payload = pb.Payload()
    serialize_into(payload, data)
    return payload


def serialize_into(payload: Any, data: Any, depth: int = ENVELOPE_DEPTH) -> None:
    """Set `payload` to a Python value; raises as `_serialize` does.

    Messages are filled where they are: to build and then insert them would copy each one, with
    the tables in it, once per level.

    Args:
        payload: an empty Payload message.
        data: any of the kinds in KINDS; lists, tuples and dicts may hold further ones.
        depth: messages around and including this payload.
    """
    if depth > MAX_MESSAGE_DEPTH:
        raise ValueError(
            f"The value is nested more deeply than the {MAX_MESSAGE_DEPTH} messages a reader "
            "accepts (49 lists or 32 dicts within each other). Flatten it, or send a string."
        )
    for kind in KINDS:
        if not kind.fits(data):
            continue
        if kind.write:
            setattr(payload, kind.member, kind.write(data))
        elif kind.fill:
            message = getattr(payload, kind.member)
            message.SetInParent()  # an empty list is sent too
            kind.fill(message, data, depth)
        return
    raise TypeError(
        f"Type {type(data)} cannot be sent. Send str, bool, int, float, None, list, tuple, dict, "
        "io.BytesIO, a numpy number or array, or a pandas or polars DataFrame or Series."
    )


def _deserialize(payload: Any) -> Any:
    """Turn a Payload message into the Python value it stands for.

    Raises:
        TypeError: no member is set, or one that only later versions of the format know.
        ValueError: the bytes in the member are not what the member announces.
    """
    member = payload.WhichOneof("value")
    if member is None:
        raise TypeError(_unknown_payload(payload.SerializeToString()))
    return _KIND_BY_MEMBER[member].read(getattr(payload, member))


def _unknown_payload(raw: bytes) -> str:
    """What to say about a payload with no known member, from its bytes: those start with a tag."""
    if not raw:
        return "Found unknown Payload case None: no member of the oneof is set."
    number = 0
    for position, byte in enumerate(raw):
        number |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            break
    number >>= 3
    kind = _LATER_KINDS.get(number, "unknown kind")
    return (
        f"Found unknown Payload case: member {number} ({kind}). This package reads members 1 to "
        f"{len(KINDS)}; the sender uses a later core. Send plain values, lists or dicts instead."
    )


# ---- nested values -------------------------------------------------------------------------------


def _fill_list(payload_list: Any, data: Sequence[Any], depth: int) -> None:
    for item in data:
        serialize_into(payload_list.payloads.add(), item, depth + 2)


def _read_list(payload_list: Any) -> list[Any]:
    return [_deserialize(item) for item in payload_list.payloads]


def _fill_dict(payload_map: Any, data: dict[Any, Any], depth: int) -> None:
    for key, value in data.items():
        if not isinstance(key, str):
            raise TypeError(f"Dict keys must be str, found {type(key)}. Convert them to str.")
        serialize_into(payload_map.payload_map[key], value, depth + 3)


def _read_dict(payload_map: Any) -> dict[str, Any]:
    return {key: _deserialize(value) for key, value in payload_map.payload_map.items()}


# ---- numpy ---------------------------------------------------------------------------------------


def _write_npy(data: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, data, allow_pickle=False)
    return buffer.getvalue()


def _write_numpy_scalar(data: np.generic) -> bytes:
    if not isinstance(data, np.number | np.bool_):
        error = AssertionError()
        error.add_note(
            f"{type(data)} cannot be sent: only numpy numbers and bools can. "
            "A label taken out of a string array becomes a plain str with str(label)."
        )
        raise error
    return _write_npy(data)


def _read_npy(blob: bytes) -> Any:
    """Read an .npy blob after comparing the size its header declares with the bytes that follow.

    np.load would also open zip archives, and would allocate what the header asks for first.
    """
    buffer = io.BytesIO(blob)
    version = np.lib.format.read_magic(buffer)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(buffer)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(buffer)
    declared = math.prod(shape) * dtype.itemsize
    present = len(blob) - buffer.tell()
    if dtype.hasobject or min(shape, default=0) < 0 or declared != present:
        raise ValueError(
            f"Refused an .npy blob that declares shape {shape} of {dtype} ({declared} bytes) "
            f"and holds {present}. Only plain numbers and strings, written by np.save, are read."
        )
    buffer.seek(0)
    return np.lib.format.read_array(buffer, allow_pickle=False)


# ---- pandas and polars ---------------------------------------------------------------------------


def is_a(module_name: str, class_name: str) -> Callable[[Any], bool]:
    """Test for a class of a package that need not be imported: unloaded, it has no instances."""

    def fits(data: Any) -> bool:
        cls = getattr(sys.modules.get(module_name), class_name, None)
        return cls is not None and isinstance(data, cls)

    return fits


def _write_pandas_frame(data: Any) -> bytes:
    buffer = io.BytesIO()
    data.to_parquet(buffer, engine="pyarrow", index=False, compression="lz4")
    return buffer.getvalue()


def _read_pandas_frame(blob: bytes) -> Any:
    import pandas as pd

    return pd.read_parquet(io.BytesIO(blob), engine="pyarrow")


def _write_pandas_series(data: Any) -> bytes:
    import pandas as pd

    return _write_pandas_frame(pd.DataFrame(data))


def _read_pandas_series(blob: bytes) -> Any:
    return _read_pandas_frame(blob).iloc[:, 0]


def _write_polars_frame(data: Any) -> bytes:
    """Arrow stream with the widely readable layouts (large_string, not the newer string_view)."""
    import polars as pl
    import pyarrow as pa

    for name, dtype in data.schema.items():
        if dtype.base_type() in (pl.Enum, pl.Object, pl.Unknown):
            raise TypeError(
                f"Column {name!r} has the polars type {dtype}, which cannot be sent. "
                "Cast it first, for example to pl.String."
            )
    table = data.to_arrow(compat_level=pl.CompatLevel.oldest())
    buffer = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_stream(buffer, table.schema, options=options) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def _read_polars_frame(blob: bytes) -> Any:
    import pyarrow as pa

    with pa.ipc.open_stream(blob) as reader:
        return _polars_from_arrow(reader.read_all())


def _polars_from_arrow(table: Any) -> Any:
    """A polars frame. Offsets are checked first, as wrong ones would crash the process."""
    import polars as pl

    table.validate(full=True)
    try:
        return pl.from_arrow(table)
    except pl.exceptions.PanicException as error:  # no Exception, so no caller would catch it
        raise ValueError(f"polars cannot read the table with {table.schema}: {error}") from None


def _write_polars_series(data: Any) -> bytes:
    buffer = io.BytesIO()
    data.to_frame().write_parquet(buffer, compression="lz4", statistics=False)
    return buffer.getvalue()


def _read_polars_series(blob: bytes) -> Any:
    """Parquet in this core, an Arrow stream (its first bytes are ff ff ff ff) in later ones.

    Read with pyarrow: polars' own reader aborts the process on some damaged files.
    """
    import pyarrow.parquet as pq

    if blob.startswith(b"\xff\xff\xff\xff"):
        return _read_polars_frame(blob).to_series()
    table = pq.ParquetFile(io.BytesIO(blob)).read()
    return _polars_from_arrow(table).to_series().alias(table.column_names[0])


# ---- the contract --------------------------------------------------------------------------------


def _as_is(value: Any) -> Any:
    return value


KINDS = (
    Kind("numpy_scalar_value", lambda v: isinstance(v, np.generic),
         read=lambda blob: _read_npy(blob)[()], write=_write_numpy_scalar),
    Kind("str_value", lambda v: isinstance(v, str), read=_as_is, write=_as_is),
    Kind("bool_value", lambda v: isinstance(v, bool), read=_as_is, write=_as_is),
    Kind("int_value", lambda v: isinstance(v, int), read=_as_is, write=_as_is),
    Kind("float_value", lambda v: isinstance(v, float), read=_as_is, write=_as_is),  # to 32 bit
    Kind("none_value", lambda v: v is None, read=lambda _: None, write=lambda _: True),
    Kind("list_value", lambda v: isinstance(v, list), read=_read_list, fill=_fill_list),
    Kind("tuple_value", lambda v: isinstance(v, tuple),
         read=lambda payload_list: tuple(_read_list(payload_list)), fill=_fill_list),
    Kind("dict_value", lambda v: isinstance(v, dict), read=_read_dict, fill=_fill_dict),
    Kind("pandas_dataframe_value", is_a("pandas", "DataFrame"),
         read=_read_pandas_frame, write=_write_pandas_frame),
    Kind("polars_dataframe_value", is_a("polars", "DataFrame"),
         read=_read_polars_frame, write=_write_polars_frame),
    Kind("pandas_series_value", is_a("pandas", "Series"),
         read=_read_pandas_series, write=_write_pandas_series),
    Kind("polars_series_value", is_a("polars", "Series"),
         read=_read_polars_series, write=_write_polars_series),
    Kind("numpy_array_value", lambda v: isinstance(v, np.ndarray),
         read=_read_npy, write=_write_npy),
    Kind("bytes_io_value", lambda v: isinstance(v, io.BytesIO),
         read=io.BytesIO, write=io.BytesIO.getvalue),
)  # fmt: skip
_KIND_BY_MEMBER = {kind.member: kind for kind in KINDS}
