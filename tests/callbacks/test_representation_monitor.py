"""The monitor in a Trainer: which tokens it counts, and that it leaves nothing behind."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from litropy.callbacks import CollapseDetector, RepresentationCollapseMonitor
from litropy.callbacks.representation_layers import find_layers, hidden_states
from litropy.callbacks.representation_metrics import effective_rank, mean_cosine, row_sums
from litropy.testing import tiny_causal_lm


class Causal(pl.LightningModule):
    """Somebody's module around a Hugging Face model; it does not learn, so that runs are comparable."""

    def __init__(self, architecture="llama", **keys):
        super().__init__()
        self.net = tiny_causal_lm(architecture, **keys)
        self.net.train()

    def training_step(self, batch, batch_idx):
        return self.net(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def sequences(count=8, length=12):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(101, (count, length), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def fit(tmp_path, module, monitor, data=None, batch_size=4, callbacks=(), **options):
    options = {"max_steps": 2, "max_epochs": -1} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[monitor, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(module, DataLoader(data or sequences(), batch_size=batch_size))
    return trainer


def expected(module, data, layers=2):
    """Rank and cosine of each decoder layer's outputs for all real tokens of the data."""
    kept = [[] for _ in range(layers)]
    decoder = find_layers(module)
    handles = [
        decoder[i].register_forward_hook(lambda m, a, output, i=i: kept[i].append(hidden_states(output, i)))
        for i in range(layers)
    ]
    with torch.no_grad():
        for item in data:
            module.net(input_ids=item["input_ids"][None], attention_mask=item["attention_mask"][None])
    for handle in handles:
        handle.remove()
    masks = [item["attention_mask"].bool() for item in data]
    rows = [torch.cat([states[0][mask] for states, mask in zip(layer, masks, strict=True)]) for layer in kept]
    sums = [row_sums(layer) for layer in rows]
    return [effective_rank(s.spectrum).item() for s in sums], [mean_cosine(s).item() for s in sums]


def found(monitor):
    values = monitor.collapse_readings().values
    return (
        values["representation/effective_rank"].tolist(),
        values["representation/mean_cosine"].tolist(),
    )


def assert_equal(got, wanted, rel=1e-4):
    assert got[0] == pytest.approx(wanted[0], rel=rel)
    assert got[1] == pytest.approx(wanted[1], rel=rel)


def test_all_tokens_of_a_step_are_measured_and_logged(tmp_path):
    module, monitor, data = Causal(), RepresentationCollapseMonitor(), sequences()
    trainer = fit(tmp_path, module, monitor, data, batch_size=8, max_steps=1)
    wanted = expected(module, data)
    assert_equal(found(monitor), wanted)
    readings = monitor.collapse_readings()
    assert (readings.step, readings.layers) == (0, (0, 1))
    metrics = trainer.callback_metrics
    assert float(metrics["representation/effective_rank/layer_1"]) == pytest.approx(wanted[0][1], rel=1e-4)
    assert float(metrics["representation/mean_cosine/layer_0"]) == pytest.approx(wanted[1][0], rel=1e-4)
    assert 0 < float(metrics["representation/matrix_entropy/layer_0"]) < 1
    assert 1 < float(metrics["representation/participation_ratio/layer_0"]) < 32
    assert len([name for name in metrics if name.startswith("representation/")]) == 8
    assert not list(tmp_path.iterdir())


def test_accumulated_batches_are_one_probe(tmp_path):
    module, monitor, data = Causal(), RepresentationCollapseMonitor(), sequences()
    fit(tmp_path, module, monitor, data, batch_size=2, accumulate_grad_batches=4, max_steps=1)
    assert_equal(found(monitor), expected(module, data))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_recomputes_counts_once(tmp_path, reentrant):
    module, monitor, data = Causal(), RepresentationCollapseMonitor(), sequences()
    calls = []
    find_layers(module)[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    module.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    fit(tmp_path, module, monitor, data, batch_size=8, max_steps=1)
    assert len(calls) == 2
    module.net.gradient_checkpointing_disable()
    assert_equal(found(monitor), expected(module, data))


def test_padding_is_left_out(tmp_path):
    module, monitor, data = Causal(), RepresentationCollapseMonitor(), sequences()
    for index, item in enumerate(data):
        item["attention_mask"][12 - index :] = 0
    fit(tmp_path, module, monitor, data, batch_size=8, max_steps=1)
    assert_equal(found(monitor), expected(module, data))


def test_a_sample_is_as_large_as_asked_and_real(tmp_path):
    module, monitor, data = Causal(), RepresentationCollapseMonitor(rows=8), sequences()
    for item in data:
        item["attention_mask"][3:] = 0
    counts, gather = [], monitor._gather
    monitor._gather = lambda: counts.append((result := gather())[0].count.tolist()) or result
    fit(tmp_path, module, monitor, data, batch_size=2, accumulate_grad_batches=4, max_steps=1)
    assert counts == [[8.0, 8.0]]
    with torch.no_grad():
        assert found(monitor)[0][0] <= 8


def test_sampling_leaves_the_random_state_alone_and_repeats_itself(tmp_path):
    def run(*callbacks):
        torch.manual_seed(5)
        fit(tmp_path, Causal(), *callbacks, batch_size=4)
        return torch.get_rng_state()

    first, second = RepresentationCollapseMonitor(rows=5), RepresentationCollapseMonitor(rows=5)
    assert torch.equal(run(first), run(pl.Callback()))
    run(second)
    assert found(first) == found(second)


def count_hooks(module):
    return sum(len(part._forward_hooks) for part in module.modules())


def test_layers_are_hooked_at_probes_only(tmp_path):
    hooks = []

    class Count(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            hooks.append(count_hooks(module))

    module, monitor = Causal(), RepresentationCollapseMonitor(every_n_steps=3)
    fit(tmp_path, module, monitor, callbacks=[Count()], max_steps=7)
    assert hooks == [2, 0, 0, 2, 0, 0, 2]
    assert count_hooks(module) == 0
    assert monitor.collapse_readings().step == 6


def test_an_exception_takes_the_hooks_away(tmp_path):
    class Failing(Causal):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("out of memory")

    module = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, module, RepresentationCollapseMonitor())
    assert count_hooks(module) == 0


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_layers_are_measured_and_stay_compiled(tmp_path, whole):
    module, monitor, data = Causal(), RepresentationCollapseMonitor(every_n_steps=4), sequences()
    wanted, graphs = expected(module, data), []

    def backend(graph, inputs):
        def run(*args):
            graphs.append(trainer_step())
            return graph.forward(*args)

        return run

    def trainer_step():
        return module.trainer.global_step

    if whole:
        module.net = torch.compile(module.net, backend=backend)
    else:
        for layer in find_layers(module).values():
            layer.compile(backend=backend)
    fit(tmp_path, module, monitor, data, batch_size=8, max_steps=6)
    assert monitor.collapse_readings().step == 4
    assert_equal(found(monitor), wanted)
    assert set(graphs) == {1, 2, 3, 5}


class Odd(pl.LightningModule):
    """Layers that return tuples, are called several times or never, and have several widths."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 8))
        self.cell = nn.GRU(8, 5, batch_first=True)
        self.unused = nn.Linear(5, 5)

    def forward(self, x):
        return self.cell(self.encoder(x))[0]

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self(torch.zeros(1, 1, 6))  # as a rollout would be
        self(batch)
        return self(batch * 2).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def test_any_module_by_the_names_of_its_layers(tmp_path):
    module, data = Odd(), [torch.randn(7, 6) for _ in range(8)]
    monitor = RepresentationCollapseMonitor(layers=r"encoder\.[02]|cell|unused")
    trainer = fit(tmp_path, module, monitor, data, batch_size=8, max_steps=1)
    batch = torch.stack(data)
    outputs = {"encoder.0": module.encoder[0](batch), "encoder.2": module.encoder(batch), "cell": module(batch)}
    for name, output in outputs.items():
        sums = row_sums(output.detach().flatten(0, 1))
        wanted = effective_rank(sums.spectrum).item()
        assert float(trainer.callback_metrics[f"representation/effective_rank/{name}"]) == pytest.approx(wanted)
        cosine = float(trainer.callback_metrics[f"representation/mean_cosine/{name}"])
        assert cosine == pytest.approx(mean_cosine(sums).item(), abs=1e-6)
    assert trainer.callback_metrics["representation/effective_rank/unused"].isnan()
    assert monitor.collapse_readings().layers == ("encoder.0", "encoder.2", "cell", "unused")


def test_wide_layers_are_projected(tmp_path):
    module, data = Causal(), sequences()
    monitor = RepresentationCollapseMonitor(width=6)
    fit(tmp_path, module, monitor, data, batch_size=8, max_steps=1)
    rank, cosine = found(monitor)
    wanted = expected(module, data)
    assert cosine == pytest.approx(wanted[1], rel=1e-4)
    assert all(1 < value <= 6 < full for value, full in zip(rank, wanted[0], strict=True))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "mixtral", "mamba", "falcon_h1", "gpt_oss"])
def test_decoder_layers_are_found_by_themselves(tmp_path, architecture):
    module, monitor = Causal(architecture), RepresentationCollapseMonitor()
    fit(tmp_path, module, monitor, max_steps=1)
    assert monitor.collapse_readings().layers == (0, 1)
    assert all(1 <= rank <= 32 for rank in found(monitor)[0])


def test_wrong_settings_are_refused(tmp_path):
    for option in ("every_n_steps", "rows", "width"):
        with pytest.raises(ValueError, match=f"`{option}` is 0; it must be at least 1"):
            RepresentationCollapseMonitor(**{option: 0})
    cases = {
        "(": r"`layers` is '\(', which is no regular expression",
        "nothing": r"`layers` is 'nothing', which matches no module of Odd; there are encoder, ",
        None: r"Odd has no nn.ModuleList, so its layers are unknown. Give `layers`",
    }
    for pattern, message in cases.items():
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, Odd(), RepresentationCollapseMonitor(layers=pattern), [torch.randn(7, 6)])
    with pytest.raises(ValueError, match=r"Layer norm returns int; it must return hidden states"):
        hidden_states(3, "norm")


def test_names_without_what_wraps_them():
    inner = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    model = torch.compile(inner)
    assert list(find_layers(model, r"layers\.\d+")) == [0, 1]


def test_a_rank_collapse_reaches_the_detector(tmp_path):
    class Collapsing(Causal):
        """Embeddings of which nothing but the first remains."""

        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 12:
                with torch.no_grad():
                    self.net.get_input_embeddings().weight[:] = 1.0
                    for parameter in (p for layer in find_layers(self).values() for p in layer.parameters()):
                        parameter.zero_()

    detector = CollapseDetector(every_n_steps=5)
    data = sequences(400, 8)
    fit(
        tmp_path, Collapsing(), RepresentationCollapseMonitor(every_n_steps=2), data, callbacks=[detector], max_steps=40
    )
    alarm = next(alarm for alarm in detector.alarms if alarm.rule == "representation_rank")
    assert (alarm.level, alarm.layer, alarm.step) == (1, 0, 22)
