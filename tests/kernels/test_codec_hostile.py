"""Whatever the bytes: a ValueError or some tensor, never a read or write out of bounds, nor more memory than asked."""

import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from litropy.kernels.rans_numba import decode_stream
from litropy.kernels.rans_stream import LANES, batch_streams, encode_rans, parse_stream
from litropy.kernels.rans_torch import decode_batch as decode_torch
from litropy.kernels.tensor_codec import (
    TensorLayout,
    decode_chunk,
    encode_tensor,
)
from litropy.kernels.tensor_codec_chunks import CEILING, parse_payload
from litropy.kernels.tensor_codec_layout import SEGMENT

COUNT = 500
GUARD = 64
EXAMPLES = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def triton_decode():
    from litropy.kernels.rans_triton import decode_batch

    return decode_batch


def symbols_of(alphabet, count=COUNT, seed=0):
    rng = np.random.default_rng(seed)
    return rng.choice(alphabet, count, p=rng.dirichlet(np.full(alphabet, 0.3))).astype(np.uint8)


STREAMS = {alphabet: encode_rans(symbols_of(alphabet)) for alphabet in (3, 40)}


@st.composite
def mutated(draw, payload):
    """Bytes flipped, set, cut out, put in, or cut off."""
    data = bytearray(payload)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "set", "cut", "insert", "truncate"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if data:
                data[at] = draw(st.sampled_from([0, 1, 127, 128, 255]))
            case "cut":
                del data[at : at + draw(st.integers(1, 9))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "truncate":
                del data[at:]
    return bytes(data)


def guarded(decode, stream):
    """Symbols that a batch decoder makes, whether all is intact; what lies around the output must not change."""
    batch = batch_streams([stream])
    memory = torch.full((batch.total + 2 * GUARD,), 77, dtype=torch.uint8)
    intact = decode(batch, memory[GUARD:-GUARD])
    assert (memory[:GUARD] == 77).all()
    assert (memory[-GUARD:] == 77).all()
    return memory[GUARD:-GUARD].numpy(), bool(intact.all())


def guarded_numba(stream):
    memory = np.full(stream.total + 2 * GUARD, 77, np.uint8)
    try:
        decode_stream(stream, memory[GUARD:-GUARD])
        intact = True
    except ValueError:
        intact = False
    assert (memory[:GUARD] == 77).all()
    assert (memory[-GUARD:] == 77).all()
    return memory[GUARD:-GUARD], intact


@pytest.mark.parametrize("alphabet", STREAMS)
@given(data=st.data())
@EXAMPLES
def test_damaged_streams(alphabet, data):
    payload = data.draw(mutated(STREAMS[alphabet]))
    try:
        stream = parse_stream(payload, COUNT)
    except ValueError:
        return
    compiled, intact = guarded_numba(stream)
    wide, wide_intact = guarded(decode_torch, stream)
    assert intact == wide_intact
    if intact:  # damage that no decoder can see: all see the same
        np.testing.assert_array_equal(compiled, wide)


@pytest.mark.parametrize("alphabet", STREAMS)
@given(data=st.data())
@settings(deadline=None, max_examples=4)
def test_damaged_states_and_words_in_triton(alphabet, data, triton_decode):
    stream = parse_stream(STREAMS[alphabet], COUNT)
    raw = data.draw(mutated(stream.states.tobytes() + stream.words.tobytes()))
    raw = (raw + bytes(4 * LANES + stream.words.nbytes))[: 4 * LANES + stream.words.nbytes]
    stream = stream._replace(
        states=np.frombuffer(raw[: 4 * LANES], "<u4").reshape(1, LANES), words=np.frombuffer(raw[4 * LANES :], "<u2")
    )
    compiled, intact = guarded_numba(stream)
    out, triton_intact = guarded(triton_decode, stream)
    assert intact == triton_intact
    if intact:
        np.testing.assert_array_equal(out, compiled)


@pytest.mark.parametrize("state", [0, 1, 0xFFFF, 0xFFFFFFFF])
def test_states_that_ask_for_too_many_words(state, triton_decode):
    stream = parse_stream(STREAMS[40], COUNT)
    hungry = stream._replace(states=np.full((1, LANES), state, np.uint32))
    assert not guarded_numba(hungry)[1]
    assert not guarded(decode_torch, hungry)[1]
    assert not guarded(triton_decode, hungry)[1]


def test_no_words_at_all():
    stream = parse_stream(STREAMS[40], COUNT)
    empty = stream._replace(words=stream.words[:0], words_of=np.zeros(1, np.uint32))
    assert not guarded_numba(empty)[1]
    assert not guarded(decode_torch, empty)[1]


def test_tables_that_lie():
    head, alphabet = bytearray(STREAMS[3]), STREAMS[3][0] + 1
    twice, unsorted, short, zero = (bytearray(head) for _ in range(4))
    twice[3] = twice[2]
    unsorted[2], unsorted[3] = unsorted[3], unsorted[2]
    short[2 + alphabet] ^= 1
    struct.pack_into("<3H", zero, 2 + alphabet, 0, 4095, 1)
    for payload in (twice, unsorted, short, zero):
        with pytest.raises(ValueError, match="or their frequencies do not sum to 4096"):
            parse_stream(bytes(payload), COUNT)
    for payload, message in [
        (b"", "starts with"),
        (b"\x02\x09", "2\\^10 to 2\\^20"),
        (b"\x02\x15", "2\\^10 to 2\\^20"),
        (b"\xff\x0f", "too few"),
        (bytes(head[:40]), "too few"),
        (head + b"!", "ask for"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_stream(bytes(payload), COUNT)


X = torch.randn(1200, generator=torch.Generator().manual_seed(0)).bfloat16()
ENCODED = {codec: encode_tensor(X, codec=codec) for codec in ("zstd", "rans", "raw")}
# small integers, of which a few are not: under a ceiling
SMALL = torch.from_numpy(np.where(np.arange(1200) % 60, symbols_of(3, 1200), np.arange(1200) % 251).astype(np.uint8))
ENCODED["ceiling"] = encode_tensor(SMALL, codec="rans")


@pytest.mark.parametrize("codec", ENCODED)
@given(data=st.data())
@EXAMPLES
def test_damaged_chunks(codec, data):
    encoded = ENCODED[codec]
    payload = data.draw(mutated(encoded.chunks[0]))
    results = []
    for impl in ("numba", "torch"):
        try:
            results.append(decode_chunk(payload, encoded.layout, 0, impl=impl).view(torch.uint8).tolist())
        except ValueError as error:
            results.append(str(error).startswith("Chunk 0 of 1 cannot be decoded: "))
    assert results[0] == results[1]
    assert results[0] is not False


@given(st.binary(max_size=300))
@EXAMPLES
def test_noise_is_refused(payload):
    layout = TensorLayout(torch.float32, (7,), False, SEGMENT)
    if len(payload) == 29 and payload[0] == 0:
        return
    with pytest.raises(ValueError, match="Chunk 0 of 1 cannot be decoded"):
        decode_chunk(b"\1" + payload, TensorLayout(torch.float32, (7000,), False, SEGMENT), 0)
    with pytest.raises(ValueError, match="Chunk 0 of 1 cannot be decoded"):
        decode_chunk(b"\2" + payload, layout, 0)


def test_frames_that_would_unpack_to_more_are_refused_before():
    layout = TensorLayout(torch.uint8, (100_000,), False, SEGMENT * 4)
    bomb = zstandard.ZstdCompressor().compress(bytes(200 << 20))
    unsaid = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(200 << 20))
    for frame, message in ((bomb, "209715200 bytes, not 100000"), (unsaid, "not 100000"), (bomb[:3], "damaged")):
        payload = b"\1" + struct.pack("<BI", 2, len(frame)) + frame
        tracemalloc.start()
        with pytest.raises(ValueError, match=message):
            decode_chunk(payload, layout, 0)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:4], "cannot hold a ceiling"),
        (lambda data: data[:1] + struct.pack("<I", 2**32 - 1) + data[5:], "4294967295 of 1200 symbols are said"),
        (lambda data: data[:1] + struct.pack("<I", 1201) + bytes([255]) * 1100, "1201 of 1200 symbols are said"),
        (lambda data: data[:5] + b"\0" + data[6:], "a symbol of 0 is listed"),
        (lambda data: bytes([data[0] - 1]) + data[1:], "symbols reach the ceiling"),
        (lambda data: data[:1] + struct.pack("<I", 0) + data[5 + data[1] :], "but 0 are listed"),
    ],
)
def test_ceilings_that_lie(change, message):
    encoded = ENCODED["ceiling"]
    (plane,) = parse_payload(encoded.chunks[0], 1200, 1)
    assert plane.method == CEILING
    data = change(bytes(plane.data))
    payload = b"\1" + struct.pack("<BI", CEILING, len(data)) + data
    for impl in ("numba", "torch"):
        with pytest.raises(ValueError, match=f"Chunk 0 of 1 cannot be decoded: .*{message}"):
            decode_chunk(payload, encoded.layout, 0, impl=impl)


def test_frames_with_something_behind_them_are_refused():
    layout = TensorLayout(torch.uint8, (1000,), False, SEGMENT)
    frame = zstandard.ZstdCompressor().compress(bytes(1000))
    assert decode_chunk(b"\1" + struct.pack("<BI", 2, len(frame)) + frame, layout, 0).eq(0).all()
    frame += b"more"
    with pytest.raises(ValueError, match="damaged"):
        decode_chunk(b"\1" + struct.pack("<BI", 2, len(frame)) + frame, layout, 0)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "starts with"),
        (b"\0" + bytes(5), "are not 3 words"),
        (b"\0" + bytes(7), "more than 3 words"),
        (b"\1" + bytes(3), "too few"),
        (b"\7" + bytes(6), "no packing"),
    ],
)
def test_lengths_that_lie(payload, message):
    with pytest.raises(ValueError, match=message):
        decode_chunk(payload, TensorLayout(torch.int16, (3,), False, SEGMENT), 0)


@pytest.mark.parametrize(
    ("plane", "size", "message"),
    [
        ((0, 49), 49, "method 0 has 49"),
        ((9, 50), 50, "method 9"),
        ((1, 2), 2, "method 1 has 2"),
        ((0, 2**32 - 1), 50, "listed where 50 are left"),
        ((0, 50), 51, "left over"),
    ],
)
def test_planes_that_lie(plane, size, message):
    layout = TensorLayout(torch.int16, (50,), False, SEGMENT)
    payload = b"\1" + struct.pack("<BIBI", 1, 1, *plane) + b"x" + bytes(size)
    with pytest.raises(ValueError, match=message):
        decode_chunk(payload, layout, 0)
