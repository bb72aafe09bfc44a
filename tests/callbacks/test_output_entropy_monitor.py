"""The monitor in real training: values against stored logits, and what it must leave alone."""

import copy
import importlib.util
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from litropy.callbacks import CollapseDetector, OutputEntropyMonitor
from litropy.callbacks.metrics_file import MetricsFile, read_metrics
from litropy.huggingface import patch_causal_lm
from litropy.losses import CutCrossEntropyLoss, head_passes
from litropy.recipes import LanguageModel
from litropy.testing import tiny_causal_lm, tiny_config

spec = importlib.util.spec_from_file_location("output_runs", Path(__file__).with_name("output_runs.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
MEANS, OwnLoss, Record = runs.MEANS, runs.OwnLoss, runs.Record
batch_of, fit, true_means = runs.batch_of, runs.fit, runs.true_means

UNEVEN = [batch_of([11, 1, 0], seed=1), batch_of([3, 9, 11], seed=2)]
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ARCHITECTURES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gpt2": NO_DROPOUT,  # tied
    "gemma2": {},  # softcap, tied
    "cohere": {},  # scale
    "granite": {},  # divisor
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},  # bias
}


def tiny(name):
    return tiny_causal_lm(name.split(",")[0], **ARCHITECTURES.get(name, {}))


def check(found, expected, rel=1e-4, names=MEANS):
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=rel, abs=1e-5), name


class Patched(OwnLoss):
    def __init__(self, model):
        super().__init__(patch_causal_lm(model))


class Positional(OwnLoss):
    """Calls the model by position and without labels, and takes the loss itself."""

    def training_step(self, batch, batch_idx):
        logits = self.model(batch["input_ids"], return_dict=False)[0][:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_with_its_own_loss(name):
    model, record = tiny(name), Record()
    fit(OwnLoss(model), UNEVEN, OutputEntropyMonitor(), record)
    for logged, batch in zip(record.logged, UNEVEN, strict=True):
        check(logged, true_means(model, [batch]))
        assert logged["entropy/output_probe_ms"] > 0
    drift = record.logged[1]["entropy/lse"] - record.logged[0]["entropy/lse"]
    assert record.logged[1]["entropy/lse_drift"] == pytest.approx(drift, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_a_model_with_our_loss(name):
    model, record = tiny(name), Record()
    truth = copy.deepcopy(model)
    fit(Patched(model), UNEVEN, OutputEntropyMonitor(), record)
    for logged, batch in zip(record.logged, UNEVEN, strict=True):
        check(logged, true_means(truth, [batch]))


@pytest.mark.parametrize("architecture", ["gemma2", "cohere"])
def test_language_model_is_measured_in_the_loss_pass_and_trains_the_same(architecture):
    runs = []
    for monitors in ([], [OutputEntropyMonitor()]):
        torch.manual_seed(0)
        model, record = LanguageModel(config=tiny_config(architecture), learning_rate=1e-2), Record()
        trained = []
        fit(model, UNEVEN * 2, *monitors, record, deterministic=True)
        trained = [parameter.detach() for parameter in model.parameters()]
        runs.append((record.logged, trained))
    (plain, without), (logged, with_monitor) = runs
    assert all(torch.equal(a, b) for a, b in zip(without, with_monitor, strict=True))
    assert [set(step) for step in plain] == [{"entropy/output"}] * 4
    for a, b in zip(plain, logged, strict=True):
        assert b["entropy/output"] == a["entropy/output"]
        assert set(MEANS) < set(b)
    # the first step's weights are those that the seed gives
    torch.manual_seed(0)
    model = LanguageModel(config=tiny_config(architecture))
    model.configure_model()
    check(logged[0], true_means(model.causal_lm, UNEVEN[:1]))


def test_a_module_that_logs_its_entropy_is_not_overruled_between_probes():
    record = Record()
    model = LanguageModel(config=tiny_config("llama"), learning_rate=0.1)
    fit(model, UNEVEN * 2, OutputEntropyMonitor(every_n_steps=3, dense_steps=0), record)
    assert len({step["entropy/output"] for step in record.logged}) == 4
    assert len({step["entropy/lse"] for step in record.logged}) == 2


def test_heads_of_other_modules_are_named_or_use_our_loss():
    class Plain(pl.LightningModule):
        def __init__(self, loss):
            super().__init__()
            self.embedding, self.out, self.loss = nn.Embedding(101, 8), nn.Linear(8, 101, bias=False), loss

        def forward(self, input_ids):
            return type("Output", (), {"logits": self.out(self.embedding(input_ids))})

        def training_step(self, batch, batch_idx):
            hidden, target = self.embedding(batch["input_ids"]), batch["labels"].roll(-1, 1)
            target[:, -1] = -100
            if self.loss is not None:
                return self.loss(hidden, self.out.weight, target)
            return nn.functional.cross_entropy(self.out(hidden).flatten(0, 1), target.flatten())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    record = Record()
    module = Plain(CutCrossEntropyLoss())
    fit(module, UNEVEN[:1], OutputEntropyMonitor(), record)
    check(record.logged[0], true_means(module, UNEVEN[:1]))
    record = Record()
    module = Plain(None)
    fit(module, UNEVEN[:1], OutputEntropyMonitor(head="out"), record)
    assert "entropy/calibration_gap" not in record.logged[0]  # nobody knows the targets
    everything = UNEVEN[0]["input_ids"]
    logits = module(everything).logits.detach().double()
    assert record.logged[0]["entropy/lse"] == pytest.approx(float(logits.logsumexp(-1).mean()), rel=1e-5)
    with pytest.warns(UserWarning, match=r"saw no logits at step 0.*`head`"):
        trainer = fit(Plain(None), UNEVEN[:1], OutputEntropyMonitor())
    assert not trainer.callback_metrics
    with pytest.raises(ValueError, match="no module of that name"):
        fit(Plain(None), UNEVEN[:1], OutputEntropyMonitor(head="lm_head"))


def test_a_call_without_labels_predicts_the_next_token():
    model, record = tiny_causal_lm("llama"), Record()
    batch = batch_of([12, 12])
    fit(Positional(model), [batch], OutputEntropyMonitor(), record)
    check(record.logged[0], true_means(model, [batch]))


def test_logits_that_cannot_be_final_are_refused():
    class Alone(OwnLoss):
        def training_step(self, batch, batch_idx):
            return self.model.lm_head(self.model.model(batch["input_ids"]).last_hidden_state).logsumexp(-1).mean()

    with pytest.raises(ValueError, match="Gemma2ForCausalLM changes its logits after its output head"):
        fit(Alone(tiny_causal_lm("gemma2")), UNEVEN[:1], OutputEntropyMonitor())
    trainer = fit(Alone(tiny_causal_lm("llama")), UNEVEN[:1], OutputEntropyMonitor())
    assert "entropy/output" in trainer.callback_metrics


@pytest.mark.parametrize("make", [OwnLoss, Patched])
def test_micro_batches_add_up_to_one_batch(make):
    model, record = tiny_causal_lm("llama"), Record()
    truth = copy.deepcopy(model)
    monitor = OutputEntropyMonitor()
    fit(make(model), UNEVEN * 2, monitor, record, accumulate_grad_batches=2)
    assert len(record.logged) == 2
    check(record.logged[0], true_means(truth, UNEVEN))
    check(record.logged[1], record.logged[0], rel=1e-6)
    assert monitor.collapse_readings().step == 1


def test_few_rows_are_an_unbiased_sample_that_each_probe_draws_anew():
    model, record = tiny_causal_lm("llama"), Record()
    batches = [batch_of([11] * 4), batch_of([1])]  # as many rows are sampled from each
    monitor = partial(OutputEntropyMonitor, rows=2)
    fit(OwnLoss(model), batches * 60, monitor(), record, accumulate_grad_batches=2)
    for name, truth in true_means(model, batches).items():
        found = torch.tensor([logged[name] for logged in record.logged])
        assert found.std() > 0
        assert abs(found.mean() - truth) < 3 * found.std() / 60**0.5, name
    again = Record()
    fit(OwnLoss(model), batches * 2, monitor(), again, accumulate_grad_batches=2)
    for logged, other in zip(again.logged, record.logged[:2], strict=True):
        check(logged, other, rel=0)


def test_batches_without_targets_repeat_the_last_probe():
    record, empty = Record(), batch_of([0, 0])
    fit(Patched(tiny_causal_lm("llama")), [UNEVEN[0], empty], OutputEntropyMonitor(), record)
    check(record.logged[1], record.logged[0], rel=0)


class Everything(OwnLoss):
    """Generates, asks a frozen model, recomputes layers, and trains only on the policy's pass."""

    def __init__(self, model):
        super().__init__(model)
        self.reference = tiny_causal_lm("llama", seed=5).requires_grad_(False)
        self.model.gradient_checkpointing_enable()

    def training_step(self, batch, batch_idx):
        self.model.generate(batch["input_ids"][:, :3], max_new_tokens=2, pad_token_id=0)
        self.model.train()
        self.reference(**batch)
        with torch.no_grad():
            self.model(**batch)
        return self.model(**batch).loss


@pytest.mark.parametrize("reentrant", [True, False])
def test_only_the_trained_pass_counts(reentrant):
    model, record = tiny_causal_lm("llama"), Record()
    truth = copy.deepcopy(model)
    module = Everything(model)
    module.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fit(module, UNEVEN[:1], OutputEntropyMonitor(), record)
    check(record.logged[0], true_means(truth, UNEVEN[:1]))


def compiled_in_place(model):
    model.compile(backend="eager")
    return OwnLoss(model)


@pytest.mark.parametrize(
    "build",
    [
        lambda model: OwnLoss(torch.compile(model, backend="eager")),
        lambda model: torch.compile(OwnLoss(model), backend="eager"),
        compiled_in_place,
    ],
    ids=["model", "module", "in place"],
)
def test_a_compiled_model_is_seen_at_probes_only(build):
    model = tiny_causal_lm("llama")
    truth, record = copy.deepcopy(model), Record()
    monitor = OutputEntropyMonitor(every_n_steps=3, dense_steps=0)
    fit(build(model), [UNEVEN[1], *UNEVEN, UNEVEN[0]], monitor, record)
    check(record.logged[0], true_means(truth, UNEVEN[1:]))
    check(record.logged[3], true_means(truth, UNEVEN[:1]))
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_adapters_of_the_head_count():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2, init_lora_weights=False)
    model, record = peft.get_peft_model(tiny_causal_lm("llama"), config), Record()
    check_against = true_means(model, UNEVEN[:1])
    fit(OwnLoss(model), UNEVEN[:1], OutputEntropyMonitor(), record)
    check(record.logged[0], check_against)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_go_away_after_each_probe_and_after_a_crash():
    class Crash(OwnLoss):
        def training_step(self, batch, batch_idx):
            counts.append(hooks(self))
            if batch_idx == 2:
                raise RuntimeError("crash")
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *args):
            counts.append(hooks(self))

    counts = []
    module = Crash(tiny_causal_lm("llama"))
    before = hooks(module)
    with pytest.raises(RuntimeError, match="crash"):
        fit(module, UNEVEN * 2, OutputEntropyMonitor(every_n_steps=2, dense_steps=0))
    assert [count - before for count in counts] == [2, 0, 0, 0, 2]
    assert hooks(module) == before
    assert not head_passes._watchers


def sampled(model, temperature, seed, rows=48, length=24):
    """Text that the model writes itself."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(101, (rows, 1), generator=generator)
    with torch.no_grad():
        for _ in range(length):
            p = (model(input_ids=ids).logits[:, -1] / temperature).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("make", [OwnLoss, Patched])
def test_text_of_the_model_itself_is_on_policy_and_colder_text_is_not(make):
    model = tiny_causal_lm("gemma2", final_logit_softcapping=8.0)
    own = [sampled(model, 1.0, seed) for seed in range(3)]
    cold = [sampled(model, 0.8, seed) for seed in range(3)]
    watch = partial(OutputEntropyMonitor, on_policy=True, rows=2048)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*on-policy")
        record = Record()
        fit(make(copy.deepcopy(model)), own, monitor := watch(), record)
        assert all(abs(logged["entropy/on_policy_z"]) < 4 for logged in record.logged)
        assert set(monitor.collapse_readings().values) == {"output/entropy"}
        if make is OwnLoss:
            fit(make(copy.deepcopy(model)), cold, watch(temperature=0.8), record := Record())
            assert abs(record.logged[-1]["entropy/on_policy_z"]) < 4
    with pytest.warns(UserWarning, match=r"At step \d, on-policy z is -\d.*lower temperature") as caught:
        fit(make(copy.deepcopy(model)), cold, watch(), record := Record())
    assert record.logged[-1]["entropy/on_policy_z"] < -4
    assert sum("on-policy" in str(warning.message) for warning in caught) == 1


def chain(rows, seed, vocabulary=64, length=32):
    """Text of a fixed Markov chain."""
    generator = torch.Generator().manual_seed(0)
    transition = (3 * torch.randn(vocabulary, vocabulary, generator=generator)).softmax(-1)
    generator.manual_seed(seed)
    tokens = [torch.randint(vocabulary, (rows,), generator=generator)]
    for _ in range(length - 1):
        tokens.append(torch.multinomial(transition[tokens[-1]], 1, generator=generator)[:, 0])
    ids = torch.stack(tokens, 1)
    return {"input_ids": ids, "labels": ids}


class HeldOut(pl.Callback):
    def __init__(self):
        self.losses, self.batch = [], chain(64, seed=10**6)

    def on_train_batch_end(self, trainer, module, *args):
        with torch.no_grad():
            self.losses.append(float(module.causal_lm(**self.batch).loss))


def test_over_training_has_its_turning_point_where_the_held_out_loss_is_lowest():
    def run(batches):
        torch.manual_seed(0)
        module = LanguageModel(
            config=tiny_config("llama", vocab_size=64), learning_rate=5e-3, schedule="constant", check_parity=False
        )
        monitor, held_out = OutputEntropyMonitor(over_optimisation=True), HeldOut()
        trainer = fit(module, batches, monitor, held_out, log_every_n_steps=5, gradient_clip_val=None)
        return monitor.turning_point, held_out.losses, float(trainer.callback_metrics["entropy/over_optimisation"])

    few = chain(16, seed=1)
    with pytest.warns(UserWarning, match=r"At step \d+, the entropy of the likeliest tokens rose to"):
        rule, losses, level = run([few] * 70)
    best = losses.index(min(losses))
    assert losses[-1] > min(losses) + 0.5
    assert rule.high_step == pytest.approx(best, abs=8)
    assert level == rule.level == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*likeliest tokens")
        rule, losses, level = run([chain(16, seed=seed) for seed in range(70)])
    assert losses[-1] < min(losses) + 0.1
    assert level == rule.level == 0


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path):
    def run(folder, steps, checkpoint=None):
        torch.manual_seed(0)
        module = OwnLoss(tiny_causal_lm("llama"), learning_rate=0.5)
        monitor = OutputEntropyMonitor(rows=8, on_policy=True, over_optimisation=True)
        options = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=steps, logger=MetricsFile(folder), callbacks=[monitor], **options
        )
        batches = [batch_of([11, 5])] * 8  # a loader that cannot go on where it was
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=checkpoint)
        trainer.save_checkpoint(folder / "end.ckpt")
        rows = read_metrics(next(folder.rglob("metrics.csv")))
        kept = {name for name in rows[0] if name != "epoch" and not name.endswith("_ms")}
        return [{name: row[name] for name in kept} for row in rows], monitor

    whole, monitor = run(tmp_path / "whole", 8)
    first, _ = run(tmp_path / "first", 3)
    second, resumed = run(tmp_path / "second", 8, tmp_path / "first" / "end.ckpt")
    assert first + second == whole
    assert {"entropy/lse_drift", "entropy/on_policy_z", "entropy/over_optimisation"} < set(whole[-1])
    assert resumed.state_dict() == monitor.state_dict()


def test_nothing_is_written_without_a_logger(tmp_path):
    fit(OwnLoss(tiny_causal_lm("llama")), UNEVEN[:1], OutputEntropyMonitor(), default_root_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_readings_are_new_objects_of_finished_tensors():
    seen = []

    class Reader(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(monitor.collapse_readings())

    monitor = OutputEntropyMonitor(every_n_steps=2, dense_steps=1)
    model = tiny_causal_lm("llama")
    fit(OwnLoss(model), UNEVEN * 2, Reader(), monitor)
    assert seen[0] is None
    assert [reading.step for reading in seen[1:]] == [0, 0, 2]
    assert seen[1] is seen[2]
    truth = true_means(model, UNEVEN[:1])
    values = {name: float(value) for name, value in seen[1].values.items()}
    assert values["output/entropy"] == pytest.approx(truth["entropy/output"], rel=1e-4)
    expected = truth["entropy/output"] + truth["entropy/calibration_gap"]
    assert values["output/cross_entropy"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("factor", "alarms"), [(1.0, []), (20.0, ["output_entropy"])])
@pytest.mark.parametrize("detector_first", [True, False])
@pytest.mark.filterwarnings("ignore:.*output")
def test_the_detector_hears_of_a_model_that_is_surer_than_right(factor, alarms, detector_first):
    model, detector = tiny_causal_lm("llama"), CollapseDetector()
    model.lm_head.weight.data *= factor
    callbacks = [detector, OutputEntropyMonitor()]
    batches = [batch_of([11] * 4, seed) for seed in range(45)]
    fit(OwnLoss(model), batches, *(callbacks if detector_first else callbacks[::-1]))
    assert [alarm.rule for alarm in detector.alarms] == alarms


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` is 0"),
        ({"rows": 0}, "`rows` is 0"),
        ({"dense_steps": -1}, "`dense_steps` is -1; it must be at least 0"),
        ({"top_k": 65}, "`top_k` is 65; it must be in 1 to 64"),
        ({"temperature": 0.0}, "`temperature` is 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OutputEntropyMonitor(**options)
