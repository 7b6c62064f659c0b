"""Messages of kaggle_evaluation.proto, for every protobuf runtime from 3.20 to 7.

Not protoc's output, for two reasons. protoc's registers the file in the process-wide descriptor
pool, where a second package with the same file name clashes; here the pool is private, so Kaggle's
own package, or another copy of this one, can be loaded next to it. And protoc's ties itself to one
range of runtimes; this needs only what all of them share: descriptors and a message factory.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "kaggle_evaluation_client"
_Field = descriptor_pb2.FieldDescriptorProto

# Message -> its fields as (number, name, type). A type that is no scalar names a message here.
_MESSAGES: dict[str, tuple[tuple[int, str, str], ...]] = {
    "KaggleEvaluationRequest": (
        (1, "name", "string"),
        (2, "args", "repeated Payload"),
        (3, "kwargs", "map Payload"),
    ),
    "KaggleEvaluationResponse": ((1, "payload", "Payload"),),
    "Payload": (
        (1, "str_value", "string"),
        (2, "bool_value", "bool"),
        (3, "int_value", "sint64"),
        (4, "float_value", "float"),
        (5, "none_value", "bool"),
        (6, "list_value", "PayloadList"),
        (7, "tuple_value", "PayloadList"),
        (8, "dict_value", "PayloadMap"),
        (9, "pandas_dataframe_value", "bytes"),
        (10, "polars_dataframe_value", "bytes"),
        (11, "pandas_series_value", "bytes"),
        (12, "polars_series_value", "bytes"),
        (13, "numpy_array_value", "bytes"),
        (14, "numpy_scalar_value", "bytes"),
        (15, "bytes_io_value", "bytes"),
    ),
    "PayloadList": ((1, "payloads", "repeated Payload"),),
    "PayloadMap": ((1, "payload_map", "map Payload"),),
}
_ONEOF = {"Payload": "value"}  # all fields of the message belong to this oneof

_SCALARS: dict[str, Any] = {
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
    "bool": _Field.TYPE_BOOL,
    "sint64": _Field.TYPE_SINT64,
    "float": _Field.TYPE_FLOAT,
}


def _set_type(field: Any, type_name: str) -> None:
    """Give a field descriptor a scalar type or one of this file's messages."""
    if type_name in _SCALARS:
        field.type = _SCALARS[type_name]
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{type_name}"


def _add_field(message: Any, number: int, name: str, type_name: str) -> None:
    """Append one field, with its entry message if it is a map from str."""
    kind, _, element = type_name.rpartition(" ")
    label = _Field.LABEL_REPEATED if kind else _Field.LABEL_OPTIONAL
    field = message.field.add(name=name, number=number, label=label)
    if kind == "map":
        entry = message.nested_type.add(name=name.title().replace("_", "") + "Entry")
        entry.options.map_entry = True
        for entry_number, entry_name, entry_type in ((1, "key", "string"), (2, "value", element)):
            _add_field(entry, entry_number, entry_name, entry_type)
        element = f"{message.name}.{entry.name}"
    _set_type(field, element)
    if message.name in _ONEOF:
        field.oneof_index = 0


def _file_descriptor() -> Any:
    """The whole .proto file as a FileDescriptorProto."""
    file = descriptor_pb2.FileDescriptorProto(
        name="kaggle_evaluation.proto", package=_PACKAGE, syntax="proto3"
    )
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        if message_name in _ONEOF:
            message.oneof_decl.add(name=_ONEOF[message_name])
        for number, name, type_name in fields:
            _add_field(message, number, name, type_name)
    service = file.service.add(name="KaggleEvaluationService")
    service.method.add(
        name="Send",
        input_type=f".{_PACKAGE}.KaggleEvaluationRequest",
        output_type=f".{_PACKAGE}.KaggleEvaluationResponse",
    )
    return file


def _message_class(descriptor: Any) -> Any:
    """The Python class of a message; the factory was renamed between protobuf 3 and 5."""
    if hasattr(message_factory, "GetMessageClass"):
        return message_factory.GetMessageClass(descriptor)
    return message_factory.MessageFactory(descriptor.file.pool).GetPrototype(descriptor)


_POOL = descriptor_pool.DescriptorPool()
_POOL.AddSerializedFile(_file_descriptor().SerializeToString())
DESCRIPTOR = _POOL.FindFileByName("kaggle_evaluation.proto")

KaggleEvaluationRequest: Any = _message_class(
    DESCRIPTOR.message_types_by_name["KaggleEvaluationRequest"]
)
KaggleEvaluationResponse: Any = _message_class(
    DESCRIPTOR.message_types_by_name["KaggleEvaluationResponse"]
)
Payload: Any = _message_class(DESCRIPTOR.message_types_by_name["Payload"])
PayloadList: Any = _message_class(DESCRIPTOR.message_types_by_name["PayloadList"])
PayloadMap: Any = _message_class(DESCRIPTOR.message_types_by_name["PayloadMap"])
