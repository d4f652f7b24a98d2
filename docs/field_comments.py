"""Comments of dataclass fields and constants in the API reference.

The package documents them by the comment above, which is also a field's help on the command line,
or behind; Griffe reads only strings.
"""

from __future__ import annotations

import ast
from typing import Any

import griffe


def comment_of(lines: list[str], first: int, last: int) -> str:
    """The comment above an assignment, else the one behind it; empty where there is none.

    Args:
        lines: of the file.
        first, last: lines of the assignment, from 1.

    """
    above: list[str] = []
    row = first - 2
    while row >= 0 and lines[row].lstrip().startswith("# "):
        above.insert(0, lines[row].strip().removeprefix("# "))
        row -= 1
    if above:
        return " ".join(above)
    _, _, behind = lines[last - 1].partition("  # ")
    return behind.strip()


class FieldComments(griffe.Extension):
    """Give what has no docstring its comment."""

    def on_attribute_instance(
        self,
        *,
        node: ast.AST | griffe.ObjectNode,
        attr: griffe.Attribute,
        agent: griffe.Visitor | griffe.Inspector,
        **kwargs: Any,
    ) -> None:
        """See `griffe.Extension`."""
        fields_or_constants = attr.name.isupper() or (attr.parent and attr.parent.is_class)
        if attr.docstring or not fields_or_constants:
            return
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            return
        text = comment_of(list(attr.lines_collection[attr.filepath]), attr.lineno, attr.endlineno)
        if text:
            attr.docstring = griffe.Docstring(text, lineno=attr.lineno, parent=attr)
