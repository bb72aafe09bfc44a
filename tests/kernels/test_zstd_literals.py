"""Frames of our own encoder are Zstandard's: its decoder gives back every byte, whatever the symbols and sizes."""

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from litropy.kernels import host_memory
from litropy.kernels.tensor_codec import decode_tensor, encode_tensor, plan_tensor
from litropy.kernels.tensor_codec_layout import room_bytes
from litropy.kernels.tensor_codec_planes import numba_loops

pytestmark = pytest.mark.skipif(numba_loops() is None, reason="needs numba")

BLOCK = 1 << 17
SIZES = (1, 2, *range(1023, 1037), 4097, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1025, 300_001)


def symbols(kind, size):
    rng = np.random.default_rng(size)
    drawn = {
        "halving": lambda: rng.geometric(0.5, size),
        "flat": lambda: rng.integers(0, 129, size),
        "close and flat": lambda: rng.integers(40, 60, size),
        "one": lambda: np.full(size, 77),
        "two far apart": lambda: (rng.random(size) < 0.01) * 128,
        "long tail": lambda: rng.geometric(0.02, size).clip(0, 128),
        "fibonacci": lambda: np.repeat(np.arange(30), [round(1.618**k) for k in range(30)])[:size],
        "sorted": lambda: np.sort(rng.zipf(1.05, size)).clip(0, 128),
        "high": lambda: (rng.geometric(0.4, size) + 125).clip(0, 255),
        "scattered": lambda: rng.permutation(256)[rng.geometric(0.1, size) % 50],
        "all others once": lambda: np.r_[np.arange(129), np.zeros(size)][:size],
    }
    return drawn[kind]().astype(np.uint8)


def compressed(plane):
    """A frame, or None; around the room that it may need nothing changes."""
    from litropy.kernels.zstd_literals import compress_literals

    memory = np.full(room_bytes(plane.size) + 2, 0xA5, np.uint8)
    size = compress_literals(plane, memory[1:-1])
    assert (memory[0], memory[-1]) == (0xA5, 0xA5)
    return memory[1 : 1 + size].tobytes() if size else None


def decompressed(frame):
    return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)


@pytest.mark.parametrize(
    "kind",
    [
        "halving",
        "flat",
        "close and flat",
        "one",
        "two far apart",
        "long tail",
        "fibonacci",
        "sorted",
        "high",
        "scattered",
        "all others once",
    ],
)
def test_frames_decode_to_what_they_hold(kind):
    for size in SIZES:
        plane = symbols(kind, size)
        frame = compressed(plane)
        assert decompressed(frame) == plane.tobytes(), size
        assert len(frame) <= plane.size + 10 + 3 * -(-plane.size // BLOCK)
        assert zstandard.get_frame_parameters(frame).content_size == plane.size


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=1, max_size=200), st.integers(1, 40_000), st.integers(0, 2**31))
def test_any_bytes_decode_or_are_declined(alphabet, size, seed):
    values = np.frombuffer(alphabet, np.uint8)
    plane = values[np.random.default_rng(seed).geometric(0.2, size) % values.size]
    frame = compressed(plane)
    if frame is None:
        assert plane.max() > 128
        assert np.unique(plane).size > 64
    else:
        assert decompressed(frame) == plane.tobytes()


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**31), st.integers(2, 64), st.floats(-2, 1))
def test_weights_of_many_symbols_decode(seed, alphabet, evenness):
    rng = np.random.default_rng(seed)
    values = np.append(rng.permutation(255)[: alphabet - 1], 255).astype(np.uint8)
    plane = rng.choice(values, 3000, p=rng.dirichlet(np.full(alphabet, 10**evenness)))
    assert decompressed(compressed(plane)) == plane.tobytes()


def test_high_exponents_take_little_more_than_entropy():
    plane = symbols("high", 1 << 18)
    assert len(compressed(plane)) < len(compressed(plane - 100)) + 200


def test_codes_take_little_more_than_entropy():
    plane = symbols("halving", 1 << 20)
    counts = np.bincount(plane)
    p = counts[counts > 0] / plane.size
    assert len(compressed(plane)) * 8 / plane.size <= -float(p @ np.log2(p)) * 1.01


def test_weights_are_coded_so_even_where_some_are_large():
    weight = torch.randn(300_000, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    large = weight.clone()
    large[::1000] = 1000.0
    for x in (weight, large):
        assert plan_tensor(x, codec="zstd").coders == ("huffman", "raw")
        encoded = encode_tensor(x, codec="zstd")
        assert encoded.nbytes < 0.67 * x.nbytes
        assert torch.equal(decode_tensor(encoded).view(torch.int16), x.view(torch.int16))


def test_much_memory_comes_in_large_pages_or_as_it_can(monkeypatch):
    asked = []
    monkeypatch.setattr(host_memory, "_madvise", lambda: lambda *request: asked.append(request))
    x = host_memory.empty((5 << 20,), torch.uint8)
    ((start, length, _),) = asked
    assert x.data_ptr() <= start
    assert start + length <= x.data_ptr() + x.nbytes
    assert length > x.nbytes - 2 * 65536
    assert host_memory.empty((1 << 20,), torch.uint8).nbytes == 1 << 20
    assert host_memory.empty((5 << 20,), torch.uint8, "meta").is_meta
    assert len(asked) == 1
    monkeypatch.setattr(host_memory, "_madvise", lambda: None)
    assert host_memory.empty((2, 3 << 20), torch.uint8).shape == (2, 3 << 20)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000])
def test_offsets_of_groups_come_back_and_numpy_agrees(size, monkeypatch):
    from litropy.kernels import tensor_codec_groups as groups

    plane = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    offsets, rest = groups.subtract_offsets(plane)
    np.testing.assert_array_equal(groups.add_offsets(rest, offsets), plane)
    monkeypatch.setattr(groups, "numba_loops", lambda: None)
    for got, expected in zip(groups.subtract_offsets(plane), (offsets, rest), strict=True):
        np.testing.assert_array_equal(got, expected)


def scaled_rows(dtype):
    """A moment of an embedding: rows of many scales."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(3000, 1, generator=generator).mul(-12).exp2()
    return (torch.randn(3000, 129, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_many_scales_are_coded_against_their_own(dtype):
    x = scaled_rows(dtype)
    encoded = encode_tensor(x, codec="zstd")
    assert plan_tensor(x, codec="zstd").coders[0] == "groups"
    assert encoded.nbytes < encode_tensor(x, codec="rans").nbytes - 0.01 * x.nbytes
    for impl in ("numba", "torch"):
        assert torch.equal(decode_tensor(encoded, impl=impl).view(torch.uint8), x.view(torch.uint8))


def test_damaged_groups_are_an_error():
    from litropy.kernels.tensor_codec_chunks import GROUPS, Plane, decode_plane, encode_plane

    plane = np.random.default_rng(0).geometric(0.5, 5000).astype(np.uint8)
    room = np.empty(room_bytes(plane.size), np.uint8)
    method, size = encode_plane(plane, "groups", room)
    data = room[:size].tobytes()
    assert method == GROUPS
    np.testing.assert_array_equal(decode_plane(Plane(method, data), 5000), plane)
    damaged = [data[:3], data[:50], data[:-1], b"\xff\xff\xff\xff" + data[4:], b"\0\0\0\0" + data[4:], data + b"\0"]
    for bad in damaged:
        with pytest.raises(ValueError, match="frame"):
            decode_plane(Plane(method, bad), 5000)
    for count in (4999, 5001, 10_000):
        with pytest.raises(ValueError, match="frame"):
            decode_plane(Plane(method, data), count)
