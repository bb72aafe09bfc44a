import pytest
import torch

from litropy.losses import CutCrossEntropyLoss, linear_cross_entropy, linear_head_stats
from litropy.losses.head_passes import watch_head_passes

NAMES = ("entropy", "varentropy", "lse", "max_logprob", "logprob")


def head(rows=(3, 4), width=8, vocabulary=23):
    h = torch.randn(*rows, width, requires_grad=True)
    w = torch.randn(vocabulary, width, requires_grad=True)
    target = torch.randint(vocabulary, rows)
    target[0, 1] = -100
    return h, w, target


def watched(call, stats=NAMES):
    seen = []
    with watch_head_passes(seen.append, stats):
        result = call()
    return result, seen


@pytest.mark.parametrize(("mode", "reduction"), [("fast", "mean"), ("lean", "mean"), ("lean", "none")])
def test_a_watched_loss_is_the_same_and_shows_the_statistics_of_its_own_pass(mode, reduction):
    h, w, target = head()
    options = {"softcap": 5.0, "temperature": 0.7, "mode": mode, "reduction": reduction}

    def call():
        loss = linear_cross_entropy(h, w, target, **options)
        return loss, *torch.autograd.grad(loss.sum(), (h, w))

    alone = call()
    together, [seen] = watched(call)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
    truth = linear_head_stats(h, w, target, softcap=5.0, temperature=0.7, stats=NAMES)
    for name in NAMES:
        got = getattr(seen.stats, name)
        assert not got.requires_grad
        torch.testing.assert_close(got, getattr(truth, name).detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(seen.target, target.masked_fill(target == -100, -1))


def test_what_a_caller_asks_for_is_all_that_it_gets():
    h, w, target = head()
    (_, stats), [seen] = watched(lambda: linear_cross_entropy(h, w, target, return_stats=["argmax"]), ["entropy"])
    assert {name for name, value in vars(stats).items() if value is not None} == {"argmax"}
    assert {name for name, value in vars(seen.stats).items() if value is not None} == {"argmax", "entropy"}
    stats, [seen] = watched(lambda: linear_head_stats(h, w, stats=["lse"]))
    assert stats.entropy is None
    assert seen.stats.logprob is None
    assert seen.target is None


def test_rows_of_a_pass_give_the_same_logits_again():
    h, w, target = head()
    low_rank = (torch.randn(3, 4, 2), torch.randn(23, 2))
    temperature = torch.rand(3, 4) + 0.5
    loss = CutCrossEntropyLoss(softcap=4.0)
    options = {"low_rank": low_rank, "linear_bias": torch.randn(23)}
    _, [seen] = watched(lambda: loss(h, w, target, **options))
    index = torch.tensor([7, 0, 3])
    again = linear_head_stats(**seen.rows(index), stats=["lse"])
    torch.testing.assert_close(again.lse, seen.stats.lse.flatten()[index])
    call = lambda: linear_cross_entropy(h, w, target, temperature=temperature)  # noqa: E731
    _, [seen] = watched(call)
    again = linear_head_stats(**seen.rows(index), stats=["lse"])
    torch.testing.assert_close(again.lse, seen.stats.lse.flatten()[index])


def test_only_passes_with_gradients_are_shown_and_none_after_the_watch():
    h, w, target = head()
    seen = []
    with watch_head_passes(seen.append, NAMES):
        with torch.no_grad():
            linear_cross_entropy(h, w, target)
        linear_cross_entropy(h.detach(), w.detach(), target)
    linear_cross_entropy(h, w, target)
    assert not seen


def test_a_watcher_may_pass_the_head_itself():
    h, w, target = head()
    calls = []

    def watcher(seen):
        calls.append(linear_head_stats(seen.input, seen.linear_weight, stats=["entropy"]).entropy)

    with watch_head_passes(watcher, ["entropy"]), watch_head_passes(watcher, ["lse"]):
        linear_cross_entropy(h, w, target)
    assert len(calls) == 2
    assert not calls[0].requires_grad
