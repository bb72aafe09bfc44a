"""Files and chunks that a fuzzer makes up, guided by what they reach: ``python fuzz_checkpoint.py FOLDER SECONDS``.

Checksums let everything pass here: what lies behind them has to hold by itself. Whatever is read or a ValueError is
right; another error, a crash, a wait of more than ten seconds or more than 2 GiB of memory is a finding.
"""

import sys
from pathlib import Path

import atheris
import torch

# compiled by Numba from plain bytecode
import litropy.kernels.rans_numba
import litropy.kernels.tensor_codec_numba
import litropy.kernels.zstd_literals  # noqa: F401

with atheris.instrument_imports(include=["litropy.callbacks", "litropy.kernels"]):
    from litropy.callbacks import checkpoint_header, checkpoint_reader, checkpoint_record
    from litropy.callbacks.checkpoint_format import save_file
    from litropy.kernels.tensor_codec import TensorLayout, decode_chunk, encode_tensor

COUNT = 700
DTYPES = (torch.bfloat16, torch.float32, torch.int64, torch.float8_e5m2)


class _Passing:
    """Equal to any checksum."""

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    __hash__ = None


class _Checksums:
    def __getattr__(self, name):
        return lambda data: _Passing()


def seeds(folder):
    """Good files and chunks, each after a byte that says which it is."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(COUNT, generator=generator).mul_(0.02)
    for codec in ("zstd", "rans", "raw"):
        tensors = {str(k): (values * (1 + 1000 * (k == 2))).to(dtype) for k, dtype in enumerate(DTYPES)}
        save_file(tensors, folder / "file", codec=codec, state={"step": 1})
        whole = (folder / "file").read_bytes()
        (folder / f"file_{codec}").write_bytes(b"\0" + whole)
        for k, x in enumerate(tensors.values()):
            (folder / f"chunk_{codec}_{k}").write_bytes(bytes([1 + k]) + encode_tensor(x, codec=codec).chunks[0])
    (folder / "file").unlink()
    # exponents against the scale of their group; bytes under a ceiling
    groups = values * 2.0 ** (-6 * (torch.arange(COUNT) // 128))
    moved, base = (values + 1e-4 * torch.randn(COUNT, generator=generator)).bfloat16(), values.bfloat16()
    (folder / "chunk_groups").write_bytes(bytes([1 + 1]) + encode_tensor(groups, codec="zstd").chunks[0])
    (folder / "chunk_ceiling").write_bytes(bytes([1]) + encode_tensor(moved, codec="rans", base=base).chunks[0])


def main(folder, seconds):
    """Fuzz for so long."""
    corpus, path = Path(folder, "corpus"), Path(folder, "file")
    seeds(corpus)
    checksums = _Checksums()
    for module in (checkpoint_header, checkpoint_reader, checkpoint_record):
        module.xxhash = checksums

    def one(data):
        if not data:
            return
        try:
            if kind := data[0] % (1 + len(DTYPES)):
                decode_chunk(data[1:], TensorLayout(DTYPES[kind - 1], (COUNT,), False, 32768), 0)
                return
            path.write_bytes(data[1:])
            with checkpoint_reader.CheckpointFile(path) as file:
                for name in file.names:
                    file.tensor(name)
        except ValueError:
            pass

    limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=16384"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}/", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
