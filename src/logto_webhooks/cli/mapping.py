"""Your mapped tables: `mapping list`, `check`, `apply` and `forget`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from msgspec import structs
from typer import Argument, Exit, Option

from logto_webhooks.admin import Admin
from logto_webhooks.cli import make_group, output
from logto_webhooks.cli.options import DATABASE, AsJson, DryRun, with_settings
from logto_webhooks.cli.session import run_admin, run_application
from logto_webhooks.mapping.check import Difference
from logto_webhooks.mapping.tally import AppliedMapping
from logto_webhooks.plural import Count
from logto_webhooks.settings import Settings

_RUN_AGAIN = "The rows written so far are stored. Run it again for the rest."
_SHOWN = 20  # differences

app = make_group()


@app.command("list")
@with_settings(*DATABASE)
def list_mappings(settings: Settings, as_json: AsJson = False) -> None:
    """List mapped tables, and count their rows by state."""
    rows = run_admin(settings, lambda admin: admin.mapping_counts())
    if rows or as_json:
        output.show(
            rows,
            as_json,
            lambda rows: output.print_list("mapping", map(output.describe_mapping, rows)),
        )
    else:
        output.note(
            "No tables are mapped. To register your mappings, start your application, or `serve` "
            "with --app or a file logto-webhooks.toml."
        )
    if not rows:
        raise Exit(1)


@app.command()
@with_settings(*DATABASE, "app", "map_file")
def check(settings: Settings, as_json: AsJson = False) -> None:
    """Compare your mapped tables with Logto's records in the database, and change nothing.

    Exits with 1 if there are differences, and with 2 if a mapping can't be checked.
    """

    async def run(admin: Admin) -> _Differences:
        found = _Differences(as_json)
        async for difference in admin.find_mapping_differences(excluded=found.excluded):
            found.add(difference)
        return found

    with output.stoppable(output.UNCHANGED):
        found = run_application(settings, run)
    found.show()
    if found.unchecked or found.count:
        raise Exit(2 if found.unchecked else 1)


@app.command()
@with_settings(*DATABASE, "app", "map_file")
def apply(
    settings: Settings,
    dry_run: DryRun = False,
    allow_deletes: Annotated[
        bool,
        Option("--allow-deletes", help="Delete or unlink rows that are held, too."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write your mapped tables again, from Logto's records in the database.

    Links existing rows, creates missing ones, corrects different ones, and tries again what your
    database refused. Rows with IDs that Logto never had stay.
    """

    async def run(admin: Admin) -> list[AppliedMapping]:
        with output.show_progress("records", silent=as_json) as bar:
            return await admin.apply_mappings(
                dry_run=dry_run,
                allow_deletes=allow_deletes,
                progressed=lambda count: bar.update("records", count, 0.0),
            )

    with output.stoppable(output.UNCHANGED if dry_run else _RUN_AGAIN):
        applied = run_application(settings, run)
    output.show(applied, as_json, lambda applied: output.print_list("applied", _to_rows(applied)))
    held = sum(mapping.held for mapping in applied)
    if held:
        output.note(
            f"{Count(held):row wasn't|rows weren't} deleted or unlinked, because that is more than "
            "20 rows and 5% of a table within an hour. If Logto is right, run this again with "
            "--allow-deletes."
        )
    refused = any(mapping.refused or mapping.ambiguous for mapping in applied)
    see = f"logto-webhooks mapping check{settings.repeat_options('app', 'map_file')}"
    if refused:
        output.note(f"Some rows were refused, or are ambiguous. To see why, run: {see}")
    elif any(mapping.waiting for mapping in applied):
        output.note(f"Some rows wait. To see for what, run: {see}")
    if held or refused:
        raise Exit(1)


@app.command()
@with_settings(*DATABASE)
def forget(
    settings: Settings,
    name: Annotated[str, Argument(help="The table's name, as `mapping list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Forget a mapping that you have removed. Your table stays as it is.

    If a process still has its code, it registers it again within a minute.
    """
    if not run_admin(settings, lambda admin: admin.forget_mapping(name)):
        output.fail(f"There is no mapping named {name!r}. See: logto-webhooks mapping list")
    output.show({"mapping": name}, as_json, lambda _: output.say(f"Forgot {name}."))


def _to_rows(applied: list[AppliedMapping]) -> list[dict[str, object]]:
    return [structs.asdict(mapping) for mapping in applied]


class _Differences:
    """Differences, which can be as many as the rows: JSON is printed at once, and otherwise the
    first ones are kept, and all are counted."""

    def __init__(self, as_json: bool) -> None:
        self.count = 0
        self.unchecked: list[Difference] = []
        self.excluded: Counter[str] = Counter()
        self._as_json = as_json
        self._is_begun = False
        self._first: list[Difference] = []
        self._by_problem: dict[str, int] = {}
        self._by_state: dict[str, int] = {}

    def add(self, difference: Difference) -> None:
        if self._as_json:
            print("," if self._is_begun else "[", output.to_json(difference), sep="", end="")
            self._is_begun = True
        if difference.problem == "unchecked":
            self.unchecked.append(difference)
            return
        if not self._as_json and self.count < _SHOWN:
            self._first.append(difference)
        self.count += 1
        _add_one(self._by_problem, difference.problem)
        if difference.state is not None:
            _add_one(self._by_state, difference.state)

    def show(self) -> None:
        if self._as_json:
            print("]" if self._is_begun else "[]")
            return
        for difference in self.unchecked:
            output.note(f"The mapping {difference.mapping} can't be checked: {difference.reason}.")
        for name, count in sorted(self.excluded.items()):
            output.note(
                f"{name}: {Count(count):record gets|records get} no row, because of `where` or "
                "create=False."
            )
        if not self.count:
            if not self.unchecked:
                output.say("Your mapped tables match Logto's records in the database.")
            return
        rows = [
            structs.asdict(difference) | {"what": _describe(difference)}
            for difference in self._first
        ]
        output.print_list("mapping difference", rows)
        text = f"{Count(self.count):difference|differences}: {_join(self._by_problem)}."
        if self._by_state:
            text += f" Not written by mapping apply: {_join(self._by_state)}."
        output.note(text)


def _add_one(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _join(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _describe(difference: Difference) -> str | None:
    """Say which columns differ, why the row isn't written, and which row is in the way."""
    parts = [", ".join(difference.columns)] if difference.columns else []
    if difference.reason is not None:
        by = difference.blocked_by or ""
        is_row = by.startswith("[")
        is_record = ":" in by
        in_the_way = f" (row {by[1:-1]})" if is_row else f" ({by})" if is_record else ""
        parts.append(f"{difference.reason}{in_the_way}")
    return ": ".join(parts) or None
