"""PyTorch checkpoint files (.pth) -> arrays by name, without PyTorch, executing nothing.

* Pickles are decoded by `pickles`, which imports and calls nothing.
* Both layouts are read: the zip archive (PyTorch 1.6 and later) and the row of pickles before it.
* Arrays are read-only views of the memory-mapped file, so what stands beside the weights costs
  nothing. They are good as long as nobody changes the file.
* Every size is checked against the file before it is used, every checksum that the archive has is
  compared. The older layout has none: a flipped bit in a value cannot be seen there.
"""

import math
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pspnet_jax.weights.pickles import (
    Bytes,
    FaultError,
    Interpreter,
    Storage,
    Stream,
    Tensor,
    is_count,
    kind,
    short,
)

_ZIP_START = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = re.compile(
    rb"\x80.(\x95.{8})?\x8a\x0a" + re.escape(_LEGACY_MAGIC.to_bytes(10, "little")), re.DOTALL
)
_LEGACY_PROTOCOL = 1001
_CHUNK_BYTES = 2**24
_NUM_SHOWN = 8

_FOREIGN = (
    (re.compile(rb"\xff\xd8\xff"), "is a JPEG image"),
    (re.compile(rb"\x89PNG"), "is a PNG image"),
    (re.compile(rb"\x89HDF\r\n"), "is an HDF5 file"),
    (re.compile(rb".{7}\0\{", re.DOTALL), "is a safetensors file"),
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE), "is a web page"),
    (re.compile(rb"version https://git-lfs"), "is a Git LFS pointer (git lfs pull gets the file)"),
    (re.compile(rb"\x1f\x8b"), "is a gzip archive"),
)


class WeightsFileError(ValueError):
    """A file of weights cannot be read; the message says why and what to do."""


def read(path: Path | str) -> dict[str, np.ndarray]:
    """The tensors of a file by name: those under 'state_dict', without that key those on top.

    Names are as they were saved. The arrays are read-only views of the mapped file.

    Raises:
        WeightsFileError: naming the file, where it is missing, damaged, of another kind, holds
            anything but tensors by name, or refers to anything but tensors.
    """
    try:
        with Path(path).open("rb") as file:
            layout = _open_layout(file)
        return {
            name: _view(name, tensor, layout) for name, tensor in _state_dict(layout.top).items()
        }
    except OSError as error:
        raise WeightsFileError(f"{path}: {error.strerror or error}") from None
    except FaultError as fault:
        raise WeightsFileError(f"{path} {fault}") from None


def _open_layout(file: BinaryIO) -> "_ZipLayout | _LegacyLayout":
    head = file.read(512)
    if not head:
        raise FaultError("is empty: download or copy it again")
    if head.startswith(_ZIP_START):
        return _ZipLayout(file)
    if _LEGACY_START.match(head):
        return _LegacyLayout(file)
    if head[257:262] == b"ustar":
        raise FaultError(
            "is a tar archive, as the first versions of PyTorch wrote: load and save it again with "
            "a later one"
        )
    for pattern, predicate in _FOREIGN:
        if pattern.match(head):
            raise FaultError(f"{predicate}, not a PyTorch checkpoint")
    raise FaultError(f"is not a PyTorch checkpoint: it begins with {head[:16]!r}")


def _state_dict(top: Any) -> dict[str, Tensor]:
    nested = isinstance(top, dict) and "state_dict" in top
    tensors, where = (top["state_dict"], "its 'state_dict'") if nested else (top, "it")
    if not isinstance(tensors, dict):
        raise FaultError(
            f"holds no tensors by name: {where} is a {kind(tensors)}; save model.state_dict()"
        )
    if not any(isinstance(value, Tensor) for value in tensors.values()):
        shown = ", ".join(short(key) for key in list(tensors)[:_NUM_SHOWN]) or "none"
        more = f" and {len(tensors) - _NUM_SHOWN} more" if len(tensors) > _NUM_SHOWN else ""
        raise FaultError(
            f"holds no tensors; keys: {shown}{more}. They are looked for on top and under "
            "'state_dict': save {'state_dict': model.state_dict()}"
        )
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise FaultError(
                f"holds more than tensors by name: {short(key)} in {where} is a {kind(value)}; "
                "save {'state_dict': model.state_dict()}"
            )
    return tensors


def _view(name: str, tensor: Tensor, layout: "_ZipLayout | _LegacyLayout") -> np.ndarray:
    """The array of a tensor, where every element of it lies within its storage."""
    data, shape, strides = _storage_part(tensor.storage, layout), tensor.shape, tensor.strides
    if not all(map(is_count, (tensor.offset, *shape, *strides))) or len(shape) != len(strides):
        raise FaultError(
            f"is damaged: offset, shape or strides of {short(name)} are not whole numbers from 0 on"
        )
    itemsize = tensor.dtype.itemsize
    available, elements = data.size // itemsize, math.prod(shape)
    if elements == 0 and math.prod(d for d in shape if d) < 2**31:
        empty = np.zeros(shape, tensor.dtype)
        empty.flags.writeable = False
        return empty
    if not 0 < elements <= available:
        raise FaultError(
            f"has the tensor {short(name)} of shape {shape} on a storage of {available} elements: "
            "save a copy of it (tensor.clone()) if it was expanded, else the file is damaged"
        )
    axes = list(zip(shape, strides, strict=True))
    last = tensor.offset + sum((length - 1) * stride for length, stride in axes)
    if last >= available:
        raise FaultError(
            f"is damaged: the tensor {short(name)} reaches element {last} of a storage of "
            f"{available} elements"
        )
    steps = [itemsize * (stride if length > 1 else 1) for length, stride in axes]
    return np.ndarray(shape, tensor.dtype, data, tensor.offset * itemsize, steps)


def _storage_part(storage: Storage, layout: "_ZipLayout | _LegacyLayout") -> Bytes:
    data = layout.storage_bytes(storage)
    if storage.part is None:
        return data
    start, stop = (n * storage.dtype.itemsize for n in (storage.part[0], sum(storage.part)))
    if stop > data.size:
        raise FaultError(f"is damaged: a part of storage {short(storage.key)} exceeds it")
    return data[start:stop]


class _ZipLayout:
    """`NAME/data.pkl` and one stored entry `NAME/data/KEY` for each storage.

    Attributes:
        top: what was saved, as dictionaries, lists, text, numbers and `Tensor`.
    """

    def __init__(self, file: BinaryIO):
        self._bytes = np.memmap(file, np.uint8, mode="r")
        self._entries = self._read_directory(file)
        folder = self._find_folder()
        self._check_entries()
        self._data_folder = f"{folder}data/"
        self._checked: dict[str, Bytes] = {}
        # torch.serialization.set_crc32_options(False) leaves zeros, in every entry alike.
        self._has_checksums = any(entry.CRC for entry in self._entries.values())
        if f"{folder}byteorder" in self._entries:
            order = self._entry_bytes(f"{folder}byteorder")[:16].tobytes()
            if order != b"little":
                raise FaultError(
                    f"was written in the byte order {order!r}, only little is read: save it "
                    "again on a machine of that order"
                )
        self.top = Interpreter(Stream(self._entry_bytes(f"{folder}data.pkl"))).run()

    def storage_bytes(self, storage: Storage) -> Bytes:
        data = self._entry_bytes(self._data_folder + storage.key)
        if data.size // storage.dtype.itemsize != storage.count:
            raise FaultError(
                f"is damaged: storage {short(storage.key)} has {data.size} bytes, not "
                f"{storage.count} elements of {storage.dtype}"
            )
        return data

    def _read_directory(self, file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error):
            raise FaultError(
                "is a zip archive without a readable directory at its end: it is truncated or "
                "damaged, download it again"
            ) from None
        entries = {info.orig_filename: info for info in infos}
        if len(entries) < len(infos):
            raise FaultError("is a zip archive with two entries of one name: it is refused")
        return entries

    def _find_folder(self) -> str:
        """'NAME/'; where the archive is not PyTorch's, the error says what else it is."""
        pickles = [name for name in self._entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise FaultError(
                f"is a zip archive with {len(pickles)} entries NAME/data.pkl, torch.save writes "
                "one: unpack it if weights lie in it"
            )
        folder = pickles[0].removesuffix("data.pkl")
        if any(
            name.startswith((f"{folder}code/", f"{folder}constants.pkl")) for name in self._entries
        ):
            raise FaultError(
                "is a TorchScript archive: save its weights with "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
            )
        return folder

    def _check_entries(self) -> None:
        """Nothing may unfold into more than the file has."""
        for name, entry in self._entries.items():
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise FaultError(
                    f"has the compressed entry {short(name)}, torch.save compresses nothing: "
                    "it was packed again, save it with torch.save"
                )
            if entry.flag_bits & 0x41:
                raise FaultError(f"has the encrypted entry {short(name)}: decrypt it first")
        if (total := sum(entry.file_size for entry in self._entries.values())) > self._bytes.size:
            raise FaultError(
                f"has {self._bytes.size} bytes and entries of {total}, which overlap: it is refused"
            )

    def _entry_bytes(self, name: str) -> Bytes:
        """The bytes of an entry, checked once."""
        if name not in self._checked:
            if name not in self._entries:
                raise FaultError(f"is damaged: it has no entry {short(name)}")
            data = self._locate(self._entries[name])
            if self._has_checksums and _checksum(data) != self._entries[name].CRC:
                raise FaultError(
                    f"is damaged: the checksum of its entry {short(name)} differs, "
                    "download it again"
                )
            self._checked[name] = data
        return self._checked[name]

    def _locate(self, entry: zipfile.ZipInfo) -> Bytes:
        start, name = entry.header_offset, entry.orig_filename
        encoded = name.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        header = self._bytes[max(start, 0) :][: _LOCAL_HEADER.size + len(encoded)].tobytes()
        if start >= 0 and len(header) == _LOCAL_HEADER.size + len(encoded):
            signature, name_length, extra_length = _LOCAL_HEADER.unpack_from(header)
            offset = start + _LOCAL_HEADER.size + name_length + extra_length
            agrees = signature == _ZIP_START and header[_LOCAL_HEADER.size :] == encoded
            if agrees and name_length == len(encoded):
                data = self._bytes[offset : offset + entry.file_size]
                if data.size == entry.file_size:
                    return data
        raise FaultError(
            f"is damaged: the entry {short(name)} of {entry.file_size} bytes is not where the "
            f"directory says, or exceeds the file of {self._bytes.size} bytes"
        )


class _LegacyLayout:
    """Five pickles (magic, version, system, object, keys), then each key's count and bytes."""

    def __init__(self, file: BinaryIO):
        self._bytes = np.memmap(file, np.uint8, mode="r")
        stream = Stream(self._bytes)
        Interpreter(stream).run()  # the magic number, known from the start of the file
        protocol = Interpreter(stream).run()
        if protocol != _LEGACY_PROTOCOL:
            raise FaultError(f"is damaged: its version is not {_LEGACY_PROTOCOL}")
        system = Interpreter(stream).run()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise FaultError(
                "was written in another byte order than little: save it again on its machine"
            )
        interpreter = Interpreter(stream)
        self.top = interpreter.run()
        keys = Interpreter(stream).run()
        self._storages = self._locate(keys, interpreter.storages, stream.position)

    def storage_bytes(self, storage: Storage) -> Bytes:
        if storage.key not in self._storages:
            raise FaultError(f"is damaged: it has no storage {short(storage.key)}")
        return self._storages[storage.key]

    def _locate(self, keys: Any, known: dict[str, Storage], start: int) -> dict[str, Bytes]:
        if not isinstance(keys, list) or not all(isinstance(k, str) and k in known for k in keys):
            raise FaultError("is damaged: its list of storages and its tensors disagree")
        size, located = self._bytes.size, {}
        for number, key in enumerate(keys, 1):
            storage, first = known[key], start + 8
            stop = first + storage.count * storage.dtype.itemsize
            if stop > size:
                raise FaultError(
                    f"is truncated: storage {number} of {len(keys)} ends at byte {stop}, the file "
                    f"at {size}; download it again"
                )
            if int.from_bytes(self._bytes[start:first].tobytes(), "little") != storage.count:
                raise FaultError(
                    f"is damaged: storage {number} of {len(keys)}, at byte {start}, does not have "
                    f"the {storage.count} elements that its tensors expect"
                )
            located[key], start = self._bytes[first:stop], stop
        if start != size:
            raise FaultError(
                f"is damaged or holds more than one torch.save: {size - start} bytes follow the "
                "last storage"
            )
        return located


def _checksum(data: Bytes) -> int:
    checksum = 0
    for start in range(0, data.size, _CHUNK_BYTES):
        checksum = zlib.crc32(data[start : start + _CHUNK_BYTES].data, checksum)
    return checksum
