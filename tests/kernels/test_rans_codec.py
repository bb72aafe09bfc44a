"""rANS: tables that are a bijection, one bitstream whoever encodes it, and three decoders that agree in every bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litropy.kernels import rans_stream, rans_tables
from litropy.kernels.rans_ceiling import best_ceiling, encode_clipped, put_back, search_ceiling, split_ceiling
from litropy.kernels.rans_stream import LANES, batch_streams, encode_rans, parse_stream, states_bytes
from litropy.kernels.rans_tables import TOTAL, alias_tables, decoding_table, encoding_tables, frequencies
from litropy.kernels.rans_torch import decode_batch as decode_torch
from litropy.kernels.tensor_codec_layout import SEGMENT
from litropy.kernels.tensor_codec_planes import numba_loops

WITH_NUMBA = pytest.mark.skipif(numba_loops() is None, reason="needs Numba")


def some_symbols(alphabet, count, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(alphabet, 0.3))
    return rng.choice(rng.permutation(256)[:alphabet], count, p=weights).astype(np.uint8)


def decode_numba(stream):
    from litropy.kernels.rans_numba import decode_stream

    out = np.empty(stream.total, np.uint8)
    decode_stream(stream, out)
    return out


def decode_with(decode, streams):
    """What a batch decoder makes of streams, and whether each segment was intact."""
    batch = batch_streams(streams)
    out = torch.zeros(batch.total, dtype=torch.uint8)
    return out.numpy(), decode(batch, out).numpy()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=256).filter(any))
def test_frequencies_sum_up_and_leave_nobody_out(counts):
    counts = np.array(counts + [0] * (256 - len(counts)))
    result = frequencies(counts)
    assert result.sum() == TOTAL
    assert ((result > 0) == (counts > 0)).all()


def test_frequencies_cost_next_to_nothing():
    counts = np.bincount(some_symbols(40, 100_000), minlength=256)
    p = counts[counts > 0] / counts.sum()
    bits = -(p * np.log2(frequencies(counts)[counts > 0] / TOTAL)).sum()
    assert -(p * np.log2(p)).sum() <= bits <= -(p * np.log2(p)).sum() + 0.02


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 256), st.integers(0, 2**32))
def test_every_slot_has_one_symbol_and_rank(alphabet, seed):
    """However uneven the frequencies: each symbol gets as many slots as its frequency, ranked from 0."""
    rng = np.random.default_rng(seed)
    symbols = np.sort(rng.permutation(256)[:alphabet]).astype(np.uint8)
    counts = np.zeros(256, np.int64)
    counts[symbols] = 1 + rng.integers(0, 10 ** rng.integers(1, 12), alphabet)
    frequency = frequencies(counts)[symbols].astype(np.uint16)
    tables = alias_tables(symbols, frequency)
    assert len(tables.divider) == (32 if alphabet <= 32 else 256)
    table = decoding_table(tables)
    by_symbol = dict(zip(symbols.tolist(), frequency.tolist(), strict=True))
    pairs = {(int(entry >> 24), int(entry) & (TOTAL - 1)) for entry in table}
    assert pairs == {(symbol, rank) for symbol, f in by_symbol.items() for rank in range(f)}
    assert all(by_symbol[int(entry >> 24)] - 1 == (int(entry) >> 12) & (TOTAL - 1) for entry in table)
    encoding = encoding_tables(symbols, frequency)
    for symbol, f in by_symbol.items():
        slots = encoding.slot[encoding.start[symbol] : encoding.start[symbol] + f]
        assert (table[slots] >> 24 == symbol).all()


COUNTS = (1, LANES - 1, LANES, LANES + 1, 3000, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 77)


@WITH_NUMBA
@pytest.mark.parametrize("alphabet", [1, 2, 32, 33, 256])
def test_encoders_write_the_same_and_decoders_read_it(alphabet, monkeypatch):
    counts = COUNTS if alphabet == 33 else COUNTS[:5]
    symbols = [some_symbols(alphabet, count, count) for count in counts]
    payloads = [encode_rans(x) for x in symbols]
    for module in (rans_stream, rans_tables):
        monkeypatch.setattr(module, "numba_loops", lambda: None)
    assert payloads == [encode_rans(x) for x in symbols]
    streams = [parse_stream(payload, len(x)) for payload, x in zip(payloads, symbols, strict=True)]
    for x, stream in zip(symbols, streams, strict=True):
        np.testing.assert_array_equal(decode_numba(stream), x)
    out, intact = decode_with(decode_torch, streams)
    assert intact.all()
    np.testing.assert_array_equal(out, np.concatenate(symbols))


@pytest.mark.parametrize("alphabet", [1, 20, 32, 33, 256])
def test_triton_reads_it_too(alphabet):
    from litropy.kernels.rans_triton import decode_batch

    symbols = [some_symbols(alphabet, count, count) for count in (1, 31, 32, 33, 200, 320)]
    streams = [parse_stream(encode_rans(x), len(x)) for x in symbols]
    out, intact = decode_with(decode_batch, streams)
    assert intact.all()
    np.testing.assert_array_equal(out, np.concatenate(symbols))


def test_triton_takes_small_and_large_alphabets_in_one_batch():
    from litropy.kernels.rans_triton import decode_batch

    symbols = [some_symbols(alphabet, 100, alphabet) for alphabet in (40, 3, 256, 17)]
    out, intact = decode_with(decode_batch, [parse_stream(encode_rans(x), 100) for x in symbols])
    assert intact.all()
    np.testing.assert_array_equal(out, np.concatenate(symbols))


def test_the_stream_takes_no_more_than_its_entropy_and_the_states():
    symbols = some_symbols(30, 4 * SEGMENT)
    p = np.bincount(symbols, minlength=256) / symbols.size
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum() * symbols.size / 8
    states = 4 * (4 * LANES + 4)
    assert entropy < len(encode_rans(symbols)) < 1.005 * entropy + states + 91


def test_the_bitstream_does_not_change():
    """Files outlive versions: 80 symbols, 3 three times as often as 200, as they were first written."""
    states = [153984, 153984, 4209792, 153984] * 4 + [115968, 115968, 1051776, 115968] * 4
    payload = bytes([1, 15, 3, 200, 0, 12, 0, 4, 0, 0, 0, 0]) + np.array(states, "<u4").tobytes()
    stream = parse_stream(payload, 80)
    out, intact = decode_with(decode_torch, [stream])
    assert intact.all()
    assert out.tolist() == [3, 3, 200, 3] * 20


def test_a_ceiling_does_not_change_either():
    """80 symbols, 3 three times as often as what reaches 200: 210 and 220 by turns, as they were first written."""
    states = [153984, 153984, 4209792, 153984] * 4 + [115968, 115968, 1051776, 115968] * 4
    stream = bytes([1, 15, 3, 200, 0, 12, 0, 4, 0, 0, 0, 0]) + np.array(states, "<u4").tobytes()
    payload = bytes([200, 20, 0, 0, 0]) + bytes([210, 220] * 10) + stream
    ceiling, high, rest = split_ceiling(payload, 80)
    out = np.tile(np.array([3, 3, 200, 3], np.uint8), 20)
    assert (ceiling, bytes(rest)) == (200, stream)
    put_back(out, ceiling, high)
    assert out.tolist() == [3, 3, 210, 3, 3, 3, 220, 3] * 10


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 256), st.integers(0, 2**32))
def test_ceilings_make_planes_no_larger_and_sizes_are_known(alphabet, seed):
    rng = np.random.default_rng(seed)
    symbols = np.minimum(rng.geometric(rng.uniform(0.05, 0.999), 30_000) - 1, alphabet - 1).astype(np.uint8)
    rare = rng.random(symbols.size) < 0.005
    symbols[rare] = rng.integers(0, alphabet, rare.sum())
    counts = np.bincount(symbols, minlength=256)
    ceiling, size = best_ceiling(counts)
    if numba_loops() is not None:
        from litropy.kernels.rans_numba import search_ceiling as compiled

        floats = counts.astype(float)
        assert compiled(floats, 3e4) == pytest.approx(search_ceiling(floats.tolist(), 3e4))
    plain = encode_rans(symbols)
    taken, coded = encode_clipped(symbols, SEGMENT)
    assert taken == ceiling
    assert len(coded) <= len(plain)
    assert len(coded) == pytest.approx(size + states_bytes(symbols.size, SEGMENT), abs=40)


def test_words_run_out_or_are_left():
    symbols = some_symbols(9, 3000)
    stream = parse_stream(encode_rans(symbols), 3000)
    fewer = stream._replace(words=stream.words[:-1], words_of=stream.words_of - np.uint32(1))
    more = stream._replace(words=np.append(stream.words, np.uint16(7)), words_of=stream.words_of + np.uint32(1))
    for damaged in (fewer, more):
        assert not decode_with(decode_torch, [damaged])[1].all()
        if numba_loops() is not None:
            with pytest.raises(ValueError, match="does not end where it must"):
                decode_numba(damaged)
