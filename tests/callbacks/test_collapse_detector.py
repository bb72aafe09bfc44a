"""The detector in a Trainer: real collapses, checkpoints, remedies, and what it must not do."""

import importlib.util
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM, LlamaConfig

from litropy.callbacks import AttentionEntropyMonitor, CollapseDetector, RepresentationCollapseMonitor
from litropy.callbacks.collapse_detector import CollapseAction
from litropy.callbacks.collapse_gradients import gradient_over_epsilon
from litropy.callbacks.collapse_inbox import Inbox
from litropy.callbacks.collapse_readings import Readings


def load_runs():
    path = Path(__file__).with_name("collapse_runs.py")
    spec = importlib.util.spec_from_file_location("collapse_runs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs = load_runs()


class Batches(IterableDataset):
    def __init__(self, kind, seed):
        self.kind, self.seed = kind, seed

    def __iter__(self):
        # half the usual batch shows what these tests are about, all but gradients that vanish
        return runs.make(self.kind, self.seed, batch=16 if self.kind == "post_ln" else 8)[1]


class Decoder(pl.LightningModule):
    """A run of collapse_runs as a LightningModule."""

    def __init__(self, kind="collapse", seed=0, loss_name=None):
        super().__init__()
        self.kind, self.loss_name = kind, loss_name
        self.model, _, _ = runs.make(kind, seed)

    def training_step(self, batch, batch_idx):
        tokens, targets = batch
        loss = F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)
        if self.loss_name:
            self.log(self.loss_name, loss)
            return loss * 0 + loss.detach()  # what is returned says nothing
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), runs.LEARNING_RATE[self.kind], betas=(0.9, 0.95))


class Stored(pl.Callback):
    """A monitor that reads the attention which these models store."""

    def __init__(self, every_n_steps=1):
        self.every_n_steps, self.readings, self.step = every_n_steps, None, 0

    def collapse_readings(self):
        return self.readings

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.step % self.every_n_steps == 0 and trainer.global_step > self.step:
            values = {name: value.clone() for name, value in module.model.attention().items()}
            self.readings = Readings(self.step, values, tuple(range(len(module.model.layers))))


class Levels(pl.Callback):
    """Keeps the logged level of each step."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen[trainer.global_step - 1] = float(trainer.callback_metrics["collapse/alarm"])


def fit(tmp_path, module, callbacks, steps, ckpt_path=None, seed=0, **options):
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    with runs.quickly():
        trainer.fit(module, DataLoader(Batches(module.kind, seed), batch_size=None), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module")
def collapse(tmp_path_factory):
    """A collapse, watched at every step."""
    folder = tmp_path_factory.mktemp("collapse")
    detector, levels = CollapseDetector(), Levels()
    with pytest.warns(UserWarning, match="Possible collapse at step") as warned:
        trainer = fit(folder, Decoder(), [Stored(), detector, levels], 60)
    return detector, levels.seen, trainer, [str(w.message) for w in warned], list(folder.iterdir())


def test_a_collapse_is_announced_while_it_begins(collapse):
    detector, levels, trainer, messages, files = collapse
    alarm = detector.alarms[0]
    assert (alarm.level, alarm.rule, alarm.layer) == (1, "attention_entropy", 0)
    assert alarm.step <= 20
    assert alarm.head in range(4)
    assert sorted(levels) == list(range(60))
    risen = min(step for step, level in levels.items() if level)
    assert alarm.step < risen <= alarm.step + 11
    assert set(levels.values()) == {0.0, 1.0}
    assert trainer.callback_metrics["collapse/alarm"] == 1
    # one line a rule, however many layers follow
    said = [message for message in messages if "ollapse at step" in message]
    assert len(said) == len({alarm.rule for alarm in detector.alarms}) < len(detector.alarms)
    assert files == []


def test_a_healthy_run_logs_zero(tmp_path):
    detector, levels = CollapseDetector(), Levels()
    fit(tmp_path, Decoder("healthy"), [Stored(), detector, levels], 30)
    assert detector.alarms == []
    assert set(levels.seen.values()) == {0.0}


@pytest.mark.parametrize("every", [1, 10])
def test_the_order_of_callbacks_does_not_matter(tmp_path, every, collapse):
    detector = CollapseDetector(every_n_steps=every)
    fit(tmp_path, Decoder(), [detector, Stored()], 32)
    # the rules see the same numbers as with the monitor first, only sooner or later
    assert detector.alarms == [alarm for alarm in collapse[0].alarms if alarm.step < 32]
    assert detector.alarms


def test_a_continued_run_decides_as_if_it_had_not_stopped(tmp_path, collapse):
    whole, levels, *_ = collapse
    path = tmp_path / "stopped.ckpt"
    # between two decisions, with losses and probes on their way
    fit(tmp_path, Decoder(), [Stored(), CollapseDetector()], 27).save_checkpoint(path)
    detector, seen = CollapseDetector(), Levels()

    class Later(Batches):
        def __iter__(self):
            batches = super().__iter__()
            for _ in range(27):
                next(batches)
            return batches

    torch.manual_seed(0)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=60, callbacks=[Stored(), detector, seen], **options)
    with runs.quickly():
        trainer.fit(Decoder(), DataLoader(Later("collapse", 0), batch_size=None), ckpt_path=path, weights_only=True)
    assert detector.alarms == whole.alarms
    assert seen.seen == {step: level for step, level in levels.items() if step >= 27}
    assert repr(detector.state_dict()) == repr(whole.state_dict())


def test_a_second_fit_starts_afresh(tmp_path):
    detector = CollapseDetector()
    for _ in range(2):
        fit(tmp_path, Decoder(), [Stored(), detector], 25)
        assert next(alarm.step for alarm in detector.alarms if alarm.rule == "attention_entropy") <= 20
    assert len({(alarm.rule, alarm.layer, alarm.level) for alarm in detector.alarms}) == len(detector.alarms)


class Remedy(pl.Callback):
    """Cuts the learning rate; being a callback, it takes part in training."""

    def __init__(self):
        self.alarms, self.steps = [], []

    def act(self, alarm, trainer, pl_module):
        self.alarms.append((alarm, trainer.global_step))
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 1e-4

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append(trainer.global_step)

    def state_dict(self):
        return {"count": len(self.alarms)}


class Note(CollapseAction):
    """A remedy that is no callback, with a state."""

    def __init__(self):
        self.count = 0

    def act(self, alarm, trainer, pl_module):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


def test_remedies_act_on_each_alarm_between_steps(tmp_path):
    remedy, note = Remedy(), Note()
    detector = CollapseDetector(actions=[remedy, note])
    module = Decoder()
    trainer = fit(tmp_path, module, [Stored(), detector], 41)
    assert [alarm for alarm, _ in remedy.alarms] == [alarm for alarm in detector.alarms if alarm.step < 40]
    assert note.count == len(remedy.alarms) > 0
    assert all(alarm.step < step <= alarm.step + 12 for alarm, step in remedy.alarms)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-4
    assert trainer.callbacks[1:3] == [detector, remedy]
    assert remedy.steps == list(range(1, 42))
    path = tmp_path / "acted.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"]
    assert saved["Remedy"]["count"] == note.count
    again = CollapseDetector(actions=[Note()])
    again.load_state_dict(saved["CollapseDetector"])
    assert again.actions[0].count == note.count
    assert again.alarms == detector.alarms


def test_the_loss_may_be_a_logged_metric(tmp_path):
    detector = CollapseDetector(loss="my/loss")
    fit(tmp_path, Decoder("healthy", loss_name="my/loss"), [detector], 5)
    plain = CollapseDetector()
    fit(tmp_path, Decoder("healthy"), [plain], 5)
    assert detector.judge.loss.recent[0] == plain.judge.loss.recent[0]
    with pytest.raises(ValueError, match=r"`loss` is 'my/lsos', which was not logged; this step logged: .*my/loss"):
        fit(tmp_path, Decoder("healthy", loss_name="my/loss"), [CollapseDetector(loss="my/lsos")], 5)


def test_accumulated_steps_have_the_mean_loss_of_their_batches(tmp_path):
    single, double = CollapseDetector(), CollapseDetector()
    fit(tmp_path, Frozen(), [single], 8)
    fit(tmp_path, Frozen(), [double], 4, accumulate_grad_batches=2)
    losses = [loss for _, loss in single.judge.loss.recent]
    expected = [(losses[i] + losses[i + 1]) / 2 for i in range(0, 8, 2)]
    assert [loss for _, loss in double.judge.loss.recent] == pytest.approx(expected)
    assert [step for step, _ in double.judge.loss.recent] == [0, 1, 2, 3]


class Frozen(Decoder):
    """Does not learn, so that its loss depends on the batch alone; some batches are skipped."""

    def __init__(self, skip=()):
        super().__init__("healthy")
        self.skip = skip

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skip else super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def test_steps_without_a_loss_are_left_out(tmp_path):
    detector = CollapseDetector()
    fit(tmp_path, Frozen(skip=(2, 5)), [detector], 8)
    assert [step for step, _ in detector.judge.loss.recent] == [0, 1, 3, 4, 6, 7]
    assert detector.alarms == []


def test_vanishing_gradients_are_seen_without_any_monitor(tmp_path):
    detector = CollapseDetector()
    fit(tmp_path, Decoder("post_ln"), [detector], 50)
    alarm = next(alarm for alarm in detector.alarms if alarm.rule == "gradient_floor")
    assert alarm.level == 1
    assert "weight" in alarm.message


@pytest.mark.parametrize("reparametrised", [False, True])
def test_the_size_of_gradients_says_nothing_where_that_of_weights_is_arbitrary(tmp_path, reparametrised):
    class Flat(pl.LightningModule):
        kind = "healthy"

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2, bias=False)
            if reparametrised:
                weight_norm(self.linear)

        def training_step(self, batch, batch_idx):
            return 1.0 + 1e-9 * self.linear(torch.ones(3)).square().sum()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-4)

    detector = CollapseDetector()
    fit(tmp_path, Flat(), [detector], 41)
    assert {alarm.rule for alarm in detector.alarms} == (set() if reparametrised else {"gradient_floor"})


def test_a_loss_that_is_not_finite_is_critical(tmp_path):
    class Broken(Frozen):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 12 else 1.0)

    detector, levels = CollapseDetector(), Levels()
    fit(tmp_path, Broken(), [detector, levels], 31)
    assert [(alarm.step, alarm.level, alarm.rule) for alarm in detector.alarms] == [(12, 2, "loss_spike")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` is 0; it must be at least 1"),
        ({"entropy_fall": 1.5}, "`entropy_fall` is 1.5; it is a share"),
        ({"loss_share": -1.0}, "`loss_share` is -1.0"),
        ({"ignore": ["loss"]}, "`ignore` has 'loss'; the rules are attention_entropy, "),
        ({"actions": [Stored()]}, "`actions` has a Stored, which has no `act"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CollapseDetector(**options)


def test_nothing_is_read_from_the_device_between_decisions(tmp_path, monkeypatch):
    """Neither the step nor logging the level asks a tensor for its value."""
    asked = []
    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, _o=original, _n=name: (asked.append(_n), _o(self, *args))[1]
        )

    detector = CollapseDetector(every_n_steps=4)
    found = {}
    for hook in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
        original = getattr(detector, hook)

        def watched(trainer, *args, _o=original):
            before = len(asked)
            _o(trainer, *args)
            found.setdefault(detector._step, []).extend(asked[before:])

        monkeypatch.setattr(detector, hook, watched)
    fit(tmp_path, Decoder("healthy"), [Stored(), detector], 10)
    assert {step for step, names in found.items() if names} == {4, 8}


class HuggingFace(pl.LightningModule):
    """Somebody's module around a causal language model of transformers."""

    def __init__(self, learning_rate):
        super().__init__()
        self.kind, self.learning_rate = "healthy", learning_rate
        torch.manual_seed(0)
        size = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 4}
        special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        config = LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, **size, **special)
        self.model = AutoModelForCausalLM.from_config(config).train()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.learning_rate, betas=(0.9, 0.95))


@pytest.mark.parametrize("learning_rate", [3e-3, 3e-2])
def test_it_works_as_it_is_on_a_causal_language_model(tmp_path, learning_rate):
    detector, levels = CollapseDetector(), Levels()
    callbacks = [AttentionEntropyMonitor(), RepresentationCollapseMonitor(), detector, levels]
    trainer = fit(tmp_path, HuggingFace(learning_rate), callbacks, 71)
    assert len(levels.seen) == 71
    if learning_rate < 0.01:
        assert detector.alarms == []
        return
    first = {}
    for alarm in detector.alarms:
        first.setdefault(alarm.level, alarm)
    assert first[1].step <= 20
    assert first[1].rule == "attention_entropy"
    assert first[2].step <= 69
    assert trainer.callback_metrics["collapse/alarm"] == 2
    assert levels.seen[30] == 1


def test_numbers_arrive_in_the_order_of_steps():
    inbox = Inbox()
    inbox.add(Readings(1, {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3.0, dtype=torch.float64)}, (0,)))
    inbox.add_loss(0, torch.tensor(4.0))
    inbox.add_loss(1, None)
    inbox.add(Readings(0, {"c": torch.tensor([5.0], dtype=torch.bfloat16)}, ("x",)))
    again = Inbox()
    again.load_state_dict(inbox.state_dict())
    for box in (inbox, again):
        box.send(torch.device("cpu"))
        box.send(torch.device("cpu"))  # waits until the first is received
        got = box.receive()
        assert [(item.step, item.loss) for item in got] == [(0, 4.0), (0, None), (1, None)]
        assert {name: value.tolist() for name, value in got[2].values.items()} == {"a": [[1.0, 2.0]], "b": 3.0}
        assert got[1].values["c"].tolist() == [5.0]
        assert (got[1].layers, got[2].layers) == (("x",), (0,))
        assert box.receive() == []


def test_gradients_are_compared_with_their_own_epsilon():
    linear, norm, unused = torch.nn.Linear(3, 2), torch.nn.LayerNorm(3), torch.nn.Linear(2, 2)
    for parameter in (*linear.parameters(), *norm.parameters()):
        parameter.grad = torch.randn_like(parameter) * 1e-12
    groups = [{"params": [*linear.parameters()], "eps": 1e-6}, {"params": [*norm.parameters(), *unused.parameters()]}]
    names = {id(p): name for name, p in [("linear.weight", linear.weight), ("unused.weight", unused.weight)]}
    found = gradient_over_epsilon(torch.optim.AdamW(groups), names)
    assert list(found) == ["linear.weight"]
    expected = linear.weight.grad.double().square().mean().sqrt() / 1e-6
    torch.testing.assert_close(found["linear.weight"].double(), expected, rtol=1e-6, atol=0)
    assert gradient_over_epsilon(torch.optim.SGD(linear.parameters(), 0.1), names) == {}
