"""Check what the exporting quickstart left: differences, a model that reloads bit for bit, a run that goes on."""

import csv
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import litropy.huggingface  # noqa: F401
from litropy.callbacks.checkpoint_format import open_file


def differences(run: Path, names: list[str]) -> list[bool]:
    """Whether some checkpoints are differences; every tensor in them is read and checked."""
    found = []
    for name in names:
        with open_file(run / f"checkpoints/{name}.ckpt") as file:
            assert all(file.tensor(key).is_contiguous() for key in file.names)
            found.append(file.base_digest is not None)
    return found


def held_out(run: Path) -> list[float]:
    """Held-out losses of a run."""
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]


def main(config_runs: str, plain: str, of_a_step: str) -> None:
    """Check the newest run but one, and the newest, which went on from its step 40.

    Args:
        config_runs: ``runs/<config name>``.
        plain: the exported folder, decompressed.
        of_a_step: the folder exported from the checkpoint of step 40, a difference.
    """
    versions = sorted(Path(config_runs).glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    run, resumed = versions[-2:]
    assert differences(run, ["step=20", "step=40"]) == [False, True]
    assert differences(resumed, ["step=60", "last"]) == [False, True]
    sizes = {step: (run / f"checkpoints/step={step}.ckpt").stat().st_size for step in (20, 40)}
    smaller = sizes[40] / sizes[20]
    assert smaller < 0.99, f"a difference takes {smaller:.1%} of a key frame"

    folder = run / "hugging_face_litropy"
    report = json.loads((folder / "litropy_report.json").read_text())
    assert report["bit_exact"], "not every tensor came back"
    assert report["ratio"] < 0.85, f"the model takes {report['ratio']:.1%} of its size"
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, variant=variant).state_dict()
        for name, path, variant in (
            ("best", folder, "litropy"), ("plain", plain, None), ("step 40", of_a_step, "litropy"),
        )
    }  # fmt: skip
    assert models["best"].keys() == models["plain"].keys() == models["step 40"].keys()
    for name, x in models["best"].items():
        assert torch.equal(x.view(torch.int32), models["plain"][name].view(torch.int32)), f"{name} differs"
    assert any(not torch.equal(x, models["step 40"][name]) for name, x in models["best"].items())

    losses = [held_out(run)[0], held_out(resumed)[-1]]
    print(
        f"{run}: a difference takes {smaller:.1%} of a key frame, the model {report['ratio']:.1%} of its size and"
        f" reloads bit for bit; held-out loss {losses[0]:.2f}, at the end {losses[-1]:.2f} nats"
    )
    assert losses[-1] < losses[0], "the resumed run did not learn"


if __name__ == "__main__":
    main(*sys.argv[1:])
