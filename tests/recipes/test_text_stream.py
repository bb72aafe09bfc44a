import itertools
import json
import random

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from litropy.recipes import TextDataModule

pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "records"
    folder.mkdir()
    words = random.Random(0)
    number = itertools.count()
    for shard in range(4):
        texts = (" ".join(str(words.randrange(99)) for _ in range(30)) for _ in range(60))
        rows = [{"text": f"<{next(number)}> {text}"} for text in texts]
        (folder / f"train-{shard}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def make(folder, tmp_path):
    def build(**options):
        options = {"vocab_size": 300, "sequence_length": 32, "batch_size": 4, "val_fraction": 0.1, **options}
        module = TextDataModule(dataset=str(folder), cache_dir=str(tmp_path / "cache"), **options)
        module.setup("fit")
        return module

    return build


def documents(module, batches):
    """Numbers of the documents that begin in some batches, in order."""
    text = module.tokenizer.decode([token for batch in batches for row in batch["input_ids"] for token in row.tolist()])
    return [int(part.split(">")[0]) for part in text.split("<")[1:] if part.split(">")[0].isdigit()]


def test_a_dataset_by_name_is_tokenized_like_files(make):
    module = make()
    seen = sorted(documents(module, [{"input_ids": [corpus.tokens]} for corpus in module._corpora.values()]))
    assert seen == list(range(240))
    assert len(module._corpora["val"]) == 24
    small = make(max_documents=50)
    assert sum(map(len, small._corpora.values())) == 50


def test_a_stream_gives_every_training_document_once_a_pass_and_never_a_held_out_one(make):
    module = make(streaming=True)
    held_out = documents(module, module.val_dataloader())
    assert 5 < len(held_out) < 60
    assert module.unigram_entropy > 2
    stream = iter(module.train_dataloader())
    seen = documents(module, itertools.islice(stream, 110))
    once = 240 - len(held_out)
    first, second = seen[:once], seen[once:]
    assert len(set(first)) > 0.97 * once  # a number may be torn apart between windows
    assert len(second) > 20
    assert not set(seen) & set(held_out)
    assert first[: len(second)] != second  # shuffled anew


def test_a_stream_of_conversations_keeps_them_whole(tmp_path, make, folder):
    for file in folder.iterdir():
        records = [json.loads(line) for line in file.read_text().splitlines()]
        pairs = [{"prompt": record["text"][:20], "completion": record["text"][20:40]} for record in records]
        file.write_text("\n".join(map(json.dumps, pairs)))
    module = make(streaming=True, sequence_length=64)
    batch = next(iter(module.train_dataloader()))
    assert batch["input_ids"].shape == (4, 64)
    for row in batch["position_ids"]:
        assert (row == 0).sum() > 1
    learnt = batch["labels"] != -100
    assert 0 < learnt.float().mean() < 0.6


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, folder, resume=None, **options):
    recorder = Recorder()
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[checkpoints], enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, **options,
    )  # fmt: skip
    trainer.fit(recorder, module, ckpt_path=resume)
    return recorder.seen


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_stream_goes_on_at_the_very_next_batch(make, tmp_path, num_workers, accumulate, monkeypatch):
    monkeypatch.setattr("litropy.recipes.text_stream._BLOCK_DOCUMENTS", 30)
    options = {"streaming": True, "num_workers": num_workers}
    run = {"max_steps": 70 // accumulate, "accumulate_grad_batches": accumulate}
    whole = fit(make(**options), tmp_path / "saved", **run)
    assert len(whole) == 70
    assert len({str(batch) for batch in whole}) == 70
    for step in (7, 28):
        resumed = fit(make(**options), tmp_path / "other", tmp_path / "saved" / f"step={step}.ckpt", **run)
        assert resumed == whole[step * accumulate :], f"resumed after step {step}"


def test_a_stream_says_what_it_needs(make, folder, tmp_path):
    with pytest.raises(ValueError, match=r"A stream has no end: set `trainer.max_steps`"):
        fit(make(streaming=True), tmp_path, max_epochs=1)
    loader = make(streaming=True).train_dataloader()
    state = loader.state_dict()
    with pytest.raises(ValueError, match="set `num_workers: 0` to resume"):
        make(streaming=True, num_workers=2).train_dataloader().load_state_dict(state)
    with pytest.raises(ValueError, match="for 2 ranks, and this run has 1"):
        loader.load_state_dict({"ranks": state["ranks"] * 2})


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_datasets_splits_and_columns(make, folder, tmp_path, streaming):
    with pytest.raises(ValueError, match=r"nowhere', split 'train', could not be loaded: "):
        TextDataModule(dataset=str(folder / "nowhere"), streaming=streaming, cache_dir=str(tmp_path)).setup()
    with pytest.raises(ValueError, match="split 'other', could not be loaded"):
        make(dataset_split="other", streaming=streaming)
    with pytest.raises(ValueError, match=r"row 1: expected the field `body`.*the record's fields are: `text`"):
        make(text_column="body", streaming=streaming)
