"""How small checkpoints get, how fast, and in how much memory, against other packages in one run.

    python benchmarks/checkpoint.py            # trains two models first; a quarter of an hour on two cores
    python benchmarks/checkpoint.py --quick    # tiny tensors, in this process: does everything run?

Every contender has a process of its own for each case and number of threads; differences, and contenders that take
long, are measured with one thread. Rates count bytes of the tensors; with one
thread they are of processor time, which neighbours on the machine do not lengthen, with more of time on the clock.
Memory is the peak beyond what goes in and what comes out. What is decoded has to be the original, bit for bit.
"Entropy" is that of the byte planes, each of each tensor by its own distribution: of the words, or of the differences.
Saving in the background is timed as a training step sees it, and as copying the tensors takes alone.
Whoever is not installed, or fails, is in the record with the reason.
"""

import argparse
import json
import math
import multiprocessing
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_codecs import CONTENDERS, PACKAGES, Contender, Tensors
from checkpoint_saving import saving
from checkpoint_sources import CACHE, Source, finetuned, gaussian, published, quickstart
from machine import describe, slug, version_of
from measuring import MIB, watch_peak
from safetensors.torch import load_file
from torch import Tensor

from litropy.kernels.tensor_codec_planes import split_planes, transform, words

RESULTS = Path(__file__).parent / "results"
FORK = multiprocessing.get_context("fork")


def plane_entropy(tensors: Tensors, base: Tensors | None = None) -> float:
    """Bytes that coding every byte plane by its own distribution would take, as a share of all."""
    bits = 0.0
    for name, x in tensors.items():
        others = None if base is None else words(base[name].flatten())
        for plane in split_planes(words(x.flatten()), transform(x.dtype, delta=base is not None), others):
            p = np.bincount(plane, minlength=256) / max(plane.size, 1)
            bits -= plane.size * float(p[p > 0] @ np.log2(p[p > 0]))
    return bits / 8 / nbytes(tensors)


def loaded(path: Path | str | None) -> dict[str, Tensor] | None:
    """Tensors of a file, in memory; the reader alone would leave them on the disk until they are looked at."""
    return None if path is None else {name: x.clone() for name, x in load_file(path).items()}


def nbytes(tensors: Tensors) -> int:
    """Bytes of all of them."""
    return sum(x.nbytes for x in tensors.values())


def differing(left: Tensors, right: Tensors) -> list[str]:
    """Names under which two sets of tensors differ in any bit."""
    return [
        name
        for name, x in left.items()
        if name not in right
        or right[name].dtype != x.dtype
        or right[name].shape != x.shape
        or not torch.equal(right[name].flatten().view(torch.uint8), x.flatten().view(torch.uint8))
    ]


def fastest(
    step: Callable[[], Any], rounds: int, patience: float, clock: Callable[[], float], first: float = 0.0
) -> float:
    """Seconds of the fastest of a few rounds; ``first`` has to do if it took longer than ``patience``."""
    seconds = [first] if first > patience else []
    begin = time.perf_counter()
    while not seconds or (len(seconds) < rounds and time.perf_counter() - begin < patience and first <= patience):
        start = clock()
        step()
        seconds.append(clock() - start)
    return max(min(seconds), 1e-9)


def measure(contender: Contender, source: Source, threads: int, rounds: int, patience: float = 2) -> dict[str, Any]:
    """Ratio, rates and memory of one contender, in this process.

    Raises:
        ValueError: if what it decodes is not what it was given.
    """
    tensors, base = loaded(source.path), loaded(source.base)
    assert tensors is not None
    total = nbytes(tensors)
    coder = contender.make(threads)
    encode, decode = partial(coder.encode, tensors, base), coder.decode
    largest = sorted(tensors, key=lambda name: tensors[name].nbytes)[-2:]
    small = {name: tensors[name].flatten()[: 1 << 17].clone() for name in largest}
    small_base = None if base is None else {name: base[name].flatten()[: 1 << 17].clone() for name in small}
    blob = coder.encode(small, small_base)  # compiles and loads what the first call does
    if decode is not None:
        decode(blob, small_base)
    clock = time.process_time if threads == 1 else time.perf_counter
    risen = watch_peak("cpu")
    start = clock()
    blob = encode()
    first = clock() - start
    size = coder.nbytes(blob)
    held = 0 if isinstance(blob, int | Path) else size
    result = {"encode_extra_mib": round(max(0, risen() - held) / MIB, 1), "ratio": round(size / total, 5)}
    result["encode_gb_per_s"] = round(total / fastest(encode, rounds, patience, clock, first) / 1e9, 4)
    if decode is not None:
        risen = watch_peak("cpu")
        start = clock()
        back = decode(blob, base)
        first = clock() - start
        result["decode_extra_mib"] = round(max(0, risen() - total) / MIB, 1)
        if wrong := differing(tensors, back):
            raise ValueError(f"decodes to something else: {wrong[0]}, and {len(wrong) - 1} others")
        del back
        result["decode_gb_per_s"] = round(
            total / fastest(partial(decode, blob, base), rounds, patience, clock, first) / 1e9, 4
        )
    return result


def isolated(contender: Contender, source: Source, threads: int, rounds: int, limit: float) -> dict[str, Any]:
    """The same in a process of its own, or the reason why there is no result."""
    # forked from one that has imported everything: what all have in common is not waited for again and again
    receive, send = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_answer, args=(send, contender, source, threads, rounds))
    child.start()
    send.close()
    found = None
    try:
        if not receive.poll(limit):
            return {"reason": f"took more than {limit:g} s"}
        found = receive.recv()
    except EOFError:
        found = None
    finally:
        if found is None:
            child.kill()
        child.join()
    return found or {"reason": f"exit code {child.exitcode}"}


def _answer(send: Any, contender: Contender, source: Source, threads: int, rounds: int) -> None:
    torch.set_num_threads(threads)
    send.send(here(contender, source, threads, rounds, math.inf))


def here(contender: Contender, source: Source, threads: int, rounds: int, limit: float) -> dict[str, Any]:
    """The same in this process."""
    try:
        return measure(contender, source, threads, rounds)
    except Exception as error:
        return {"reason": traceback.format_exception_only(error)[-1].strip()[:200]}


def run_case(source: Source, contenders: Iterable[Contender], threads: Sequence[int], trial: Any) -> dict[str, Any]:
    """Everybody who can on one source."""
    tensors, base = loaded(source.path), loaded(source.base)
    assert tensors is not None
    case: dict[str, Any] = {"data": source.data, "dtype": source.dtype, "apart": source.apart}
    case |= {"bytes": nbytes(tensors), "entropy": round(plane_entropy(tensors, base), 5), "results": [], "not_run": []}
    del tensors, base
    for contender in contenders:
        if source.dtype not in contender.dtypes or (source.base is not None and not contender.deltas):
            continue
        for count in threads:
            if count > (1 if source.base is not None else contender.most_threads):
                continue
            found = trial(contender, source, count)
            case["not_run" if "reason" in found else "results"].append(
                {"name": contender.name, "threads": count, **found}
            )
            if "reason" in found:
                break
        print(
            *(row for row in case["results"] + case["not_run"] if row["name"] == contender.name), sep="\n", flush=True
        )
    return case


def all_sources(folder: Path, cache: Path, missing: list[dict[str, str]]) -> Iterator[Source]:
    """Every source, one at a time; those that cannot be had are listed in ``missing``."""
    yield from gaussian(folder, 1 << 24)
    others = {
        "MiniLM": published(folder),
        "quickstart": quickstart(cache / "quickstart"),
        "MiniLM, fine-tuned": finetuned(cache / "fine_tuned"),
    }
    for name, sources in others.items():
        try:
            yield from sources
        except (ImportError, subprocess.CalledProcessError) as error:
            missing.append({"data": name, "reason": traceback.format_exception_only(error)[-1].strip()})


def main() -> None:
    """Measure, and write the JSON after each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny Gaussian weights alone, in this process")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="chunks that are coded at once")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a contender may take in its process")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder where checkpoints are trained and kept")
    parser.add_argument("--contenders", nargs="+", choices=[one.name for one in CONTENDERS], help="only these")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: results/checkpoint_<machine>.json)")
    parser.add_argument("--sources", nargs="+", help="only data whose name starts so")
    options = parser.parse_args()
    # forked processes must not find threads that are not theirs
    torch.set_num_threads(1)
    machine = describe("cpu")
    machine["versions"] |= {package: version for package in PACKAGES if (version := version_of(package))}
    record: dict[str, Any] = {"benchmark": "checkpoint", "machine": machine, "cases": [], "missing": []}
    output = options.output or RESULTS / f"checkpoint_{slug(machine['hardware'])}{'_quick' * options.quick}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    contenders = [one for one in CONTENDERS if not options.contenders or one.name in options.contenders]
    rounds = 1 if options.quick else options.rounds
    trial = partial(here if options.quick else isolated, rounds=rounds, limit=options.limit)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sources = gaussian(folder, 1 << 15) if options.quick else all_sources(folder, options.cache, record["missing"])
        for source in sources:
            if options.sources and not source.data.startswith(tuple(options.sources)):
                continue
            record["cases"].append(run_case(source, contenders, options.threads, trial))
            output.write_text(json.dumps(record, indent=1) + "\n")
        record["saving"] = saving(1 << (16 if options.quick else 24), rounds)
        print(record["saving"], flush=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
