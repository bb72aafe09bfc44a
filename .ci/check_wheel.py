"""Check that an installed wheel is complete: every module imports from it, and the packaged configs are there."""

import importlib
import importlib.metadata
import pkgutil
import sys
from importlib.resources import files
from pathlib import Path

import litropy

PACKAGES = ("callbacks", "configs", "kernels", "losses", "recipes")


def main(environment: str) -> None:
    """Import everything.

    Args:
        environment: folder of the virtual environment that must own every module.
    """
    names = ["litropy", *(f"litropy.{name}" for name in PACKAGES)]
    for name in list(names):
        folder = importlib.import_module(name).__path__
        names += [f"{name}.{module.name}" for module in pkgutil.iter_modules(folder) if module.name != "__main__"]
    for name in dict.fromkeys(names):
        module = importlib.import_module(name)
        places = [module.__file__] if module.__file__ else list(module.__path__)
        assert all(Path(str(place)).is_relative_to(environment) for place in places), f"{name} comes from {places}"
    configs = list(Path(str(files("litropy.configs"))).rglob("*.yaml"))
    assert configs, "the wheel has no configs"
    version = importlib.metadata.version("litropy")
    assert version == litropy.__version__, f"metadata say {version}, the module {litropy.__version__}"
    print(f"litropy {version}: {len(set(names))} modules and {len(configs)} configs, all from the wheel")


if __name__ == "__main__":
    main(sys.argv[1])
