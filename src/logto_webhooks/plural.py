"""Count with a noun that agrees: `1 job`, `2 jobs`."""

from __future__ import annotations


class Count(int):
    """Formats both forms of what is counted: `f"{Count(1):job is|jobs are} dead"`."""

    def __format__(self, forms: str) -> str:
        one, bar, many = forms.partition("|")
        if not bar:
            return super().__format__(forms)
        return f"{int(self)} {one if self == 1 else many}"
