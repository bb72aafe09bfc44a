"""Instruction data out of Python source: a function without its docstring, and the docstring to write for it."""

import ast
import textwrap
from collections.abc import Iterator

__all__ = ["docstring_records"]

_MAX_LINES = 40


def docstring_records(source: str) -> Iterator[tuple[str, str]]:
    r"""Yield a prompt and a completion for each documented function of at most 40 lines.

    Args:
        source: Python source; one that does not parse yields nothing.

    Returns:
        Pairs: the function's source with the docstring taken out and a request for one; the docstring.

    Example::

        >>> next(docstring_records("def f(x):\n    'Twice x.'\n    return 2 * x"))
        ('def f(x):\n    return 2 * x\n\n# Docstring:\n', 'Twice x.')
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = source.splitlines()
    for node in _functions(tree):
        docstring = ast.get_docstring(node)
        if not docstring or len(node.body) < 2:
            continue
        quoted, rest = node.body[0], node.body[1]
        assert quoted.end_lineno is not None
        assert node.end_lineno is not None
        on_one_line = quoted.lineno == node.lineno or rest.lineno == quoted.end_lineno
        if on_one_line or node.end_lineno - node.lineno > _MAX_LINES:
            continue
        kept = lines[node.lineno - 1 : quoted.lineno - 1] + lines[quoted.end_lineno : node.end_lineno]
        yield textwrap.dedent("\n".join(kept)) + "\n\n# Docstring:\n", docstring


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions of a module and of its classes, in order; looking into expressions would take most of the time."""
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.stmt):
            yield from _functions(node)
