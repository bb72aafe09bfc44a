import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from litropy.recipes import TextDataModule
from litropy.recipes.resumable_loader import eval_batches, shuffled_batches


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    words = random.Random(0)
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"<{number}> " + " ".join(str(words.randrange(99)) for _ in range(50)))
    return str(folder)


@pytest.fixture
def make(tmp_path):
    def build(stage=None, **options):
        options = {"vocab_size": 300, "sequence_length": 32, "batch_size": 4, "num_workers": 0, **options}
        module = TextDataModule(cache_dir=str(tmp_path / "cache"), **options)
        module.setup(stage)
        return module

    return build


def all_text(module, loader):
    tokens = [token for batch in loader for row in batch["input_ids"] for token in row.tolist()]
    return module.tokenizer.decode(tokens)


def test_the_standard_library_is_text_on_every_machine(make):
    module = make(max_mebibytes=0.2, vocab_size=512)
    batch = next(iter(module.train_dataloader()))
    assert list(batch) == ["input_ids", "labels", "position_ids"]
    assert {(tuple(value.shape), value.dtype) for value in batch.values()} == {((4, 32), torch.int64)}
    learnt = batch["labels"] != -100
    assert (batch["labels"][learnt] == batch["input_ids"][learnt]).all()
    assert learnt.float().mean() > 0.9
    assert module.vocab_size == len(module.tokenizer) == 512
    assert 4 < module.unigram_entropy < np.log(512)
    size = sum(len(module.tokenizer.decode(c.tokens.tolist()).encode()) for c in module._corpora.values())
    assert 0.15 * 2**20 < size < 0.21 * 2**20


def test_docstrings_of_the_standard_library_are_instruction_data(make):
    module = make(source="stdlib_docstrings", max_documents=60, sequence_length=512, vocab_size=512)
    batch = next(iter(module.train_dataloader()))
    inputs, labels = batch["input_ids"][0], batch["labels"][0]
    answer = module.tokenizer.decode(labels[labels >= 0])
    assert "# Docstring:" not in answer
    assert answer.endswith("<|endoftext|>")
    assert "# Docstring:\n" + answer.split("<|endoftext|>")[0] in module.tokenizer.decode(inputs)


def test_documents_are_either_trained_on_or_held_out(make, text):
    module = make(source=text, val_fraction=0.2)
    train = module.tokenizer.decode(module._corpora["train"].tokens.tolist())
    val = all_text(module, module.val_dataloader())
    held_out = [number for number in range(40) if f"<{number}>" in val]
    assert len(held_out) == 8
    assert [number for number in range(40) if f"<{number}>" in train] == sorted(set(range(40)) - set(held_out))
    again = make(source=text, val_fraction=0.2, num_workers=0)
    assert all_text(again, again.val_dataloader()) == val
    other = make(source=text, val_fraction=0.2, seed=1)
    assert all_text(other, other.val_dataloader()) != val


def test_evaluation_sees_every_held_out_token_once(make, text):
    module = make(source=text, val_fraction=0.5)
    ids = torch.cat([batch["input_ids"] for batch in module.val_dataloader()]).flatten()
    corpus = module._corpora["val"].tokens
    assert ids[: len(corpus)].tolist() == corpus.tolist()
    assert (ids[len(corpus) :] == module.tokenizer.pad_token_id).all()
    assert all_text(module, module.test_dataloader()) == all_text(module, module.val_dataloader())


def test_val_and_test_sources_of_their_own(make, text, tmp_path):
    for name in ("val", "test"):
        (tmp_path / f"{name}.txt").write_text(f"only {name} " * 30)
    module = make(source=text, val_source=str(tmp_path / "val.txt"), test_source=[str(tmp_path / "test.txt")])
    assert "only val" in all_text(module, module.val_dataloader())
    assert "only test" in all_text(module, module.test_dataloader())
    assert len(module._corpora["train"]) == 40


def test_no_validation_if_nothing_is_held_out(make, text):
    module = make(source=text, val_fraction=0)
    assert module.val_dataloader() == []


def test_unigram_entropy_is_that_of_the_training_targets(make, text):
    module = make(source=text, sequence_length=4096, batch_size=1)
    labels = torch.cat([batch["labels"] for batch in module.train_dataloader()])
    counts = np.array(list(Counter(labels[labels >= 0].tolist()).values()))
    # the first token of a document, and of a window, is no target
    assert 0 < module.num_tokens - counts.sum() <= module.num_documents + len(labels)
    share = counts / counts.sum()
    assert module.unigram_entropy == pytest.approx(-(share * np.log(share)).sum(), abs=2e-3)


def test_a_second_run_reads_the_cache(make, text, monkeypatch):
    first = make(source=text)
    monkeypatch.setattr("litropy.recipes.text_selection.read_sources", pytest.fail)
    second = make(source=text)
    assert all_text(second, second.train_dataloader()) == all_text(first, first.train_dataloader())


def test_a_changed_file_is_read_again_and_an_interrupted_write_leaves_nothing(make, text, tmp_path, monkeypatch):
    make(source=text)
    with open(f"{text}/00.txt", "a") as file:
        file.write(" and more")

    def broken(documents, tokenizer, folder):
        (folder / "tokens.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    before = set((tmp_path / "cache").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("litropy.recipes.text_data.write_corpus", broken)
        with pytest.raises(KeyboardInterrupt):
            make(source=text)
    assert {path.name.split("-")[0] for path in set((tmp_path / "cache").iterdir()) - before} == {"tokenizer"}
    module = make(source=text, val_fraction=0)
    assert "and more" in all_text(module, module.train_dataloader())


def test_a_trained_tokenizer_never_sees_held_out_text(make, tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "a.txt").write_text("aaaa bbbb " * 200)
    (folder / "b.txt").write_text("cccc dddd " * 200)
    module = make(source=str(folder), val_fraction=0.5, batch_size=1)
    seen, unseen = ("aaaa", "cccc") if "aaaa" in all_text(module, module.train_dataloader()) else ("cccc", "aaaa")
    assert len(module.tokenizer(seen)["input_ids"]) == 1
    assert len(module.tokenizer(unseen)["input_ids"]) == 4


def test_a_tokenizer_by_path(make, text, tmp_path):
    trained = make(source=text).tokenizer
    trained.save_pretrained(tmp_path / "mine")
    module = make(source=text, tokenizer=str(tmp_path / "mine"), vocab_size=1)
    assert module.tokenizer.get_vocab() == trained.get_vocab()


def test_without_packing_documents_are_padded_on_the_right(make, text):
    module = make(source=text, packing=False)
    for batch in module.train_dataloader():
        mask, ids = batch["attention_mask"].bool(), batch["input_ids"]
        assert (ids[~mask] == module.tokenizer.pad_token_id).all()
        assert (batch["labels"][~mask] == -100).all()
        assert (batch["labels"][mask][1:] != -100).any()
        assert (batch["position_ids"][:, 0] == 0).all()


def test_long_examples_lose_their_end_with_a_count(make, tmp_path):
    path = tmp_path / "pairs.jsonl"
    records = [{"prompt": "a b c ", "completion": "d e f " * (50 if number == 1 else 2)} for number in range(10)]
    path.write_text("\n".join(map(json.dumps, records)))
    module = make(source=str(path), val_fraction=0)
    with pytest.warns(UserWarning, match=r"1 of 10 train examples are longer than `sequence_length` \(32 tokens\)"):
        module.train_dataloader()


def test_workers_give_the_batches_of_the_main_process(make, text):
    plain, workers = make(source=text), make(source=text, num_workers=2)
    for _ in range(2):  # the workers stay for a second epoch
        for one, two in zip(plain.train_dataloader(), workers.train_dataloader(), strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_corpus_is_opened_again_in_another_process(make, text):
    corpus = make(source=text)._corpora["train"]
    data = pickle.dumps(corpus)
    assert len(data) < 1000
    assert pickle.loads(data).tokens.tolist() == corpus.tokens.tolist()


def test_loading_leaves_the_global_random_state_alone(make, text):
    module = make(source=text)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(module.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_share_global_batches_that_do_not_depend_on_their_number():
    whole = shuffled_batches(103, batch_size=12, rank=0, ranks=1, seed=3, epoch=2)
    for ranks in (2, 3, 4):
        parts = [shuffled_batches(103, 12 // ranks, rank, ranks, seed=3, epoch=2) for rank in range(ranks)]
        assert np.concatenate(parts, axis=1).tolist() == whole.tolist()
    assert len(set(whole.ravel().tolist())) == whole.size == 96
    assert whole.tolist() != shuffled_batches(103, 12, 0, 1, seed=3, epoch=1).tolist()


@pytest.mark.parametrize("num_items", [1, 2, 7, 24, 25])
def test_ranks_evaluate_every_item_once_in_equally_many_batches(num_items):
    parts = [eval_batches(num_items, 4, rank, 3) for rank in range(3)]
    for batches in zip(*parts, strict=True):
        assert len({len(batch) for batch in batches}) == 1
    items = [item for batches in parts for batch in batches for item in batch.tolist() if item >= 0]
    assert sorted(items) == list(range(num_items))


def test_prompts_are_padded_on_the_left(make, text, tmp_path):
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "1 2 3 4 5 6"}]
    path.write_text(json.dumps({"prompt": "7"}) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    module = make("predict", source=text, prompts=["1 2 3"], prompts_file=str(path), batch_size=2)
    assert not module._corpora
    first, second = module.predict_dataloader()
    ids, mask = first["input_ids"], first["attention_mask"]
    assert mask.sum(1).tolist() == [len(module.tokenizer(prompt)["input_ids"]) for prompt in ("1 2 3", "7")]
    assert mask[:, -1].all()
    assert module.tokenizer.batch_decode(ids, skip_special_tokens=True) == ["1 2 3", "7"]
    assert module.tokenizer.batch_decode(second["input_ids"]) == ["User:\n1 2 3 4 5 6\nAssistant:\n"]


class Counting(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return batch["input_ids"].shape

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, tmp_path, **options):
    counting = Counting()
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(counting, module)
    return counting, trainer


def test_a_trainer_shuffles_anew_in_each_epoch_and_overfits_on_the_same_batches(tmp_path, text):
    options = {"source": text, "vocab_size": 300, "sequence_length": 32, "batch_size": 4, "cache_dir": str(tmp_path)}
    counting, trainer = fit(TextDataModule(**options), tmp_path, max_epochs=2)
    half = len(counting.seen) // 2
    assert counting.seen[:half] != counting.seen[half:]
    assert trainer.datamodule.hparams.source == text
    counting, trainer = fit(TextDataModule(**options, prompts="1 2"), tmp_path, max_epochs=2, overfit_batches=2)
    assert len(counting.seen) == 4
    assert counting.seen[:2] == counting.seen[2:]
    assert len(trainer.predict(counting, trainer.datamodule)) == 1
    fit(TextDataModule(**options, val_fraction=0), tmp_path, max_steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is 0; it must be at least 1"),
        ({"sequence_length": 1}, "`sequence_length` is 1; it must be at least 2"),
        ({"max_mebibytes": 0}, "`max_mebibytes` is 0; it must be positive"),
        ({"max_documents": 1, "val_fraction": 1.5}, "`val_fraction` is 1.5"),
        ({"streaming": True}, "`streaming: true` needs a `dataset`"),
        ({"dataset_val_split": "test"}, "`dataset_val_split` needs a `dataset`"),
        ({"tokenizer": "no/such"}, "tokenizer 'no/such' could not be loaded"),
    ],
)
def test_options_out_of_range(make, text, options, message):
    with pytest.raises(ValueError, match=message):
        make(**{"source": text, **options})


def test_text_shorter_than_a_batch_says_what_to_change(make, text):
    module = make(source=text, sequence_length=4096)
    with pytest.raises(ValueError, match=r"too short: its \d+ tokens fill 1 windows of 4096.*Give more text, or lower"):
        module.train_dataloader()


def test_one_text_is_cut_in_two_and_one_record_is_not(make, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {number}\n" for number in range(500)))
    module = make(source=str(path), val_fraction=0.1)
    train, val = (all_text(module, loader) for loader in (module.train_dataloader(), module.val_dataloader()))
    assert val.startswith("line ")
    assert "line 499\n" in val
    assert "line 499\n" not in train
    record = tmp_path / "one.jsonl"
    record.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    with pytest.raises(ValueError, match="There is one document only, so none is left for validation"):
        make(source=str(record))


def test_nothing_to_predict(make, text, tmp_path):
    with pytest.raises(ValueError, match="set `prompts`"):
        make("predict", source=text).predict_dataloader()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: expected an object with `prompt`"):
        make("predict", source=text, prompts_file=str(tmp_path / "bad.jsonl")).predict_dataloader()
