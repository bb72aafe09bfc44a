"""Fine-tuning on surprising tokens: which are chosen, what is learned from them, and what stays as it was."""

import math

import pytest
import rlvr_problems as problems
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from litropy.recipes import EntropySFT, LanguageModel, entropy_sft
from litropy.recipes.entropy_sft import surprising_tokens


class Data(LightningDataModule):
    """Two batches of two sequences; some positions have no target."""

    def __init__(self):
        super().__init__()
        self.tokenizer = problems.tokenizer()
        ids = torch.randint(3, 16, (4, 9), generator=torch.Generator().manual_seed(4))
        labels = ids.clone()
        labels[1, :5] = -100
        self.rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=2)

    val_dataloader = train_dataloader


def fit(module_class, steps=1, accumulate=1, **options):
    torch.manual_seed(2)
    module = module_class(
        config=problems.CONFIG | {"initializer_range": 0.5}, pad_vocab_to=1, check_parity=False, schedule="constant",
        **options,
    )  # fmt: skip
    data = Data()
    trainer = problems.trainer(max_steps=steps, limit_val_batches=0, accumulate_grad_batches=accumulate)
    trainer.fit(module, datamodule=data)
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}, data


def test_the_most_surprising_share_is_chosen():
    generator = torch.Generator().manual_seed(0)
    logprob, entropy = -torch.rand(5, 7, generator=generator), torch.rand(5, 7, generator=generator)
    mask = torch.rand(5, 7, generator=generator) < 0.8
    found = surprising_tokens(logprob, entropy, mask, 0.3, 0.8)
    values = {(i, j): float(-logprob[i, j] - 0.8 * entropy[i, j]) for i, j in mask.nonzero().tolist()}
    best = sorted(values, key=lambda place: -values[place])[: math.ceil(0.3 * len(values))]
    assert sorted(map(tuple, found.nonzero().tolist())) == sorted(best)
    assert torch.equal(surprising_tokens(logprob, entropy, mask, 1.0, 0.8), mask)


def test_ranks_choose_together(monkeypatch):
    """Each rank has tokens of its own, in batches of different shapes."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.rand(2, 3, *shape, generator=generator) for shape in ((4,), (6,))]
    masks = [part[0] < 0.9 for part in parts]
    surprise = [torch.where(m, p[0] - 0.5 * p[1], -torch.inf).flatten() for p, m in zip(parts, masks, strict=True)]
    found = []
    for rank in range(2):
        monkeypatch.setattr(
            entropy_sft, "gather", lambda mine, rank=rank: [*surprise[:rank], mine, *surprise[rank + 1 :]]
        )
        monkeypatch.setattr(entropy_sft, "rank_and_ranks", lambda rank=rank: (rank, 2))
        found.append(surprising_tokens(-parts[rank][0], parts[rank][1], masks[rank], 0.25, 0.5))
    flat = [torch.cat([part[k].flatten() for part in parts]) for k in (0, 1)]
    monkeypatch.undo()
    mask = torch.cat([each.flatten() for each in masks])
    alone = surprising_tokens(-flat[0], flat[1], mask, 0.25, 0.5)
    assert torch.equal(torch.cat([each.flatten() for each in found]), alone)


def test_the_whole_share_is_ordinary_fine_tuning():
    ours, logged, _ = fit(EntropySFT, steps=2, share=1.0)
    theirs, expected, _ = fit(LanguageModel, steps=2)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    for name in ("train/loss", "entropy/output", "train/token_accuracy", "train/grad_norm"):
        assert logged[name] == pytest.approx(expected[name], rel=1e-4)
    assert logged["train/loss_all_tokens"] == pytest.approx(expected["train/loss"], rel=1e-4)


def test_the_gradient_is_that_of_the_mean_over_chosen_tokens():
    """Against the ordinary way, from logits in float64."""
    module, logged, data = fit(EntropySFT, share=0.4, learning_rate=1e-12)
    rows = data.rows[:2]
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    model = module.causal_lm.double()
    model.zero_grad()
    logp = model(ids).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    mask = targets != -100
    loss = -logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    surprise = loss - 0.8 * -(logp.exp() * logp).sum(-1)
    bound = sorted(surprise[mask].tolist(), reverse=True)[math.ceil(0.4 * int(mask.sum())) - 1]
    chosen = mask & (surprise >= bound - 1e-9)
    expected = loss[chosen].mean()
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert logged["train/loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert logged["train/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert logged["train/loss_all_tokens"] == pytest.approx(loss[mask].mean().item(), rel=1e-4)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"`share` is 0; it must be in \(0, 1\]"):
        EntropySFT(share=0, config=problems.CONFIG)
    with pytest.raises(ValueError, match="`alpha` is -1"):
        EntropySFT(alpha=-1, config=problems.CONFIG)
    with pytest.raises(ValueError, match="accumulate_grad_batches is 2; EntropySFT chooses tokens among all of a step"):
        fit(EntropySFT, accumulate=2)
