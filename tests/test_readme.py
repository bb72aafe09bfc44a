"""What the pages tell a reader to type works: Python blocks run, commands are parsed by the real parsers."""

import itertools
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from litropy import cli
from litropy.testing import tiny_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# tools whose arguments are not checked here; that they are installed by what CONTRIBUTING says is
TOOLS = ("ruff", "mypy", "pre-commit", "source", "zensical")


def blocks(language):
    """(page, number, code) of every block of a language."""
    found = []
    for page in PAGES:
        codes = [code for name, code in FENCE.findall(page.read_text()) if name == language]
        found += [pytest.param(code, id=f"{page.name}-{number}") for number, code in enumerate(codes)]
    return found


def commands():
    lines = {}
    for block in blocks("bash"):
        for line in block.values[0].splitlines():
            for command in line.split("&&"):
                lines.setdefault(command.split(" #")[0].strip(), block.id)
    return [command for command in lines if command]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_two_commands_stand_in_the_readme():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "pip install -c constraints.txt -e . && litropy fit --config quickstart/pretrain_cpu.yaml" in lines
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in lines


def check_pip(words):
    assert words[1] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for flag, word in itertools.pairwise(words):
        if flag == "-c":
            assert (ROOT / word).is_file()
        if word.startswith(".["):
            assert set(word[2:-1].split(",")) <= set(extras)


def check_python(words):
    if words[1] == "-m":
        return
    source = (ROOT / words[1]).read_text()
    for flag in words[2:]:
        assert f'"{flag}"' in source, f"{words[1]} has no option {flag}"


def check_litropy(arguments):
    training = arguments[0] in cli.COMMANDS and "--help" not in arguments
    if training:
        with pytest.raises(SystemExit, match=r"^0$"):  # a mistake exits with another code
            cli.main([*arguments, "--print_config"])
    else:
        cli.main(arguments)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Hugging Face folder, as it is and compressed."""
    plain, compressed = (tmp_path_factory.mktemp("folders") / name for name in ("plain", "compressed"))
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config("llama"))).save_pretrained(plain)
    cli.main(["export", str(plain), str(compressed)])
    return {"export": plain, "verify": compressed, "decompress": compressed}


@pytest.mark.parametrize("command", commands())
def test_commands(command, elsewhere, capsys, request):
    words = shlex.split(command)
    if words[0] == "litropy":
        if words[1] in ("export", "verify", "decompress"):
            shutil.copytree(request.getfixturevalue("folders")[words[1]], words[2])
        check_litropy(words[1:])
        assert capsys.readouterr().out, "prints nothing"
    elif words[0] == "pip":
        check_pip(words)
    elif words[0] == "python":
        check_python(words)
    elif words[0] in ("bash", "pytest"):
        assert all((ROOT / word).exists() for word in words[1:] if not word.startswith("-") and not word.isdigit())
    else:
        assert words[0] in TOOLS, f"nothing checks {command!r}"


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, elsewhere):
    exec(compile(code, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_is_accepted(text, elsewhere, capsys):
    assert isinstance(yaml.safe_load(text), dict)
    Path("fragment.yaml").write_text(text)
    check_litropy(["fit", "--config", "fragment.yaml"])
    assert "learning_rate" in capsys.readouterr().out
