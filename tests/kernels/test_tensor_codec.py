"""Tensors come back bit for bit, whatever their dtype, shape, strides and values, from every codec and decoder."""

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litropy.kernels import tensor_codec_planes
from litropy.kernels.tensor_codec import (
    DTYPES,
    TensorLayout,
    decode_chunk,
    decode_chunks,
    decode_tensor,
    encode_chunk,
    encode_chunk_into,
    encode_chunks,
    encode_tensor,
    flat_chunk,
    plan_tensor,
)  # fmt: skip
from litropy.kernels.tensor_codec_layout import SEGMENT, room_bytes
from litropy.kernels.tensor_codec_planes import (
    merge_planes,
    merge_planes_torch,
    numba_loops,
    split_planes,
    transform,
    words,
)

CODECS = ("auto", "zstd", "rans", "raw")
IMPLS = ("torch",) if numba_loops() is None else ("numba", "torch")
SMALL = SEGMENT * 2  # bytes, and so the smallest chunks there are


def random_bits(dtype, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    elements = int(np.prod(shape))
    raw = torch.randint(0, 256, (max(elements, 1) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)[:elements].view(shape)


def bits(x):
    return x.contiguous().view(-1).view(torch.uint8)


def assert_same_bits(got, wanted):
    assert (got.dtype, got.shape, got.device) == (wanted.dtype, wanted.shape, wanted.device)
    assert got.is_contiguous()
    assert not got.numel() or torch.equal(bits(got), bits(wanted))


def weights(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(dtype)


EVERY_BFLOAT16 = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("codec", CODECS)
def test_every_bfloat16_comes_back(codec, impl):
    mixed = torch.cat([EVERY_BFLOAT16, weights(70_000)])  # without which no plane would be coded
    encoded = encode_tensor(mixed, codec=codec)
    assert codec in ("auto", encoded.codec)
    assert_same_bits(decode_tensor(encoded, impl=impl), mixed)


def test_every_bfloat16_comes_back_through_triton():
    """Its exponents in 64 streams, side by side: 32 steps instead of 1024."""
    from litropy.kernels.rans_stream import batch_streams, encode_rans, parse_stream
    from litropy.kernels.rans_triton import decode_batch

    kind = transform(torch.bfloat16, False)
    exponent, rest = split_planes(words(EVERY_BFLOAT16), kind, None)
    batch = batch_streams([parse_stream(encode_rans(part), part.size) for part in np.split(exponent, 64)])
    decoded = torch.empty(65536, dtype=torch.uint8)
    assert decode_batch(batch, decoded).all()
    out = torch.empty_like(EVERY_BFLOAT16)
    merge_planes_torch([decoded, torch.from_numpy(rest)], kind, None, out)
    assert_same_bits(out, EVERY_BFLOAT16)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_random_bits_come_back(dtype, impl):
    for seed, shape in enumerate([(), (1,), (0, 3), (5, 7), (3, 401)]):
        x = random_bits(dtype, *shape, seed=seed)
        near = x.clone()
        if x.numel():
            near.view(-1).view(torch.uint8)[::5] ^= 3
        for codec in CODECS:
            for base in (None, near):
                encoded = encode_tensor(x, codec=codec, base=base)
                assert encoded.nbytes <= encoded.layout.nbytes + encoded.layout.num_chunks
                assert_same_bits(decode_tensor(encoded, base=base, impl=impl), x)


@pytest.mark.parametrize("count", [100, 3_000_000])
def test_what_is_encoded_can_be_pickled(count):
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)).bfloat16()
    encoded = pickle.loads(pickle.dumps(encode_tensor(x)))
    assert_same_bits(decode_tensor(encoded), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn], ids=str)
def test_triton_decodes_tensors(dtype):
    x = torch.randn(200).mul_(3).to(dtype)
    base = torch.randn(200).mul_(3).to(dtype)
    for other in (None, base):
        encoded = encode_tensor(x, codec="rans", base=other)
        assert_same_bits(decode_tensor(encoded, base=other, impl="triton"), x)
        assert_same_bits(decode_chunk(encoded.chunks[0], encoded.layout, 0, base=other, impl="triton"), x)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(DTYPES)), st.booleans(), st.integers(1, 70), st.integers(0, 2**31))
def test_planes_are_the_same_from_numba_numpy_torch_and_triton(name, delta, count, seed):
    from litropy.kernels.plane_merge_triton import merge_planes as merge_planes_triton

    dtype = DTYPES[name]
    x, base = random_bits(dtype, count, seed=seed), random_bits(dtype, count, seed=seed + 1)
    kind, other = transform(dtype, delta), words(base) if delta else None
    planes = split_planes(words(x), kind, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_codec_planes, "_FEW", 0)  # Numba however little there is
        np.testing.assert_array_equal(split_planes(words(x), kind, other), planes)
        out = torch.empty_like(x)
        merge_planes(list(planes), kind, other, words(out))
        assert_same_bits(out, x)
        patch.setattr(tensor_codec_planes, "numba_loops", lambda: None)
        out = torch.empty_like(x)
        merge_planes(list(planes), kind, other, words(out))
        assert_same_bits(out, x)
    out = torch.empty_like(x)
    merge_planes_torch([torch.tensor(plane) for plane in planes], kind, base if delta else None, out)
    assert_same_bits(out, x)
    out = torch.empty_like(x)
    merge_planes_triton(torch.tensor(planes), kind, base if delta else None, out)
    assert_same_bits(out, x)


def test_planes_of_known_numbers():
    x = torch.tensor([1.0, -2.0, float("-inf")], dtype=torch.bfloat16)
    exponent, rest = split_planes(words(x), transform(x.dtype, False), None)
    assert exponent.tolist() == [127, 128, 255]
    assert rest.tolist() == [0, 1, 1]
    x, base = torch.tensor([5, 3, -128], dtype=torch.int8), torch.tensor([3, 5, 127], dtype=torch.int8)
    assert split_planes(words(x), transform(x.dtype, True), words(base)).tolist() == [[4, 3, 2]]


@pytest.fixture(scope="module")
def long():
    return weights(5 * SEGMENT // 2)


@pytest.mark.parametrize("codec", ["zstd", "rans", "raw"])
def test_chunks_decode_alone_at_any_address_and_into_place(long, codec):
    encoded = encode_tensor(long, codec=codec, chunk_bytes=SMALL)
    assert [encoded.layout.chunk_range(i) for i in range(3)] == [
        (0, SEGMENT), (SEGMENT, 2 * SEGMENT), (2 * SEGMENT, long.numel())
    ]  # fmt: skip
    out = torch.empty_like(long)
    for index in (2, 0, 1):
        start, stop = encoded.layout.chunk_range(index)
        assert len(encoded.chunks[index]) <= encoded.layout.max_payload_bytes(index)
        moved = memoryview(b"?" + encoded.chunks[index])[1:]
        assert_same_bits(decode_chunk(moved, encoded.layout, index), long[start:stop])
        decode_chunk(moved, encoded.layout, index, out=out[start:stop])
    assert_same_bits(out, long)


def test_threads_change_nothing(long):
    plan = plan_tensor(long, chunk_bytes=SMALL)
    alone = list(encode_chunks(long, plan))
    assert list(encode_chunks(long, plan, threads=3)) == alone
    assert_same_bits(decode_chunks(alone, plan.layout, threads=3), long)


@pytest.mark.parametrize("codec", ["auto", "rans", "raw"])
def test_payloads_that_lie_side_by_side_are_those_that_come_one_by_one(codec):
    x = weights(3, 900_001)
    x[1] = 3.0  # of which less is left than of the others
    plan = plan_tensor(x, codec=codec)
    alone = list(encode_chunks(x, plan))
    assert len(alone) == 3
    for threads in (1, 2, 3):
        encoded = encode_tensor(x, codec=codec, threads=threads)
        assert list(encoded.chunks) == alone
        assert encoded.nbytes == sum(map(len, alone))
        assert all(memoryview(payload).readonly for payload in encoded.chunks)
        assert_same_bits(decode_tensor(encoded, threads=threads), x)


def test_a_chunk_is_coded_into_room_that_is_large_enough():
    x = weights(70_000)
    plan, need = plan_tensor(x), room_bytes(x.nbytes)
    room = np.zeros(need, np.uint8)
    assert room[: encode_chunk_into(x, plan, room)].tobytes() == encode_chunk(x, plan)
    with pytest.raises(ValueError, match=f"{need - 1} bytes of room are too few: `room_bytes` says {need}"):
        encode_chunk_into(x, plan, room[1:])


@pytest.mark.parametrize("codec", ["zstd", "rans"])
def test_a_chunk_may_be_of_another_kind_than_the_sample(codec):
    """Planes that repeat one byte or cannot be coded, among planes that stay as they are."""
    plan = plan_tensor(weights(70_000, dtype=torch.float32), codec=codec)
    assert plan.coders[1:] == ("raw",) * 3
    rounded = weights(70_000).float()  # of which plane 2 is zeros
    middle = (rounded.view(torch.int32) | 0x5500).view(torch.float32)
    noise = random_bits(torch.float32, 70_000)
    some_noise = (noise.view(torch.int32) & ~0x7F80).view(torch.float32)
    for x in (rounded, middle, noise, some_noise, torch.full((70_000,), 0.1), rounded[:1], noise[:3]):
        payload = encode_chunk(x, plan)
        layout = TensorLayout(x.dtype, x.shape, False, plan.layout.chunk_elements)
        assert len(payload) <= layout.max_payload_bytes(0)
        assert_same_bits(decode_chunk(payload, layout, 0), x)
    assert len(encode_chunk(rounded, plan)) < 2.4 * rounded.numel()
    assert len(encode_chunk(some_noise, plan)) < 3 * rounded.numel() + 100


def test_writing_streams(long):
    """No more than threads + 1 payloads are made ahead of the one that is taken."""
    plan = plan_tensor(long, chunk_bytes=SMALL)
    taken = []
    flat_before = threading.active_count()
    payloads = encode_chunks(long, plan)
    assert isinstance(next(payloads), bytes)
    assert threading.active_count() == flat_before

    def counted():
        for index, payload in enumerate(encode_chunks(long, plan)):
            taken.append(index)
            yield payload

    decode_chunks(counted(), plan.layout)
    assert taken == [0, 1, 2]


def test_bases_come_whole_or_in_chunks(long):
    near = (long.float() * 1.001).to(long.dtype)
    plan = plan_tensor(near, base=long, chunk_bytes=SMALL)

    def chunk_of(index):
        return flat_chunk(long, TensorLayout(long.dtype, tuple(long.shape), False, plan.layout.chunk_elements), index)

    assert plan_tensor(near, base=chunk_of, chunk_bytes=SMALL) == plan
    payloads = list(encode_chunks(near, plan, base=long))
    assert list(encode_chunks(near, plan, base=chunk_of)) == payloads
    for impl in IMPLS:
        assert_same_bits(decode_chunks(payloads, plan.layout, base=long, impl=impl), near)
        assert_same_bits(decode_chunks(payloads, plan.layout, base=chunk_of, impl=impl), near)
    assert sum(map(len, payloads)) < 0.5 * long.nbytes


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(60, -1).T,
        lambda x: x[::3],
        lambda x: x.view(20, 30, -1).permute(2, 0, 1),
        lambda x: x[:7].view(1, 7).expand(9001, 7),
        lambda x: x.view(60, -1)[:, 5:],
        lambda x: x.float().view(-1, 2).view(torch.complex64)[:, 0].conj(),
        lambda x: x.clone().requires_grad_(),
        lambda x: torch.nn.Parameter(x.view(300, -1)),
    ],
)
def test_strides_do_not_matter_and_inputs_stay_as_they_are(view):
    x = view(weights(60 * 2400))
    before = x.detach().clone()
    encoded = encode_tensor(x, chunk_bytes=SMALL)
    assert_same_bits(decode_tensor(encoded), x.detach().resolve_conj().contiguous())
    assert torch.equal(x.detach(), before)


def test_a_chunk_of_a_contiguous_tensor_is_no_copy(long):
    layout = TensorLayout(long.dtype, tuple(long.shape), False, SEGMENT)
    assert flat_chunk(long, layout, 1).data_ptr() == long[SEGMENT:].data_ptr()


def test_what_is_decoded_owns_its_memory(long):
    encoded = encode_tensor(long, codec="raw")
    decode_tensor(encoded).zero_()
    assert_same_bits(decode_tensor(encoded), long)


@pytest.mark.parametrize(
    ("dtype", "codec", "most"),
    [
        (torch.bfloat16, "zstd", 0.662),
        (torch.bfloat16, "rans", 0.664),
        (torch.float16, "auto", 0.862),
        (torch.float32, "auto", 0.832),
        (torch.float64, "auto", 0.92),
        (torch.float8_e5m2, "auto", 0.75),
    ],
)
def test_sizes_are_near_the_entropy(dtype, codec, most):
    """Of Gaussian weights: 2.55 bits of entropy in the exponents, 0.659 of all bits in bfloat16."""
    x = weights(300_000) * 50
    x = x.float().add_(torch.randn(300_000) * 1e-3).to(dtype)
    plan = plan_tensor(x, codec=codec)
    encoded = encode_tensor(x, codec=codec)
    assert encoded.nbytes / x.nbytes < most
    assert plan.estimated_bytes == pytest.approx(encoded.nbytes, rel=0.01)


def test_auto_takes_what_is_smaller():
    assert plan_tensor(weights(200_000)).codec == "zstd"
    flips = weights(200_000)
    moved = torch.where(torch.rand(200_000) < 0.05, flips * 1.01, flips)
    delta = plan_tensor(moved, base=flips)
    assert delta.codec == "rans"  # Huffman codes have no less than a bit for each of the many zeros
    assert delta.estimated_bytes < plan_tensor(moved, codec="zstd", base=flips).estimated_bytes
    assert plan_tensor(random_bits(torch.int32, 50_000)).codec == "raw"
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8)
    assert plan_tensor(text).coders == ("zstd_match",)
    assert encode_tensor(torch.zeros(100_000)).nbytes < 200
    assert encode_tensor(torch.rand(100_000) < 0.01, codec="rans").nbytes < 0.02 * 100_000


def test_halves_in_floats_are_found():
    x = weights(100_000).float()
    assert encode_tensor(x).nbytes / x.nbytes < 0.35


def test_a_chunk_that_grows_is_kept_as_it_is(long):
    """The sample says one thing, a chunk another."""
    plan = plan_tensor(long, codec="rans")
    noise = random_bits(torch.bfloat16, SEGMENT)
    payload = encode_chunk(noise, plan)
    assert len(payload) <= 1 + noise.nbytes
    layout = TensorLayout(torch.bfloat16, (SEGMENT,), False, SEGMENT)
    assert_same_bits(decode_chunk(payload, layout, 0), noise)


class TestWrongCalls:
    def test_tensors(self):
        for x in (torch.empty(3, device="meta"), torch.eye(3).to_sparse()):
            with pytest.raises(ValueError, match="dense"):
                encode_tensor(x)

    def test_options(self, long):
        with pytest.raises(ValueError, match="'gzip'"):
            encode_tensor(long, codec="gzip")
        with pytest.raises(ValueError, match="'cuda'"):
            decode_tensor(encode_tensor(long[:100]), impl="cuda")

    def test_triton_without_a_gpu(self, long, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match="needs a GPU"):
            decode_tensor(encode_tensor(long[:100]), impl="triton")

    def test_numba_that_is_missing(self, long, monkeypatch):
        encoded = encode_tensor(long[:1000], codec="rans")
        monkeypatch.setattr("litropy.kernels.tensor_codec.numba_loops", lambda: None)
        assert_same_bits(decode_tensor(encoded), long[:1000])
        with pytest.raises(ValueError, match="numba"):
            decode_tensor(encoded, impl="numba")

    def test_layouts(self):
        for fields, message in [
            ((torch.quint8, (3,), False, SEGMENT), "cannot be coded"),
            ((torch.uint8, (-1,), False, SEGMENT), "shape"),
            ((torch.uint8, (2**40, 2**40), False, SEGMENT), "shape"),
            ((torch.uint8, (3,), False, 0), "chunk_elements"),
            ((torch.uint8, (3,), False, 1000), "chunk_elements"),
            ((torch.uint8, (3,), False, 2**31), "At most"),
        ]:
            with pytest.raises(ValueError, match=message):
                TensorLayout(*fields)

    def test_chunks(self, long):
        encoded = encode_tensor(long, chunk_bytes=SMALL)
        with pytest.raises(ValueError, match="no chunk 3"):
            decode_chunk(encoded.chunks[0], encoded.layout, 3)
        for payloads in (encoded.chunks[:2], (*encoded.chunks, b"\0")):
            with pytest.raises(ValueError, match="3 chunks came with"):
                decode_chunks(payloads, encoded.layout)
        with pytest.raises(ValueError, match="`out`"):
            decode_chunk(encoded.chunks[0], encoded.layout, 0, out=torch.empty(3))
        with pytest.raises(ValueError, match="Expected a tensor"):
            flat_chunk(long.float(), encoded.layout, 0)

    def test_bases(self, long):
        delta, alone = encode_tensor(long, base=long), encode_tensor(long)
        with pytest.raises(ValueError, match="with a base"):
            decode_tensor(delta)
        with pytest.raises(ValueError, match="without a base"):
            decode_tensor(alone, base=long)
        for wrong in (long.float(), long[1:]):
            with pytest.raises(ValueError, match="Expected a tensor"):
                decode_tensor(delta, base=wrong)
        with pytest.raises(ValueError, match="chunk of the base"):
            decode_tensor(delta, base=lambda _: long[1:])


def test_results_come_in_order_and_small_items_take_no_threads_place():
    from litropy.kernels.in_order import in_order

    begun, own = [], threading.get_ident()

    def work(item):
        begun.append(item)
        return item, threading.get_ident() == own

    items = [3, -1, -2, 4, -3, 5, 6, *range(-200, -100), 7]
    assert list(in_order(work, items, 1)) == [(item, True) for item in items]
    assert list(in_order(work, items, 2, lambda item: item < 0)) == [(item, item < 0) for item in items]
    taken = []
    results = in_order(work, (taken.append(item) or item for item in items), 2, lambda item: item < 0)
    assert next(results) == (3, False)
    assert taken == [3, -1, -2, 4, -3, 5]
    results.close()
