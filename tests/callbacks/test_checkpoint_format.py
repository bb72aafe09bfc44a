"""Compressed files: bit for bit, valid safetensors, read in parts, in little memory."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litropy.callbacks.checkpoint_format import load_file, open_file, save_file
from litropy.kernels.tensor_codec import DTYPES

MIB = 2**20


def random_bits(dtype, *shape):
    """A tensor of random bits: NaNs of all kinds, infinities, denormals and negative zeros among them."""
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).view(shape)


def same_bits(left, right):
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("codec", ["auto", "zstd", "rans", "raw"])
def test_every_dtype_comes_back_bit_for_bit(tmp_path, codec):
    tensors = {name: random_bits(dtype, 3, 50) for name, dtype in DTYPES.items()}
    tensors["all bfloat16"] = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    written = save_file(tensors, tmp_path / "x.safetensors", codec=codec)
    loaded = load_file(tmp_path / "x.safetensors")
    assert list(loaded) == list(tensors)
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())
    assert written.tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert written.file_bytes == (tmp_path / "x.safetensors").stat().st_size


def test_odd_tensors(tmp_path):
    whole = torch.randn(300, 40)
    conjugate = torch.randn(5, dtype=torch.complex64).conj()
    parameter = torch.nn.Parameter(torch.randn(4))
    tensors = {
        "scalar": torch.tensor(-0.0), "empty": torch.empty(3, 0, 2), "transposed": whole.t(),
        "strided": whole[::7, 3::2],
        "expanded": torch.tensor([1.5]).expand(1000, 30), "part": whole[10:20], "other part": whole[15:25],
        "conjugate": conjugate, "parameter": parameter, "\u65e5\u672c/\U0001f600 \"quoted\"": torch.ones(2),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x")
    loaded = load_file(tmp_path / "x")
    for name, tensor in tensors.items():
        assert same_bits(loaded[name], tensor.detach().resolve_conj()), name
        assert loaded[name].is_contiguous(), name
        assert loaded[name].untyped_storage().nbytes() == tensor.nbytes, f"{name} owns its memory"


def test_saving_leaves_the_tensors_alone(tmp_path):
    tensor = random_bits(torch.bfloat16, 1000)
    before, version = tensor.clone(), tensor._version
    save_file({"a": tensor}, tmp_path / "x")
    assert same_bits(tensor, before)
    assert tensor._version == version


def test_shared_storage_is_stored_once(tmp_path):
    weight = torch.randn(200, 100)
    written = save_file({"head": weight, "embedding": weight.view_as(weight), "copy": weight.clone()}, tmp_path / "x")
    assert written.tensor_bytes == 2 * weight.nbytes
    with open_file(tmp_path / "x") as file:
        assert set(file.names) == {"head", "embedding", "copy"}
        assert file.stored_bytes("embedding") == 0 < file.stored_bytes("head")
        assert torch.equal(file.rows("embedding", 7, 9), weight[7:9])
    loaded = load_file(tmp_path / "x")
    assert torch.equal(loaded["embedding"], weight)
    assert loaded["embedding"].data_ptr() != loaded["head"].data_ptr()


def test_it_is_a_valid_safetensors_file_that_nobody_takes_for_the_tensors(tmp_path):
    tensors = {"matrix": torch.randn(9, 9), "vector": torch.randn(70), "scalar": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors", state={"epoch": 3})
    plain = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(plain) == set(tensors)
    for name, tensor in plain.items():
        assert tensor.dtype == torch.uint8
        assert tensor.shape != tensors[name].shape
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["litropy_version"] == "1"
        assert json.loads(file.metadata()["litropy_state"]) == {"epoch": 3}


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    """A tensor of four chunks, and a difference from it."""
    folder = tmp_path_factory.mktemp("long")
    tensor = torch.randn(70_001, 29, generator=torch.Generator().manual_seed(1))
    later = tensor + 1e-4 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
    save_file({"t": tensor, "gone": torch.ones(5)}, folder / "base")
    written = save_file({"t": later, "new": torch.ones(5)}, folder / "delta", base=folder / "base", threads=2)
    assert written.deltas == 1
    return folder, tensor, later


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_rows_are_read_alone(long_file, data):
    folder, tensor, later = long_file
    start = data.draw(st.integers(0, len(tensor)))
    stop = data.draw(st.integers(start, min(start + 30_000, len(tensor))))
    with open_file(folder / "base") as base, open_file(folder / "delta", base=folder / "base") as delta:
        assert same_bits(base.rows("t", start, stop), tensor[start:stop])
        assert same_bits(delta.rows("t", start, stop), later[start:stop])


def test_only_the_chunks_of_the_rows_are_read(long_file, monkeypatch):
    folder, _, _ = long_file
    with open_file(folder / "base") as file:
        file.layout("t")
        seen = []
        chunk = file.chunk
        monkeypatch.setattr(file, "chunk", lambda name, index: seen.append(index) or chunk(name, index))
        file.rows("t", 30_000, 30_010)
        assert len(seen) == 1
    with (
        pytest.raises(ValueError, match=r"'t' of shape \[70001, 29\] has no rows 5 to 70002"),
        open_file(folder / "base") as f,
    ):
        f.rows("t", 5, 70_002)


def test_differences_are_smaller_and_exact(long_file):
    folder, _, later = long_file
    assert (folder / "delta").stat().st_size < 0.85 * (folder / "base").stat().st_size
    assert same_bits(load_file(folder / "delta", base=folder / "base", threads=2)["t"], later)


def test_a_tensor_that_has_nothing_in_common_is_stored_whole(tmp_path):
    save_file({"t": torch.randn(1000)}, tmp_path / "base")
    other = {"t": torch.randn(1001), "u": torch.randn(4)}
    assert save_file(other, tmp_path / "x", base=tmp_path / "base").deltas == 0
    assert same_bits(load_file(tmp_path / "x")["t"], other["t"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux counts it")
def test_peak_memory_is_a_few_chunks(tmp_path):
    tensors = {"t": torch.randn(40 * MIB), "transposed": torch.randn(2048, 1024).t()}

    def peak_of(function):
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        result = function()
        return status("VmHWM") - before, result

    def status(field):
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) / 1024

    save_file({"warm": torch.randn(MIB)}, tmp_path / "warm")
    load_file(tmp_path / "warm")
    extra, _ = peak_of(lambda: save_file(tensors, tmp_path / "x"))
    assert extra < 66, "64 MiB and a chunk"
    extra, loaded = peak_of(lambda: load_file(tmp_path / "x"))
    assert extra - 168 < 66
    assert same_bits(loaded["transposed"], tensors["transposed"])


@pytest.mark.parametrize("tensor", [torch.empty(3, device="meta"), torch.eye(3).to_sparse(), torch.ones(2).numpy()])
def test_what_cannot_be_stored_is_named(tmp_path, tensor):
    with pytest.raises(ValueError, match="bad one"):
        save_file({"good": torch.ones(1), "bad one": tensor}, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_use(long_file, tmp_path):
    folder, _, _ = long_file
    with pytest.raises(ValueError, match="which is missing: bring that file"):
        load_file(folder / "delta")
    save_file({"t": torch.zeros(70_001, 29)}, tmp_path / "other")
    with pytest.raises(ValueError, match="'t' cannot be read: it is a difference from a file with digest"):
        load_file(folder / "delta", base=tmp_path / "other")
    with pytest.raises(ValueError, match="holds differences itself"):
        save_file({"t": torch.ones(1)}, tmp_path / "x", base=folder / "delta")
    with pytest.raises(ValueError, match="has no tensor 'u'"), open_file(folder / "base") as file:
        file.tensor("u")
    with pytest.raises(ValueError, match="`threads` is 0"):
        save_file({}, tmp_path / "x", threads=0)
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path / "nothing")


def many_tensors():
    """Of one chunk, of several, of a few bytes and of none, and some that are coded in other ways."""
    generator = torch.Generator().manual_seed(3)
    tensors = {f"small {i}": torch.randn(40, 300 + i, generator=generator).bfloat16() for i in range(9)}
    tensors |= {"several chunks": torch.randn(3, 600_001, generator=generator), "nothing": torch.empty(0, 4)}
    tensors |= {"number": torch.tensor(3), "noise": torch.randint(0, 256, (99_999,), generator=generator).byte()}
    tensors |= {"transposed": torch.randn(700, 90, generator=generator).t(), "alias": tensors["small 3"]}
    return tensors


@pytest.mark.parametrize("delta", [False, True])
def test_threads_change_neither_the_file_nor_the_tensors(tmp_path, delta):
    tensors = many_tensors()
    base = None
    if delta:
        base = tmp_path / "base"
        save_file({name: (x * 1.001).to(x.dtype) for name, x in tensors.items()}, base)
    paths = [tmp_path / str(threads) for threads in (1, 2, 5)]
    for path in paths:
        save_file(tensors, path, base=base, threads=int(path.name))
    assert len({path.read_bytes() for path in paths}) == 1
    for threads in (1, 2, 5):
        loaded = load_file(paths[0], base=base, threads=threads)
        assert list(loaded) == list(tensors)
        assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_tell_of_each_byte_and_stop_when_nobody_asks_for_more(tmp_path, threads):
    tensors = many_tensors()
    save_file(tensors, tmp_path / "x")
    with open_file(tmp_path / "x") as file:
        told = []
        assert [name for name, _ in file.tensors(tensors, threads=threads, progress=told.append)] == list(tensors)
        assert sum(told) == sum(tensor.nbytes for tensor in tensors.values())
        first = next(file.tensors(["several chunks", *tensors], threads=threads))
        assert first[0] == "several chunks"
        assert same_bits(first[1], tensors["several chunks"])
        with pytest.raises(ValueError, match="has no tensor 'u'"):
            dict(file.tensors(["number", "u"], threads=threads))


@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_thread_finds_damaged_is_named(tmp_path, threads):
    tensors = many_tensors()
    path = tmp_path / "x"
    save_file(tensors, path)
    data = bytearray(path.read_bytes())
    with open_file(path) as file:
        region = file._header.regions["small 5"]
        data[file._header.data_start + region.stop - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="'small 5' cannot be read: the checksum of chunk 0 is wrong"):
        load_file(path, threads=threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_tensor_that_threads_cannot_store_is_named(tmp_path, threads, monkeypatch):
    from litropy.callbacks import checkpoint_writer

    def fail(values, plan, room, *, base):
        if plan.layout.shape == (40, 305):
            raise ValueError("so it is")
        return original(values, plan, room, base=base)

    original = checkpoint_writer.encode_chunk_into
    monkeypatch.setattr(checkpoint_writer, "encode_chunk_into", fail)
    with pytest.raises(ValueError, match="Tensor 'small 5' cannot be stored: so it is"):
        save_file(many_tensors(), tmp_path / "x", threads=threads)
    assert list(tmp_path.iterdir()) == []
