"""Samples follow from the seed; training and validation share none; a killed run goes on with the next batch."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from litropy.recipes import TaskDataModule, task_data
from litropy.recipes.character_tokenizer import character_tokenizer
from litropy.recipes.rlvr_samples import Sample
from litropy.recipes.tasks import (
    Arithmetic,
    Correctness,
    Countdown,
    Format,
    GeneratedTask,
    KolmogorovTest,
    RewardSum,
    SoftOverlong,
    SumToTarget,
    TowerOfHanoi,
    Verdict,
)

SMALL = {"num_train": 64, "num_val": 16, "batch_size": 8}


def module(**options):
    data = TaskDataModule(**{**SMALL, **options})
    data.setup()
    return data


def ids(batches):
    return [sample.sample_id for batch in batches for sample in batch]


def prompts(data, name):
    return [sample.prompt for sample in data.samples(name)]


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append([sample.sample_id for sample in batch])
        assert all(isinstance(sample, Sample) for sample in batch)
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        assert all(isinstance(sample, Sample) for sample in batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, path, ckpt=None, **options):
    model = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[ModelCheckpoint(path, "{step}", every_n_train_steps=1, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        **{"max_epochs": 2, **options},
    )
    trainer.fit(model, data, ckpt_path=ckpt, **({"weights_only": False} if ckpt else {}))
    return model.seen


TASKS = {
    "default": None,
    "several": [Arithmetic(1), SumToTarget(2, 99), TowerOfHanoi(2, 4)],
    "countdown": Countdown(),
    "programs": KolmogorovTest(),
}


@pytest.mark.parametrize("answer_format", ["plain", "tags", "boxed"])
@pytest.mark.parametrize("name", TASKS)
def test_samples_are_the_same_in_every_run_and_their_solutions_right(name, answer_format):
    data, again, other = (module(task=TASKS[name], answer_format=answer_format, seed=seed) for seed in (1, 1, 2))
    for part in ("train", "val"):
        samples = list(data.samples(part))
        assert samples == list(again.samples(part)), "same seed, same samples"
        assert samples != list(other.samples(part))
        assert [sample.sample_id for sample in samples] == list(range(len(samples)))
        assert json.loads(json.dumps(samples)) == [list(sample) for sample in samples]
        assert all(result.correct for result in data.reward(samples, [sample.solution for sample in samples]))
        for sample in samples[:8]:
            text = sample.prompt + sample.solution
            assert data.tokenizer.decode(data.tokenizer(text)["input_ids"]) == text
    assert not set(prompts(data, "train")) & set(prompts(data, "val")), "no problem is in both"
    assert len(set(prompts(data, "val"))) == len(prompts(data, "val"))


def test_nothing_that_is_held_out_comes_up_in_training_however_long():
    data = module(task=SumToTarget(2, 49), num_train=3000, num_val=500, val_fraction=0.25)
    train, val = set(prompts(data, "train")), set(prompts(data, "val"))
    assert not train & val
    assert len(train | val) == 99, "every problem is in one of them"
    assert 12 < len(val) < 40


def test_without_a_held_out_part_validation_is_on_what_is_trained_on():
    data = module(task=SumToTarget(), num_train=500, num_val=100, val_fraction=0)
    assert set(prompts(data, "train")) == set(prompts(data, "val")) == {f"{target}=" for target in range(19)}


def test_too_few_problems_are_an_error_that_says_what_helps():
    with pytest.raises(ValueError, match=r"TowerOfHanoi has too few problems: .* `val_fraction: 0`"):
        module(task=TowerOfHanoi(2, 2, "first"))
    with pytest.raises(ValueError, match="There are 64 problems to train on"):
        module(batch_size=65).train_dataloader()


def test_two_digit_sums_are_the_default_and_take_few_tokens():
    data = module()
    assert data.vocab_size == len(data.tokenizer) == 10 + len("+=") + 3
    sample = data.samples("train")[0]
    left, right = sample.prompt.rstrip("=").split("+")
    assert sample.solution == str(int(left) + int(right))
    assert data.tokenizer.eos_token_id != data.tokenizer.pad_token_id
    assert isinstance(data.reward, Correctness)


def test_characters_that_did_not_occur_are_unknown():
    tokenizer = character_tokenizer(["ab\n"])
    assert tokenizer("aéb\n")["input_ids"].count(tokenizer.unk_token_id) == 1
    assert tokenizer.decode(tokenizer("ab\nba")["input_ids"]) == "ab\nba"
    assert tokenizer("")["input_ids"] == []


def test_ranks_divide_a_batch_and_see_equally_many(monkeypatch):
    def become(rank, ranks):
        monkeypatch.setattr(task_data, "rank_of", lambda trainer: (rank, ranks))

    data = module(num_val=11)
    whole = [[sample.sample_id for sample in batch] for batch in data.train_dataloader()]
    assert sorted(ids(data.train_dataloader())) == list(range(64))
    parts, val = [], []
    for rank in range(2):
        become(rank, 2)
        part = module(batch_size=4, num_val=11)
        parts.append([[sample.sample_id for sample in batch] for batch in part.train_dataloader()])
        val.append([[sample.sample_id for sample in batch] for batch in part.val_dataloader()])
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    assert [len(batch) for batch in val[0]] == [len(batch) for batch in val[1]] == [4, 1]
    assert sorted(row for batch in val[0] + val[1] for row in batch) == list(range(10)), "what divides evenly, once"
    become(11, 12)
    with pytest.raises(ValueError, match="11 problems to validate on, fewer than the 12 devices"):
        data.val_dataloader()


def test_worker_processes_make_the_same_batches():
    batches = [list(module(task=Countdown(), num_workers=number).train_dataloader()) for number in (0, 1)]
    assert batches[0] == batches[1]
    assert isinstance(batches[1][0][0], Sample)


def test_a_stopped_run_goes_on_with_the_next_batch(tmp_path):
    whole = fit(TaskDataModule(**SMALL), tmp_path)
    assert len(whole) == 16
    assert whole[:8] != whole[8:]
    for epoch in (whole[:8], whole[8:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(64))
    for steps in (3, 8, 11):
        rest = fit(TaskDataModule(**SMALL), tmp_path / "rest", ckpt=tmp_path / f"step={steps}.ckpt")
        assert whole[:steps] + rest == whole


def test_a_checkpoint_knows_its_problems(tmp_path):
    fit(TaskDataModule(**SMALL), tmp_path, max_epochs=-1, max_steps=3)
    with pytest.warns(UserWarning, match=r"other data settings .*seed was 0 and is 1"):
        fit(TaskDataModule(**SMALL, seed=1), tmp_path / "other", ckpt=tmp_path / "step=3.ckpt")


class Parity(GeneratedTask):
    """A task of the user's."""

    def generate(self, random):
        """Draw a number."""
        return {"number": random.randrange(1000)}

    @staticmethod
    def prompt(spec):
        """Ask."""
        return f"{spec['number']}?"

    @staticmethod
    def rules(spec):
        """Explain."""
        return "Is it even or odd?"

    @staticmethod
    def solve(spec, random):
        """Solve."""
        return "odd" if spec["number"] % 2 else "even"

    @staticmethod
    def check(spec, answer):
        """Check."""
        right = Parity.solve(spec, None)
        return Verdict.right(right) if answer == right else Verdict.wrong("the other one")


def test_a_task_of_the_users_works_like_the_others():
    data = module(task=Parity(), answer_format="tags")
    sample = data.samples("train")[0]
    assert sample.prompt.startswith("Is it even or odd?\n\n")
    assert data.reward([sample], [sample.solution])[0].correct


def test_overlong_punishment_counts_the_tokens_of_the_tokenizer():
    overlong = SoftOverlong(4, 2)
    data = module(reward=RewardSum([Correctness(), RewardSum([Format(), overlong])]))
    assert overlong.tokenizer is data.tokenizer


def test_chat_puts_prompts_into_the_template(tmp_path):
    module().tokenizer.save_pretrained(tmp_path)
    data = module(tokenizer=str(tmp_path), chat=True)
    assert data.samples("train")[0].prompt.startswith("User:\n")
    assert data.samples("train")[0].prompt.endswith("=\nAssistant:\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 0}, "`num_train` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"val_fraction": 1.0}, "`val_fraction` is 1.0"),
        ({"task": []}, "`task` is an empty list"),
        ({"task": Arithmetic(), "source": "x.jsonl"}, "Give one of"),
        ({"val_source": "x.jsonl"}, "needs a `source`"),
        ({"dataset_val_split": "test"}, "needs a `dataset`"),
        ({"chat": True}, "needs a `tokenizer`"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TaskDataModule(**options)


CONFIG = """
class_path: litropy.recipes.TaskDataModule
init_args:
  task:
  - class_path: litropy.recipes.tasks.Arithmetic
    init_args: {digits: 1, operations: ["+", "-"]}
  - class_path: litropy.recipes.tasks.TowerOfHanoi
    init_args: {start: any}
  reward:
    class_path: litropy.recipes.tasks.RewardSum
    init_args:
      rewards:
      - class_path: litropy.recipes.tasks.Correctness
        init_args: {progress: 0.1}
      - class_path: litropy.recipes.tasks.SoftOverlong
        init_args: {longest: 16, buffer: 4}
      weights: [1.0, 0.5]
"""


def test_tasks_and_rewards_are_configured_by_class_path(tmp_path):
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule

    (tmp_path / "data.yaml").write_text(CONFIG)
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = parser.instantiate_classes(parser.parse_args(["--data", str(tmp_path / "data.yaml")])).data
    assert [type(task) for task in data.tasks] == [Arithmetic, TowerOfHanoi]
    assert data.reward.rewards[0].progress == 0.1
    one = ["--data", "litropy.recipes.TaskDataModule", "--data.task", "litropy.recipes.tasks.Countdown"]
    data = parser.instantiate_classes(parser.parse_args([*one, "--data.task.numbers", "4"])).data
    assert data.tasks[0].numbers == 4
