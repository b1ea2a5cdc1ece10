"""Your mapped tables: `mapping list`, `check`, `apply` and `forget`."""

from __future__ import annotations

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
            "with --app."
        )
    if not rows:
        raise Exit(1)


@app.command()
@with_settings(*DATABASE, "app")
def check(settings: Settings, as_json: AsJson = False) -> None:
    """Compare your mapped tables with Logto's records here, and change nothing.

    Exits with 1 if a row is missing, extra, different or refused.
    """

    async def run(admin: Admin) -> _Differences:
        found = _Differences(as_json)
        async for difference in admin.find_mapping_differences():
            found.add(difference)
        return found

    with output.stoppable(output.UNCHANGED):
        found = run_application(settings, run)
    found.show()
    if found.count:
        raise Exit(1)


@app.command()
@with_settings(*DATABASE, "app")
def apply(
    settings: Settings,
    dry_run: DryRun = False,
    allow_deletes: Annotated[
        bool,
        Option("--allow-deletes", help="Delete or unlink rows that are held, too."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write your mapped tables again, from Logto's records here.

    Links existing rows, creates missing ones, corrects different ones, and tries again what your
    database refused. Extra rows stay.
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
            "20 rows and 5 % at once. If Logto is right, run: logto-webhooks mapping apply "
            "--allow-deletes"
        )
    refused = any(mapping.refused or mapping.ambiguous for mapping in applied)
    if refused:
        output.note("Some rows were refused. To see why, run: logto-webhooks mapping check")
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

    If a process still has its code, the next start registers it again.
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
        self._as_json = as_json
        self._first: list[Difference] = []
        self._by_problem: dict[str, int] = {}

    def add(self, difference: Difference) -> None:
        if self._as_json:
            print("," if self.count else "[", output.to_json(difference), sep="", end="")
        elif self.count < _SHOWN:
            self._first.append(difference)
        self.count += 1
        counted = self._by_problem.get(difference.problem, 0)
        self._by_problem[difference.problem] = counted + 1

    def show(self) -> None:
        if self._as_json:
            print("]" if self.count else "[]")
            return
        if not self.count:
            output.say("Your mapped tables equal Logto's records here.")
            return
        rows = [
            structs.asdict(difference)
            | {"what": difference.reason or ", ".join(difference.columns) or None}
            for difference in self._first
        ]
        output.print_list("mapping difference", rows)
        counted = ", ".join(f"{n} {problem}" for problem, n in sorted(self._by_problem.items()))
        output.note(f"{Count(self.count):difference|differences}: {counted}.")
