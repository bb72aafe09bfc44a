"""AttentionEntropyRegularizer: its gradient is that of the penalty on stored attention, however the step is divided."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from litropy.callbacks.attention_capture import _patches
from litropy.callbacks.entropy_regularizer import AttentionEntropyRegularizer
from litropy.callbacks.entropy_regularizer_penalties import BandOfMeans, BandOfRows, RowEntropies
from litropy.testing import tiny_causal_lm

spec = importlib.util.spec_from_file_location("remedy_runs", Path(__file__).with_name("remedy_runs.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")

STRONG = {"weight": 20.0, "margin": 0.05, "threshold": 0.3, "floor": 0.95, "rows": None}
KEYS = torch.arange(1, runs.T + 1).double()


class Plain(runs.TinyLM):
    """Learns with SGD, in double precision, and keeps the gradients of each step."""

    def __init__(self, rate=0.05, model=None):
        super().__init__(rate, model=(runs.tiny_opt() if model is None else model).double())
        self.gradients, self.before = [], []

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append({name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None})
        self.before.append({name: p.detach().clone() for name, p in self.named_parameters()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.learning_rate)


def fit(callbacks, steps, module=None, **options):
    options = {"batch": 2} | options
    return runs.train(None, callbacks, steps, module or Plain(), **options)


def eager(module, weights, ids):
    """Loss and attention probabilities [L][B, H, T, T] of a model with some weights."""
    module.load_state_dict(weights)
    module.model.set_attn_implementation("eager")
    output = module.model(ids, output_attentions=True, use_cache=False)
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return loss, output.attentions


def row_entropies(probabilities):
    return -(probabilities * probabilities.clamp_min(1e-300).log()).sum(-1)


def test_the_gradient_is_that_of_the_penalty_on_stored_attention():
    regularizer = AttentionEntropyRegularizer(**STRONG)
    module, trainer = fit([regularizer], 3)
    ours, plain = module.gradients[2], Plain()
    # the second step's means give the third step's forces
    truth = BandOfMeans(20.0, 0.05, 0.95, 1.0, 0.3, 0.01)
    for step in (0, 1):
        _, attentions = eager(plain, module.before[step], runs.Markov(2)[step]["input_ids"])
        means = [(row_entropies(p)[..., 7:] / KEYS[7:].log()).mean((0, 2)).detach() for p in attentions]
        sums = {f"layer {index}": torch.stack([m, torch.ones_like(m), m * 0]) for index, m in enumerate(means)}
        truth.end_step(sums)
    loss, attentions = eager(plain, module.before[2], runs.Markov(2)[2]["input_ids"])
    assert module.losses[2] == pytest.approx(loss.item(), rel=1e-9)
    means = [(row_entropies(p)[..., 7:] / KEYS[7:].log()).mean((0, 2)) for p in attentions]
    pull = sum((force * mean).sum() for force, mean in zip(truth.forces.values(), means, strict=True))
    names, parameters = zip(*plain.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss + pull, parameters)
    without = torch.autograd.grad(eager(plain, module.before[2], runs.Markov(2)[2]["input_ids"])[0], parameters)
    assert any((e - w).norm() > 0.1 * w.norm() for e, w in zip(expected, without, strict=True))
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert [threshold.shape for threshold in regularizer.penalty.thresholds.values()] == [(4,), (4,)]
    assert float(trainer.callback_metrics["entropy_regularizer/penalty"]) > 0
    assert not _patches
    assert "training_step" not in vars(module)


def test_the_released_form_is_that_of_stored_attention():
    options = {"weight": 1e-3, "margin": 0.2, "threshold": 0.3, "threshold_rate": 0.1}
    module, trainer = fit([AttentionEntropyRegularizer(rows=None, released=True, **options)], 2)
    plain, longest, theta = Plain(), math.log(runs.T), torch.full((4,), 0.3, dtype=torch.float64)
    for step in (0, 1):
        loss, attentions = eager(plain, module.before[step], runs.Markov(2)[step]["input_ids"])
        penalty, outside = 0, 0
        for probabilities in attentions:
            deviation = row_entropies(probabilities) - theta[:, None] * longest
            hard = torch.where(deviation.abs() > 0.2 * longest, deviation, 0)
            penalty = penalty + 1e-3 * hard.square().sum() / 4 / 2
            outside = outside + hard.detach().mean((0, 2)) / longest / 2
        theta = theta + 0.1 * outside
    parameters = dict(plain.named_parameters())
    expected = torch.autograd.grad(loss + penalty, list(parameters.values()))
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(module.gradients[1][name], gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(trainer.callbacks[0].penalty.thresholds.double(), theta, rtol=1e-4, atol=1e-6)
    assert float(trainer.callback_metrics["entropy_regularizer/penalty"]) == pytest.approx(float(penalty), rel=1e-4)


def test_how_a_step_is_divided_makes_no_difference():
    whole, _ = fit([AttentionEntropyRegularizer(**STRONG)], 4, data=Parts(4))
    parts, _ = fit([AttentionEntropyRegularizer(**STRONG)], 4, data=Parts(1), accumulate_grad_batches=4)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


class Parts(runs.Markov):
    """The same sequences in batches of some size."""

    def __init__(self, size):
        super().__init__(1, tuple(range(size)), size)


@pytest.mark.parametrize("kind", ["tensor", "dictionary"])
def test_the_loss_keeps_its_value(kind):
    class Returns(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if kind == "tensor" else {"loss": loss, "more": 1}

    class Reads(runs.Callback):
        losses = ()

        def on_train_batch_end(self, trainer, module, outputs, *_):
            self.losses = (*self.losses, outputs["loss"].item())

    reads = Reads()
    module, _ = fit([AttentionEntropyRegularizer(**STRONG), reads], 3, Returns())
    assert list(reads.losses) == pytest.approx(module.losses)


def checkpointed(reentrant):
    module = Plain()
    module.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        module.model.enable_input_require_grads()
    return module


def test_gradient_checkpointing_changes_nothing():
    plain, _ = fit([AttentionEntropyRegularizer(**STRONG)], 3)
    module, _ = fit([AttentionEntropyRegularizer(**STRONG)], 3, checkpointed(False))
    for one, other in zip(plain.gradients, module.gradients, strict=True):
        for name, gradient in one.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        fit([AttentionEntropyRegularizer(**STRONG)], 1, checkpointed(True))
    assert not _patches


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    whole, _ = fit([AttentionEntropyRegularizer()], 6)
    _, trainer = fit([AttentionEntropyRegularizer()], 3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    resumed, _ = fit([AttentionEntropyRegularizer()], 6, ckpt_path=tmp_path / "three.ckpt")
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_as_an_action_it_begins_with_the_alarm():
    plain, _ = fit([], 6)
    module, _ = fit([runs.Alarms([AttentionEntropyRegularizer(**STRONG)], steps=[2])], 6)
    same = [
        all(torch.equal(one[n], other[n]) for n in one)
        for one, other in zip(plain.gradients, module.gradients, strict=True)
    ]
    # the step after the alarm measures, the one after that pulls
    assert same == [True, True, True, True, False, False]


def test_compiled_layers_are_pulled_too():
    module = Plain()
    for layer in module.model.model.decoder.layers:
        layer.compile(backend="aot_eager")
    fit([AttentionEntropyRegularizer(**STRONG)], 2, module)
    plain, _ = fit([AttentionEntropyRegularizer(**STRONG)], 2)
    for name, gradient in plain.gradients[1].items():
        torch.testing.assert_close(module.gradients[1][name], gradient, rtol=1e-6, atol=1e-10)


def test_thresholds_follow_what_is_outside_of_the_band():
    penalty = BandOfMeans(1.0, 0.2, 0.0, 1.0, 0.5, 0.5)
    entropy = torch.tensor([0.9, 0.6, 0.05])
    for _ in range(100):
        penalty.end_step({"layer": torch.stack([entropy, torch.ones(3), torch.zeros(3)])})
    torch.testing.assert_close(penalty.thresholds["layer"], torch.tensor([0.7, 0.5, 0.25]))
    assert penalty.end_step({"layer": torch.stack([entropy, torch.ones(3), torch.zeros(3)])}) < 1e-9


def test_heads_without_rows_are_left_alone():
    penalty = BandOfMeans(1.0, 0.0, 0.3, 1.0, 0.5, 0.5)
    sums = torch.tensor([[0.0, 0.4], [0.0, 1.0], [0.0, 0.0]])
    assert float(penalty.end_step({"layer": sums})) == pytest.approx(0.01 / 2)
    assert penalty.forces["layer"][0] == 0
    nothing = RowEntropies(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, dtype=torch.bool), 8, 8)
    assert penalty.term("layer", nothing) == 0


def test_what_cannot_work_is_refused():
    class Manual(Plain):
        automatic_optimization = False

    with pytest.raises(ValueError, match="Manual optimises manually"):
        fit([AttentionEntropyRegularizer()], 1, Manual())

    class Causal(Plain):
        def training_step(self, batch, batch_idx):
            return self.model(batch["input_ids"], labels=batch["input_ids"]).loss

    with pytest.raises(ValueError, match="which stores its logits"):
        fit([AttentionEntropyRegularizer()], 1, Causal(model=tiny_causal_lm("bloom")))
    with pytest.raises(ValueError, match="differ in their heads"):
        BandOfRows(1.0, 0.2, 0.5, 0.1).end_step({"a": torch.ones(3, 2), "b": torch.ones(3, 4)})
    for wrong in ({"margin": 2.0}, {"floor": -0.1}, {"weight": -1.0}, {"rows": 0}, {"threshold_rate": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AttentionEntropyRegularizer(**wrong)


def test_the_floor_holds_at_a_rate_that_collapses():
    torch.set_flush_denormal(True)
    held, _ = runs.train(runs.COLLAPSING, [AttentionEntropyRegularizer(weight=0.0, floor=0.4, rows=16)], 50)
    plain, _ = runs.train(runs.COLLAPSING, [], 50)
    torch.set_flush_denormal(False)
    ours, theirs = (runs.attention_entropy_by_head(module.model) for module in (held, plain))
    assert float(theirs.mean()) < 0.25
    assert float(ours.mean()) > 2 * float(theirs.mean())
    assert runs.end_loss(held) < runs.end_loss(plain)
