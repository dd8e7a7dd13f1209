"""Caffe's files without Caffe: what is read and written, what a fault says, what a hostile file costs."""

import io
import json
import pickle
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

from pspnet_jax.weights import messages
from pspnet_jax.weights.caffe import is_caffemodel, read, write
from pspnet_jax.weights.pytorch import WeightsFileError

BUDGET_SECONDS = 30

KERNEL = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 7
BIAS = np.array([0.5, -1.5], np.float32)
NORM = [np.array([i, i + 0.25], np.float32) for i in range(4)]
ARRAYS = {"conv1_1_3x3_s2.0": KERNEL, "conv6.0": KERNEL[:1, :, :1, :1], "conv6.1": BIAS[:1]}
ARRAYS |= {f"conv1_1_3x3_s2/bn.{i}": array for i, array in enumerate(NORM)}


# --- The format, stated a second time ----------------------------------------------------------------


def varint(value):
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def number(field, value):
    return varint(field << 3) + varint(value)


def sized(field, content):
    content = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | 2) + varint(len(content)) + content


def packed(array, kind="f"):
    return struct.pack(f"<{array.size}{kind}", *array.ravel().tolist())


def shaped(shape):
    return sized(7, sized(1, b"".join(map(varint, shape))))


def four_axes(shape):
    shape = (1,) * (4 - len(shape)) + tuple(shape)
    return b"".join(number(axis, length) for axis, length in enumerate(shape, 1))


def blob(array, *, shape=None, axes=shaped, double=False):
    """With the field `diff`, which solvers write and nobody wants."""
    values = sized(8, packed(array, "d")) if double else sized(5, packed(array))
    return axes(array.shape if shape is None else shape) + values + sized(6, packed(array))


def layer(name, kind, *blobs, options=b""):
    """With the names of its inputs and outputs, a phase and multipliers."""
    texts = sized(1, name) + sized(2, kind) + sized(3, "data") + sized(4, name) + number(10, 1)
    rates = sized(6, varint(2 << 3 | 5) + struct.pack("<f", 10))
    return sized(100, texts + rates + b"".join(sized(7, b) for b in blobs) + options)


def v1_layer(name, kind, *blobs, options=b""):
    texts = sized(2, "data") + sized(3, name) + sized(4, name) + number(5, kind)
    return sized(2, texts + b"".join(sized(6, b) for b in blobs) + options)


def convolution(options, field=106):
    return sized(field, number(1, 64) + number(3, 1) + number(4, 3) + options)


def row(array):
    return blob(array, shape=(1, array.size, 1, 1))


def net(*layers):
    return sized(1, "pspnet") + sized(3, "data") + number(4, 1) + b"".join(layers)


NET = net(
    layer("data", "Input"),
    layer("conv1_1_3x3_s2", "Convolution", blob(KERNEL), options=convolution(number(6, 2))),
    layer("conv1_1_3x3_s2/bn", "BN", *map(row, NORM)),
    layer("conv1_1_3x3_s2/relu", "ReLU"),
    layer("conv6", "Convolution", blob(KERNEL[:1, :, :1, :1]), blob(BIAS[:1])),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pspnet.caffemodel"


def read_bytes(path, content):
    path.write_bytes(content)
    return read(path)


def assert_equal(arrays, wanted):
    assert arrays.keys() == wanted.keys()
    for name, array in arrays.items():
        assert (array.dtype, array.shape) == (wanted[name].dtype, wanted[name].shape), name
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


# --- What is read ---------------------------------------------------------------------------------


def test_a_net_as_caffe_saves_it(path):
    arrays, strides = read_bytes(path, NET)
    assert_equal(arrays, ARRAYS)
    assert strides == {"conv1_1_3x3_s2": (2, 2)}
    assert not arrays["conv6.0"].flags.writeable


def test_four_axes_of_before(path):
    content = net(
        layer("conv1_1_3x3_s2", "Convolution", blob(KERNEL, axes=four_axes)),
        layer("conv1_1_3x3_s2/bn", "BN", *(blob(array, axes=four_axes) for array in NORM)),
        layer(
            "conv6",
            "Convolution",
            blob(KERNEL[:1, :, :1, :1], axes=four_axes),
            blob(BIAS[:1], axes=four_axes),
        ),
    )
    assert_equal(read_bytes(path, content)[0], ARRAYS)


def test_layers_of_the_first_generation(path):
    content = net(
        v1_layer("data", 5),
        v1_layer(
            "conv",
            4,
            blob(KERNEL[:1, :, :1, :1], axes=four_axes),
            blob(BIAS[:1], axes=four_axes),
            options=convolution(number(6, 2), field=10),
        ),
        v1_layer("linear", 14, blob(BIAS[None], axes=four_axes)),
    )
    arrays, strides = read_bytes(path, content)
    assert {name: array.shape for name, array in arrays.items()} == {
        "conv.0": (1, 3, 1, 1),
        "conv.1": (1,),
        "linear.0": (1, 1, 1, 2),
    }
    assert strides == {"conv": (2, 2)}


@pytest.mark.parametrize(
    ("options", "stride"),
    [
        (b"", (1, 1)),
        (number(6, 3), (3, 3)),
        (number(6, 3) + number(6, 1), (3, 1)),
        (sized(6, varint(300) + varint(1)), (300, 1)),
        (number(13, 2) + number(14, 1), (2, 1)),
    ],
    ids=["none", "one", "two", "packed", "by name"],
)
def test_strides(path, options, stride):
    content = net(layer("conv", "Convolution", blob(KERNEL), options=convolution(options)))
    assert read_bytes(path, content)[1] == {"conv": stride}


def test_doubles_stay_doubles_and_come_before_floats(path):
    exact = np.array([1 / 3, 2 / 3])
    content = blob(exact, double=True) + sized(5, packed(BIAS))
    arrays, _ = read_bytes(path, net(layer("a", "PReLU", content)))
    assert_equal(arrays, {"a.0": exact})


def test_values_and_shapes_in_several_parts_are_joined(path):
    parts = sized(5, packed(KERNEL.ravel()[:5])) + sized(5, packed(KERNEL.ravel()[5:]))
    content = shaped((2, 3)) + parts + shaped((2, 2))
    assert_equal(
        read_bytes(path, net(layer("a", "Convolution", content)))[0],
        {"a.0": KERNEL},
    )


def test_layers_without_blobs_are_nothing(path):
    data = layer("data", "Data")  # one for training, one for testing
    shared = layer("shared", "Convolution", options=convolution(number(6, 2)))
    arrays, strides = read_bytes(path, net(data, data, layer("", "ReLU"), shared) + NET)
    assert_equal(arrays, ARRAYS)
    assert strides.keys() == {"conv1_1_3x3_s2"}


@pytest.mark.parametrize("kind", ["Convolution", "Deconvolution", "InnerProduct"])
def test_kernels_keep_their_axes_and_others_do_not(path, kind):
    one_output = KERNEL[:1, :, :1, :1]
    content = net(layer("a", kind, blob(one_output), row(BIAS)), layer("b", "PReLU", row(BIAS)))
    assert_equal(read_bytes(path, content)[0], {"a.0": one_output, "a.1": BIAS, "b.0": BIAS})


def test_unaligned_views_reach_the_device(path):
    arrays, _ = read_bytes(path, NET)
    assert not all(array.flags.aligned for array in arrays.values())
    for array in arrays.values():
        np.testing.assert_array_equal(jnp.asarray(array), array)


# --- What is written ------------------------------------------------------------------------------


def test_what_is_written_is_read(path):
    path = path.parent / "new" / path.name
    write(path, ARRAYS, {"conv6": (2, 1)})
    arrays, strides = read(path)
    assert_equal(arrays, ARRAYS)
    assert strides == {"conv6": (2, 1)}
    assert is_caffemodel(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_bytes_written_are_those_of_the_format(path):
    write(path, ARRAYS | {"linear.0": BIAS[None]}, {"conv1_1_3x3_s2": (2, 2)})

    def plain(array, shape=None):
        return sized(7, sized(5, packed(array)) + shaped(shape or array.shape))

    strides = sized(106, number(6, 2) + number(6, 2))
    parts = {
        "conv1_1_3x3_s2": ("Convolution", plain(KERNEL) + strides),
        "conv6": ("Convolution", plain(ARRAYS["conv6.0"]) + plain(BIAS[:1])),
        "conv1_1_3x3_s2/bn": ("BN", b"".join(plain(array, (1, 2, 1, 1)) for array in NORM)),
        "linear": ("InnerProduct", plain(BIAS[None])),
    }
    assert path.read_bytes() == b"".join(
        sized(100, sized(1, name) + sized(2, kind) + rest) for name, (kind, rest) in parts.items()
    )


def test_arrays_in_any_order_of_memory(path):
    turned = np.asfortranarray(KERNEL).astype(">f8")
    write(path, {"a.0": turned}, {})
    assert_equal(read(path)[0], {"a.0": KERNEL})


@pytest.mark.parametrize(
    ("arrays", "strides", "message"),
    [
        ({"a.1": KERNEL}, {}, r"blobs 1 of layer 'a': keys must be 'layer\.0'"),
        ({"weight": KERNEL}, {}, "blobs weight of layer ''"),
        ({".0": KERNEL}, {}, "blobs 0 of layer ''"),
        ({"a.0": BIAS}, {}, r"layer 'a' has blobs of \[1\] axes"),
        ({"a.0": KERNEL}, {"b": (1, 1)}, "strides of b, but no convolution"),
        ({"a.0": BIAS[None]}, {"a": (1, 1)}, "strides of a, but no convolution"),
        (
            {"a.0": np.broadcast_to(np.float32(0), (2**10, 2**10, 2**9, 1))},
            {},
            "2147483648 bytes: Caffe reads less than 2 GiB, write safetensors",
        ),
    ],
)
def test_what_cannot_be_written(path, arrays, strides, message):
    with pytest.raises(ValueError, match=message):
        write(path, arrays, strides)
    assert not list(path.parent.iterdir())


# --- Which files are Caffe's ----------------------------------------------------------------------


def zip_archive():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return buffer.getvalue()


FOREIGN = {
    "empty": b"",
    "zip": zip_archive(),
    "pickle": pickle.dumps({"a": BIAS}, protocol=2),
    "prototxt": b'name: "pspnet"\nlayer {\n  name: "conv"\n  type: "Convolution"\n}\n',
    "text after an empty line": b"\n" + b'name: "pspnet"\nlayer { name: "conv" }\n' * 20,
    "web page": b"<!doctype html><html></html>",
    "JSON": json.dumps({"name": "conv"}).encode(),
    "ONNX": number(1, 8) + sized(2, "pytorch") + sized(7, sized(1, b"\x0a\x01x")),
    "graph of TensorFlow": sized(1, sized(1, "input") + sized(2, "Placeholder")),
    "state of a solver": number(1, 100) + sized(2, "pspnet.caffemodel") + sized(3, blob(BIAS)),
    "mean image": four_axes(KERNEL.shape) + sized(5, packed(KERNEL)),
    "zeros": bytes(100),
    "name alone": sized(1, "pspnet"),
    "name that is no text": sized(1, b"\0") + layer("a", "BN", blob(BIAS)),
    "field of no net": number(9, 1) + layer("a", "BN", blob(BIAS)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_known_as_such(path, name):
    path.write_bytes(FOREIGN[name])
    assert not is_caffemodel(path)
    message = (
        "is empty" if name == "empty" else r"is not a \.caffemodel: it begins with b.*prototxt"
    )
    with pytest.raises(WeightsFileError, match=f"{path} {message}"):
        read(path)


def test_safetensors_of_any_header_are_known_as_such(path):
    for length in range(300):  # the first byte of such a file is the length of its header
        path.write_bytes(save({"a": BIAS}, {"note": "x" * length}))
        assert not is_caffemodel(path)


def test_random_bytes_are_no_net(path):
    rng = np.random.default_rng(0)
    for _ in range(300):
        path.write_bytes(b"\x12" + rng.bytes(200))
        assert not is_caffemodel(path)


def test_a_truncated_file_is_still_caffes(path):
    for content in (NET, NET[NET.index(b"\xa2\x06") :], net(v1_layer("a", 4, blob(KERNEL)))):
        path.write_bytes(content[:60])
        assert is_caffemodel(path)
        with pytest.raises(WeightsFileError, match=r"truncated|no weights"):
            read(path)


# --- What a fault says ----------------------------------------------------------------------------

FAULTS = {
    "truncated": (
        NET[:-3],
        r"is truncated or damaged: field 100 of the net claims \d+ bytes, \d+ ",
    ),
    "truncated in a length": (NET + b"\xa2\x06\xff", "the net ends in a number; download it again"),
    "claims beyond the file": (
        net(sized(100, sized(1, "a") + varint(7 << 3 | 2) + varint(2**40))),
        "field 7 of layer 0 claims 1099511627776 bytes, 0 are there",
    ),
    "values beyond the blob": (
        net(layer("a", "BN", shaped((2,)) + varint(5 << 3 | 2) + varint(2**31) + bytes(8))),
        "field 5 of blob 0 of layer 'a' claims 2147483648 bytes, 8 are there",
    ),
    "kind of field": (NET + b"\x0b", "is damaged: the net has a field of kind 3"),
    "long number": (NET + b"\xff" * 30 + b"\x01", "the net ends in a number"),
    "shape": (
        net(layer("a", "BN", blob(BIAS, shape=(3,)))),
        r"is damaged: blob 0 of layer 'a' has the shape \(3,\) and 8 bytes of float32 values",
    ),
    "shape of doubles": (
        net(layer("a", "BN", blob(BIAS, shape=(4,), double=True))),
        r"has the shape \(4,\) and 16 bytes of float64 values; download it again",
    ),
    "part of a value": (
        net(layer("a", "BN", shaped((2,)) + sized(5, bytes(7)))),
        r"has the shape \(2,\) and 7 bytes",
    ),
    "no values": (net(layer("a", "BN", shaped((2,)))), r"the shape \(2,\) and 0 bytes"),
    "negative lengths": (
        net(layer("a", "BN", blob(BIAS, shape=(2**64 - 1, 2**64 - 2)))),
        r"the shape \(-1, -2\)",
    ),
    "length 0": (net(layer("a", "BN", shaped((0, 5)) + sized(5, b""))), r"the shape \(0, 5\)"),
    "axes": (net(layer("a", "BN", blob(BIAS, shape=[1] * 40 + [2]))), r"the shape \(1, 1, 1"),
    "more values than bytes": (
        net(layer("a", "BN", blob(BIAS, shape=(2**62, 2**62)))),
        r"the shape \(4611686018427387904, 4611686018427387904\) and 8 bytes",
    ),
    "unpacked": (
        net(layer("a", "BN", shaped((1,)) + varint(5 << 3 | 5) + bytes(4))),
        r"has 'data' of blob 0 of layer 'a' not in one piece \(encoding 5 .*save it in Caffe",
    ),
    "two layers": (
        net(*[layer("a", "BN", blob(BIAS))] * 2),
        "has two layers 'a' with blobs: rename one",
    ),
    "both generations": (
        net(layer("a", "BN", blob(BIAS)), v1_layer("a", 4, blob(BIAS))),
        "has two layers 'a' with blobs",
    ),
    "no name": (net(layer("", "BN", blob(BIAS))), "is damaged: layer 0 has blobs and the name b''"),
    "name": (
        net(layer("a", "ReLU"), layer(b"\xff", "BN", blob(BIAS))),
        r"layer 1 has blobs and the name b'\\xff'",
    ),
    "long name": (net(layer("a" * 5000, "BN", blob(BIAS))), "is not a .caffemodel"),
    "long type": (
        net(layer("a", "B" * 5000, blob(BIAS))),
        r"layer 0 has 50\d\d bytes beside its values",
    ),
    "options": (
        net(layer("a", "Convolution", blob(KERNEL), options=sized(106, b"\x07"))),
        "is damaged: layer 0 cannot be decoded",
    ),
    "strides of volumes": (
        net(layer("a", "Convolution", blob(KERNEL), options=convolution(number(6, 2) * 3))),
        r"has strides \[2, 2, 2\] in layer 'a', as no network of images",
    ),
    "stride 0": (
        net(layer("a", "Convolution", blob(KERNEL), options=convolution(number(6, 0)))),
        r"has strides \[0\] in layer 'a'",
    ),
    "no blobs": (
        net(layer("a", "Convolution"), layer("b", "BN")),
        "holds no weights: none of its 2 layers has blobs; take the file that Caffe saved",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_file_and_reason(path, name):
    content, message = FAULTS[name]
    with pytest.raises(WeightsFileError, match=message) as error:
        read_bytes(path, content)
    assert str(error.value).startswith(f"{path} ")


def test_a_file_that_is_not_there_or_a_folder(tmp_path):
    with pytest.raises(WeightsFileError, match=r"none\.caffemodel: No such file"):
        read(tmp_path / "none.caffemodel")
    with pytest.raises(WeightsFileError, match=f"{tmp_path}: Is a directory"):
        read(tmp_path)


def test_more_than_two_gibibytes_are_not_looked_at(path):
    with path.open("wb") as file:
        file.write(NET)
        file.truncate(2**31)  # takes no room
    with pytest.raises(WeightsFileError, match=r"has 2147483648 bytes, a \.caffemodel has"):
        read(path)


# --- What a hostile file costs --------------------------------------------------------------------

HOSTILE = {
    "layers": b"\xa2\x06\x00" * 10**6,
    "layers of V1": b"\x12\x00" * 10**6,
    "blobs": layer("a", "BN", *[b""] * 10**6),
    "good blobs": layer("a", "BN", *[shaped(()) + sized(5, bytes(4))] * 10**5),
    "values": layer("a", "BN", b"\x2a\x00" * 10**6),
    "axes": layer("a", "BN", shaped([1] * 10**6) + sized(5, bytes(4))),
    "strides": layer("a", "BN", blob(BIAS), options=sized(106, b"\x30\x01" * 10**6)),
    "numbers": net() + b"\x28\x01" * 10**6,
}


MEASURE = """
import json, resource, sys, time
from pspnet_jax.weights.caffe import read
from pspnet_jax.weights.pytorch import WeightsFileError
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for path in sys.argv[1:]:
    before, start = peak(), time.perf_counter()
    try:
        message = f"{len(read(path)[0])} arrays"
    except WeightsFileError as error:
        message = str(error)
    print(json.dumps([message, peak() - before, time.perf_counter() - start]))
"""


def test_small_parts_without_number_are_refused_at_little_cost(tmp_path):
    """In a process of its own, without the checks of types that the tests add."""
    for name, content in HOSTILE.items():
        (tmp_path / name).write_bytes(layer("first", "ReLU") + content)
    paths = [str(tmp_path / name) for name in HOSTILE]
    command = [sys.executable, "-c", MEASURE, *paths]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for name, line in zip(HOSTILE, result.stdout.splitlines(), strict=True):
        message, num_bytes, seconds = json.loads(line)
        assert re.search(r"more than 65536 fields|beside its values", message), (name, message)
        assert num_bytes < 32 * 2**20, name
        assert seconds < 5, name


def test_values_are_not_copied(path):
    size = 2**23
    path.write_bytes(net(layer("a", "BN", sized(5, bytes(4 * size)) + shaped((size,)))))
    tracemalloc.start()
    arrays, _ = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert arrays["a.0"].shape == (size,)
    assert peak < 2**20


def test_any_cut_is_found(path):
    """Unless it lies between two layers."""
    whole = layer("a", "Convolution", blob(KERNEL), blob(BIAS))
    for stop in range(len(whole)):
        with pytest.raises(WeightsFileError):
            read_bytes(path, whole[:stop])


def outcome(path):
    """Arrays, or what the error says."""
    try:
        return read(path)[0]
    except WeightsFileError as error:
        return str(error)


def test_changed_bytes_give_arrays_or_a_fault(path):
    content = NET + net(v1_layer("v1", 4, blob(KERNEL, axes=four_axes, double=True)))
    rng, slowest, outcomes = np.random.default_rng(0), 0.0, []
    for _ in range(400):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 6)):
            changed[place] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        del changed[int(rng.choice([len(content), rng.integers(len(content))])) :]
        path.write_bytes(changed)
        start = time.perf_counter()
        tracemalloc.start()
        outcomes.append(outcome(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        slowest = max(slowest, time.perf_counter() - start)
        if isinstance(outcomes[-1], dict):
            assert sum(array.nbytes for array in outcomes[-1].values()) <= len(content)
        else:
            assert outcomes[-1].startswith(str(path))
        assert peak < 2**18
    assert slowest < 2
    assert 40 < sum(isinstance(found, dict) for found in outcomes) < 360


def test_limits_are_far_from_real_files(path, monkeypatch):
    """A ResNet-269 as Caffe saves it: three convolutions with norms and activations in each of 90 blocks."""
    options = convolution(number(6, 1) + number(18, 2))
    one = np.ones((1, 1, 1, 1), np.float32)
    layers = []
    for name in (f"conv{block}_{part}" for block in range(90) for part in range(3)):
        layers.append(layer(name, "Convolution", blob(one), options=options))
        layers.append(layer(f"{name}/bn", "BN", *[blob(one)] * 4))
        layers.append(layer(f"{name}/relu", "ReLU"))
    monkeypatch.setattr(messages, "MAX_FIELDS", messages.MAX_FIELDS // 4)
    assert len(read_bytes(path, net(*layers))[0]) == 90 * 3 * 5
