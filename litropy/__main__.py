"""``python -m litropy`` is the ``litropy`` command."""

from litropy.cli import main

if __name__ == "__main__":
    main()
