import csv
import json
import os

import pytest

from litropy.recipes.docstring_records import docstring_records
from litropy.recipes.text_sources import fingerprint, read_sources, source_files, stdlib_files

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def write(tmp_path):
    def to_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return to_file


def items(*sources, **options):
    return list(read_sources(list(sources), **options).items)


def test_the_standard_library_is_found_without_its_tests():
    files = stdlib_files()
    names = {path.name for path in files}
    assert {"argparse.py", "textwrap.py", "decoder.py"} <= names
    assert len(files) > 300
    assert not [path for path in files if {"test", "tests", "site-packages"} & set(path.parts)]
    assert len(items("stdlib")) > 300


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "A.TXT"])
def test_text_files_are_one_document(write, name):
    assert items(write(name, "\ufefffirst\n\nsecond")) == ["first\n\nsecond"]


def test_tables_and_records_have_a_document_in_each_row(write, tmp_path):
    rows = [{"id": 1, "body": "one\n'line'"}, {"id": 2, "body": "two\u2028separators"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "body"])
        writer.writeheader()
        writer.writerows(rows)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    paths = [write("a.jsonl", lines), write("a.json", json.dumps(rows)), *map(str, tmp_path.glob("a.[cp]*"))]
    assert len(paths) == 4
    for path in paths:
        assert items(path, text_column="body") == [row["body"] for row in rows], path


def test_folders_globs_and_lists(write, tmp_path):
    write("in/b.txt", "b")
    write("in/deep/a.md", "a")
    write("in/picture.png", b"\x89")
    write("in/empty.txt", " \n")
    c = write("c.txt", "c")
    assert items(str(tmp_path / "in")) == ["b", "a"]
    assert items(str(tmp_path / "in/**/*.md"), c) == ["a", "c"]
    assert items(c, str(tmp_path / "in/?.txt")) == ["c", "b"]


def test_conversations_and_completions(write):
    path = write("a.jsonl", json.dumps({"messages": CHAT, "id": 3}))
    assert read_sources([path]).kind == "messages"
    assert items(path) == [CHAT]
    path = write("b.jsonl", json.dumps({"prompt": "a", "completion": "b"}))
    assert read_sources([path]).kind == "prompt_completion"
    assert items(path) == [("a", "b")]


def test_a_fingerprint_follows_the_files(write):
    path = write("a.txt", "one")
    before = fingerprint([path])
    assert fingerprint([path]) == before
    write("a.txt", "other")
    assert fingerprint([path]) != before
    os.utime(path, ns=(0, 0))
    assert fingerprint([path])[0][2] == 0


def test_docstrings_of_functions_and_methods():
    source = '''
class A:
    """Not a function."""

    @staticmethod
    async def f(x):
        """Say x.

        Twice.
        """
        return x, "kept"

    def g(self): "on one line"; return 1

def h():
    """Nothing else."""
'''
    assert list(docstring_records(source)) == [
        ('async def f(x):\n    return x, "kept"\n\n# Docstring:\n', "Say x.\n\nTwice.")
    ]
    assert not list(docstring_records("def broken("))


def jsonl(*records):
    return "\n".join(json.dumps(record) for record in records)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\n\xff\xfe", r"a.txt, line 3: not UTF-8 text; convert the file"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"a.jsonl, line 2: not valid JSON \("),
        ("a.json", '[\n{"text": "a"},\n{"text"}]', r"a.json, line 3: not valid JSON"),
        ("a.jsonl", jsonl({"text": "a"}, ["b"]), r"a.jsonl, line 2: expected an object with named fields, found list"),
        ("a.jsonl", jsonl({"txt": "a"}), r"a.jsonl, line 1: expected the field `text` .*set `text_column`.*`txt`"),
        ("a.jsonl", jsonl({"text": 3}), r"a.jsonl, line 1: `text` should be text, but is int"),
        ("a.jsonl", jsonl({"text": "a", "messages": CHAT}), r"line 1: the record mixes text and messages"),
        ("a.jsonl", jsonl({"text": "a"}, {"messages": CHAT}), r"line 2 is a record of messages.*line 1 is one of text"),
        ("a.jsonl", jsonl({"messages": []}), r"line 1: `messages` should be a list of at least one"),
        ("a.jsonl", jsonl({"messages": [{"role": "user"}]}), r"line 1: message 1 should have the texts"),
        ("a.jsonl", jsonl({"messages": CHAT[:1]}), r"line 1: there is nothing to learn"),
        ("a.csv", 'text,n\nfine,1\n"open', r"a.csv, from line 3 on: not valid CSV"),
        ("a.csv", "text,n\nfine,1\nshort\n", r"a.csv, line 3: the number of cells differs from the header's 2"),
        ("a.parquet", b"PAR1 no", r"a.parquet: not a readable Parquet file"),
        ("a.txt", "  \n", r"There is no text in .*a.txt: every file is empty"),
        ("a.xml", "<a/>", r"a.xml: files of type .xml are not known; known are .txt, .md"),
    ],
)  # fmt: skip
def test_unreadable_files_name_file_and_line(write, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=message) as error:
        items(write(name, content))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_missing_sources_say_what_is_there(write, tmp_path):
    path = write("here/a.txt", "a")
    with pytest.raises(ValueError, match=r"There is no file or folder .*b.txt; .*here holds a.txt\.$"):
        source_files(path.replace("a.txt", "b.txt"))
    with pytest.raises(ValueError, match=r"nor a folder .*; |set `dataset: some/name` instead"):
        source_files("some/name")
    with pytest.raises(ValueError, match=r"No file matches the glob .*\*\.md"):
        source_files(str(tmp_path / "*.md"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no file of a known type \(.txt, .*holds nothing"):
        source_files(str(tmp_path / "empty"))
