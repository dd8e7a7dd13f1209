"""PyTorch's files without PyTorch: what is read, what a fault says; nothing is executed."""

import contextlib
import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pspnet_jax.weights import pickles, pytorch
from pspnet_jax.weights.pytorch import WeightsFileError, read

BUDGET_SECONDS = 40

GOLDENS = Path(__file__).parent / "goldens"
RUN_ZIP, RUN_LEGACY = GOLDENS / "pytorch_run_zip.pth", GOLDENS / "pytorch_run_legacy.pth"
BARE_ZIP, BARE_LEGACY = GOLDENS / "pytorch_bare_zip.pth", GOLDENS / "pytorch_bare_legacy.pth"
NO_CHECKSUMS = GOLDENS / "pytorch_bare_no_checksums.pth"
LEGACY_HEAD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
SYSTEM = {"protocol_version": 1001, "little_endian": True}


def expected(group):
    with np.load(GOLDENS / "pytorch_values.npz") as values:
        arrays = {n.removeprefix(f"{group}/"): values[n] for n in values.files if group in n}
    if "module.bfloat16" in arrays:
        arrays["module.bfloat16"] = arrays["module.bfloat16"].view(ml_dtypes.bfloat16)
    return arrays


def assert_equal(arrays, wanted):
    assert list(arrays) == list(wanted)
    for name, array in arrays.items():
        assert (array.dtype, array.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert array.tobytes() == wanted[name].tobytes(), name


class Reference:
    """A name that `dumps` writes into a pickle, called with arguments where there are some."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


def dumps(value):
    """A pickle of protocol 2 as Python 2 wrote it: byte strings, INT, OrderedDict of a list."""
    kind = type(value)
    if kind is Reference:
        name = b"c" + value.name.replace(" ", "\n").encode() + b"\n"
        return name + (dumps(value.arguments) + b"R" if value.arguments else b"")
    if kind is str:
        return b"U" + bytes([len(value)]) + value.encode()
    if kind is int:
        return b"I%d\n" % value
    if kind is OrderedDict:
        pairs = [list(pair) for pair in value.items()]
        return b"ccollections\nOrderedDict\n" + dumps(pairs) + b"\x85R"
    if kind is dict:
        return b"}(" + b"".join(dumps(x) for pair in value.items() for x in pair) + b"u"
    if kind in (tuple, list):
        return b"(" + b"".join(map(dumps, value)) + (b"t" if kind is tuple else b"l")
    if kind is bytes:  # instructions as they are
        return value
    return {None: b"N", True: b"\x88", False: b"\x89"}[value]


def persistent(*identity):
    return dumps(("storage", *identity)) + b"Q"


def tensor(storage, offset=0, shape=(2,), strides=(1,), name="_rebuild_tensor"):
    more = (False, OrderedDict()) if name.endswith("v2") else ()
    return Reference(f"torch._utils {name}", storage, offset, shape, strides, *more)


def storage(key="0", count=2, *part, kind="FloatStorage"):
    return persistent(Reference(f"torch {kind}"), key, "cpu", count, *part)


def write_legacy(path, top, storages, system=SYSTEM):
    """`top`: anything `dumps` takes. `storages`: key -> array."""
    pickles = [b"\x80\x02" + dumps(x) + b"." for x in (system, top, list(storages))]
    data = b"".join(struct.pack("<q", a.size) + a.tobytes() for a in storages.values())
    path.write_bytes(LEGACY_HEAD + b"".join(pickles) + data)
    return path


def write_zip(path, top, entries=None, *, compression=zipfile.ZIP_STORED):
    """`top`: the bytes of data.pkl, or what `dumps` takes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        data = top if isinstance(top, bytes) else b"\x80\x02" + dumps(top) + b"."
        archive.writestr("archive/data.pkl", data)
        for name, content in (entries or {}).items():
            archive.writestr(f"archive/{name}", content)
    return path


def patch_directory(path, name, offset, form, *values):
    """Overwrite fields of the entry `name` in the directory at the end of a zip archive."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        position = archive.start_dir
        for info in archive.infolist():
            if info.filename.endswith(name):
                break
            position = data.index(b"PK\x01\x02", position + 4)
    struct.pack_into(form, data, position + offset, *values)
    path.write_bytes(data)


# --- What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [RUN_ZIP, RUN_LEGACY], ids=["zip", "legacy"])
def test_a_training_scripts_file_of_every_type_is_equal_to_the_bit(path):
    assert_equal(read(path), expected("run"))


@pytest.mark.parametrize("name", ["zip", "legacy", "protocol4", "no_checksums"])
def test_a_bare_state_dict(name):
    assert_equal(read(GOLDENS / f"pytorch_bare_{name}.pth"), expected("bare"))


def test_unsigned_types_of_untyped_storages():
    arrays = read(str(GOLDENS / "pytorch_unsigned.pth"))
    assert {name: (array.dtype.name, array.tolist()) for name, array in arrays.items()} == {
        name: (name, [1, 200]) for name in ("uint16", "uint32", "uint64")
    }


@pytest.mark.parametrize("path", [RUN_ZIP, RUN_LEGACY], ids=["zip", "legacy"])
def test_arrays_are_read_only_views_of_the_mapped_file(path):
    arrays = read(path)
    for name, array in arrays.items():
        assert not array.flags.writeable, name
        assert array.size == 0 or isinstance(array.base, np.memmap), name
    assert arrays["module.transposed"].strides == (4, 48, 16)
    assert np.shares_memory(arrays["module.whole"], arrays["module.row"])
    assert np.shares_memory(arrays["module.whole"], arrays["module.whole_again"])
    # JAX takes them as they lie in the file: aligned or not, bfloat16, strided, without axes.
    for name in ("module.bfloat16", "module.transposed", "module.scalar", "module.every_other"):
        np.testing.assert_array_equal(jnp.asarray(arrays[name]), arrays[name])


def test_python_2_and_the_first_versions_of_pytorch(tmp_path):
    """Byte strings, INT, OrderedDict of a list of pairs, four arguments, parts of a storage."""
    values = np.arange(6, dtype=np.float32)
    part = storage("123456789012345", 6, ("987654321098765", 2, 4))
    weight = tensor(part, 1, (3,))
    scale = tensor(storage("123456789012345", 6, None), 0, (2, 3), (3, 1), "_rebuild_tensor_v2")
    nested = OrderedDict(weight=weight, scale=Reference("torch._utils _rebuild_parameter", scale))
    top = {"state_dict": nested, "seed": 2**40, "sizes": Reference("torch Size", (1, 2))}
    arrays = read(write_legacy(tmp_path / "old.pth", top, {"123456789012345": values}))
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "weight": [3, 4, 5],
        "scale": [[0, 1, 2], [3, 4, 5]],
    }


def test_storages_of_a_gpu_and_what_stands_beside_the_weights(tmp_path):
    beside = pickle.dumps(
        {"a": np.arange(3), "b": np.float32(1), "c": {1, 2}, "d": (None, [1.5], 10**30)}, protocol=2
    )[2:-1]
    cuda = persistent(Reference("torch.cuda FloatStorage"), "0", "cuda:0", 2)
    top = {"state_dict": {"weight": tensor(cuda)}, "beside": beside}
    path = write_zip(tmp_path / "a.pth", top, {"data/0": np.ones(2, np.float32).tobytes()})
    assert read(path)["weight"].tolist() == [1, 1]


def mmengine_log(values):
    """As mmengine's runner leaves it beside the weights: a class, and its methods by `getattr`."""
    name = Reference("mmengine.logging.history_buffer HistoryBuffer")
    methods = {"mean": Reference("__builtin__ getattr", name, "mean")}
    text = b"X" + struct.pack("<I", len(values)) + values
    encoded = Reference("_codecs encode", text, "latin1")
    return {"train/loss": [name, {"_log_history": encoded, "statistics_methods": methods}]}


def test_a_long_log_beside_the_weights(tmp_path):
    top = {
        "message_hub": mmengine_log("ÿ".encode() * 2**23),
        "state_dict": {"a": tensor(storage())},
    }
    path = write_zip(tmp_path / "a.pth", top, {"data/0": bytes(8)})
    assert path.stat().st_size > 2**24
    assert read(path)["a"].tolist() == [0, 0]


def test_what_stands_beside_the_weights_is_not_read(tmp_path):
    """A damaged optimizer does not matter; an optimizer of another size costs nothing."""
    data = {"data/0": bytes(8), "data/1": bytes(2**20)}
    top = {"state_dict": {"a": tensor(storage())}, "optimizer": [tensor(storage("1", 2**18))]}
    path = write_zip(tmp_path / "a.pth", top, data)
    patch_directory(path, "data/1", 16, "<I", 12345)  # its checksum
    tracemalloc.start()
    assert read(path)["a"].tolist() == [0, 0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**19


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: download"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "is a JPEG image, not"),
        (b"\x89PNG\r\n\x1a\n", "is a PNG image, not"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, not"),
        (struct.pack("<Q", 20) + b'{"weight":{}}', "is a safetensors file, not"),
        (b"\n<!DOCTYPE html><html>", "is a web page, not"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"\x1f\x8b\x08", "is a gzip archive, not"),
        (b"sys_info".ljust(257, b"\0") + b"ustar\x0000", "is a tar archive, as the first versions"),
        (b"weights", "is not a PyTorch checkpoint: it begins with b'weights'"),
        (pickle.dumps({}, protocol=2), "is not a PyTorch checkpoint: it begins with"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, content, message):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(WeightsFileError, match=rf"weights\.pth {message}"):
        read(tmp_path / "weights.pth")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(WeightsFileError, match=r"none\.pth: No such file"):
        read(tmp_path / "none.pth")
    with pytest.raises(WeightsFileError, match="Is a directory"):
        read(tmp_path)


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_a_malicious_pickle_is_refused_and_nothing_is_executed(tmp_path, layout, protocol):
    payload = pickle.dumps({"state_dict": Touch(tmp_path / "gotcha")}, protocol=protocol)
    path = tmp_path / "evil.pth"
    if layout == "zip":
        write_zip(path, payload)
    else:
        path.write_bytes(LEGACY_HEAD + pickle.dumps(SYSTEM, protocol=2) + payload)
    with pytest.raises(WeightsFileError, match=r"is refused: it refers to 'posix\.mkdir'.*nothing"):
        read(path)
    assert not (tmp_path / "gotcha").exists()
    pickle.loads(payload)
    assert (tmp_path / "gotcha").exists()  # the payload would have worked


@pytest.mark.parametrize(
    "name",
    [
        *("os system", "builtins eval", "__builtin__ eval", "builtins getattr", "torch load"),
        *("torch.hub load", "torch.storage _load_from_bytes", "numpy load", "collections abc"),
        *("torch._utils _rebuild_qtensor", "collections OrderedDict.__init__", "torch nn.Storage"),
    ],
)
def test_names_that_weights_do_not_need_are_refused(tmp_path, name):
    top = {"a": tensor(storage()), "b": Reference(name)}
    with pytest.raises(WeightsFileError, match="is refused: it refers to") as caught:
        read(write_zip(tmp_path / "a.pth", top, {"data/0": bytes(8)}))
    assert repr(name.replace(" ", ".")) in str(caught.value)


def test_methods_of_logs_alone_are_referred_to(tmp_path):
    top = {
        "a": tensor(storage()),
        "b": Reference("__builtin__ getattr", Reference("_codecs encode"), "x"),
    }
    with pytest.raises(WeightsFileError, match=r"is refused: it refers to '__builtin__\.getattr'"):
        read(write_zip(tmp_path / "a.pth", top, {"data/0": bytes(8)}))


def test_harmless_names_are_never_called(tmp_path):
    """`_codecs.encode` and the like stay names, also where they are called as the tensor."""
    call = Reference("_codecs encode", "text", "latin1")
    with pytest.raises(WeightsFileError, match=r"'a' in it is a _codecs\.encode"):
        read(
            write_zip(tmp_path / "a.pth", {"b": tensor(storage()), "a": call}, {"data/0": bytes(8)})
        )


def test_a_whole_model_says_what_to_save_instead():
    with pytest.raises(WeightsFileError, match=r"Linear'.*whole model.*save model\.state_dict\(\)"):
        read(GOLDENS / "pytorch_module.pth")


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"epoch": 1, "model": {}}, "holds no tensors; keys: 'epoch', 'model'. They"),
        ({str(i): 1 for i in range(9)}, "keys: '0', '1', .*'7' and 1 more"),
        ({}, "holds no tensors; keys: none"),
        ({"state_dict": {}}, "holds no tensors; keys: none"),
        ([1], "holds no tensors by name: it is a list"),
        ({"state_dict": 5}, "its 'state_dict' is a int"),
        ({"a": tensor(storage()), "b": 3}, "'b' in it is a int; save"),
        ({"state_dict": {"a": tensor(storage()), "b": None}}, "'b' in its 'state_dict' is a NoneT"),
        ({"a": tensor(storage()), 7: tensor(storage())}, "7 in it is a Tensor"),
    ],
)
def test_what_holds_no_tensors_or_more_than_tensors(tmp_path, top, message):
    with pytest.raises(WeightsFileError, match=message):
        read(write_zip(tmp_path / "a.pth", top, {"data/0": bytes(8)}))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (tensor(storage(), 1), "'a' reaches element 2 of a storage of 2"),
        (tensor(storage(), 0, (2,), (2,)), "'a' reaches element 2 of a storage of 2"),
        (tensor(storage(), 0, (2**40,), (0,)), r"shape \(1099511627776,\) on a .* expanded"),
        (tensor(storage(), 0, (3,), (0,)), "of 2 elements: save a copy"),
        (tensor(storage(), -1), "'a' are not whole numbers from 0"),
        (tensor(storage(), 0, (-2,)), "'a' are not whole numbers from 0"),
        (tensor(storage(), 1, (2,), (-1,)), "'a' are not whole numbers from 0"),
        (tensor(storage(), 0, (2, 1), (1,)), "'a' are not whole numbers from 0"),
        (tensor(storage(), 0, (True,)), "'a' are not whole numbers from 0"),
        (tensor(storage(), 0, (0, 2**62, 2**62), (1, 1, 1)), "on a storage of 2 elements"),
        (tensor(storage(), 0, (1,) * 65, (1,) * 65), "arguments of the wrong kind"),
        (tensor(storage(), 0, [2], [1]), "arguments of the wrong kind"),
        (tensor(storage(), "0"), "arguments of the wrong kind"),
        (tensor("0"), "arguments of the wrong kind"),
        (tensor(storage(count=-2)), "size is no whole number"),
        (tensor(storage(count=3)), "storage '0' has 8 bytes, not 3 elements of float32"),
        (tensor(storage(kind="LongStorage")), "storage '0' has 8 bytes, not 2 elements of int64"),
        (tensor(storage("1")), "it has no entry 'archive/data/1'"),
        (tensor(storage("0", 2, ("1", 1, 2))), "a part of storage '0' exceeds it"),
        (tensor(persistent("FloatStorage", "0", "cpu", 2)), "external object that is no storage"),
        (
            Reference("torch._utils _rebuild_tensor_v2", storage(), 0, (), (), False, {}, {"a": 1}),
            "conjugated or negated view",
        ),
    ],
)
def test_tensors_outside_their_storage(tmp_path, case, message):
    with pytest.raises(WeightsFileError, match=message):
        read(write_zip(tmp_path / "a.pth", {"a": case}, {"data/0": bytes(8)}))


def test_one_storage_in_two_types_is_refused(tmp_path):
    top = {"a": tensor(storage()), "b": tensor(storage(kind="IntStorage"))}
    with pytest.raises(WeightsFileError, match="storage '0' in two types or sizes"):
        read(write_zip(tmp_path / "a.pth", top, {"data/0": bytes(8)}))


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (b".", "takes a value where there is none"),
        (b"(.", "takes a value where there is none"),
        (b"K\x01(K\x02\x86.", "takes a value where there is none"),
        (b"t.", "has no mark"),
        (b"h\x05.", "refers to object 5 before it is there"),
        (b"NNN\x87(Nu.", "has a tuple where a dict belongs"),
        (b"}(K\x01u.", "has a key without a value"),
        (b"})K\x01s.", "has a tuple as a key"),
        (b"}\x8a\x08\0\0\0\0\0\0\0\x80K\x01s.", "has a int as a key"),
        (b"NNR.", "has a NoneType where a tuple belongs"),
        (b"N)R.", "has a NoneType where a GlobalName belongs"),
        (b"ctorch\nFloatStorage\n)R.", "has a StorageType where a GlobalName belongs"),
        (b"ccollections\nOrderedDict\nK\x01\x85R.", "OrderedDict of something else"),
        (b"ctorch\nSize\n)R.", "calls torch Size on something else"),
        (b"ctorch._utils\n_rebuild_parameter\n)\x85R.", "calls torch._utils _rebuild_parameter on"),
        (b"]NNb.", "has a NoneType where a dict belongs"),
        (b"]2.", "has the instruction DUP"),
        (b"\xff.", "cannot be decoded"),
        (b"X\xff\xff\xff\x7fabc.", "cannot be decoded|without an end"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "cannot be decoded|without an end"),
        (b"}", "without an end within 3 bytes .*: it is truncated"),
    ],
)
def test_a_malformed_pickle_says_what_is_wrong(tmp_path, instructions, message):
    with pytest.raises(WeightsFileError, match=message):
        read(write_zip(tmp_path / "a.pth", b"\x80\x02" + instructions))


# --- Damage ---------------------------------------------------------------------------------------


def test_truncated_files_say_so(tmp_path):
    path = tmp_path / "cut.pth"
    for keep in (30, 1024, 4096, RUN_ZIP.stat().st_size - 1):
        path.write_bytes(RUN_ZIP.read_bytes()[:keep])
        with pytest.raises(WeightsFileError, match=r"without a readable directory.* truncated"):
            read(path)
    whole = BARE_LEGACY.read_bytes()
    for cut, message in ((1, r"storage \d of 2 ends at byte \d+, the file at"), (150, "truncated")):
        path.write_bytes(whole[:-cut])
        with pytest.raises(WeightsFileError, match=message):
            read(path)
    path.write_bytes(whole + b"1234")
    with pytest.raises(WeightsFileError, match="4 bytes follow the last storage"):
        read(path)


def test_a_flipped_bit_in_a_value_is_seen_where_there_are_checksums(tmp_path):
    path = tmp_path / "flipped.pth"
    for golden in (BARE_ZIP, NO_CHECKSUMS):
        data = bytearray(golden.read_bytes())
        data[data.index(np.float32([4, 5]).tobytes())] ^= 1
        path.write_bytes(data)
        if golden == BARE_ZIP:
            with pytest.raises(WeightsFileError, match=r"checksum of its entry .*/data/0' differs"):
                read(path)
        else:  # PyTorch was told to leave them out: nothing to compare with
            assert not np.array_equal(read(path)["weight"], expected("bare")["weight"])


def test_one_missing_checksum_among_others_is_a_wrong_checksum(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(BARE_ZIP.read_bytes())
    patch_directory(path, "data/0", 16, "<I", 0)
    with pytest.raises(WeightsFileError, match="checksum of its entry"):
        read(path)


def test_large_storages_are_checked_in_several_pieces(monkeypatch):
    monkeypatch.setattr(pytorch, "_CHUNK_BYTES", 5)
    assert_equal(read(BARE_ZIP), expected("bare"))


@pytest.mark.parametrize("golden", [BARE_ZIP, BARE_LEGACY, NO_CHECKSUMS], ids=lambda p: p.stem)
def test_every_truncation_is_an_error(tmp_path, golden):
    whole, path = golden.read_bytes(), tmp_path / "cut.pth"
    for length in range(0, len(whole), max(1, len(whole) // 400)):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsFileError, match=r"cut\.pth"):
            read(path)


@pytest.mark.parametrize("golden", [BARE_ZIP, BARE_LEGACY, NO_CHECKSUMS], ids=lambda p: p.stem)
def test_every_damaged_byte_is_an_error_or_arrays(tmp_path, golden):
    """With checksums the arrays are those that were saved; without, they are arrays at least."""
    whole, path = golden.read_bytes(), tmp_path / "damaged.pth"
    rng, step, slowest = np.random.default_rng(0), max(1, len(whole) // 400), 0.0
    num_read = 0
    for position in range(0, len(whole), step):
        data = bytearray(whole)
        data[position] ^= int(rng.choice([1, 0x80, 0xFF, *range(2, 60)]))
        path.write_bytes(data)
        start, arrays = time.monotonic(), None
        with contextlib.suppress(WeightsFileError):
            arrays = read(path)
        if arrays is not None:
            num_read += 1
            assert all(isinstance(array, np.ndarray) for array in arrays.values())
            if golden == BARE_ZIP:
                assert_equal(arrays, expected("bare"))
        slowest = max(slowest, time.monotonic() - start)
    assert 0 < num_read < len(whole) / step
    assert slowest < 2.0


def test_random_instructions_are_an_error_or_arrays(tmp_path):
    """The pickle alone, in an archive whose checksums are right."""
    with zipfile.ZipFile(BARE_ZIP) as archive:
        original = archive.read("pytorch_bare_zip/data.pkl")
    rng = np.random.default_rng(1)
    for _ in range(200):
        data = bytearray(original)
        for position in rng.integers(2, len(data), rng.integers(1, 6)):
            data[position] = rng.choice([*b"(.tuesRQbq0hNl\x85\x86\x87", rng.integers(256)])
        with contextlib.suppress(WeightsFileError):
            read(write_zip(tmp_path / "a.pth", bytes(data), {"data/0": bytes(24)}))


# --- Bombs ----------------------------------------------------------------------------------------


def peak_of_refusal(path, message):
    """Bytes allocated, and the error must take seconds at most."""
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(WeightsFileError, match=message):
            read(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        assert time.process_time() - start < 5


def test_a_declared_terabyte_is_refused_without_memory(tmp_path):
    top = {"a": tensor(storage(count=2**38), 0, (2**38,), (1,))}
    path = write_legacy(tmp_path / "legacy.pth", top, {"0": np.zeros(2, np.float32)})
    assert peak_of_refusal(path, "storage 1 of 1 ends at byte 10995116") < 2**20
    path = write_zip(tmp_path / "zip.pth", top, {"data/0": bytes(8)})
    assert peak_of_refusal(path, "has 8 bytes, not 274877906944 elements") < 2**20
    patch_directory(path, "data/0", 20, "<II", 2**32 - 16, 2**32 - 16)
    assert peak_of_refusal(path, "entries of 42949.* overlap") < 2**20
    data = b"\x80\x02\x8e" + struct.pack("<Q", 2**40) + b"abc."
    assert peak_of_refusal(write_zip(tmp_path / "text.pth", data), "it is trunc|decoded") < 2**20


def test_compressed_and_overlapping_entries_are_refused(tmp_path):
    top = {"a": tensor(storage(count=2**22), 0, (2**22,), (1,))}
    entries = {"data/0": bytes(2**24)}
    path = write_zip(tmp_path / "bomb.pth", top, entries, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**15
    assert peak_of_refusal(path, "has the compressed entry 'archive/data.pkl'.*packed") < 2**20
    path = write_zip(tmp_path / "lap.pth", top, {"data/0": bytes(8), "data/1": bytes(4000)})
    patch_directory(path, "data/0", 20, "<II", 4000, 4000)
    assert peak_of_refusal(path, "entries of 8.* overlap") < 2**20


def test_encrypted_double_and_misplaced_entries(tmp_path):
    top, path = {"a": tensor(storage())}, tmp_path / "a.pth"
    write_zip(path, top, {"data/0": bytes(8)})
    patch_directory(path, "data/0", 8, "<H", 1)
    with pytest.raises(WeightsFileError, match="the encrypted entry 'archive/data/0'"):
        read(path)
    write_zip(path, top, {"data/0": bytes(8), "data/1": bytes(8)})
    patch_directory(path, "data/0", 42, "<I", path.read_bytes().rindex(b"PK\x03\x04"))  # data/1
    with pytest.raises(WeightsFileError, match="is not where the directory says"):
        read(path)
    path.write_bytes(path.read_bytes().replace(b"data/1", b"data/0"))
    with pytest.raises(WeightsFileError, match="two entries of one name"):
        read(path)


def test_few_instructions_cannot_make_much_work(tmp_path):
    """One list of pairs, made into an OrderedDict 3,000 times."""
    pairs = b"](" + b"K\x01K\x02\x86" * 2_000 + b"eq\x00"
    copies = b"h\x01h\x00\x85R0" * 3_000
    data = b"\x80\x02ccollections\nOrderedDict\nq\x010" + pairs + copies + b"."
    assert peak_of_refusal(write_zip(tmp_path / "a.pth", data), "again and again") < 2**26


def test_more_instructions_than_any_file_has(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "_MAX_INSTRUCTIONS", 1000)
    data = b"\x80\x02" + b"N0" * 500 + b"."
    with pytest.raises(WeightsFileError, match="more than 1000 instructions"):
        read(write_zip(tmp_path / "a.pth", data))


def test_deep_nesting_is_no_recursion(tmp_path):
    data = b"\x80\x02" + b"N" + b"\x85" * 20_000 + b"."
    with pytest.raises(WeightsFileError, match="it is a tuple"):
        read(write_zip(tmp_path / "a.pth", data))


# --- Other archives, other machines ---------------------------------------------------------------


def test_other_archives_say_what_they_are(tmp_path):
    path = write_zip(tmp_path / "a.pth", {}, {"code/model.py": b"", "constants.pkl": b""})
    with pytest.raises(WeightsFileError, match=r"TorchScript archive: save .*state_dict\(\)"):
        read(path)
    np.savez(tmp_path / "b.npz", a=np.ones(2))
    with pytest.raises(WeightsFileError, match=r"zip archive with 0 entries NAME/data\.pkl"):
        read(tmp_path / "b.npz")


def test_big_endian_files_are_refused(tmp_path):
    top = {"a": tensor(storage())}
    with pytest.raises(WeightsFileError, match="byte order b'big', only little"):
        read(write_zip(tmp_path / "a.pth", top, {"data/0": bytes(8), "byteorder": b"big"}))
    path = write_legacy(
        tmp_path / "b.pth", top, {"0": np.zeros(2, np.float32)}, {"little_endian": False}
    )
    with pytest.raises(WeightsFileError, match="another byte order than little"):
        read(path)


def test_lists_that_disagree_in_legacy_files(tmp_path):
    top, zeros, path = {"a": tensor(storage())}, np.zeros(2, np.float32), tmp_path / "a.pth"
    with pytest.raises(WeightsFileError, match="list of storages and its tensors disagree"):
        read(write_legacy(path, top, {"7": zeros}))
    with pytest.raises(WeightsFileError, match="it has no storage '0'"):
        read(write_legacy(path, top, {}))
    write_legacy(path, top, {"0": zeros})
    path.write_bytes(path.read_bytes().replace(struct.pack("<q", 2), struct.pack("<q", 1)))
    with pytest.raises(WeightsFileError, match="does not have the 2 elements"):
        read(path)
