"""How small tensors get and how fast, codec by codec, in memory.

    python benchmarks/codec_rates.py                                 # Gaussian weights, a minute on one core
    python benchmarks/codec_rates.py --weights model.safetensors     # and those of a model, tensor by tensor

Rates count bytes of the tensors. With one thread they are of processor time, which neighbours on the machine do not
lengthen; with more, of time on the clock. "entropy" is that of the byte planes: the size of coding each plane of each
tensor by its own distribution.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe, slug
from safetensors.torch import load_file
from torch import Tensor

from litropy.kernels.tensor_codec import decode_tensor, encode_tensor
from litropy.kernels.tensor_codec_planes import split_planes, transform, words

RESULTS = Path(__file__).parent / "results"
CODECS = ("zstd", "rans", "auto", "raw")
DTYPES = ("bfloat16", "float16", "float32")


def plane_entropy(tensors: Mapping[str, Tensor]) -> float:
    """Bytes that coding every byte plane by its own distribution would take, as a share of all."""
    bits = 0.0
    for tensor in tensors.values():
        for plane in split_planes(words(tensor.flatten()), transform(tensor.dtype, delta=False), None):
            p = np.bincount(plane, minlength=256) / plane.size
            bits -= plane.size * float(p[p > 0] @ np.log2(p[p > 0]))
    return bits / 8 / sum(tensor.nbytes for tensor in tensors.values())


def fastest(step: Callable[[], Any], rounds: int, clock: Callable[[], float]) -> float:
    """Seconds of the fastest of a few rounds."""
    seconds = []
    for _ in range(rounds):
        start = clock()
        step()
        seconds.append(clock() - start)
    return min(seconds)


def measure(tensors: Mapping[str, Tensor], codec: str, threads: int, rounds: int) -> dict[str, Any]:
    """Size and rates of one codec on some tensors, decoded bit for bit."""
    clock = time.process_time if threads == 1 else time.perf_counter
    total = sum(tensor.nbytes for tensor in tensors.values())
    encoded = {name: encode_tensor(x, codec=codec, threads=threads) for name, x in tensors.items()}
    for name, x in tensors.items():
        assert torch.equal(decode_tensor(encoded[name]).view(torch.uint8), x.view(torch.uint8)), name
    values, coded = tensors.values(), encoded.values()
    encoding = fastest(lambda: [encode_tensor(x, codec=codec, threads=threads) for x in values], rounds, clock)
    decoding = fastest(lambda: [decode_tensor(x, threads=threads) for x in coded], rounds, clock)
    return {
        "codec": codec,
        "threads": threads,
        "ratio": round(sum(x.nbytes for x in encoded.values()) / total, 5),
        "encode_gb_per_s": round(total / encoding / 1e9, 3),
        "decode_gb_per_s": round(total / decoding / 1e9, 3),
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a .safetensors file to measure, too")
    parser.add_argument("--elements", type=int, default=1 << 24, help="how many Gaussian weights")
    parser.add_argument("--rounds", type=int, default=5, help="the fastest of so many")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="chunks that are coded at once")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    sources = {"gaussian": {"weight": torch.randn(args.elements, generator=generator).mul_(0.02)}}
    if args.weights:
        loaded = load_file(args.weights)
        sources[args.weights.stem] = {name: x for name, x in loaded.items() if x.is_floating_point()}
    machine = describe("cpu")
    rows = []
    for source, weights in sources.items():
        for dtype in DTYPES:
            tensors = {name: x.to(getattr(torch, dtype)) for name, x in weights.items()}
            known = {"source": source, "dtype": dtype, "entropy": round(plane_entropy(tensors), 5)}
            for threads in args.threads:
                for codec in CODECS:
                    rows.append(known | measure(tensors, codec, threads, args.rounds))
                    print(rows[-1], flush=True)
    output = args.output or RESULTS / f"codec_rates_{slug(machine['hardware'])}.json"
    output.write_text(json.dumps({"benchmark": "codec_rates", "machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
