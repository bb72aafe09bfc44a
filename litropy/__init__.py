"""Language-model training and entropy: ``litropy.losses`` is ``./losses``, ``litropy.kernels`` is ``./kernels``, ..."""

from pathlib import Path as _Path

__version__ = "0.1.0"

_checkout = _Path(__file__).resolve().parents[1]
if (_checkout / "pyproject.toml").is_file():  # editable install or bare checkout, never a wheel
    __path__.append(str(_checkout))
