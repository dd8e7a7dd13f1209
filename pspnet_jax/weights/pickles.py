"""Pickles of tensors, decoded but never executed.

* `pickletools` only splits a pickle into instructions; the interpreter here builds dictionaries, lists,
  text, numbers and descriptions of tensors from them. Nothing is imported or called, unknown names are
  refused.
* Time and memory are in proportion to the pickle's length, whatever it says.
"""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

Bytes = UInt8[np.ndarray, "_size"]

# Of a network with an optimizer both are below 2**20: tensors lie outside. mmengine's log of 160,000 steps has few
# instructions, but 30 MB.
_MAX_PICKLE_BYTES, _MAX_INSTRUCTIONS = 2**26, 2**23
_MAX_LINE_BYTES = 2**12
_MAX_AXES = 64  # NumPy's and PyTorch's limit

_NATIVE = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
_DTYPES = {name: np.dtype(name) for name in _NATIVE.split()}
_DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
_ORDERED_DICT = "collections OrderedDict"
# Function -> number of its arguments; one more, if there, holds flags of the view.
_TENSORS = {
    "torch._utils _rebuild_tensor": 4,
    "torch._utils _rebuild_tensor_v2": 6,
    "torch._utils _rebuild_tensor_v3": 7,
}
_PARAMETERS = {"torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"}
_LOG = "mmengine.logging.history_buffer HistoryBuffer"
# What training scripts leave beside the weights; stays a name, whatever is done to it.
_INERT = {
    "_codecs encode",
    "argparse Namespace",
    "collections Counter",
    "collections defaultdict",
    "pathlib PosixPath",
    "torch device",
    *(
        f"{module} {name}"
        for module in ("__builtin__", "builtins")
        for name in ("dict", "list", "set")
    ),
    *(f"numpy {name}" for name in ("dtype", "ndarray")),
    *(
        f"{module}.multiarray {name}"
        for module in ("numpy.core", "numpy._core")
        for name in ("scalar", "_reconstruct")
    ),
    _LOG,
}
# The logs refer to their own methods by it, in files of protocol 2.
_METHOD_OF = "__builtin__ getattr"


class FaultError(Exception):
    """A predicate of the file, such as 'is empty'; `read` puts the file's name before it."""


@dataclass(frozen=True)
class GlobalName:
    """A name that the pickle refers to, and everything that calling it would give."""

    name: str


@dataclass(frozen=True)
class StorageType:
    """What a storage's elements are."""

    dtype: np.dtype


@dataclass(frozen=True)
class Storage:
    """A row of numbers in the file; several tensors may be views of it."""

    key: str
    dtype: np.dtype
    count: int
    """Elements of the whole storage `key`."""
    part: tuple[int, int] | None = None
    """(offset, elements) of the part that is meant; only the first PyTorch versions wrote that."""


@dataclass(frozen=True)
class Tensor:
    """A view of a storage, as the pickle describes it; nothing of it is checked yet."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple
    strides: tuple


class Stream:
    """A file for `pickletools`: never gives more than is there, whatever length is asked for."""

    def __init__(self, data: Bytes):
        self._view = data[:_MAX_PICKLE_BYTES].data
        self.size = len(self._view)
        self.position = 0

    def read(self, count: int) -> bytes:
        data = bytes(self._view[self.position : min(self.position + count, self.size)])
        self.position += len(data)
        return data

    def readline(self) -> bytes:
        data = bytes(self._view[self.position : self.position + _MAX_LINE_BYTES])
        data = data[: data.find(b"\n") + 1] or data
        self.position += len(data)
        return data


class Interpreter:
    """Builds what a pickle describes; time and memory are in proportion to the pickle's length."""

    def __init__(self, stream: Stream):
        self.storages: dict[str, Storage] = {}
        self._stream = stream
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._copies_left = min(stream.size, _MAX_INSTRUCTIONS)

    def run(self) -> Any:
        for name, argument in _instructions(self._stream):
            if name == "STOP":
                return self.pop()
            if name in _LITERALS:
                self.push(argument)
            elif name in _CONSTANTS:
                self.push(_CONSTANTS[name])
            elif name in _STEPS:
                _STEPS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise damaged(f"has the instruction {name}, which torch.save does not write")
        raise AssertionError("genops ends with STOP")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self, *kinds: type) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise damaged("takes a value where there is none")
        value = self._stack.pop()
        if kinds and not isinstance(value, kinds):
            wanted = kinds[0].__name__.removeprefix("_")
            raise damaged(f"has a {kind(value)} where a {wanted} belongs")
        return value

    def pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise damaged("has no mark where it goes back to one")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def pop_one(self, _: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self.pop()

    def put(self, index: int | None) -> None:
        value = self.pop()
        self.push(value)
        self._memo[len(self._memo) if index is None else index] = value

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise damaged(f"refers to object {index} before it is there")
        self.push(self._memo[index])

    def pop_tuple(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def append(self, values: list[Any]) -> None:
        target = self.pop(list, GlobalName)
        if isinstance(target, list):
            target.extend(values)
        self.push(target)

    def set_items(self, values: list[Any]) -> None:
        target = self.pop(dict, GlobalName)
        if len(values) % 2:
            raise damaged("has a key without a value")
        if isinstance(target, dict):
            target.update(_dictionary(zip(values[::2], values[1::2], strict=True)))
        self.push(target)

    def dictionary(self, _: Any) -> None:
        values = self.pop_to_mark()
        self.push({})
        self.set_items(values)

    def refer(self, name: str) -> None:
        module, _, attribute = name.rpartition(" ")
        if module in ("torch", "torch.cuda", "torch.storage") and attribute in _STORAGES:
            self.push(StorageType(_DTYPES[_STORAGES[attribute]]))
        elif module == "torch" and attribute in _DTYPES:
            self.push(_DTYPES[attribute])
        elif name in _KNOWN:
            self.push(GlobalName(name))
        else:
            raise _refused(name)

    def refer_by_stack(self, _: Any) -> None:
        attribute, module = self.pop(str), self.pop(str)
        self.refer(f"{module} {attribute}")

    def call(self, _: Any) -> None:
        """What calling an allowed name would give, without calling it."""
        arguments, function = self.pop(tuple), self.pop(GlobalName)
        name = function.name
        if name in _INERT:
            self.push(function)
        elif name == _METHOD_OF:
            if arguments[:1] != (GlobalName(_LOG),):
                raise _refused(name)
            self.push(function)
        elif name == _ORDERED_DICT:
            self.push(self._ordered_dict(arguments))
        elif name in _TENSORS:
            self.push(_tensor(name, arguments))
        else:
            wanted = Tensor if name in _PARAMETERS else tuple  # torch.Size, where it is neither
            if not arguments or not isinstance(arguments[0], wanted):
                raise damaged(f"calls {name} on something else than it is for")
            self.push(arguments[0])

    def set_state(self, _: Any) -> None:
        self.pop()  # such as the _metadata of a state dict: versions of the modules
        self.push(self.pop(dict, GlobalName))

    def storage(self, _: Any) -> None:
        match self.pop(tuple):
            case (str("storage"), StorageType(dtype), str(key), str(), int(count)):
                storage = Storage(key, dtype, count)
            case (str("storage"), StorageType(dtype), str(key), str(), int(count), None):
                storage = Storage(key, dtype, count)
            case (
                str("storage"),
                StorageType(dtype),
                str(key),
                str(),
                int(count),
                (str(), int(start), int(length)),
            ):
                storage = Storage(key, dtype, count, (start, length))
            case _:
                raise damaged("has an external object that is no storage")
        if not all(map(is_count, (count, *(storage.part or ())))):
            raise damaged("has a storage whose size is no whole number from 0 on")
        first = self.storages.setdefault(key, storage)
        if (first.dtype, first.count) != (dtype, count):
            raise damaged(f"has the storage {short(key)} in two types or sizes")
        self.push(storage)

    def _ordered_dict(self, arguments: tuple) -> dict:
        """Of no arguments, or of a list of pairs, as Python 2 has it."""
        if not arguments:
            return {}
        pairs = arguments[0] if isinstance(arguments[0], list) else [None]
        self._copies_left -= len(pairs)  # else few instructions could copy one long list often
        if self._copies_left < 0:
            raise damaged("copies one list again and again")
        if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            raise damaged("has an OrderedDict of something else than pairs")
        return _dictionary(pairs)


# Instructions whose argument is the value that they push.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_STEPS = {
    "MARK": Interpreter.mark,
    "POP": Interpreter.pop_one,
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "BINPUT": Interpreter.put,
    "LONG_BINPUT": Interpreter.put,
    "MEMOIZE": Interpreter.put,
    "BINGET": Interpreter.get,
    "LONG_BINGET": Interpreter.get,
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.pop_tuple(1),
    "TUPLE2": lambda machine, _: machine.pop_tuple(2),
    "TUPLE3": lambda machine, _: machine.pop_tuple(3),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "DICT": Interpreter.dictionary,
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "GLOBAL": Interpreter.refer,
    "STACK_GLOBAL": Interpreter.refer_by_stack,
    "REDUCE": Interpreter.call,
    "NEWOBJ": Interpreter.call,
    "BUILD": Interpreter.set_state,
    "BINPERSID": Interpreter.storage,
}
_KNOWN = {_ORDERED_DICT, "torch Size", *_TENSORS, *_PARAMETERS, *_INERT, _METHOD_OF}


def _instructions(stream: Stream) -> Iterator[tuple[str, Any]]:
    source: Any = stream  # has the two methods of a file that genops uses
    try:
        for count, (opcode, value, _) in enumerate(pickletools.genops(source)):
            if count >= _MAX_INSTRUCTIONS:
                raise damaged(f"has more than {_MAX_INSTRUCTIONS} instructions")
            yield opcode.name, value
    except (ValueError, DeprecationWarning) as error:  # the latter where warnings are errors
        if stream.position < stream.size:
            raise damaged(f"cannot be decoded ({str(error)[:100]})") from None
        raise FaultError(
            f"has a pickle without an end within {stream.size} bytes (at most {_MAX_PICKLE_BYTES} "
            "are read): it is truncated, download it again, or holds too much beside the weights: "
            "save model.state_dict() alone"
        ) from None


def _tensor(name: str, arguments: tuple) -> Tensor:
    count = _TENSORS[name]
    if any(arguments[count:]):
        raise FaultError("holds a conjugated or negated view: save tensor.resolve_conj()")
    if len(arguments) in (count, count + 1):
        storage, offset, shape, strides = arguments[:4]
        tuples = isinstance(shape, tuple) and isinstance(strides, tuple)
        if isinstance(storage, Storage) and isinstance(offset, int) and tuples:
            dtype = arguments[6] if name.endswith("_v3") else storage.dtype
            if isinstance(dtype, np.dtype) and max(len(shape), len(strides)) <= _MAX_AXES:
                return Tensor(storage, dtype, offset, shape, strides)
    raise damaged("has a tensor with arguments of the wrong kind")


def _dictionary(pairs: Any) -> dict:
    result = {}
    for key, value in pairs:
        # Nested tuples and long numbers could be made to collide, or take forever to hash.
        if type(key) is not str and not (type(key) is int and abs(key) < 2**63):
            raise damaged(f"has a {kind(key)} as a key; text and 64-bit numbers are read")
        result[key] = value
    return result


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on, of at most 64 bits."""
    return type(value) is int and 0 <= value < 2**63


def _refused(name: str) -> FaultError:
    """The fault of a pickle that refers to what weights do not need."""
    return FaultError(
        f"is refused: it refers to {short(name.replace(' ', '.'))}, weights are tensors "
        "alone; nothing was executed. If it holds a whole model, or objects beside the "
        "weights, and you trust it: load it in PyTorch and save model.state_dict()"
    )


def damaged(what: str) -> FaultError:
    """The fault of a pickle that no program writes."""
    return FaultError(f"is damaged: its pickle {what}; download or save it again")


def kind(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, GlobalName):
        return value.name.replace(" ", ".")
    return type(value).__name__.removeprefix("_")


def short(name: Any) -> str:
    """A name from a file, for messages: never long, never unprintable."""
    return repr(name[:80] if isinstance(name, str) else name)
