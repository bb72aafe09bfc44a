"""The fragment that compresses checkpoints, on a run that knows nothing of it."""

import torch
import yaml

from litropy.callbacks import CompressedCheckpointIO
from litropy.callbacks.checkpoint_format import open_file
from litropy.config_files import packaged_configs

FRAGMENT = packaged_configs()["checkpoint/compressed.yaml"]


def test_a_run_is_saved_resumed_and_evaluated_compressed(litropy, project):
    options = [
        "--config",
        "tiny.yaml",
        "--config",
        "checkpoint/compressed.yaml",
        "--trainer.plugins.key_frame_every",
        3,
    ]
    place = ["--trainer.default_root_dir", "compressed"]
    stop = "--trainer.callbacks+={class_path: stoppers.InterruptAt, init_args: {step: 6}}"
    result = litropy("fit", *options, *place, stop)
    assert result.code == 130, result.err
    run = project / "compressed" / "tiny" / "version_0"
    for name in ("last", "best"):
        with open_file(run / "checkpoints" / f"{name}.ckpt") as file:
            assert file.state["tree"]["hyper_parameters"]["learning_rate"] == 0.01
            assert any(tensor.startswith("optimizer_states/0/state/") for tensor in file.names)
    result = litropy("fit", *options, *place, "--ckpt_path", "last")
    assert "going on from 6" in result.out, result.err
    result = litropy("fit", "--config", "tiny.yaml", "--trainer.default_root_dir", "plain")
    assert result.code == 0, result.err
    expected = torch.load(project / "plain" / "tiny" / "version_0" / "checkpoints" / "last.ckpt", weights_only=False)
    resumed = CompressedCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert list(resumed) == list(expected)
    for name, weight in expected["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weight), name
    result = litropy("validate", *options[:4], *place, "--ckpt_path", "last")
    assert result.code == 0, result.err


def test_the_fragment_is_one_line():
    assert yaml.safe_load(FRAGMENT.read_text()) == {
        "trainer": {"plugins": [{"class_path": "litropy.callbacks.CompressedCheckpointIO"}]}
    }
