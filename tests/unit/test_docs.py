"""What the docs say is so: code runs, tables and settings are complete."""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path

import pytest
from msgspec import Struct

from logto_webhooks import LogtoWebhooks, events, testing
from logto_webhooks.admin import HandlerInfo
from logto_webhooks.apply.replay import ReplayResult
from logto_webhooks.database.mapped_rows import MappingCounts
from logto_webhooks.database.records import FoundRow
from logto_webhooks.database.schema import (
    VERSION_TABLE,
    member_roles,
    members,
    metadata,
    organizations,
    user_identities,
    user_roles,
    users,
)
from logto_webhooks.deliveries import DeliveryState, MappingStatus, Status, StoredDelivery
from logto_webhooks.events import ALIASES, BY_NAME
from logto_webhooks.events.local import LOCAL
from logto_webhooks.explain.timeline import TimelineEntry
from logto_webhooks.handlers.existing import ExistingRows
from logto_webhooks.instrumentation import TelemetryEvent
from logto_webhooks.instrumentation.prometheus import (
    GAUGES,
    METRICS,
    SPOOLED,
    SPOOLED_SAYS,
    UP,
    UP_SAYS,
    Metric,
)
from logto_webhooks.jobs import JOB_MOVES, JobRow, JobState
from logto_webhooks.logto import webhooks
from logto_webhooks.mapping.check import Difference
from logto_webhooks.mapping.tally import AppliedMapping
from logto_webhooks.reconcile.reconcile import ReconcileResult
from logto_webhooks.reconcile.recover import RecoverResult
from logto_webhooks.records.drift import Drift
from logto_webhooks.records.merge import OUTCOMES
from logto_webhooks.records.record import DEAD_DELIVERY
from logto_webhooks.settings import VARIABLES, Settings
from tests.support import names_in_docs
from tests.support.unmeasured import UNMEASURED

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page's, one after the other; those of some pages are files of their own."""
    if page.name in ("testing.md", "tutorial.md", "fake-logto.md", "fastapi.md"):
        return  # tests/e2e runs these
    monkeypatch.setenv("LOGTO_WEBHOOK_SIGNING_KEY", testing.SIGNING_KEY)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks or page != ROOT / "README.md"
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, page.name, "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Those within the project."""
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_modules_that_a_page_names_exist(page: Path) -> None:
    """As a path within the package, the project, or the page's folder."""
    places = (ROOT / "src/logto_webhooks", ROOT, page.parent)
    for path in re.findall(r"`([\w/]+/\w+\.py)`", page.read_text()):
        assert any((place / path).exists() for place in places), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    """Settings, metrics, and commands with their options."""
    text = page.read_text()
    assert names_in_docs.unknown_settings(text) == set()
    assert names_in_docs.unknown_metrics(text) == set()
    assert names_in_docs.unknown_commands(names_in_docs.of_page(text)) == []


def test_what_is_unknown_is_found() -> None:
    """In a block, in a list, in prose."""
    page = """
Use `jobs list --gruop`.

```sh
logto-webhooks retry
```

1. Then:

   ```sh
   logto-webhooks serve --prot 1   # not --port
   ```
"""
    assert set(names_in_docs.unknown_commands(names_in_docs.of_page(page))) == {
        "jobs list --gruop",
        "retry",
        "serve --prot 1",
    }
    assert names_in_docs.unknown_settings("LOGTO_WEBHOOKS_PROT") == {"LOGTO_WEBHOOKS_PROT"}
    assert names_in_docs.unknown_metrics("logto_webhooks_ups") == {"logto_webhooks_ups"}


def test_every_public_module_is_in_the_api_reference() -> None:
    """`make docs` compares their names with what autodoc wrote (docs/_ext/api.py)."""
    checked = set(re.findall(r'"(logto_webhooks[\w.]*)"', (ROOT / "docs/_ext/api.py").read_text()))
    documented, imported = set(), set()
    for page in PAGES:
        text = page.read_text()
        documented |= set(re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE))
        imported |= set(re.findall(r"^from (logto_webhooks\S*) import", text, re.MULTILINE))
    assert documented == checked
    assert imported <= checked


def test_every_function_that_makes_a_delivery_is_in_the_api_reference() -> None:
    """They are partials, which autodoc can't describe."""
    page = (ROOT / "docs/api/testing-make.md").read_text()
    made = {name for name, value in vars(testing.make).items() if isinstance(value, partial)}
    assert set(re.findall(r"^- `(\w+)`$", page, re.MULTILINE)) == made


@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("deliveries", StoredDelivery),
        ("deliveries", ReplayResult),
        ("endpoint", webhooks.RotationResult),
        ("endpoint", webhooks.TestResult),
        ("explain", TimelineEntry),
        ("handlers", HandlerInfo),
        ("handlers", ExistingRows),
        ("jobs", JobRow),
        ("mapping", MappingCounts),
        ("mapping", Difference),
        ("mapping", AppliedMapping),
        ("reconcile", Drift),
        ("reconcile", ReconcileResult),
        ("recover", RecoverResult),
        ("status", Status),
        ("status", MappingStatus),
        ("users", FoundRow),
    ],
)
def test_what_is_printed_as_json_is_documented(page: str, printed: type[Struct]) -> None:
    """Each name of an object, on the page of the command that prints it."""
    told = re.findall(
        r"\*\*With `--json`\*\*.*?\n\n", (ROOT / f"docs/commands/{page}.md").read_text(), re.DOTALL
    )
    missing = [name for name in printed.__struct_fields__ if f"`{name}`" not in "".join(told)]
    assert missing == []


def test_every_public_column_is_documented() -> None:
    """In the page about tables."""
    page = (ROOT / "docs/tables.md").read_text()
    for table in (users, organizations, members, user_identities, user_roles, member_roles):
        [section] = re.findall(rf"## `{table.name}`\n(.*?)(?=\n##+ |\Z)", page, re.DOTALL)
        for column in table.columns:
            assert f"`{column.name}`" in section, f"{table.name}.{column.name}"


def test_every_event_is_in_the_reference() -> None:
    """Each has a place of its own, so has each alias."""
    page = (ROOT / "docs/events.md").read_text()
    titles = re.findall(r"^### `(\S+)`$", page, re.MULTILINE)
    assert sorted(titles) == sorted([*BY_NAME, *LOCAL])
    assert all(f"| `{alias}` |" in page for alias in ALIASES)
    assert "`TestPayload`" in page
    assert "`UnknownEvent`" in page


def test_every_table_is_told_of() -> None:
    """In the page about tables: with its columns, or as private."""
    page = (ROOT / "docs/tables.md").read_text()
    assert {name for name in (*metadata.tables, VERSION_TABLE) if f"`{name}`" not in page} == set()


def test_every_word_is_explained() -> None:
    """Outcomes, states and reasons, in the page about words."""
    page = (ROOT / "docs/words.md").read_text()
    groups = ["own", "suspension", "custom_data", "profile", "present", DEAD_DELIVERY]
    reasons = ["incomplete", "members", "unknown change"]
    for word in [*OUTCOMES, *DeliveryState, *JobState, *reasons]:
        assert f"| `{word}`" in page, word
    for group in groups:
        assert f"{group}`" in page, group


def test_what_moves_a_job_is_told() -> None:
    """The page about words has every move, and no other."""
    told = rows((ROOT / "docs/words.md").read_text(), "Job transitions")
    moves = {
        (f"`{state}`", f"`{move}`", f"`{target}`") for (state, move), target in JOB_MOVES.items()
    }
    named = {(state, re.split("[:;]", by)[0], target) for state, by, target in told}
    assert (named, len(told)) == (moves, len(moves))


def test_every_setting_is_documented_with_its_default() -> None:
    """In the page about settings."""
    page = (ROOT / "docs/settings.md").read_text()
    assert {*VARIABLES, "sources"} == set(Settings.__struct_fields__)
    for field, variables in VARIABLES.items():
        [line] = [line for line in page.splitlines() if line.startswith(f"| `{variables[0]}`")]
        assert f"`--{field.replace('_', '-')}`" in line
        default = getattr(Settings(), field)
        assert str(default) in line


def test_every_option_of_a_handler_is_documented_with_its_default() -> None:
    """In the page about handlers."""
    page = (ROOT / "docs/handlers.md").read_text()
    options = inspect.signature(LogtoWebhooks.on).parameters.values()
    named = [each for each in options if each.kind is each.KEYWORD_ONLY]
    told = {cells[0]: cells[1] for cells in rows(page, "Options")}
    expected = {f"`{each.name}`": f"`{each.default}`" for each in named}
    assert told == expected | {"`name`": "`module:function`"}


def test_every_event_is_documented_with_its_fields() -> None:
    """In the page about handlers; those of all are told once."""
    page = (ROOT / "docs/handlers.md").read_text()
    told = {name: cells[1] for cells in rows(page, "Event fields") for name in words(cells)}
    for kind in (*BY_NAME.values(), *LOCAL.values()):
        own = set(kind.__struct_fields__) - set(events.Event.__struct_fields__)
        line = told[kind.__name__]
        assert "the same" in line or all(f"`{each}`" in line for each in own), kind


def words(cells: list[str]) -> list[str]:
    return re.findall(r"`(\w+)`", cells[0])


def rows(page: str, title: str) -> list[list[str]]:
    """The cells of the table below a title, without its head."""
    [section] = re.findall(rf"## {title}\n(.*?)(?=\n## |\Z)", page, re.DOTALL)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def labelled(metric: Metric) -> str:
    values = ", ".join(f"`{value}`" for value in metric.values)
    return f"`{metric.label}`: {values}" if metric.label else ""


def test_every_metric_is_documented() -> None:
    """The page about metrics has what the table has, and no more."""
    page = (ROOT / "docs/metrics.md").read_text()
    assert rows(page, "Metrics of this process") == [
        [
            f"`{metric.full_name}`",
            "histogram" if metric.buckets else "counter",
            labelled(metric),
            metric.says,
        ]
        for metric in METRICS
    ]
    gauges = [
        (SPOOLED, SPOOLED_SAYS),
        (UP, UP_SAYS),
        *((gauge.full_name, gauge.says) for gauge in GAUGES),
    ]
    assert rows(page, "Metrics of the database") == [[f"`{name}`", says] for name, says in gauges]


def test_every_report_is_documented_and_measured() -> None:
    """Or it is said why it isn't measured."""
    page = (ROOT / "docs/metrics.md").read_text()
    measured = {
        report: [f"`{metric.name}`" for metric in METRICS if metric.report is report]
        for report in TelemetryEvent.__subclasses__()
    }
    assert {report for report, names in measured.items() if not names} == set(UNMEASURED)
    assert rows(page, "Telemetry events") == [
        [
            f"`{report.__name__}`",
            (report.__doc__ or "").splitlines()[0],
            ", ".join(names) or f"none: {UNMEASURED[report]}",
        ]
        for report, names in measured.items()
    ]
