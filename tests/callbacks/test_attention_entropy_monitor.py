"""The monitor with a plain Trainer: what it logs, against stored attention weights, and what it leaves alone."""

import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.data import DataLoader

from litropy.callbacks import AttentionEntropyMonitor
from litropy.callbacks.attention_capture import capture_attention
from litropy.callbacks.attention_probe import AttentionProbe
from litropy.callbacks.attention_schedule import sample_rows
from litropy.callbacks.collapse_readings import PublishesReadings
from litropy.kernels.attention_entropy import attention_entropy
from litropy.recipes import LanguageModel
from litropy.testing import tiny_causal_lm, tiny_config

LENGTH, SHORT = 16, 12
ROWS = 2 * (LENGTH - 7) + (SHORT - 7)  # rows of a batch that see at least 8 keys


def batches(count=4, size=3, seed=0, pad=True):
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        ids = torch.randint(101, (size, LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        if pad:
            mask[0, SHORT:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


class Training(pl.LightningModule):
    """What anybody would write."""

    def __init__(self, model, before=None):
        super().__init__()
        self.model, self.before = model, before

    def training_step(self, batch, batch_idx):
        if self.before is not None:
            self.before(self.model, batch)
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Record(pl.Callback):
    """Keeps the readings as the detector would collect them, and the metrics that were logged."""

    def __init__(self, monitor):
        self.monitor, self.readings, self.logged = monitor, [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        found = self.monitor.collapse_readings()
        if found is not None and all(found is not earlier for earlier in self.readings):
            self.readings.append(found)
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def monitor_of(**options):
    return AttentionEntropyMonitor(**{"dense_steps": 100, "sequences": 8, **options})


def fit(module, monitor=None, data=None, **options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    record = Record(monitor)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[] if monitor is None else [monitor, record],
        enable_model_summary=False,
        enable_progress_bar=False,
        **{name: value for name, value in options.items() if name != "ckpt_path"},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*|.*log_every_n_steps.*")
        trainer.fit(module, DataLoader(data or batches(), batch_size=None), ckpt_path=options.get("ckpt_path"))
    return record


def is_patched():
    from litropy.callbacks.attention_capture import _patches

    return bool(_patches)


def truth(architecture, batch, min_keys=8, **options):
    """Normalised entropies of heads, by layer, from stored attention weights in float64."""
    model = tiny_causal_lm(architecture, attn_implementation="eager", **options).eval()
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    found = []
    for weights in attentions:
        p, keys = weights.double(), (weights > 0).sum(-1)
        entropy = -torch.xlogy(p, p).sum(-1) / keys.clamp_min(2).log()
        counted = (keys >= min_keys) & batch["attention_mask"].bool()[:, None]
        found.append((torch.where(counted, entropy, 0).sum((0, 2)) / counted.sum((0, 2))).float())
    return torch.stack(found)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "falcon", "qwen3_moe"])
def test_numbers_are_those_of_stored_weights(architecture):
    monitor, data = monitor_of(), batches(1)
    record = fit(Training(tiny_causal_lm(architecture).eval()), monitor, data)
    entropy, logged = truth(architecture, data[0]), record.logged[0]
    assert isinstance(monitor, PublishesReadings)
    readings = record.readings[0]
    assert (readings.step, readings.layers) == (0, (0, 1))
    torch.testing.assert_close(readings.values["attention/entropy"], entropy, rtol=0, atol=3e-6)
    for layer in (0, 1):
        assert logged[f"entropy/attention/layer_{layer}"] == pytest.approx(float(entropy[layer].mean()), abs=3e-6)
        assert logged[f"entropy/attention_min/layer_{layer}"] == pytest.approx(float(entropy[layer].min()), abs=3e-6)
        top = readings.values["attention/max_logit"][layer].max()
        assert logged[f"attention/max_logit/layer_{layer}"] == pytest.approx(float(top))
        assert 0 < logged[f"attention/p_max/layer_{layer}"] <= 1
    assert logged["entropy/attention/mean"] == pytest.approx(float(entropy.mean()), abs=3e-6)
    assert logged["entropy/probe_ms"] > 0
    assert not is_patched()


def test_largest_logit():
    data, tops = batches(1, pad=False), []

    def see(module, args, kwargs, output):
        q, k = (
            getattr(module, name)(args[0] if args else kwargs["hidden_states"]).view(3, LENGTH, -1, 8)
            for name in ("q_proj", "k_proj")
        )
        # no rotation: the positions are all zero
        logits = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 8**0.5
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        tops.append(logits.masked_fill(~seen, -torch.inf)[:, :, 7:].amax((0, 2, 3)))

    model = tiny_causal_lm("llama").eval()
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(see, with_kwargs=True)
    data[0] |= {"position_ids": torch.zeros(3, LENGTH, dtype=torch.int64)}
    record = fit(Training(model), monitor_of(), data)
    found = record.readings[0].values["attention/max_logit"]
    torch.testing.assert_close(found, torch.stack(tops), rtol=1e-5, atol=1e-5)


def weights_after(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon", "bloom"])
def test_training_is_bit_for_bit_the_same(architecture):
    found = []
    for monitor in (None, AttentionEntropyMonitor(dense_steps=1, every_n_steps=2, rows=5, sequences=2)):
        torch.manual_seed(1)  # of the dropout that these configs have by default
        module = Training(tiny_causal_lm(architecture).train())
        fit(module, monitor)
        found.append(weights_after(module))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_steps_that_are_probed():
    monitor = monitor_of(dense_steps=2, every_n_steps=3)
    record = fit(Training(tiny_causal_lm("llama")), monitor, batches(8))
    assert [readings.step for readings in record.readings] == [0, 1, 3, 6]
    monitor = monitor_of(dense_steps=0, every_n_steps=2)
    record = fit(Training(tiny_causal_lm("llama")), monitor, batches(8), accumulate_grad_batches=2)
    assert [readings.step for readings in record.readings] == [0, 2]


def test_accumulation_takes_the_first_micro_batch():
    data = batches(4)
    record = fit(Training(tiny_causal_lm("llama").eval()), monitor_of(), data, accumulate_grad_batches=2)
    torch.testing.assert_close(
        record.readings[0].values["attention/entropy"], truth("llama", data[0]), rtol=0, atol=3e-6
    )


def test_sampled_rows_estimate_all():
    model = tiny_causal_lm("llama").eval()
    frozen = Training(model)
    frozen.configure_optimizers = lambda: torch.optim.SGD(frozen.parameters(), 0.0)
    record = fit(frozen, monitor_of(rows=4, sequences=2, min_keys=1), batches(1, size=4, pad=False) * 60)
    found = torch.stack([readings.values["attention/entropy"] for readings in record.readings])
    whole = truth("llama", batches(1, size=4, pad=False)[0], min_keys=2)
    rows = (whole * (LENGTH - 1) + 1) / LENGTH  # the first row sees one key, and counts as uniform
    assert found.std(0).max() > 1e-3  # other rows each time
    torch.testing.assert_close(found.mean(0), rows, rtol=0, atol=4 * float(found.std(0).max()) / 60**0.5)


@given(st.integers(1, 300), st.integers(1, 80), st.integers(0, 10_000))
def test_sample_of_rows(length, wanted, seed):
    before = torch.random.get_rng_state()
    rows = sample_rows(length, wanted, seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(rows) == min(length, wanted)
    assert rows.tolist() == sorted(rows.tolist())
    assert rows.bincount().max() <= 2  # a row may lie in two stretches
    assert 0 <= rows[0] <= rows[-1] < length
    assert torch.equal(rows, sample_rows(length, wanted, seed))


def test_every_row_is_as_likely():
    counts = sum(torch.bincount(sample_rows(10, 4, seed), minlength=10) for seed in range(4000))
    assert counts.sum() == 16_000
    assert ((counts - 1600).abs() < 5 * (4000 * 0.4 * 0.6) ** 0.5).all()


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        return func(*args, **(kwargs or {}))


def test_a_probe_does_not_wait_for_the_device(monkeypatch):
    def kernel(*args, **options):
        with _disable_current_modes():  # on a CPU it looks at rows
            return attention_entropy(*args, **options)

    def see(call):
        with NoWaiting():
            probe.add(call)

    monkeypatch.setattr("litropy.callbacks.attention_call.attention_entropy", kernel)
    model, probe = tiny_causal_lm("llama"), AttentionProbe(0, 1, rows=4, sequences=2, min_keys=8)
    with capture_attention(model, see):
        model(**batches(1)[0])
    layers = probe.layers()
    with NoWaiting():
        result = probe.finish(layers, torch.device("cpu"))
        result.readings()
        result.metrics()
    assert layers.paths == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        result.values.sum().item()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant):
    data, found = batches(1), []
    for checkpointing in (False, True):
        model = tiny_causal_lm("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        monitor = monitor_of()
        record = fit(Training(model), monitor, data)
        found.append((record.readings[0], monitor._latest.values))
    order = [found[1][0].layers.index(layer) for layer in (0, 1)]  # the backward pass comes the other way round
    assert torch.equal(found[0][1], found[1][1][:, order])
    assert found[0][1][3].unique().tolist() == [ROWS]


def test_generation_evaluation_and_frozen_models_do_not_count():
    def before(model, batch):
        model.generate(batch["input_ids"][:, :4], max_new_tokens=2, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            model(**batch)

    data = batches(1)
    record = fit(Training(tiny_causal_lm("llama").eval(), before), monitor_of(), data)
    torch.testing.assert_close(
        record.readings[0].values["attention/entropy"], truth("llama", data[0]), rtol=0, atol=3e-6
    )


def test_language_model_and_its_check_of_the_first_batch():
    data, found = batches(2), []
    for check in (True, False):
        torch.manual_seed(0)
        module = LanguageModel(config=tiny_config("llama"), learning_rate=0.0, check_parity=check, pad_vocab_to=1)
        monitor = monitor_of()
        record = fit(module, monitor, data)
        found.append([readings.values["attention/entropy"] for readings in record.readings])
        rows = monitor._latest.values[3]
        assert rows.unique().tolist() == [ROWS]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("how", ["layers", "model"])
def test_compiled_models(how):
    counter, data, monitor = CompileCounter(), batches(6, pad=False), monitor_of(dense_steps=1, every_n_steps=3)
    model = tiny_causal_lm("llama", use_cache=False).train()
    if how == "layers":
        for layer in model.model.layers:
            layer.compile(backend=counter)
    else:
        model = torch.compile(model, backend=counter)
    frames = []
    model.register_forward_hook(lambda *_: frames.append(counter.frame_count))
    module = Training(model)
    record = fit(module, monitor, data)
    plain = Training(tiny_causal_lm("llama").train())
    eager = fit(plain, monitor_of(dense_steps=1, every_n_steps=3), data)
    for a, b in zip(record.readings, eager.readings, strict=True):
        torch.testing.assert_close(a.values["attention/entropy"], b.values["attention/entropy"])
    # steps 0 and 3 are probed, without compiling; all others run what the second has compiled
    assert frames[0] == 0
    assert frames[2] > 0
    assert frames[2:] == [frames[2]] * 4
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_half_precision_under_autocast():
    data, found = batches(1), []
    for precision in ("32-true", "bf16-mixed"):
        record = fit(Training(tiny_causal_lm("llama").eval()), monitor_of(), data, precision=precision)
        found.append(record.readings[0].values["attention/entropy"])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=5e-3)


def test_plain_transformer_with_cross_attention():
    class Translate(Training):
        def training_step(self, batch, batch_idx):
            return self.model(batch["x"], batch["y"]).square().mean()

    model = nn.Transformer(8, 2, 1, 2, 16, batch_first=True)
    data = [{"x": torch.randn(2, 9, 8), "y": torch.randn(2, 11, 8)}]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "AttentionEntropyMonitor")
        record = fit(Translate(model), monitor_of(), data)
    names = [
        "encoder.layers.0.self_attn",
        *(f"decoder.layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn", "multihead_attn")),
    ]
    assert record.readings[0].layers == tuple(f"model.{name}" for name in names)
    assert f"entropy/attention/model.{names[2]}" in record.logged[0]


def test_layers_with_other_numbers_of_heads():
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, heads, 16, batch_first=True) for heads in (4, 2)))

    class Encode(Training):
        def training_step(self, batch, batch_idx):
            return self.model(batch).square().mean()

    record = fit(Encode(model), monitor_of(), [torch.randn(2, 9, 8)])
    entropy, logged = record.readings[0].values["attention/entropy"], record.logged[0]
    assert entropy.isnan().tolist() == [[False] * 4, [False, False, True, True]]
    assert logged["entropy/attention/layer_1"] == pytest.approx(float(entropy[1, :2].mean()))
    assert logged["entropy/attention_min/layer_1"] == pytest.approx(float(entropy[1, :2].min()))


class NoAttention(pl.LightningModule):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class HandmadeAttention(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_error_that_lists_what_was_found():
    with pytest.raises(
        ValueError, match=r"saw no attention.*Modules named attention: none.*Linear, NoAttention.*report_"
    ):
        fit(NoAttention(nn.Linear(4, 4)), monitor_of(), [torch.zeros(2, 4)])
    with pytest.raises(ValueError, match=r"Modules named attention: layer \(HandmadeAttention\)"):
        fit(NoAttention(HandmadeAttention(4, 4)), monitor_of(), [torch.zeros(2, 4)])
    assert not is_patched()


def test_warning_of_attention_that_is_not_seen():
    module = Training(tiny_causal_lm("llama"))
    module.extra = HandmadeAttention(2, 2)
    with pytest.warns(UserWarning, match=r"not called with gradients in the first step.*: extra \(HandmadeAttention\)"):
        fit(module, monitor_of(), batches(1))


def test_nan_is_named_and_not_averaged_away():
    model = tiny_causal_lm("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[:8] = torch.nan  # the first of four heads
    with pytest.warns(
        UserWarning, match=r"NaN or infinity in queries or keys at step 0: layer_1 \(\d+ of \d+ rows\), lay"
    ):
        record = fit(Training(model), monitor_of(), batches(1))
    entropy = record.readings[0].values["attention/entropy"]
    assert entropy.isnan().any(1).tolist() == [False, True, True]
    assert entropy[1].isnan().tolist() == [True, False, False, False]
    assert np.isnan(record.logged[0]["entropy/attention/layer_1"])
    assert np.isnan(record.logged[0]["entropy/attention/mean"])
    assert np.isfinite(record.logged[0]["entropy/attention/layer_0"])


def test_errors_restore_the_model():
    def fail(model, batch):
        assert is_patched()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fit(Training(tiny_causal_lm("llama"), fail), monitor_of())
    assert not is_patched()


def test_files_beside_those_of_the_logger(tmp_path):
    monitor = monitor_of(dense_steps=1, every_n_steps=2, heatmap_every_n_steps=4)
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(Training(tiny_causal_lm("llama")), monitor, batches(8), logger=logger, log_every_n_steps=1)
    files = sorted((tmp_path / "run" / "version_0" / "attention_entropy").iterdir())
    assert [file.name for file in files] == [f"step_{step:08d}.npz" for step in (0, 4, 6)]
    arrays = np.load(files[1])
    assert arrays["steps"].tolist() == [2, 4]
    assert arrays["layers"].tolist() == ["layer_0", "layer_1"]
    assert arrays["entropy"].shape == arrays["max_logit"].shape == arrays["rows"].shape == (2, 2, 4)
    torch.testing.assert_close(
        torch.tensor(np.load(files[2])["entropy"][-1]), monitor.collapse_readings().values["attention/entropy"]
    )
    events = EventAccumulator(str(tmp_path / "run" / "version_0")).Reload()
    assert [event.step for event in events.Images("attention/entropy")] == [0, 4, 6]
    assert len(events.Scalars("entropy/attention/layer_1")) == 8


def test_nothing_on_disk_without_a_logger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(Training(tiny_causal_lm("llama")), monitor_of(), batches(2), default_root_dir=tmp_path)
    csv = CSVLogger(tmp_path / "csv")
    fit(Training(tiny_causal_lm("llama")), monitor_of(heatmap_every_n_steps=0), batches(2), logger=csv)
    assert not list(tmp_path.rglob("*.npz"))


class Save(pl.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    def run(monitor, steps, **options):
        record = Record(monitor)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=CSVLogger(tmp_path, name=options.pop("name")),
            callbacks=[monitor, record, Save(tmp_path / "last.ckpt", 5)],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(Training(tiny_causal_lm("llama")), DataLoader(batches(1) * 10, batch_size=None), **options)
        return record.readings

    def monitor():
        return AttentionEntropyMonitor(dense_steps=2, every_n_steps=3, rows=5, sequences=1, heatmap_every_n_steps=4)

    whole = run(monitor(), 10, name="whole")
    again = monitor()
    rest = run(again, 10, name="rest", ckpt_path=tmp_path / "last.ckpt")
    assert [readings.step for readings in whole] == [0, 1, 3, 6, 9]
    assert [readings.step for readings in rest] == [6, 9]
    for a, b in zip(whole[3:], rest, strict=True):
        assert torch.equal(a.values["attention/entropy"], b.values["attention/entropy"])
    assert again.schedule.position == 10
    assert again.costs["sparse"].probe_ms > again.costs["sparse"].last_ms > 0
    files = {name: sorted(x.name for x in (tmp_path / name).rglob("*.npz")) for name in ("whole", "rest")}
    steps = sorted(
        int(step) for name in files["whole"] for step in np.load(next(tmp_path.glob(f"whole/*/*/{name}")))["steps"]
    )
    assert steps == [0, 1, 3, 6, 9]
    assert files["rest"] == [name for name in files["whole"] if int(name[5:13]) > 5]


def test_a_second_fit_begins_anew():
    monitor = monitor_of(dense_steps=2, every_n_steps=50)
    for _ in range(2):
        record = fit(Training(tiny_causal_lm("llama")), monitor, batches(4))
        assert [readings.step for readings in record.readings] == [0, 1]


@pytest.mark.parametrize(
    ("option", "value", "least"), [("rows", 0, 1), ("every_n_steps", 0, 1), ("dense_steps", -1, 0), ("min_keys", 0, 1)]
)
def test_bad_options(option, value, least):
    with pytest.raises(ValueError, match=f"`{option}` is {value}; it must be at least {least}"):
        AttentionEntropyMonitor(**{option: value})


def test_tensor_parallelism_is_refused():
    class Mesh(dict):
        mesh_dim_names = ("data_parallel", "tensor_parallel")

    class Dimension:
        def size(self):
            return 2

    module = Training(tiny_causal_lm("llama"))
    module._device_mesh = Mesh(tensor_parallel=Dimension())
    with pytest.raises(ValueError, match="tensor_parallel_size=2, which gives each rank other heads"):
        fit(module, monitor_of(), batches(1))
