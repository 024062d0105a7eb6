"""Statements of one operation, before it is known where values and memory lie."""

from __future__ import annotations


class Calls:
    """Statements of one operation, and the memory it needs meanwhile.

    Attributes:
      lines: statements over `n` images; {vN} stands for a value, {tN} for memory of its own, {w} for the weights.
      temporaries: floats of the memory for one image, in turn.
      reads: values that are read.
      makes: values that are made.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.temporaries: list[int] = []
        self.reads: set[int] = set()
        self.makes: set[int] = set()

    def temporary(self, floats: int) -> str:
        """Memory for each image; returns what stands for it."""
        self.temporaries.append(floats)
        return f"{{t{len(self.temporaries) - 1}}}"

    def value(self, value: int) -> str:
        """What stands for a value that is read."""
        self.reads.add(value)
        return f"{{v{value}}}"

    def result(self, value: int) -> str:
        """What stands for a value that is made."""
        self.makes.add(value)
        return f"{{v{value}}}"

    def add(self, line: str) -> None:
        """Adds a statement."""
        self.lines.append(line)

    def each(self, line: str) -> None:
        """Adds a statement for each image i."""
        self.lines.append(f"for (int i = 0; i < n; i++) {line}")
