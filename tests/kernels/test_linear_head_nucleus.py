"""The gradient of a nucleus' entropy, entry by entry where these are few."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_head_problems import check, make_problem, well_separated

from litropy.kernels.linear_head_nucleus import nucleus_entries, nucleus_factor, nucleus_gradient
from litropy.kernels.linear_head_ranking import rank_rows
from litropy.kernels.linear_head_types import RowStats, Want


def stats_of(z, top_p, is_open=False):
    """Of the nuclei of rows z [n, v]."""
    stats = RowStats(lse=z.logsumexp(1), max_logit=z.amax(1))
    rank_rows(z, None, z[:, 0], stats, Want(top_p=top_p, open_nucleus=is_open), None)
    return stats


def logits(n, v, spread, seed):
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * spread


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    v=st.integers(32, 400),
    top_p=st.sampled_from([0.1, 0.5, 0.9]),
    is_open=st.booleans(),
    digits=st.sampled_from([0, 6]),
    seed=st.integers(0, 9999),
)
def test_the_entries_are_those_of_the_nuclei(n, v, top_p, is_open, digits, seed):
    """With ties, nuclei that hold nothing, and rows without a cotangent."""
    z = logits(n, v, 8.0, seed).round(decimals=digits)
    stats, g = stats_of(z, top_p, is_open), torch.ones(n)
    g[::3] = 0
    entries = nucleus_entries(z, stats, g)
    if entries is not None:
        found = torch.zeros(n, v, dtype=torch.int64)
        found.index_put_(entries, torch.ones(len(entries.rows), dtype=torch.int64), accumulate=True)
        assert torch.equal(found, ((z >= stats.nucleus_boundary[:, None]) & (g != 0)[:, None]).long())


def test_few_entries_get_what_a_pass_over_all_gives_them():
    z = logits(40, 4100, 8.0, 0)
    stats, g = stats_of(z, 0.8), torch.linspace(-1, 1, 40)
    logp = z - stats.lse[:, None]
    found = nucleus_gradient(z, logp, logp.exp(), stats, g)
    assert found is not None
    entries, gradient = found
    assert 40 <= len(gradient) < 1000
    every = nucleus_factor(logp, stats, g) * logp.exp()
    expected = torch.where(z >= stats.nucleus_boundary[:, None], every, 0)
    torch.testing.assert_close(torch.zeros_like(z).index_put_(entries, gradient), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("v", [31, 4096])
def test_many_entries_are_left_to_a_pass_over_all(v):
    z = logits(8, v, 0.1, 0)
    assert nucleus_entries(z, stats_of(z, 0.9), torch.ones(8)) is None


def test_rows_without_a_cotangent_do_not_count_as_many():
    z = logits(64, 4096, 0.1, 0)
    z[0, 7] = 30.0
    entries = nucleus_entries(z, stats_of(z, 0.9), torch.eye(64)[0])
    assert entries is not None
    assert (entries.rows.tolist(), entries.columns.tolist()) == ([0], [7])


@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_operator_in_sharp_rows(softcap, is_open):
    problem = well_separated(make_problem(32, 16, 3000, scale=6.0, ignored=False, softcap=softcap), 0.8)
    check(problem, "torch", Want(top_p=0.8, open_nucleus=is_open, entropy=True))
