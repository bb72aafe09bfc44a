import copy
import gc
import pickle
import subprocess
import sys
from contextlib import contextmanager

import accelerate
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from litropy.huggingface import patch_causal_lm, unpatch_causal_lm
from litropy.recipes.causal_lm import CausalLM
from litropy.testing import tiny_causal_lm


def packed_batch(seed=0, length=12):
    """Two rows of tokens with some labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(101, (2, length), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, 7] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model, batch, **options):
    """With the same random state each time, for dropout."""
    torch.manual_seed(1)
    loss = model(**batch, **options).loss
    return loss, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def assert_same(ours, theirs, tolerance=1e-5):
    """Compare pairs of a loss and gradients."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    for our_gradient, their_gradient in zip(ours[1], theirs[1], strict=True):
        assert (our_gradient is None) == (their_gradient is None)
        if our_gradient is not None:
            assert (our_gradient - their_gradient).norm() <= 10 * tolerance * their_gradient.norm() + 1e-6


def traces(model):
    """What a patch leaves on the instances."""
    head = model.get_output_embeddings()
    return {
        name for module in (model, head) for name in vars(module) if "forward" in name or name.startswith("_li")
    } | ({"_loss_function"} & set(vars(model)))


UNTOUCHED = traces(tiny_causal_lm("llama"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "mamba", "mixtral"])
def test_output_is_the_models_own_but_for_logits(architecture):
    model = tiny_causal_lm(architecture).train()
    options = {"output_hidden_states": True}
    torch.manual_seed(1)
    theirs = model(**packed_batch(), **options)
    patch_causal_lm(model)
    torch.manual_seed(1)
    ours = model(**packed_batch(), **options)
    assert type(ours) is type(theirs)
    assert ours.logits is None
    assert [*theirs] == [name for name in theirs if name in ours or name == "logits"]
    for mine, own in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, own)
    if architecture == "mixtral":
        torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
        assert len(ours.router_logits) == len(theirs.router_logits)
    as_tuple = model(**packed_batch(), **options, return_dict=False)
    assert len(as_tuple) == len(theirs)
    assert as_tuple[list(theirs).index("logits")] is None


def test_arguments_may_come_by_position():
    model = tiny_causal_lm("llama").train()
    batch = packed_batch()
    arguments = (batch["input_ids"], None, None, None, None, batch["labels"])
    theirs = model(*arguments).loss
    ours = patch_causal_lm(model)(*arguments)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, theirs)


def test_calls_without_labels_and_in_eval_mode_are_untouched():
    model = tiny_causal_lm("gemma2").train()
    batch = packed_batch()
    ids = batch["input_ids"]
    logits = model(ids).logits
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    options = {"num_items_in_batch": torch.tensor(7), "shift_labels": torch.arange(24).view(2, 12), "ignore_index": 3}
    theirs = model.eval()(**batch, **options)
    patch_causal_lm(model)
    ours = model(**batch, **options)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    model.train()
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)
    assert model(**batch).logits is None


def test_eval_mode_if_asked():
    model = tiny_causal_lm("llama").eval()
    theirs = model(**packed_batch()).loss
    with torch.no_grad():
        ours = patch_causal_lm(model, in_eval=True)(**packed_batch())
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"num_items_in_batch": torch.tensor(3.5)},
        {"ignore_index": 3},
        {"shift_labels": torch.arange(24).view(2, 12), "num_items_in_batch": torch.tensor(5)},
    ],
    ids=["int", "tensor", "float tensor", "ignore_index", "shift_labels"],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_what_a_trainer_passes_counts_as_in_the_models_own_loss(architecture, options):
    model = tiny_causal_lm(architecture, router_aux_loss_coef=0.5).train()
    batch = packed_batch()
    if "ignore_index" in options:
        batch["labels"] = torch.where(batch["labels"] < 0, 3, batch["labels"])
    theirs = loss_and_gradients(model, batch, **options)
    assert_same(loss_and_gradients(patch_causal_lm(model), batch, **options), theirs)


def test_router_loss_can_be_asked_for_in_a_call():
    model = tiny_causal_lm("olmoe", output_router_logits=False, router_aux_loss_coef=0.5).train()
    batch = packed_batch()
    theirs = loss_and_gradients(model, batch, output_router_logits=True)
    plain = model(**batch).loss
    patch_causal_lm(model)
    assert_same(loss_and_gradients(model, batch, output_router_logits=True), theirs)
    torch.testing.assert_close(model(**batch).loss, plain)
    assert float((theirs[0] - plain).detach()) > 0.1


def test_options_of_the_loss():
    model = tiny_causal_lm("llama").train()
    batch = packed_batch()
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    smooth = F.cross_entropy(logits, targets, label_smoothing=0.2)
    square = logits.logsumexp(-1)[targets != -100].square().mean()
    patch_causal_lm(model, label_smoothing=0.2, z_loss=0.01)
    torch.testing.assert_close(model(**batch).loss, smooth + 0.01 * square)


@pytest.mark.parametrize("options", [{"mode": "lean"}, {"mode": "fast"}, {"skip_tol": 1e-9}, {"memory_budget_mib": 1}])
def test_ways_to_compute_it_agree(options):
    model = tiny_causal_lm("llama").train()
    theirs = loss_and_gradients(model, packed_batch())
    assert_same(loss_and_gradients(patch_causal_lm(model, **options), packed_batch()), theirs)


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 2}, {"skip_tol": 1}, {"mode": "slow"}, {"memory_budget_mib": 0}]
)
def test_options_out_of_range_are_refused(options):
    model = tiny_causal_lm("llama")
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` is"):
        patch_causal_lm(model, **options)
    assert traces(model) == UNTOUCHED


def test_batch_without_targets_gives_zero():
    model = patch_causal_lm(tiny_causal_lm("llama").train())
    batch = packed_batch()
    loss, gradients = loss_and_gradients(model, batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert float(loss.detach()) == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_gradient_checkpointing():
    model = tiny_causal_lm("llama").train()
    theirs = loss_and_gradients(model, packed_batch())
    model.gradient_checkpointing_enable()
    assert_same(loss_and_gradients(patch_causal_lm(model), packed_batch(), use_cache=False), theirs)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_compiles_without_graph_breaks(architecture):
    model = tiny_causal_lm(architecture).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    theirs = loss_and_gradients(model, packed_batch())
    compiled = torch.compile(patch_causal_lm(model), fullgraph=True, backend="aot_eager")
    assert_same(loss_and_gradients(compiled, packed_batch(), use_cache=False), theirs)
    assert compiled(**packed_batch(), use_cache=False).logits is None
    assert compiled(packed_batch()["input_ids"], use_cache=False).logits is not None
    assert model.forward.tap.hidden is None


def test_mixed_precision_matches_the_models_own_loss():
    model = tiny_causal_lm("qwen3").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = loss_and_gradients(model, packed_batch())
        ours = loss_and_gradients(patch_causal_lm(model), packed_batch())
    assert ours[0].dtype == torch.float32
    assert_same(ours, theirs, 1e-2)


@contextmanager
def one_process_group(path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    model = tiny_causal_lm("llama").train()
    batch = packed_batch()
    theirs = loss_and_gradients(model, batch)
    with one_process_group(tmp_path / "store"):
        wrapped = nn.parallel.DistributedDataParallel(patch_causal_lm(model))
        loss = wrapped(**batch).loss
        loss.backward()
        assert_same((loss, [p.grad for p in model.parameters()]), theirs)
        # while the group is there: the last reference to one that is gone waits for its threads, at times for ever
        del wrapped, loss
        gc.collect()


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_models_of_their_own(make_copy):
    model = patch_causal_lm(tiny_causal_lm("llama").train(), z_loss=0.1)
    expected = loss_and_gradients(model, packed_batch())
    twin = make_copy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(loss_and_gradients(twin, packed_batch()), expected)
    unpatch_causal_lm(model)
    assert twin(**packed_batch()).logits is None
    assert traces(unpatch_causal_lm(twin)) == UNTOUCHED


def test_save_pretrained(tmp_path):
    model = tiny_causal_lm("llama").eval()
    logits = model(packed_batch()["input_ids"]).logits
    patch_causal_lm(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert traces(loaded) == UNTOUCHED
    torch.testing.assert_close(loaded(packed_batch()["input_ids"]).logits, logits)
    assert patch_causal_lm(loaded.train())(**packed_batch()).logits is None


def test_unpatch_restores_what_was_there():
    model = tiny_causal_lm("llama").train()
    batch = packed_batch()
    theirs = loss_and_gradients(model, batch)
    assert unpatch_causal_lm(patch_causal_lm(model)) is model
    assert traces(model) == UNTOUCHED
    assert model(**batch).logits is not None
    assert_same(loss_and_gradients(model, batch), theirs)

    calls = []
    own_forward = model.forward

    def forward(*args, **kwargs):
        calls.append(kwargs)
        return own_forward(*args, **kwargs)

    model.forward, model.loss_function = forward, ForCausalLMLoss
    patch_causal_lm(model)
    assert model(input_ids=batch["input_ids"], labels=batch["labels"]).logits is None
    assert calls
    unpatch_causal_lm(model)
    assert vars(model)["forward"] is forward
    assert vars(model)["_loss_function"] is ForCausalLMLoss


def test_patching_twice_and_unpatching_what_is_not_patched_are_refused():
    model = tiny_causal_lm("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        unpatch_causal_lm(model)
    patch_causal_lm(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM is patched already"):
        patch_causal_lm(model)


def test_a_patched_model_can_be_wrapped_unless_it_gives_no_logits_in_eval_mode():
    model = tiny_causal_lm("llama").eval()
    theirs = model(**packed_batch()).loss
    torch.testing.assert_close(CausalLM(patch_causal_lm(model))(packed_batch()).loss, theirs)
    patch_causal_lm(unpatch_causal_lm(model), in_eval=True)
    with pytest.raises(ValueError, match="gives no logits; unpatch_causal_lm"):
        CausalLM(model)


def test_what_is_no_hugging_face_model_is_refused():
    with pytest.raises(ValueError, match="Linear is no Hugging Face model"):
        patch_causal_lm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"pass the \.\.\.ForCausalLM itself, before torch.compile"):
        patch_causal_lm(torch.compile(tiny_causal_lm("llama"), backend="eager"))


def test_a_forward_that_computes_its_loss_itself_is_refused(monkeypatch):
    model = tiny_causal_lm("llama")

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ValueError, match="computes its loss from logits itself"):
        patch_causal_lm(model)


@pytest.mark.parametrize("keep", [1, torch.tensor([0, 3])])
def test_logits_to_keep_with_labels_is_refused(keep):
    model = patch_causal_lm(tiny_causal_lm("llama").train())
    batch = packed_batch()
    with pytest.raises(ValueError, match="`logits_to_keep` is"):
        model(**batch, logits_to_keep=keep)
    assert model(batch["input_ids"], logits_to_keep=1).logits.shape == (2, 1, 101)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.resize_token_embeddings(120),
        lambda model: setattr(model, "lm_head", nn.Linear(32, 101, bias=False)),
        lambda model: setattr(model, "loss_function", ForCausalLMLoss),
    ],
)
def test_a_change_after_the_patch_is_noticed(change):
    model = patch_causal_lm(tiny_causal_lm("llama").train())
    change(model)
    with pytest.raises(ValueError, match=r"is another one than when it was patched\. Call unpatch_causal_lm"):
        model(**packed_batch())
    patch_causal_lm(unpatch_causal_lm(model))
    assert model(**packed_batch()).logits is None


def test_replaced_forward_of_the_head_is_noticed():
    model = patch_causal_lm(tiny_causal_lm("llama").train())
    head = model.lm_head
    head.forward = lambda hidden: F.linear(hidden, head.weight)
    with pytest.raises(ValueError, match="`forward` of the output head was replaced"):
        model(**packed_batch())


def test_failed_call_leaves_the_model_in_order():
    model = patch_causal_lm(tiny_causal_lm("llama").train())
    batch = packed_batch()
    with pytest.raises(ValueError, match="`target` holds 101"):
        model(batch["input_ids"], labels=batch["labels"] * 0 + 101)
    assert model(batch["input_ids"]).logits.shape == (2, 12, 101)
    assert model(**batch).logits is None


def test_no_logits_are_stored():
    vocabulary = 50_000
    model = patch_causal_lm(tiny_causal_lm("llama", vocab_size=vocabulary, tie_word_embeddings=True).train())
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    ids = torch.randint(vocabulary, (4, 512))
    with Watch():
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert max(sizes) < ids.numel() * vocabulary / 4


def in_half_precision(model):
    """The model as accelerate prepares it: autocast around its ``forward``."""
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    return accelerator, accelerator.prepare(model)


def test_accelerate_wraps_a_patched_model():
    model = tiny_causal_lm("llama").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = loss_and_gradients(model, packed_batch())
    accelerator, prepared = in_half_precision(patch_causal_lm(model))
    assert prepared(**packed_batch()).logits is None
    assert_same(loss_and_gradients(prepared, packed_batch()), theirs, 1e-2)
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    batch = packed_batch()
    assert bare(batch["input_ids"], labels=batch["labels"]).logits is None
    assert unpatch_causal_lm(bare)(batch["input_ids"], labels=batch["labels"]).logits is not None


def test_unpatch_beneath_a_wrapper():
    _, prepared = in_half_precision(patch_causal_lm(tiny_causal_lm("llama").train()))
    unpatch_causal_lm(prepared)
    output = prepared(**packed_batch())
    assert output.logits is not None
    patch_causal_lm(prepared)
    again = prepared(**packed_batch())
    assert again.logits is None
    torch.testing.assert_close(again.loss, output.loss, rtol=1e-2, atol=1e-2)


def lora_on_the_head(model):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, config)


def trainer_losses(folder, wrap, patched):
    """Losses and final weights of three optimiser steps of two micro-batches with unequal numbers of targets."""
    model = wrap(tiny_causal_lm("llama"))
    if patched:
        patch_causal_lm(model)
    rows = []
    for seed in range(6):
        row = {name: value[0].clone() for name, value in packed_batch(seed).items()}
        row["labels"][: 2 * seed] = -100
        rows.append(row)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        per_device_eval_batch_size=2,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_loss"], [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("wrap", [lambda model: model, lora_on_the_head], ids=["all weights", "lora"])
def test_trainer_of_transformers(wrap, tmp_path):
    theirs, their_eval, their_weights = trainer_losses(tmp_path / "theirs", wrap, patched=False)
    ours, our_eval, our_weights = trainer_losses(tmp_path / "ours", wrap, patched=True)
    assert len(ours) == 3
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-4)
    assert our_eval == pytest.approx(their_eval, rel=1e-4)
    for mine, own in zip(our_weights, their_weights, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-3, atol=1e-4)


def adapted(patch_first, config, **model_options):
    """A PEFT model, patched before or after wrapping, and its unpatched twin."""
    models = []
    for patched in (False, True):
        inner = tiny_causal_lm("llama", **model_options)
        if patched and patch_first:
            patch_causal_lm(inner)
        torch.manual_seed(0)
        model = peft.get_peft_model(inner, config).train()
        if patched and not patch_first:
            assert patch_causal_lm(model) is model
        models.append(model)
    return models


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["lora", "prompt tuning", "prefix tuning"],
)
def test_peft_around_a_patched_model(config, patch_first):
    theirs, ours = adapted(patch_first, config())
    assert ours(**packed_batch()).logits is None
    assert_same(loss_and_gradients(ours, packed_batch()), loss_and_gradients(theirs, packed_batch()))
    assert unpatch_causal_lm(ours)(**packed_batch()).logits is not None


@pytest.mark.parametrize(
    ("module", "others"), [("litropy", ["litropy.huggingface", "transformers"]), ("litropy.huggingface", ["peft"])]
)
def test_imports_are_no_heavier_than_needed(module, others, tmp_path):
    code = f"import sys, {module}; print({set(others)} & set(sys.modules) or 'none of them')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout == "none of them\n", run.stdout + run.stderr
