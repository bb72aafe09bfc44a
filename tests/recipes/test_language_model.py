import csv
import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from litropy.recipes import LanguageModel, strategies
from litropy.recipes.causal_lm import CausalLM
from litropy.recipes.packing_check import isolates_documents
from litropy.recipes.parity import check_parity
from litropy.recipes.sharding import decoder_layers, shard
from litropy.recipes.token_normalisation import TokenNormaliser
from litropy.testing import tiny_causal_lm, tiny_config


class Words:
    """Stands for a tokenizer of some number of tokens."""

    bos_token_id, eos_token_id, pad_token_id = None, 1, 0

    def __init__(self, size=101):
        self.size = size

    def __len__(self):
        return self.size

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(str(token) for token in row if token > 1) for row in ids.tolist()]

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


class Data(LightningDataModule):
    """Twelve sequences with very different numbers of targets, in batches of two."""

    unigram_entropy = 4.5

    def __init__(self, tokenizer=None, batch_size=2):
        super().__init__()
        self.tokenizer, self.batch_size = tokenizer, batch_size

    def items(self):
        generator = torch.Generator().manual_seed(11)
        for index in range(12):
            ids = torch.randint(2, 101, (16,), generator=generator)
            labels = ids.clone()
            labels[: (5 * index) % 16] = -100
            yield {"input_ids": ids, "labels": labels}

    def train_dataloader(self):
        return DataLoader(list(self.items()), batch_size=self.batch_size)

    val_dataloader = test_dataloader = train_dataloader


class Steps(Callback):
    """Keeps what every step logged."""

    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, module, *_):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def trainer(folder=None, callbacks=(), **options):
    defaults = {"max_steps": 3, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    return Trainer(callbacks=list(callbacks), **defaults | quiet | {"num_sanity_val_steps": 0} | options)


def module(architecture="llama", seed=5, keys=None, **options):
    seed_everything(seed, verbose=False)
    return LanguageModel(config=tiny_config(architecture, **(keys or {})), learning_rate=0.01, **options)


def fit(model, data=None, ckpt_path=None, **options):
    steps = Steps()
    runner = trainer(callbacks=[steps, *options.pop("callbacks", ())], **options)
    runner.fit(model, datamodule=data or Data(), ckpt_path=ckpt_path)
    return steps.logged, runner


def weights_of(model):
    return {name: value.clone() for name, value in model.causal_lm.state_dict().items()}


# training and what it logs


def test_training_learns_a_repeated_batch():
    logged, _ = fit(module(schedule="constant"), max_steps=60, overfit_batches=1)
    assert logged[0]["train/loss"] > 4.3
    assert logged[-1]["train/loss"] < 1.0


def test_first_step_logs_what_eager_code_computes():
    reference = module()
    reference.configure_model()
    batch = next(iter(Data().train_dataloader()))
    logits = reference.causal_lm(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    kept = targets != -100
    loss = F.cross_entropy(logits, targets)
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in reference.causal_lm.parameters()]).norm()
    entropy = torch.distributions.Categorical(logits=logits[kept]).entropy().mean()
    accuracy = (logits.argmax(-1) == targets)[kept].float().mean()
    (logged, *_), _ = fit(module(warmup_steps=2), max_steps=1)
    assert logged["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert logged["train/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert logged["entropy/output"] == pytest.approx(float(entropy.detach()), rel=1e-5)
    assert logged["train/token_accuracy"] == pytest.approx(float(accuracy), abs=1e-6)
    assert logged["train/learning_rate"] == pytest.approx(0.005)


def test_evaluation_is_a_mean_over_tokens_and_not_over_batches():
    model = module()
    (losses,) = trainer().validate(model, datamodule=Data(), verbose=False)
    (again,) = trainer().validate(model, datamodule=Data(batch_size=5), verbose=False)
    (tested,) = trainer().test(model, datamodule=Data(), verbose=False)
    batch = {name: torch.stack([item[name] for item in Data().items()]) for name in ("input_ids", "labels")}
    expected = float(model.causal_lm(**batch).loss.detach())
    assert losses["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert losses["val/perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert again == pytest.approx(losses, rel=1e-5)
    assert {name.replace("test/", "val/"): value for name, value in tested.items()} == pytest.approx(losses)
    assert set(losses) == {"val/loss", "val/perplexity", "val/entropy", "val/token_accuracy"}


def test_statistics_can_be_left_out():
    logged, _ = fit(module(log_stats=False))
    assert set(logged[-1]) == {"train/loss", "train/grad_norm", "train/learning_rate"}


def test_smoothing_and_z_loss_are_optimised_and_not_validated():
    plain, runner = fit(module(), max_steps=1, val_check_interval=1)
    shaped, other = fit(module(label_smoothing=0.3, z_loss=0.1), max_steps=1, val_check_interval=1)
    assert shaped[0]["train/loss"] > plain[0]["train/loss"] + 1
    # one step apart, so nearly but not quite equal
    losses = [float(each.callback_metrics["val/loss"]) for each in (runner, other)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 0.01), ("value", 0.001)])
def test_clipping(algorithm, limit):
    class Look(Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            if gradients:
                flat = torch.cat([gradient.flatten() for gradient in gradients])
                self.size = float(flat.norm() if algorithm == "norm" else flat.abs().max())

    look = Look()
    logged, _ = fit(module(), gradient_clip_val=limit, gradient_clip_algorithm=algorithm, callbacks=[look], max_steps=2)
    assert look.size == pytest.approx(limit, rel=1e-3)
    assert logged[0]["train/grad_norm"] > 10 * limit


def test_what_surrounds_the_loss_does_not_wait_for_the_device(monkeypatch):
    waits, calls = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                waits.append(function)
            return function(*args, **(kwargs or {}))

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            calls.append(name)
            with Watch():
                return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(LanguageModel, "on_before_optimizer_step")
    watch(LanguageModel, "configure_gradient_clipping")
    watch(TokenNormaliser, "divisor")
    fit(module(), gradient_clip_val=1.0, accumulate_grad_batches=2, max_steps=2)
    assert len(calls) == 2 + 2 + 4
    assert not waits


def test_unigram_entropy_is_logged_once(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(module(), logger=logger, log_every_n_steps=1)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        values = [row.get("data/unigram_entropy") for row in csv.DictReader(file)]
    assert [value for value in values if value] == ["4.5"]


# precision, checkpointing, compiling


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_half_precision(precision, dtype):
    full, _ = fit(module())
    model = module()
    half, _ = fit(model, precision=precision, gradient_clip_val=1.0)
    assert all(parameter.dtype == dtype for parameter in model.causal_lm.parameters())
    assert [step["train/loss"] for step in half] == pytest.approx([step["train/loss"] for step in full], rel=0.01)


def test_evaluation_in_half_precision_keeps_its_digits():
    model = module()
    (result,) = trainer(precision="bf16-true").validate(model, datamodule=Data(), verbose=False)
    assert result["val/loss"] != float(torch.tensor(result["val/loss"]).bfloat16())


def test_gradient_checkpointing_changes_nothing_but_memory():
    plain, _ = fit(module())
    model = module(gradient_checkpointing=True)
    recomputed = []
    model.configure_model()
    layer = decoder_layers(model.model.backbone)[0]
    layer.mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
    logged, _ = fit(model, max_steps=1)
    # the first two calls belong to the check of the first batch
    assert len(recomputed) == 4
    assert logged[0] == pytest.approx(plain[0], rel=1e-5)


@pytest.mark.slow
def test_compiled_layers_train_alike():
    model = module(compile=True)
    logged, _ = fit(model)
    plain_model = module()
    plain, _ = fit(plain_model)
    assert all(layer._compiled_call_impl is not None for layer in decoder_layers(model.model.backbone))
    assert [step["train/loss"] for step in logged] == pytest.approx([step["train/loss"] for step in plain], rel=1e-4)
    assert weights_of(model).keys() == weights_of(plain_model).keys()


# the checks of the first batch


def test_parity_check_leaves_the_model_as_it_was():
    causal_lm = tiny_causal_lm("gpt2").train()
    causal_lm.transformer.h[0].eval()
    model = CausalLM(causal_lm)
    batch = next(iter(Data().train_dataloader()))
    state = torch.get_rng_state()
    errors = check_parity(model, batch)
    assert set(errors) == {"loss", "causal_lm.transformer.wte.weight"}
    assert max(errors.values()) < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not causal_lm.transformer.h[0].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parity_check_notices_a_wrong_loss():
    model = CausalLM(tiny_causal_lm("gemma2"))
    batch = next(iter(Data().train_dataloader()))
    check_parity(model, batch)
    object.__setattr__(model.head_info, "softcap", None)
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM disagrees with the model's own.*check_parity: false"):
        check_parity(model, batch)


def test_parity_check_has_targets_even_where_the_batch_has_none():
    model = CausalLM(tiny_causal_lm("llama"))
    batch = next(iter(Data().train_dataloader()))
    errors = check_parity(model, batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert all(math.isfinite(error) for error in errors.values())


def test_parity_check_does_not_change_training():
    # GPT-2 has dropout, so a moved random state would show
    runs = [fit(module("gpt2", check_parity=check))[0] for check in (True, False)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("architecture", "isolates"), [("llama", True), ("mixtral", True), ("opt", False), ("mamba", False)]
)
def test_packed_documents(architecture, isolates):
    assert isolates_documents(CausalLM(tiny_causal_lm(architecture))) == isolates


def test_leaking_documents_are_announced():
    class Packed(Data):
        def items(self):
            for item in super().items():
                yield item | {"position_ids": torch.arange(8).repeat(2)}

    with pytest.warns(UserWarning, match="MambaForCausalLM lets packed documents see one another"):
        fit(module("mamba"), data=Packed(), max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*packed documents.*")
        fit(module("llama"), data=Packed(), max_steps=1)


# where the model comes from


def test_vocabulary_and_special_tokens_come_from_the_tokenizer():
    model = LanguageModel(config={"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1}, pad_vocab_to=32)
    trainer().validate(model, datamodule=Data(Words()), verbose=False)
    config = model.causal_lm.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (128, None, 1, 0)


def test_padding_token_with_another_use_is_not_frozen():
    class EosPads(Words):
        pad_token_id = 1

    model = LanguageModel(config={"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1})
    trainer().validate(model, datamodule=Data(EosPads()), verbose=False)
    assert model.causal_lm.get_input_embeddings().padding_idx is None


def test_weights_depend_on_the_seed_alone():
    first, second, third = module(), module(), module()
    for model, seed, drawn in ((first, 1, 0), (second, 1, 100), (third, 2, 0)):
        torch.manual_seed(seed)
        torch.rand(drawn)
        model.configure_model()
    head = "lm_head.weight"
    assert torch.equal(weights_of(first)[head], weights_of(second)[head])
    assert not torch.equal(weights_of(first)[head], weights_of(third)[head])


def test_building_twice_keeps_the_model():
    model = module()
    model.configure_model()
    before = model.causal_lm
    model.configure_model()
    assert model.causal_lm is before


def test_config_from_a_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("qwen3")))
    model = LanguageModel(config=tmp_path / "config.json")
    model.configure_model()
    assert type(model.causal_lm).__name__ == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": 32}, "model_type None"),
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        (
            {"model_type": "llama", "hiden_size": 32},
            "'hiden_size' is unknown to model_type 'llama'. Did you mean 'hidden_size'",
        ),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ("nowhere.json", "is no file"),
    ],
)
def test_bad_configs_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        LanguageModel(config=config).configure_model()


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_unreadable_config_file_is_named(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json"):
        LanguageModel(config=tmp_path / "bad.json").configure_model()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either `config`"),
        ({"config": {}, "pretrained": "x"}, "and not both"),
        ({"config": {}, "pad_vocab_to": 0}, "at least 1"),
        ({"config": {}, "warmup_steps": -1}, "at least 0"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        LanguageModel(**options)


def test_pretrained_folder_is_loaded(tmp_path):
    causal_lm = tiny_causal_lm("gemma2")
    causal_lm.save_pretrained(tmp_path)
    model = LanguageModel(pretrained=str(tmp_path))
    model.configure_model()
    assert all(torch.equal(value, causal_lm.state_dict()[name]) for name, value in weights_of(model).items())


@pytest.mark.parametrize("name", ["./no/such/folder", "nobody/no-such-model"])
def test_unknown_pretrained_model_is_refused(name):
    with pytest.raises(ValueError, match=f"`pretrained` is '{name}'"):
        LanguageModel(pretrained=name).configure_model()


def test_tokenizer_larger_than_the_head_is_refused():
    with pytest.raises(ValueError, match=r"The tokenizer has 300 tokens.*LlamaForCausalLM has 101 rows"):
        trainer().validate(module(), datamodule=Data(Words(300)), verbose=False)


# strategies


@pytest.mark.parametrize(
    ("name", "words"), [("DeepSpeedStrategy", "accumulate_grad_batches=2"), ("FSDPStrategy", "FSDP2")]
)
def test_strategies_that_would_be_wrong_are_refused(monkeypatch, name, words):
    monkeypatch.setattr(strategies, name, SingleDeviceStrategy)
    with pytest.raises(ValueError, match=words):
        fit(module(), accumulate_grad_batches=2)


def test_tensor_parallelism_is_refused():
    class Mesh:
        mesh_dim_names = ("data_parallel", "tensor_parallel")

        def __getitem__(self, name):
            return SimpleNamespace(size=lambda: 4)

    with pytest.raises(ValueError, match="tensor_parallel_size to 1"):
        shard(CausalLM(tiny_causal_lm("llama")), Mesh(), "32-true")


# checkpoints and folders


def training_only(logged):
    return {name: value for name, value in logged.items() if not name.startswith("val/")}


def test_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    options = {"schedule": "wsd", "warmup_steps": 2}
    model = module("gpt2", **options)
    whole, _ = fit(model, max_steps=12, accumulate_grad_batches=2)

    class StopAfter(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = trainer.current_epoch == 1

    first, runner = fit(module("gpt2", **options), max_steps=12, accumulate_grad_batches=2, callbacks=[StopAfter()])
    checkpoint = tmp_path / "last.ckpt"
    runner.save_checkpoint(checkpoint)
    state = torch.get_rng_state()
    resumed = module("gpt2", seed=99, **options)

    class Restore(Callback):
        def on_train_start(self, trainer, module):
            torch.set_rng_state(state)

    rest, _ = fit(resumed, max_steps=12, accumulate_grad_batches=2, ckpt_path=str(checkpoint), callbacks=[Restore()])
    assert len(first) == 12
    # the first micro-batch of a step logs nothing
    assert [training_only(step) for step in rest[1::2]] == [training_only(step) for step in whole[13::2]]
    assert all(torch.equal(value, weights_of(model)[name]) for name, value in weights_of(resumed).items())


def test_checkpoint_of_another_model_is_refused_in_one_sentence(tmp_path):
    _, runner = fit(module(), max_steps=1)
    runner.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="The checkpoint belongs to another model") as caught:
        fit(module(keys={"hidden_size": 48, "num_hidden_layers": 3}), ckpt_path=str(tmp_path / "a.ckpt"))
    message = str(caught.value)
    assert "hidden_size 32 there, 48 here" in message
    assert "model.causal_lm.model.embed_tokens.weight is [101, 32] in the checkpoint, [101, 48] in the model" in message
    assert len(message) < 600


def test_module_loads_from_a_checkpoint_alone(tmp_path):
    model = LanguageModel(config={"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1})
    _, runner = fit(model, data=Data(Words()), max_steps=1)
    runner.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt")
    assert all(torch.equal(value, weights_of(model)[name]) for name, value in weights_of(loaded).items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_saved_folder_loads_with_transformers(tmp_path, architecture):
    model = module(architecture)
    fit(model, data=Data(Words()), max_steps=1)
    model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, weights_of(model)[name]) for name, value in loaded.state_dict().items())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folder_with_something_else_is_left_alone(tmp_path):
    model = module()
    model.configure_model()
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is no Hugging Face folder"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_failure_while_saving_leaves_the_old_folder(tmp_path):
    model = module()
    fit(model, data=Data(Words()), max_steps=1)
    model.save_pretrained(tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())

    class Full(Words):
        def save_pretrained(self, folder):
            raise OSError("disk full")

    model.trainer.datamodule.tokenizer = Full()
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# prediction


class Prompts(Data):
    def predict_dataloader(self):
        ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
        return DataLoader([{"input_ids": ids, "attention_mask": (ids > 0).long()}], batch_size=None)


def test_prediction_continues_prompts():
    model = module(generation={"max_new_tokens": 3, "do_sample": False})
    (answers,) = trainer().predict(model, datamodule=Prompts(Words()))
    assert [answer["prompt"] for answer in answers] == ["5 6", "7 8 9 10"]
    alone = model.causal_lm.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert answers[0]["completion"] == " ".join(map(str, alone[0, 2:].tolist()))


def test_prediction_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="needs a data module with a `tokenizer`"):
        trainer().predict(module(), datamodule=Prompts())


def test_model_that_is_not_built_yet_says_so():
    with pytest.raises(ValueError, match="does not exist yet"):
        _ = module().causal_lm


def test_tokens_in_a_batch():
    assert module().num_tokens_in_batch(next(iter(Data().train_dataloader()))) == 32


def test_skipping_is_logged_and_only_where_asked():
    skipping, plain = (fit(module(**options), max_steps=2)[0][-1] for options in ({"skip_tol": 1e-3}, {}))
    assert 0 <= skipping["train/skipped_mass"] <= 1e-3
    assert 0 < skipping["train/surviving_share"] <= 1
    assert "train/skipped_mass" not in plain
    with pytest.raises(ValueError, match="`skip_tol` is 2"):
        module(skip_tol=2)
