"""The code's style in numbers: ``python tests/style.py [FOLDER ...]``. Compare two
commits, or compare with code that reads well.

A mirror, not a goal: it sets no limits and is not a test.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from dataclasses import dataclass, fields
from pathlib import Path

COLUMNS = 100
PARAMETERS = 6
"""More than this count as many; ``self`` and ``cls`` do not count."""
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class Counts:
    """The counts of one file or of many. Docstrings and comments are not code lines."""

    code_lines: int = 0
    comment_lines: int = 0
    docstring_lines: int = 0
    long_lines: int = 0
    ternaries: int = 0
    nested_ternaries: int = 0
    comprehensions: int = 0
    ternaries_in_comprehensions: int = 0
    many_parameters: int = 0
    longest_parameter_list: int = 0

    def add(self, other: Counts) -> None:
        """Add up the counts, but keep the longer of the two longest parameter lists."""
        longest = max(self.longest_parameter_list, other.longest_parameter_list)
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        self.longest_parameter_list = longest


def counts_of(source: str) -> Counts:
    """The counts for a file's text."""
    tree = ast.parse(source)
    counts = Counts()
    docstrings = _docstring_lines(tree)
    counts.docstring_lines = len(docstrings)
    comments, code = _lines(source)
    code -= docstrings
    counts.comment_lines, counts.code_lines = len(comments), len(code)
    lines = source.splitlines()
    counts.long_lines = sum(len(lines[number - 1]) > COLUMNS for number in code)
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            counts.ternaries += 1
            counts.nested_ternaries += _holds(node, ast.IfExp)
        elif isinstance(node, COMPREHENSIONS):
            counts.comprehensions += 1
            counts.ternaries_in_comprehensions += _holds(node, ast.IfExp)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = _parameters(node)
            counts.many_parameters += count > PARAMETERS
            counts.longest_parameter_list = max(counts.longest_parameter_list, count)
    return counts


def _lines(source: str) -> tuple[set[int], set[int]]:
    """The numbers of the lines with comments, and of those with code."""
    blank = {
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
        tokenize.ENCODING,
    }
    comments, code = set[int](), set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in blank:
            code.update(range(token.start[0], token.end[0] + 1))
    return comments, code


def _docstring_lines(tree: ast.Module) -> set[int]:
    """The numbers of all docstring lines, including docstrings of attributes."""
    numbers = set[int]()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            numbers.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return numbers


def _holds(node: ast.AST, kind: type[ast.AST]) -> bool:
    return any(isinstance(inner, kind) for inner in ast.walk(node) if inner is not node)


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def main(folders: list[str]) -> None:
    """Print each folder's counts, also per 1,000 code lines."""
    for folder in folders:
        total = Counts()
        for path in sorted(Path(folder).rglob("*.py")):
            total.add(counts_of(path.read_text()))
        print(folder)
        for field in fields(total):
            value = getattr(total, field.name)
            relative = f"{1000 * value / max(total.code_lines, 1):8.1f} per 1,000 code lines"
            print(
                f"  {field.name:30}"
                f" {value:6}{relative if field.name not in ('code_lines', 'longest_parameter_list') else ''}"
            )


if __name__ == "__main__":
    main(sys.argv[1:] or ["hwnas"])
