import random
from types import SimpleNamespace

import pytest

WORDS = ["def", "return", "import", "class", "self", "for", "in", "if", "else", "not", "None", "print", "range", "open"]
TINY = """# A tiny model for tests.
model:
  config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
  learning_rate: 0.01
  generation: {max_new_tokens: 4}
data:
  source: texts
  vocab_size: 300
  sequence_length: 16
  batch_size: 4
  val_fraction: 0.2
trainer:
  accelerator: cpu
  max_epochs: -1
  max_steps: 12
  val_check_interval: 4
  log_every_n_steps: 1
  num_sanity_val_steps: 0
"""
CALLBACKS = """import os, signal
from lightning.pytorch import Callback

class InterruptAt(Callback):
    def __init__(self, step: int, times: int = 1):
        self.step, self.times = step, times
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)

class DieAt(Callback):
    def __init__(self, step: int):
        self.step = step
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step - 1:
            os._exit(9)

class InterruptInSetup(Callback):
    def setup(self, *args, **kwargs):
        raise KeyboardInterrupt

class FailAt(Callback):
    def on_train_start(self, *args):
        raise ValueError("the answer is 41; it must be 42.")
"""


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A folder with texts, a config for a tiny model, and callbacks that stop training."""
    folder = tmp_path_factory.mktemp("project")
    rng = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(40):
        lines = [" ".join(rng.choices(WORDS, k=8)) for _ in range(12)]
        (folder / "texts" / f"{number}.txt").write_text("\n".join(lines))
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "stoppers.py").write_text(CALLBACKS)
    return folder


@pytest.fixture
def litropy(project, monkeypatch, capsys):
    """Run the command in this process, in the project's folder; gives code, out and err."""
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))

    def run(*arguments, debug=False):
        from litropy.cli import main

        monkeypatch.setenv("LITROPY_DEBUG", "1" if debug else "0")
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run
