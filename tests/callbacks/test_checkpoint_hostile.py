"""Damaged and hostile files: an error that names what is wrong, never wrong numbers."""

import json
import struct

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from litropy.callbacks import checkpoint_header
from litropy.callbacks.checkpoint_format import load_file, open_file, save_file
from litropy.callbacks.checkpoint_header import Region, parse_header, render_header


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file with two tensors of two chunks each, and one small one."""
    path = tmp_path_factory.mktemp("hostile") / "good.safetensors"
    values = torch.randn(2, 600_000, generator=torch.Generator().manual_seed(0))
    save_file({"first": values[0], "second": values[1].clone(), "small": torch.arange(7)}, path, codec="raw")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_file({"weights": torch.randn(60), "mask": torch.rand(40) > 0.5}, path, state={"epoch": [1, 2.5, "x"]})
    return path


def parts(data):
    """Take a file apart: regions, metadata, and the bytes of each tensor."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = parse_header(data[8:start], len(data) - start)
    metadata = {k: v for k, v in header.metadata.items() if k.startswith("litropy_") and k != "litropy_checksum"}
    del metadata["litropy_version"]
    return header.regions, metadata, {n: data[start + r.start : start + r.stop] for n, r in header.regions.items()}


def join(records, regions, metadata):
    """Put a file together again, with checksums of the header and of the heads that are right."""
    found, end = {}, 0
    for name, record in records.items():
        found[name] = Region(end, end + len(record), regions[name].rank)
        end += len(record)
    return render_header(found, metadata) + b"".join(records.values())


def forged(record, **fields):
    """Change fields of a record's head but not its index, and make its checksum right again."""
    names = ("magic", "version", "rank", "delta", "dtype", "chunk_elements", "digest")
    layout = struct.Struct("<4sHBB16sQ16s")
    values = dict(zip(names, layout.unpack(record[: layout.size]), strict=True))
    (old,) = struct.unpack_from("<Q", record, layout.size)
    shape = fields.pop("shape", None)
    index = record[layout.size + 8 : layout.size + 8 + 12 * -(-old // values["chunk_elements"])]
    values |= fields
    head = layout.pack(*values.values()) + struct.pack("<Q", old if shape is None else shape) + index
    return head + xxhash.xxh3_64_digest(head) + record[len(head) + 8 :]


def with_record(data, name, record):
    regions, metadata, records = parts(data)
    heads = json.loads(metadata["litropy_heads"])
    # the checksum of the head is its last eight bytes, wherever it ends
    ends = [n for n in range(56, min(len(record), 200) - 8) if xxhash.xxh3_64_digest(record[:n]) == record[n : n + 8]]
    heads[name] = record[ends[0] : ends[0] + 8].hex() if ends else ""
    return join({**records, name: record}, regions, {**metadata, "litropy_heads": json.dumps(heads)})


def fails(tmp_path, data, match):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match) as error:
        load_file(path)
    assert str(path) in str(error.value)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_noticed(tiny, data):
    content = bytearray(tiny.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "swap", "zero"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[place:]
    elif kind == "grow":
        content += bytes(data.draw(st.integers(1, 9)))
    elif kind == "zero":
        content[place : place + 16] = bytes(len(content[place : place + 16]))
    else:
        other = data.draw(st.integers(0, len(content) - 1))
        content[place], content[other] = content[other], content[place]
    if bytes(content) == tiny.read_bytes():
        return
    bad = tiny.with_name("bad")
    bad.write_bytes(content)
    with pytest.raises(ValueError, match="bad"):
        load_file(bad)


@given(st.binary(max_size=400))
@settings(max_examples=60, deadline=None)
def test_noise_is_no_file(tiny, noise):
    bad = tiny.with_name("noise")
    bad.write_bytes(len(noise).to_bytes(8, "little") + noise)
    with pytest.raises(ValueError, match="noise"):
        load_file(bad)


def test_a_damaged_chunk_names_its_tensor_and_leaves_the_others_readable(good, tmp_path):
    data = bytearray(good.read_bytes())
    regions, _, _ = parts(bytes(data))
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + regions["second"].stop - 5] ^= 4
    fails(tmp_path, data, "tensor 'second' cannot be read: the checksum of chunk 1 is wrong")
    with open_file(tmp_path / "bad.safetensors") as file:
        assert torch.equal(file.tensor("first"), load_file(good)["first"])


def test_shuffled_tensors(good, tmp_path):
    regions, metadata, records = parts(good.read_bytes())
    records["first"], records["second"] = records["second"], records["first"]
    fails(tmp_path, join(records, regions, metadata), "tensor 'first' cannot be read: another tensor lies in its place")


def test_oversized_header(good, tmp_path):
    data = good.read_bytes()
    fails(tmp_path, (2**40).to_bytes(8, "little") + data[8:], "header would have 1099511627776 bytes")
    fails(tmp_path, len(data).to_bytes(8, "little") + data[8:], "header would have")
    fails(tmp_path, b"", "header would have 0 bytes, but the file has 0")


def edited(data, edit):
    """Change the JSON of the header, and make its checksum right again."""
    start = 8 + int.from_bytes(data[:8], "little")
    text = edit(data[8:start].decode())
    blank = '"litropy_checksum":"' + "0" * 32 + '"'
    digest = json.loads(data[8:start])["__metadata__"]["litropy_checksum"]
    text = text.replace(f'"litropy_checksum":"{digest}"', blank)
    checksum = xxhash.xxh3_128_hexdigest(text.encode())
    text = text.replace(blank, f'"litropy_checksum":"{checksum}"')
    return len(text).to_bytes(8, "little") + text.encode() + data[start:]


def entry(data, name):
    start = 8 + int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8:start])[name], separators=(",", ":"))


def test_lies_in_the_header(good, tmp_path):
    data = good.read_bytes()
    second, small = entry(data, "second"), entry(data, "small")
    first_end = json.loads(entry(data, "first"))["data_offsets"][1]
    for edit, match in {
        (lambda t: t.replace(f'"small":{small}', f'"small":{second}')): "overlap or gap",
        (lambda t: t.replace(f'"small":{small}', f'"first":{small}')): "tensor 'first' is in its header twice",
        (lambda t: t.replace(second, second.replace(f"[{first_end},", f"[{first_end + 1},"))): "'second' has shape",
        (lambda t: t.replace(second, second.replace("U8", "F32"))): "'second' has a damaged entry",
        (lambda t: t.replace(second, second.replace(f"[{first_end},", "[-1,"))): "'second' has a damaged entry",
        (lambda t: t.replace('"litropy_version":"1"', '"litropy_version":"2"')): "version '2', this litropy reads '1'",
        (lambda t: t.replace("litropy_version", "other")): "no compressed file of litropy",
        (lambda t: t.replace("litropy_heads", "other")): "header contradicts itself",
        (lambda t: t.replace('"litropy_aliases":"{}"', '"litropy_aliases":"{\\"x\\":\\"y\\"}"')): "'x' refers to one",
    }.items():
        fails(tmp_path, edited(data, edit), match)
    fails(tmp_path, edited(data, lambda t: "[" * 100_000), "header is no JSON")


def test_lies_in_the_head_of_a_tensor(good, tmp_path):
    data = good.read_bytes()
    _, _, records = parts(data)
    first = records["first"]
    for record, match in {
        forged(first, magic=b"ABCD"): "does not start as",
        forged(first, version=2): "does not start as",
        forged(first, dtype=b"object"): "does not start as",
        forged(first, chunk_elements=0): "chunk",
        forged(first, chunk_elements=2**40): "is over 67108864 bytes",
        forged(first, shape=2**44): "takes an index of",
        forged(first, shape=2**63): "",
        forged(first, shape=599_999): "",
        forged(first, shape=600_001): "",
        forged(first, delta=1): "the file names no base",
        first[:40]: "too few",
        first[:-1]: "end at byte",
        first + b"\0": "end at byte",
    }.items():
        fails(tmp_path, with_record(data, "first", record), f"(?s)tensor 'first'.*{match}")


def test_a_bomb_allocates_nothing(tmp_path):
    """A small file that promises terabytes is refused before anything of the kind is allocated."""
    path = tmp_path / "zeros.safetensors"
    save_file({"zeros": torch.zeros(100_000)}, path)
    data = path.read_bytes()
    _, _, records = parts(data)
    huge = forged(records["zeros"], shape=2**42, chunk_elements=2**24)
    fails(tmp_path, with_record(data, "zeros", huge), "tensor 'zeros' cannot be read: shape .* takes an index")
    longer = forged(records["zeros"], shape=2**24, chunk_elements=2**24)
    fails(tmp_path, with_record(data, "zeros", longer), "tensor 'zeros'")


def test_a_header_that_is_too_long_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_header, "_MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="of at most 1000"):
        save_file({str(n): torch.ones(1) for n in range(30)}, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
