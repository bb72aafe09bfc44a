"""What a user can get wrong, and that the message says what was wrong, what is allowed, and what to do."""

import pytest
import torch

from litropy.losses import CutCrossEntropyLoss, linear_cross_entropy, linear_head_stats

IDS = torch.zeros(4, 9, dtype=torch.int64)

SHARED = [
    ({"target": IDS + 60}, "holds 60, but the vocabulary has 57 entries .0 to 56.*ignore_index"),
    ({"target": IDS.float()}, "`target` is torch.float32; token ids must be int64: use target.long"),
    ({"target": IDS.int()}, "must be int64"),
    ({"target": IDS[:, :8]}, r"`target` is \(4, 8\); it must be input.shape\[:-1\] = \(4, 9\)"),
    ({"linear_weight": torch.zeros(57, 11)}, r"`input` \(4, 9, 12\) and `linear_weight` \(57, 11\) do not fit"),
    ({"linear_weight": torch.zeros(12)}, "do not fit"),
    ({"input": torch.zeros(())}, "do not fit"),
    ({"linear_weight": torch.zeros(0, 12)}, "has no rows: is it a shard that was not gathered"),
    ({"linear_weight": torch.zeros(57, 12, dtype=torch.int8)}, "is torch.int8.*quantised head has to be dequantised"),
    ({"input": torch.zeros(4, 9, 12, dtype=torch.float8_e4m3fn)}, "`input` is torch.float8_e4m3fn; it must be float32"),
    ({"linear_bias": torch.zeros(12)}, r"`linear_bias` is \(12,\); it must be \[V\] = \(57,\)"),
    ({"softcap": -1.0}, "`softcap` is -1.0; it must be positive, or None"),
    ({"softcap": 0.0}, "it must be positive, or None"),
    ({"temperature": 0.0}, "`temperature` is 0.0; it must be positive"),
    ({"temperature": float("nan")}, "must be positive"),
    ({"temperature": torch.ones(3)}, r"`temperature` is \(3,\); it must be a number or one value a row, \(4, 9\)"),
    ({"temperature": torch.ones((), requires_grad=True)}, r"pass temperature.detach\(\)"),
    ({"low_rank": (torch.zeros(4, 9, 3), torch.zeros(57, 2))}, r"they must be \(4, 9, 'R'\) and \(57, 'R'\)"),
    ({"low_rank": (torch.zeros(4, 8, 3), torch.zeros(57, 3))}, "`low_rank` is"),
    ({"impl": "cuda"}, "`impl` is 'cuda'; choose 'auto', 'triton' or 'torch'"),
]
LOSS = [
    ({"target": IDS - 7}, r"holds -7, which is neither an entry of the vocabulary nor `ignore_index` \(-100\)"),
    ({"target": IDS - 100, "ignore_index": -1}, "holds -100"),
    ({"weight": torch.ones(12)}, r"`weight` is \(12,\); it must be \[V\] = \(57,\)"),
    ({"weight": torch.ones(57, requires_grad=True)}, r"pass weight.detach\(\)"),
    ({"token_weight": torch.ones(4)}, r"`token_weight` is \(4,\); it must be shaped like `target`, 36 tokens"),
    ({"token_weight": torch.ones(4, 9, requires_grad=True)}, r"pass token_weight.detach\(\)"),
    ({"reduction": "avg"}, "`reduction` is 'avg'; choose 'mean', 'sum' or 'none'"),
    ({"label_smoothing": 1.5}, r"`label_smoothing` is 1.5; it must be in \[0, 1\]"),
    ({"label_smoothing": -0.1}, "must be in"),
    ({"skip_tol": 1.0}, r"`skip_tol` is 1.0; it must be in \[0, 1\)"),
    ({"skip_tol": -1e-3}, "must be in"),
    ({"mode": "quick"}, "`mode` is 'quick'; choose 'auto', 'fast' or 'lean'"),
    ({"num_items": 3, "reduction": "sum"}, "`num_items` replaces the denominator of the mean; it does nothing"),
    ({"num_items": torch.ones(2)}, "a number or a tensor of one element"),
    ({"num_items": torch.ones((), requires_grad=True)}, "requires no gradient"),
    ({"return_stats": ("perplexity",)}, "'perplexity' is no row statistic; there are logprob, entropy"),
    ({"return_stats": ("nucleus_entropy",)}, "has options of its own: use `linear_head_stats`"),
    ({"return_stats": ("skipped_mass",)}, "asks for skipped_mass, but `skip_tol` is 0.0: nothing is skipped"),
    ({"return_stats": ("surviving_share",)}, "nothing is skipped"),
    ({"return_stats": ("rank",), "skip_tol": 1e-3}, "rank and `skip_tol` is positive"),
    ({"memory_budget_mib": 0}, "`memory_budget_mib` is 0; it must be positive"),
]
STATS = [
    ({"stats": ("perplexity",)}, "'perplexity' is no row statistic"),
    ({"stats": ("logprob",), "target": None}, "asks for logprob, which needs a `target`"),
    ({"stats": ("rank",), "target": None}, "asks for rank, which needs a `target`"),
    ({"stats": ("skipped_mass",)}, "nothing is skipped here, only in `linear_cross_entropy`"),
    ({"stats": ("surviving_share",)}, "nothing is skipped here"),
    ({"stats": ("nucleus_entropy",)}, "which needs `top_p`"),
    ({"stats": ("nucleus_entropy",), "top_p": 1.1}, r"`top_p` is 1.1; it must be in \(0, 1\]"),
    ({"stats": ("nucleus_entropy",), "top_p": 0.0}, r"it must be in \(0, 1\]"),
    ({"stats": ("nucleus_entropy",), "top_p": 0.5, "nucleus": "half"}, "choose 'closed' or 'open'"),
    ({"stats": ("topk_mass",)}, "which need `top_k`"),
    ({"stats": ("topk_entropy",), "top_k": 65}, "`top_k` is 65; it must be in 1 to 64"),
    ({"stats": ("topk_entropy",), "top_k": 0}, "must be in 1 to 64"),
]


def arguments(change):
    return {"input": torch.randn(4, 9, 12), "linear_weight": torch.randn(57, 12), "target": IDS} | change


@pytest.mark.parametrize(("change", "message"), SHARED + LOSS)
def test_of_the_loss(change, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments(change))


@pytest.mark.parametrize(("change", "message"), SHARED + STATS)
def test_of_the_statistics(change, message):
    with pytest.raises(ValueError, match=message):
        linear_head_stats(**arguments(change))


@pytest.mark.parametrize("change", [change for change, _ in LOSS if set(change) <= {"reduction", "skip_tol", "mode"}])
def test_the_module_checks_its_options_when_it_is_made(change):
    with pytest.raises(ValueError, match=r"choose|must be in"):
        CutCrossEntropyLoss(**change)


def test_main_grad_of_another_shape():
    weight = torch.randn(57, 12, requires_grad=True)
    weight.main_grad = torch.zeros(12, 57)
    with pytest.raises(ValueError, match=r"`linear_weight.main_grad` is \(12, 57\); it must be \(57, 12\)"):
        linear_cross_entropy(torch.randn(2, 12), weight, torch.tensor([0, 1]))


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="`impl='triton'` needs a GPU, but `input` is on cpu"):
        linear_cross_entropy(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1]), impl="triton")


def test_triton_does_not_take_float64():
    with pytest.raises(ValueError, match="float64 inputs need impl='torch' or 'auto'"):
        linear_head_stats(torch.randn(2, 4).double(), torch.randn(5, 4).double(), stats=("lse",), impl="triton")


def test_the_greatest_target_is_looked_at_even_if_others_are_ignored():
    target = torch.tensor([-100, 57, -100])
    with pytest.raises(ValueError, match="holds 57"):
        linear_cross_entropy(torch.randn(3, 12), torch.randn(57, 12), target)
    with pytest.raises(ValueError, match="holds 57"):
        linear_cross_entropy(torch.randn(3, 12).requires_grad_(), torch.randn(57, 12), target)
