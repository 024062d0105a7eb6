"""Statements of one operation, before the addresses of values and memory are known."""

from __future__ import annotations


class Calls:
    """Statements of one operation, and its temporary memory.

    Attributes:
      lines: statements for `n` images; {vN} stands for a value, {tN} for temporary memory, {w} for the weights.
      temporaries: size of each temporary memory for one image, in floats.
      reads: values that are read.
      makes: values that are made.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.temporaries: list[int] = []
        self.reads: set[int] = set()
        self.makes: set[int] = set()

    def temporary(self, floats: int) -> str:
        """Adds temporary memory for each image; returns its placeholder."""
        self.temporaries.append(floats)
        return f"{{t{len(self.temporaries) - 1}}}"

    def value(self, value: int) -> str:
        """Returns the placeholder of a value that is read."""
        self.reads.add(value)
        return f"{{v{value}}}"

    def result(self, value: int) -> str:
        """Returns the placeholder of a value that is made."""
        self.makes.add(value)
        return f"{{v{value}}}"

    def add(self, line: str) -> None:
        """Adds a statement."""
        self.lines.append(line)

    def each(self, line: str) -> None:
        """Adds a statement for each image i."""
        self.lines.append(f"for (int i = 0; i < n; i++) {line}")
