"""The arithmetic of representation metrics against singular values in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litropy.callbacks.representation_metrics import (
    RowSums,
    effective_rank,
    matrix_entropy,
    mean_cosine,
    participation_ratio,
    projection,
    row_sums,
)


def truth(rows):
    """All metrics from the rows themselves, in numpy float64."""
    z = np.asarray(rows, dtype=np.float64)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    singular = np.linalg.svd(z, compute_uv=False)
    p, q = singular / singular.sum(), singular**2 / (singular**2).sum()
    cosines = (z @ z.T)[~np.eye(len(z), dtype=bool)]
    return {
        "rank": math.exp(-sum(x * math.log(x) for x in p if x > 0)),
        "participation": 1 / (q**2).sum(),
        "entropy": -sum(x * math.log(x) for x in q if x > 0) / math.log(min(z.shape)),
        "cosine": cosines.mean(),
    }


def measured(sums):
    spectrum = sums.spectrum
    most = torch.minimum(sums.count, torch.tensor(float(spectrum.shape[-1])))
    return {
        "rank": effective_rank(spectrum).item(),
        "participation": participation_ratio(spectrum).item(),
        "entropy": matrix_entropy(spectrum, most).item(),
        "cosine": mean_cosine(sums).item(),
    }


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 40), st.integers(2, 24)),
    scale=st.floats(1e-12, 1e12),
    offset=st.floats(0, 100),
    seed=st.integers(0, 10**6),
)
def test_metrics_are_those_of_the_singular_values(shape, scale, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    rows = (rows * scale * torch.rand(shape[0], 1, generator=generator).exp()).float()
    got, expected = measured(row_sums(rows)), truth(rows.double())
    # eigenvalues of a Gram matrix hold half of the digits of small singular values
    assert got == pytest.approx(expected, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_rows_have_rank_one_in_every_dtype(dtype):
    rows = (torch.rand(500, 1) * torch.randn(1, 64)).to(dtype)
    got = measured(row_sums(rows))
    assert got["rank"] == pytest.approx(1, abs=1e-3 if dtype == torch.float32 else 0.2)
    assert got["participation"] == pytest.approx(1, abs=1e-3)
    assert got["entropy"] == pytest.approx(0, abs=1e-3)
    assert abs(got["cosine"]) == pytest.approx(1, abs=1e-3)


def test_isotropic_rows_use_all_directions():
    got = measured(row_sums(torch.randn(20_000, 32)))
    assert got["rank"] == pytest.approx(32, rel=0.01)
    assert got["participation"] == pytest.approx(32, rel=0.01)
    assert got["entropy"] == pytest.approx(1, abs=0.01)
    assert got["cosine"] == pytest.approx(0, abs=0.01)


def test_metrics_do_not_depend_on_the_basis():
    rows = torch.randn(300, 16) * torch.logspace(0, -3, 16) + torch.randn(16)
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q.float()
    assert measured(row_sums(rows @ rotation)) == pytest.approx(measured(row_sums(rows)), rel=1e-3)


def test_batches_add_up_to_the_whole():
    rows = torch.randn(90, 12) + 1
    parts = [row_sums(part) for part in rows.split([1, 40, 49])]
    assert measured(parts[0] + parts[1] + parts[2]) == pytest.approx(measured(row_sums(rows)), rel=1e-6)


def test_rows_that_do_not_count_leave_no_trace():
    rows = torch.randn(60, 8)
    expected = measured(row_sums(rows))
    padding = torch.full((5, 8), torch.nan)
    weight = torch.cat([torch.ones(60), torch.zeros(5)])
    assert measured(row_sums(torch.cat([rows, padding]), weight)) == pytest.approx(expected)
    assert measured(row_sums(torch.cat([rows, torch.zeros(5, 8)]))) == pytest.approx(expected)


def test_huge_and_tiny_rows_count_alike():
    rows = torch.randn(60, 8)
    scaled = rows * torch.logspace(-37, 37, 60)[:, None]
    assert measured(row_sums(scaled)) == pytest.approx(measured(row_sums(rows)), rel=1e-4)


def test_what_cannot_be_known_is_nan():
    empty = row_sums(torch.zeros(3, 4))
    assert all(math.isnan(value) for value in measured(empty).values())
    broken = row_sums(torch.tensor([[1.0, math.nan], [1.0, 2.0]]))
    whole = row_sums(torch.randn(5, 2))
    stacked = RowSums(*(torch.stack(pair) for pair in zip(*map(vars_of, (broken, whole)), strict=True)))
    rank = effective_rank(stacked.spectrum)
    assert rank.isnan().tolist() == [True, False]
    assert rank[1] == pytest.approx(effective_rank(whole.spectrum).item())
    assert mean_cosine(row_sums(torch.ones(1, 3))).isnan()


def vars_of(sums):
    return sums.count, sums.total, sums.moment


def test_a_projection_keeps_collapse_and_caps_the_rank():
    directions = projection(256, 32)
    torch.testing.assert_close(directions.T @ directions, torch.eye(32), atol=1e-5, rtol=0)
    assert torch.equal(directions, projection(256, 32))
    collapsed = torch.randn(1, 256) + 1e-4 * torch.randn(500, 256)
    full, cosine = torch.randn(5000, 256), mean_cosine(row_sums(collapsed))
    sums = row_sums(collapsed, None, directions)
    assert sums.moment.shape == (32, 32)
    assert effective_rank(sums.spectrum) < 1.1
    assert mean_cosine(sums) == cosine  # never projected
    assert effective_rank(row_sums(full, None, directions).spectrum) == pytest.approx(32, rel=0.02)
    # four of 256 directions remain four
    few = torch.randn(1000, 4) @ torch.randn(4, 256)
    exact = effective_rank(row_sums(few).spectrum)
    assert effective_rank(row_sums(few, None, directions).spectrum) == pytest.approx(exact.item(), rel=0.15)
