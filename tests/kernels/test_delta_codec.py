"""Differences from a base take little more than their entropy, and come back bit for bit from every decoder."""

import numpy as np
import pytest
import torch

from litropy.kernels.tensor_codec import (
    TensorLayout,
    TensorPlan,
    decode_chunks,
    decode_tensor,
    encode_chunks,
    encode_tensor,
    plan_tensor,
)  # fmt: skip
from litropy.kernels.tensor_codec_chunks import CEILING, parse_payload
from litropy.kernels.tensor_codec_layout import SEGMENT
from litropy.kernels.tensor_codec_planes import numba_loops, split_planes, transform, words

IMPLS = ("torch", "triton") if numba_loops() is None else ("numba", "torch", "triton")


def assert_same(got, wanted):
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


def moved_a_little(count, dtype=torch.bfloat16):
    """Words and the same after a step of training: most as they were, some next to it, a few far away."""
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(count, generator=generator).mul_(0.02)
    step = torch.where(torch.rand(count, generator=generator) < 0.9, 1e-6, 1e-4)
    new = old + step * torch.randn(count, generator=generator)
    new[::700] *= -1
    return old.to(dtype), new.to(dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_rare_in_differences_stands_beside_the_stream(impl):
    old, new = moved_a_little(1500 if impl == "triton" else 3 * SEGMENT)
    plan = TensorPlan(TensorLayout(new.dtype, (len(new),), True, 2 * SEGMENT), "rans", ("rans", "rans"), 0)
    payloads = list(encode_chunks(new, plan, base=old))
    assert CEILING in [plane.method for plane in parse_payload(payloads[0], min(len(new), 2 * SEGMENT), 2)]
    assert_same(decode_chunks(payloads, plan.layout, base=old, impl=impl), new)


def test_differences_are_near_their_entropy():
    old, new = moved_a_little(300_000)
    entropy = 0.0
    for plane in split_planes(words(new), transform(new.dtype, True), words(old)):
        p = np.bincount(plane) / plane.size
        entropy -= plane.size * (p[p > 0] @ np.log2(p[p > 0])) / 8
    plan, encoded = plan_tensor(new, base=old), encode_tensor(new, base=old)
    assert plan.codec == "rans"
    assert 0 < (encoded.nbytes - entropy) / new.nbytes < 0.003
    assert plan.estimated_bytes == pytest.approx(encoded.nbytes, rel=0.05)


def test_a_small_tensor_that_stays_costs_next_to_nothing():
    """Biases and norms are many; alone they are kept as they are."""
    bias = torch.randn(384, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert plan_tensor(bias).codec == "raw"
    moved = bias.clone()
    moved[3] += 0.1
    encoded = encode_tensor(moved, base=bias)
    assert encoded.nbytes < 100
    assert plan_tensor(moved, base=bias).estimated_bytes == pytest.approx(encoded.nbytes, abs=40)
    assert_same(decode_tensor(encoded, base=bias), moved)
    step = torch.tensor(7.0)
    assert plan_tensor(step, base=step - 1).codec == "raw"
