"""The head sees only rows that have a target, and finding them waits for no device."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from litropy.losses.head_passes import watch_head_passes
from litropy.recipes import EntropySFT, LanguageModel
from litropy.recipes.causal_lm import CausalLM, next_token_targets
from litropy.recipes.packing import concatenate, gather
from litropy.recipes.parity import check_parity
from litropy.recipes.target_rows import check_target_rows, target_rows
from litropy.testing import tiny_causal_lm

VOCABULARY = 101


def sparse_batch(seed=0, B=5, T=60, learnt=18):
    """Rows of which only the end is learnt, with the index of those places."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (B, T), generator=generator)
    labels = ids.masked_fill(torch.arange(T) < T - learnt, -100)
    return {"input_ids": ids, "labels": labels, "target_rows": torch.from_numpy(target_rows(labels.numpy()))}


def whole(batch):
    return {name: value for name, value in batch.items() if name != "target_rows"}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(2, 300), st.floats(0, 1), st.integers(0, 99))
def test_every_target_is_named_once(B, T, share, seed):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((B, T)) < share, rng.integers(0, 50, (B, T)), -100)
    rows = target_rows(labels)
    targets = next_token_targets(torch.from_numpy(labels))
    if rows is None:
        assert -(-max(1, int((targets != -100).sum())) // 128) * 128 > 7 / 8 * B * T
        return
    assert len(rows) % 128 == 0
    named = targets.flatten()[torch.from_numpy(rows)]
    assert (named != -100).sum() == (targets != -100).sum() == len(set(rows[named.numpy() != -100].tolist()))
    check_target_rows(torch.from_numpy(rows), targets)


def test_batches_of_windows_name_their_targets():
    tokens, learnt = np.arange(1000), np.arange(1000) % 10 == 7
    windows = concatenate(np.array([0, 600, 1000]), np.arange(2), 500)
    batch = gather(windows, np.arange(2), tokens, learnt, 0)
    predicted = batch["input_ids"].flatten()[batch["target_rows"] + 1]
    assert sorted(predicted[predicted % 10 == 7]) == list(range(7, 1000, 10))
    check_target_rows(torch.from_numpy(batch["target_rows"]), next_token_targets(torch.from_numpy(batch["labels"])))
    assert "target_rows" not in gather(windows, np.arange(2), tokens, None, 0)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_loss_gradients_and_statistics_are_those_of_all_rows(architecture):
    batch = sparse_batch()
    found = []
    for given_batch in (batch, whole(batch)):
        model = CausalLM(tiny_causal_lm(architecture).double().eval())
        output = model(given_batch, num_items=torch.tensor(70), z_loss=0.1, return_stats=("entropy", "argmax"))
        output.loss.backward()
        sums = output.sums()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append({"loss": output.loss, "num_targets": output.num_targets, **sums, **gradients})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-10, atol=1e-12, msg=name)
    assert found[0]["num_targets"] == 90


def test_a_choice_among_targets_is_that_of_all_rows():
    batch, module = sparse_batch(), EntropySFT(config={"model_type": "llama"}, share=0.3)
    losses = [
        CausalLM(tiny_causal_lm("llama").double().eval())(b, choose=module._choose).loss for b in (batch, whole(batch))
    ]
    torch.testing.assert_close(*losses)


def test_the_head_sees_only_rows_with_targets():
    batch, seen = sparse_batch(), []
    model = CausalLM(tiny_causal_lm("llama"))
    with watch_head_passes(lambda head_pass: seen.append(head_pass.input.shape), ["entropy"]):
        model(batch)
        model(whole(batch))
    width = model.head.weight.shape[1]
    assert seen == [(128, width), (5, 60, width)]  # 90 targets, filled up to a tile


def test_labels_that_changed_are_noticed():
    batch = sparse_batch()
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, 5] = 7
    model = CausalLM(tiny_causal_lm("llama"))
    message = "name 90 targets, and its `labels` have 91, of which 1 are not named"
    with pytest.raises(ValueError, match=message):
        model(batch)
    with pytest.raises(ValueError, match=message):
        check_parity(model, batch)  # what looks at a run's first batch, on any device


class Backbone(nn.Module):
    """Stands for the decoder: hidden states from an embedding."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids, **_):
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.embedding(input_ids))


@pytest.mark.parametrize("log_stats", [False, True])
def test_a_training_step_reads_no_number_from_the_device(log_stats, monkeypatch):
    """Tensors without numbers raise where one is asked for; what is done on a CPU alone is not done for them."""
    module = LanguageModel(config={"model_type": "llama"}, z_loss=0.1, log_stats=log_stats)
    module._trainer = type("T", (), {"accumulate_grad_batches": 1})()
    model = module.model = CausalLM(tiny_causal_lm("llama"))
    weight = nn.Parameter(model.head.weight.to("meta"))
    model.causal_lm.lm_head.weight = weight
    model.causal_lm.model = Backbone(nn.Embedding(*weight.shape, device="meta"))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # knows no "meta"
    loss = module.training_step({name: value.to("meta") for name, value in sparse_batch().items()}, 0)
    loss.backward()
    assert weight.grad is not None
    with pytest.raises(RuntimeError, match="meta"):
        bool(loss > 0)


@pytest.mark.gpu
def test_a_training_step_waits_for_no_gpu():
    batch = {name: value.cuda() for name, value in sparse_batch().items()}
    module = LanguageModel(config={"model_type": "llama"}, memory_budget_mib=64)
    module._trainer = type("T", (), {"accumulate_grad_batches": 1})()
    module.model = CausalLM(tiny_causal_lm("llama")).cuda()
    module.training_step(batch, 0).backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = module.training_step(batch, 0)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)
