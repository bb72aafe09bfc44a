"""Verifiable tasks for reinforcement learning: problems from a seed, a file or a dataset, to samples on every rank."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule

from litropy.recipes.cache_folder import cache_key
from litropy.recipes.character_tokenizer import character_tokenizer
from litropy.recipes.resumable_loader import ResumableLoader, eval_batches, position_of, rank_of, shuffled_batches
from litropy.recipes.rlvr_samples import Reward, Sample
from litropy.recipes.tasks.answer_format import AnswerFormat
from litropy.recipes.tasks.arithmetic import Arithmetic
from litropy.recipes.tasks.problem_files import dataset_problems, file_problems
from litropy.recipes.tasks.rewards import Correctness, RewardSum, SoftOverlong
from litropy.recipes.tasks.samples import GeneratedProblems, GivenProblems, Problems, held_out, to_sample
from litropy.recipes.tasks.task import GeneratedTask, Spec
from litropy.recipes.tokenizer import load_tokenizer

__all__ = ["TaskDataModule"]

_DRAWN_FOR_TOKENIZER = 256


class TaskDataModule(LightningDataModule):
    r"""Verifiable tasks: prompts with a solution of each, and the reward that checks responses; batches are lists.

    Args:
        task: what to draw problems from, one or several; None takes sums of two-digit numbers.
        source: problems of the user's instead: path of a file (.jsonl .json .parquet), a folder or a glob; or a list of
            these. Fields are those of GSM8K, of MATH, or ``prompt`` and ``answer``.
        val_source: what to validate on, like ``source``; else problems are held out.
        dataset: take problems from this dataset of Hugging Face (a name on the hub, or a folder) instead.
        dataset_config: which configuration of it, where it has several.
        dataset_split: which split of it to train on.
        dataset_val_split: which split of it to validate on; else problems are held out.
        reward: what judges responses; None is ``Correctness()``.
        answer_format: where in a response the answer is: plain (all of it), tags (``<answer>``) or boxed
            (``\boxed{}``); None is plain for drawn problems, boxed for the user's. Plain prompts are as short as can
            be, others explain rules and format.
        chat: put prompts into the tokenizer's chat template.
        tokenizer: name on the Hugging Face hub, or folder, of a tokenizer; None makes one of the characters that occur.
        num_train: how many problems to draw for an epoch; epochs draw the same ones in another order.
        num_val: how many problems to validate on; fewer where there are fewer.
        val_fraction: share of all problems that is held out, from 0 to 1; 0 validates on what is trained on.
        batch_size: prompts in a batch of one device.
        num_workers: processes that prepare batches ahead; 0 does it in the main process.
        seed: of problems, held-out split, solutions and order.

    Raises:
        ValueError: if an option is out of its range, or two sources of problems are given.
    """

    def __init__(
        self,
        task: GeneratedTask | list[GeneratedTask] | None = None,
        source: str | list[str] | None = None,
        val_source: str | list[str] | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        dataset_split: str = "train",
        dataset_val_split: str | None = None,
        reward: Reward | None = None,
        answer_format: AnswerFormat | None = None,
        chat: bool = False,
        tokenizer: str | None = None,
        num_train: int = 8192,
        num_val: int = 128,
        val_fraction: float = 0.1,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_train", num_train, 1),
            ("num_val", num_val, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"`{name}` is {value}; it must be at least {least}.")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"`val_fraction` is {val_fraction}; it must be at least 0 and below 1.")
        if sum(given is not None for given in (task, source, dataset)) > 1:
            raise ValueError("Give one of `task`, `source` and `dataset`.")
        if val_source is not None and source is None:
            raise ValueError("`val_source` needs a `source`; of a `dataset` there is `dataset_val_split`.")
        if dataset_val_split is not None and dataset is None:
            raise ValueError("`dataset_val_split` needs a `dataset`; for files there is `val_source`.")
        if chat and tokenizer is None:
            raise ValueError("`chat` needs a `tokenizer` with a chat template.")
        tasks = [] if source or dataset else [Arithmetic()] if task is None else task
        self.tasks = [tasks] if isinstance(tasks, GeneratedTask) else list(tasks)
        if not (self.tasks or source or dataset):
            raise ValueError("`task` is an empty list; give at least one, or leave it out.")
        self.source = _as_list(source)
        self.val_source = _as_list(val_source)
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.dataset_splits = (dataset_split, dataset_val_split)
        self.reward: Reward = Correctness() if reward is None else reward
        self.answer_format: AnswerFormat = answer_format or ("plain" if self.tasks else "boxed")
        self.chat = chat
        self.tokenizer_name = tokenizer
        self.num_train = num_train
        self.num_val = num_val
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer: Any = None
        self._problems: dict[str, Problems] = {}

    def prepare_data(self) -> None:
        """Download what is to be downloaded, once for all ranks of a machine."""
        if self.dataset:
            self._read_given()

    def setup(self, stage: str | None = None) -> None:
        """Draw or read the problems, and make or load the tokenizer."""
        if not self._problems:
            self._problems = self._draw() if self.tasks else self._read_given()
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.tokenizer_name) if self.tokenizer_name else self._make_tokenizer()
        _give_tokenizer(self.reward, self.tokenizer)

    def samples(self, name: str) -> "Samples":
        """Samples of a part by their number.

        Args:
            name: train or val.
        """
        return Samples(self._problems[name], self._write)

    def _write(self, problem: Any, index: int) -> Sample:
        return to_sample(problem, index, self.seed, self.answer_format, self.tokenizer if self.chat else None)

    def _draw(self) -> dict[str, Problems]:
        draw = partial(GeneratedProblems, self.tasks, self.seed, val_fraction=self.val_fraction)
        return {"train": draw(val=False, size=self.num_train), "val": draw(val=True, size=self.num_val)}

    def _read_given(self) -> dict[str, Problems]:
        split, val_split = self.dataset_splits
        if self.dataset:
            specs = dataset_problems(self.dataset, self.dataset_config, split)
            val = dataset_problems(self.dataset, self.dataset_config, val_split) if val_split else None
        else:
            specs = file_problems(self.source)
            val = file_problems(self.val_source) if self.val_source else None
        if val is None:
            specs, val = self._hold_out(specs)
        for spec in [*specs, *val]:
            if spec["answer"] is None and isinstance(self.reward, Correctness):
                raise ValueError(
                    f"The problem {spec['question'][:80]!r} has no `answer`, and no `solution` to take it from; add it,"
                    " or set `reward` to one of your own."
                )
        return {"train": GivenProblems(specs), "val": GivenProblems(val[: self.num_val])}

    def _hold_out(self, specs: list[Spec]) -> tuple[list[Spec], list[Spec]]:
        if not self.val_fraction:
            return specs, specs
        parts: tuple[list[Spec], list[Spec]] = ([], [])
        for spec in specs:
            parts[held_out(spec["question"], self.val_fraction, self.seed)].append(spec)
        if not all(parts):
            raise ValueError(
                f"Of {len(specs)} problems, {len(parts[1])} are held out for validation with `val_fraction`"
                f" {self.val_fraction}; change it or `seed`, or set `val_source`."
            )
        return parts

    def _make_tokenizer(self) -> Any:
        texts = ["0123456789"]
        most = _DRAWN_FOR_TOKENIZER if self.tasks else None
        for name in ("train", "val"):
            samples = self.samples(name)
            for sample in itertools.islice((samples[i] for i in range(len(samples))), most):
                texts += [sample.prompt, sample.solution or ""]
        return character_tokenizer(texts)

    @property
    def vocab_size(self) -> int:
        """Number of the tokenizer's tokens."""
        return len(self.tokenizer)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled samples; resumes where the training loop is.

        Raises:
            ValueError: if there are fewer problems than a batch takes.
        """
        problems = self._problems["train"]
        rank, ranks = rank_of(self.trainer)
        if len(problems) < self.batch_size * ranks:
            raise ValueError(
                f"There are {len(problems)} problems to train on, and a batch on {ranks} device(s) takes"
                f" {self.batch_size * ranks}; give more problems (`num_train`), or lower `batch_size`."
            )
        identity = {
            "problems": cache_key(first=problems[0][1], last=problems[len(problems) - 1][1], number=len(problems)),
            "batch size on all devices": self.batch_size * ranks,
            "seed": self.seed,
        }
        order = partial(shuffled_batches, len(problems), self.batch_size, rank, ranks, self.seed)
        return ResumableLoader(
            self._batches("train"), order, lambda: position_of(self.trainer), self.num_workers, identity
        )

    def val_dataloader(self) -> ResumableLoader:
        """Held-out samples, each once; without the few that do not divide evenly, so that no rank waits for others.

        Raises:
            ValueError: if there are fewer problems than ranks.
        """
        rank, ranks = rank_of(self.trainer)
        count = len(self._problems["val"]) // ranks * ranks
        if not count:
            raise ValueError(
                f"There are {len(self._problems['val'])} problems to validate on, fewer than the {ranks} devices; raise"
                " `num_val` or `val_fraction`."
            )
        batches = eval_batches(count, self.batch_size, rank, ranks)
        return ResumableLoader(self._batches("val"), lambda epoch: batches, num_workers=self.num_workers)

    def test_dataloader(self) -> ResumableLoader:
        """The same as for validation."""
        return self.val_dataloader()

    def _batches(self, name: str) -> Any:
        return _Batches(self.samples(name))


class Samples:
    """Samples by their number, made when they are asked for."""

    def __init__(self, problems: Problems, write: Callable[[Any, int], Sample]) -> None:
        self.problems = problems
        self.write = write

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.problems):
            raise IndexError(index)
        return self.write(self.problems[index], index)


class _Batches:
    """Lists of samples, made in worker processes."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, rows: np.ndarray) -> list[Sample]:
        return [self.samples[int(row)] for row in rows]


def _give_tokenizer(reward: Reward, tokenizer: Any) -> None:
    if isinstance(reward, SoftOverlong):
        reward.tokenizer = tokenizer
    elif isinstance(reward, RewardSum):
        for part in reward.rewards:
            _give_tokenizer(part, tokenizer)


def _as_list(source: str | list[str] | None) -> list[str]:
    return [source] if isinstance(source, str) else list(source or [])
