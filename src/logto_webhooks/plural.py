"""Nouns that agree with what is counted or named: `1 job`, `2 jobs`, `the tables a, b`."""

from __future__ import annotations

from collections.abc import Sequence


class Count(int):
    """Formats both forms of what is counted: `f"{Count(1):job is|jobs are} dead"`."""

    def __format__(self, forms: str) -> str:
        one, bar, many = forms.partition("|")
        if not bar:
            return super().__format__(forms)
        return f"{int(self)} {one if self == 1 else many}"


class Names:
    """Formats names with a noun: `f"{Names(['a', 'b']):the table|the tables}"`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def __str__(self) -> str:
        return ", ".join(self._names)

    def __format__(self, forms: str) -> str:
        one, bar, many = forms.partition("|")
        if not bar:
            return format(str(self), forms)
        return f"{one if len(self._names) == 1 else many} {self}"
