"""Text for language models: from files or a dataset to packed batches on every rank."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from litropy.recipes.cache_folder import cache_key, cached_folder
from litropy.recipes.packing import Windows, best_fit, concatenate, gather, one_per_window
from litropy.recipes.prompts import PromptBatches, read_prompts
from litropy.recipes.resumable_loader import ResumableLoader, eval_batches, position_of, rank_of, shuffled_batches
from litropy.recipes.stream_loader import StreamLoader
from litropy.recipes.text_records import Kind, document_text
from litropy.recipes.text_selection import TextSelection
from litropy.recipes.text_stream import PackedStream
from litropy.recipes.token_corpus import TokenCorpus, write_corpus
from litropy.recipes.tokenizer import load_tokenizer, tokenizer_key, train_tokenizer

__all__ = ["TextDataModule"]


class TextDataModule(LightningDataModule):
    """Text for a language model, tokenized once and packed into windows of fixed length.

    Records may be plain text, conversations (``messages``) or ``prompt`` and ``completion``; of the last two only the
    answers are learnt. Batches hold ``input_ids``, ``labels`` and ``position_ids`` [B, T], and ``target_rows`` [n]
    where many positions have no target.

    Args:
        source: what to train on: stdlib (the Python standard library's own source), stdlib_docstrings (prompts and
            completions made from it), or the path of a file (.txt .md .py .jsonl .json .csv .parquet), a folder or a
            glob; or a list of these.
        dataset: train on this dataset of Hugging Face (a name on the hub, or a folder) instead of ``source``.
        dataset_config: which configuration of it, where it has several.
        dataset_split: which split of it to train on.
        dataset_val_split: which split of it to validate on; else documents are held out.
        streaming: read the dataset while training, without end, rather than download and tokenize it first; needs
            ``trainer.max_steps``.
        text_column: field or column with the text, for records that are no conversations.
        max_documents: train and validate on a random subset of so many documents; of a stream, how many to read at the
            start, for tokenizer and validation (10000 if there is no limit).
        max_mebibytes: the same as an amount of text [MiB]; of a stream 16 MiB if there is no limit.
        val_source: what to validate on, like ``source``; else documents are held out.
        val_fraction: share of the documents that is held out, from 0 to 1.
        test_source: what to test on, like ``source``; else what is validated on.
        tokenizer: name on the Hugging Face hub, or folder, of a tokenizer; else one is trained on the training text.
        vocab_size: tokens of a tokenizer that is trained.
        sequence_length: tokens in a window, T.
        packing: fill windows with several documents, isolated from each other; else each has windows of its own.
        batch_size: windows in a batch of one device, B.
        num_workers: processes that prepare batches ahead; 0 does it in the main process.
        seed: of subset, held-out split and order.
        prompts: what predict continues, a text or several.
        prompts_file: the same from a file: a prompt in each line, or .jsonl with ``prompt`` or ``messages``.
        cache_dir: where tokenizers and tokenized text are kept between runs.

    Raises:
        ValueError: if an option is out of its range.
    """

    def __init__(
        self,
        source: str | list[str] = "stdlib",
        dataset: str | None = None,
        dataset_config: str | None = None,
        dataset_split: str = "train",
        dataset_val_split: str | None = None,
        streaming: bool = False,
        text_column: str = "text",
        max_documents: int | None = None,
        max_mebibytes: float | None = None,
        val_source: str | list[str] | None = None,
        val_fraction: float = 0.05,
        test_source: str | list[str] | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        sequence_length: int = 256,
        packing: bool = True,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        prompts: str | list[str] | None = None,
        prompts_file: str | None = None,
        cache_dir: str = "runs/.cache",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("sequence_length", sequence_length, 2),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"`{name}` is {value}; it must be at least {least}.")
        self.save_hyperparameters(logger=False)
        self.selection = TextSelection(
            source=_as_list(source),
            val_source=_as_list(val_source),
            test_source=_as_list(test_source),
            dataset=dataset,
            dataset_config=dataset_config,
            dataset_split=dataset_split,
            dataset_val_split=dataset_val_split,
            streaming=streaming,
            text_column=text_column,
            max_documents=max_documents,
            max_mebibytes=max_mebibytes,
            val_fraction=val_fraction,
            seed=seed,
        )
        self.tokenizer_name = tokenizer
        self.trained_vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.packing = packing
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.prompts = _as_list(prompts)
        self.prompts_file = prompts_file
        self.cache_dir = Path(cache_dir)
        self.tokenizer: Any = None
        self._corpora: dict[str, TokenCorpus] = {}
        self._windows: dict[str, Windows] = {}

    # from documents to tokens on disk

    def prepare_data(self) -> None:
        """Train the tokenizer and tokenize everything, once for all ranks of a machine."""
        self.setup(self.trainer.state.fn if self.trainer else None)

    def setup(self, stage: str | None = None) -> None:
        """Open tokenizer and tokens, which are made first if there are none from an earlier run."""
        if self.tokenizer is None:
            self.tokenizer = self._open_tokenizer()
        names = ("train", "val", "test") if self.selection.test_source else ("train", "val")
        for name in names:
            if name not in self._corpora and stage != "predict":
                self._corpora[name] = self._open_corpus(name)
        self.selection.forget()

    @property
    def vocab_size(self) -> int:
        """Number of the tokenizer's tokens."""
        return len(self.tokenizer)

    @property
    def num_documents(self) -> int | None:
        """Number of training documents; None before ``setup`` and for a stream."""
        return len(self._corpora["train"]) if self._counts_known else None

    @property
    def num_tokens(self) -> int | None:
        """Number of training tokens; None before ``setup`` and for a stream."""
        return len(self._corpora["train"].tokens) if self._counts_known else None

    @property
    def _counts_known(self) -> bool:
        return "train" in self._corpora and not self.selection.streaming

    @property
    def unigram_entropy(self) -> float | None:
        """Entropy [nats] of how often each token is a target in training; None before ``setup``."""
        return self._corpora["train"].unigram_entropy if "train" in self._corpora else None

    def _open_tokenizer(self) -> Any:
        if self.tokenizer_name is not None:
            return load_tokenizer(self.tokenizer_name)

        def write(folder: Path) -> None:
            documents = self.selection.documents("train")
            rank_zero_info(f"Training a tokenizer of {self.trained_vocab_size} tokens on {len(documents)} documents.")
            texts = (document_text(documents.kind, item) for item in documents.items)
            train_tokenizer(texts, self.trained_vocab_size, folder)

        key = cache_key(vocab_size=self.trained_vocab_size, **self.selection.settings("train"))
        return load_tokenizer(str(cached_folder(self.cache_dir, f"tokenizer-{key}", write)))

    def _open_corpus(self, name: str) -> TokenCorpus:
        def write(folder: Path) -> None:
            documents = self.selection.documents(name)
            rank_zero_info(f"Tokenizing {len(documents)} documents for {name}.")
            write_corpus(documents, self.tokenizer, folder)

        part = "own" if self.selection.own_source(name) else name
        key = cache_key(tokenizer=tokenizer_key(self.tokenizer), **self.selection.settings(name))
        return TokenCorpus(cached_folder(self.cache_dir, f"{part}-{key}", write))

    # from tokens to batches

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Shuffled windows; resumes where the training loop is."""
        if self.selection.streaming:
            return self._stream_loader()
        windows = self._windows_of("train")
        rank, ranks = rank_of(self.trainer)
        if len(windows) < self.batch_size * ranks:
            tokens = int(windows.size.sum())
            raise ValueError(
                f"The training text is too short: its {tokens} tokens fill {len(windows)} windows of"
                f" {self.sequence_length}, and a batch on {ranks} device(s) takes {self.batch_size * ranks}. Give more"
                " text, or lower `sequence_length` or `batch_size`."
            )
        identity = {
            "data": self._corpora["train"].folder.name,
            "windows": len(windows),
            "sequence_length": self.sequence_length,
            "batch size on all devices": self.batch_size * ranks,
            "seed": self.seed,
        }
        order = partial(shuffled_batches, len(windows), self.batch_size, rank, ranks, self.seed)
        return self._loader("train", order, lambda: position_of(self.trainer), identity)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Held-out windows, each once; nothing if ``val_fraction`` is 0."""
        return self._eval_loader("val")

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        """Windows of ``test_source``, else the held-out ones."""
        return self._eval_loader("test" if self.selection.test_source else "val")

    def predict_dataloader(self) -> ResumableLoader:
        """Prompts, padded on the left.

        Raises:
            ValueError: if there are none.
        """
        prompts = [*self.prompts, *(read_prompts(Path(self.prompts_file)) if self.prompts_file else [])]
        if not prompts:
            raise ValueError("There is nothing to continue; set `prompts` to some text, or `prompts_file` to a file.")
        batches = eval_batches(len(prompts), self.batch_size, *rank_of(self.trainer))
        return ResumableLoader(PromptBatches(prompts, self.tokenizer), lambda epoch: batches)

    def _eval_loader(self, name: str) -> ResumableLoader | list[Any]:
        windows = self._windows_of(name)
        if not len(windows):
            return []
        batches = eval_batches(len(windows), self.batch_size, *rank_of(self.trainer))
        return self._loader(name, lambda epoch: batches)

    def _loader(self, name: str, order: Callable[[int], Any], *options: Any) -> ResumableLoader:
        pad = self.tokenizer.pad_token_id
        batches = _Batches(self._windows_of(name), self._corpora[name], pad, mask=not self.packing)
        position, identity = options or (lambda: (0, 0), None)
        return ResumableLoader(batches, order, position, self.num_workers, identity)

    def _stream_loader(self) -> StreamLoader:
        from datasets.distributed import split_dataset_by_node

        rank, ranks = rank_of(self.trainer)
        kind = self._corpora["train"].kind
        stream = PackedStream(
            stream=split_dataset_by_node(self.selection.stream(), rank, ranks),
            name=str(self.selection.dataset),
            text_column=self.selection.text_column,
            kind=kind,
            tokenizer=self.tokenizer,
            layout=self._layout(kind),
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            held_out=self.selection.held_out,
            seed=self.seed,
        )
        return StreamLoader(stream, self._stream_length(), self.num_workers, mask=not self.packing)

    def _stream_length(self) -> int:
        trainer = self.trainer
        if trainer is None:
            return sys.maxsize
        limit = getattr(trainer, "limit_train_batches", 1.0)
        if trainer.max_steps > 0:
            return trainer.max_steps * trainer.accumulate_grad_batches
        if isinstance(limit, int):
            return limit
        raise ValueError("A stream has no end: set `trainer.max_steps` (or `trainer.limit_train_batches` to a number).")

    def _layout(self, kind: Kind) -> Callable[[np.ndarray, np.ndarray, int], Windows]:
        if not self.packing:
            return partial(one_per_window, cut=kind == "text")
        return concatenate if kind == "text" else best_fit

    def _windows_of(self, name: str) -> Windows:
        if name not in self._windows:
            corpus = self._corpora[name]
            order = np.arange(len(corpus))
            if name == "train":
                order = np.random.default_rng([self.seed, 3]).permutation(order)
            windows = self._layout(corpus.kind)(corpus.offsets, order, self.sequence_length)
            if windows.truncated:
                rank_zero_warn(
                    f"{windows.truncated} of {len(corpus)} {name} examples are longer than `sequence_length`"
                    f" ({self.sequence_length} tokens) and lost their end."
                )
            self._windows[name] = windows
        return self._windows[name]


class _Batches:
    """Makes batches out of windows, in worker processes."""

    def __init__(self, windows: Windows, corpus: TokenCorpus, pad: int, mask: bool) -> None:
        self.windows = windows
        self.corpus = corpus
        self.pad = pad
        self.mask = mask

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, rows: np.ndarray) -> dict[str, Tensor]:
        batch = gather(self.windows, rows, self.corpus.tokens, self.corpus.targets, self.pad)
        if not self.mask:
            del batch["attention_mask"]  # models isolate packed documents only without one
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def _as_list(source: str | list[str] | None) -> list[str]:
    return [source] if isinstance(source, str) else list(source or [])
