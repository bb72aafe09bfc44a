"""The ``litropy`` command."""


def main() -> None:
    """Run the command line."""
    raise SystemExit("under construction")
