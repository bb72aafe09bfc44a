import logging

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from litropy.recipes.chat import Encoder
from litropy.recipes.tokenizer import load_tokenizer, tokenizer_key, train_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "The quick brown fox jumps over the lazy dog. " * 20]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which fox?"},
    {"role": "assistant", "content": "The quick one."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "  Lazy,\nvery.  "},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300, folder)
    return folder


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(str(folder))


def test_trained_tokenizer_is_a_hugging_face_folder_that_loses_nothing(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) == 300
    for text in (*TEXTS, "ünïcödé \t\r\n 漢字 🦊 'quotes' ", " leading . and , spaces"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0]) / 2
    assert tokenizer.eos_token_id == tokenizer.bos_token_id != tokenizer.pad_token_id
    assert tokenizer.pad_token_id is not None
    assert max(tokenizer.get_vocab().values()) == 299


def test_vocabulary_must_hold_all_bytes(tmp_path):
    with pytest.raises(ValueError, match=r"`vocab_size` is 200; .* at least 258"):
        train_tokenizer(TEXTS, 200, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_unknown_tokenizer_is_a_short_error(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer .* could not be loaded: the folder has no tokenizer") as error:
        load_tokenizer(str(tmp_path))
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_key_follows_what_is_encoded(tokenizer, folder):
    key = tokenizer_key(tokenizer)
    assert tokenizer_key(load_tokenizer(str(folder))) == key
    tokenizer.chat_template = "other"
    assert tokenizer_key(tokenizer) != key


def test_text_gets_an_end_and_what_the_tokenizer_puts_in_front(tokenizer):
    ((ids, targets),) = Encoder(tokenizer, "text")(["fox"])
    assert targets is None
    assert tokenizer.decode(ids) == "fox<|endoftext|>"
    start = tokenizer.convert_tokens_to_ids("<|padding|>")
    encoder = Encoder(tokenizer, "text")
    encoder.prefix = [start]
    ((with_start, _),) = encoder(["fox"])
    assert with_start.tolist() == [start, *ids.tolist()]


def test_only_the_completion_is_learnt(tokenizer):
    ((ids, targets),) = Encoder(tokenizer, "prompt_completion")([("Which fox?", " The quick one.")])
    assert tokenizer.decode(ids) == "Which fox? The quick one.<|endoftext|>"
    assert tokenizer.decode(ids[targets]) == " The quick one.<|endoftext|>"


def test_only_assistant_turns_are_learnt(tokenizer):
    ((ids, targets),) = Encoder(tokenizer, "messages")([CHAT])
    assert tokenizer.decode(ids) == (
        "System:\nBe brief.\nUser:\nWhich fox?\nAssistant:\nThe quick one.<|endoftext|>\n"
        "User:\nAnd the dog?\nAssistant:\n  Lazy,\nvery.  <|endoftext|>\n"
    )
    starts = np.flatnonzero(np.diff(targets.astype(int)) == 1) + 1
    turns = [
        tokenizer.decode(part[mask])
        for part, mask in zip(np.split(ids, starts), np.split(targets, starts), strict=True)
    ]
    assert turns[1] == "The quick one.<|endoftext|>"
    assert turns[2].endswith("Lazy,\nvery.  <|endoftext|>")


def test_a_template_without_generation_marks_gives_the_same_turns(tokenizer, caplog):
    plain = [message | {"content": message["content"].strip()} for message in CHAT]
    ((ids, marked),) = Encoder(tokenizer, "messages")([plain])
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert tokenizer.chat_template != template
    with caplog.at_level(logging.WARNING):
        ((same_ids, found),) = Encoder(tokenizer, "messages")([plain])
    assert ids.tolist() == same_ids.tolist()
    # everything that is marked, and the line end that closes a turn of this template
    newline = tokenizer("\n")["input_ids"][0]
    assert (found >= marked).all()
    assert set(ids[found & ~marked].tolist()) <= {newline}


def test_a_template_that_refuses_says_so(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('only user and assistant') }}"
    with pytest.raises(ValueError, match=r"does not take a conversation of the roles system, .*only user"):
        list(Encoder(tokenizer, "messages")([CHAT]))
