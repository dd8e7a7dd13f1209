"""Large files of Protocol Buffers: a schema as a table; large fields are found, small ones decoded.

* A message is a row of fields with numbers, some of which are messages again. What the schema does not name is
  stepped over.
* `protobuf` decodes what is small. Of a whole file it would copy all values, and make up to eighty bytes of each
  two of a hostile one; so large fields are found here, as views of the file.
* Every length is checked before it is used and all fields are counted: whatever a file says, time and memory are
  bounded by `MAX_FIELDS` and `MAX_SMALL_BYTES`.

Format: protobuf.dev/programming-guides/encoding.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from pspnet_jax.weights.pickles import FaultError

NUMBER, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5
"""How a field is written: seven bits a byte; as they are; a length and so many bytes; as they are."""

MAX_BYTES = 2**31 - 1
"""Of a message, in every program that reads or writes them."""
MAX_FIELDS = 2**16
"""Of all messages of a file; a ResNet-269 as Caffe saves it has some 2**14."""
MAX_SMALL_BYTES = 2**12
"""Of a message without its large fields."""

Schema = Mapping[str, Mapping[str, tuple[int, str]]]
"""Message -> field -> (number, '[repeated|packed] type'); types are the format's or other messages."""
Large = Mapping[str, list[memoryview]]
"""Field -> contents in the order of the file, none for those that are not there."""


class Field(NamedTuple):
    """Where a field lies in its message: the field, its content, and the end that it claims."""

    number: int
    kind: int
    start: int
    content: int
    stop: int


def make_messages(schema: Schema) -> dict[str, Any]:
    """A class for each message, in a pool of their own."""
    file = descriptor_pb2.FileDescriptorProto(name="pspnet_jax.proto", package="pspnet_jax")
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, declared in schema.items():
        described = file.message_type.add(name=message)
        for name, (number, what) in declared.items():
            *often, kind = what.split()
            field = described.field.add(name=name, number=number)
            field.label = kinds.LABEL_REPEATED if often else kinds.LABEL_OPTIONAL
            if kind in schema:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{file.package}.{kind}"
            else:
                field.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
                field.options.packed = often == ["packed"]
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    found = {name: pool.FindMessageTypeByName(f"{file.package}.{name}") for name in schema}
    return {name: message_factory.GetMessageClass(found[name]) for name in schema}


class Splitter:
    """Splits the messages of one file."""

    def __init__(self, messages: Mapping[str, Any], large: frozenset[str]):
        self._messages, self._large = messages, large
        self._fields_left = MAX_FIELDS

    def split(self, kind: str, message: memoryview, where: str) -> tuple[Any, Large]:
        """A message without its large fields, decoded, and these.

        Args:
            where: what the message is, for faults.

        Raises:
            FaultError: where it is truncated, damaged, or has fields beyond all measure.
        """
        declared = self._messages[kind].DESCRIPTOR.fields_by_number
        small, large = [], defaultdict(list)
        for field in fields(message, where):
            self._fields_left -= 1
            if self._fields_left < 0:
                raise FaultError(f"has more than {MAX_FIELDS} fields, as no network: it is refused")
            if field.stop > len(message):
                raise FaultError(
                    f"is truncated or damaged: field {field.number} of {where} claims "
                    f"{field.stop - field.content} bytes, {len(message) - field.content} are there; "
                    "download it again"
                )
            if field.number in declared:
                name = declared[field.number].name
                if name not in self._large:
                    small.append(message[field.start : field.stop])
                elif field.kind == LENGTH:
                    large[name].append(message[field.content : field.stop])
                else:
                    raise FaultError(
                        f"has '{name}' of {where} not in one piece (encoding {field.kind} instead of "
                        f"{LENGTH}), which nobody is known to write: load and save it in Caffe"
                    )
        if (size := sum(map(len, small))) > MAX_SMALL_BYTES:
            raise FaultError(f"is damaged: {where} has {size} bytes beside its values")
        try:
            return self._messages[kind].FromString(b"".join(small)), large
        except DecodeError:
            raise FaultError(f"is damaged: {where} cannot be decoded; download it again") from None


def fields(message: memoryview, where: str) -> Iterator[Field]:
    """The fields of a message; the last may claim more than there is.

    Raises:
        FaultError: where it is truncated or damaged.
    """
    start = 0
    while start < len(message):
        tag, content = _number(message, start, where)
        kind = tag & 7
        if kind == NUMBER:
            _, stop = _number(message, content, where)
        elif kind == LENGTH:
            length, content = _number(message, content, where)
            stop = content + length
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            stop = content + (8 if kind == EIGHT_BYTES else 4)
        else:
            raise FaultError(f"is damaged: {where} has a field of kind {kind}; download it again")
        yield Field(tag >> 3, kind, start, content, stop)
        start = stop


def _number(message: memoryview, start: int, where: str) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for i, byte in enumerate(message[start : start + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, start + i + 1
    raise FaultError(f"is truncated or damaged: {where} ends in a number; download it again")
