"""`docs/fake-logto.md`: its service and its Logto run as printed, and nothing is missing there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks.testing.fake import FakeLogto, Faults
from tests.support.doc_runner import Page
from tests.support.servers import free_port

PAGE = (Path(__file__).parents[2] / "docs" / "fake-logto.md").read_text()
PLAY, REST = PAGE.split("\n## Use it in a test\n")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/logto-webhooks.db", poolclass=sa.NullPool)
    port = str(free_port())
    own = {"port=3001": f"port={port}", ":3001": f":{port}"}
    page = Page(tmp_path, own, engine=engine)
    try:
        yield page
    finally:
        page.end()


def test_the_logto_runs_as_printed(page: Page) -> None:
    """What it lost is brought back, its key is changed, and all that was sent is here."""
    listed, recovered, found, rotated, judged = filter(None, page.follow(PLAY))
    assert re.search(r" play +true +true ", listed)
    assert "recovered" in recovered
    assert "user0@example.com" in found
    assert "LOGTO_WEBHOOK_SIGNING_KEY=" in rotated
    assert "arrived as delivery" in rotated
    assert "✗" not in judged


def test_every_parameter_and_fault_is_told() -> None:
    """With what it is if it isn't given."""
    parameters = set(inspect.signature(FakeLogto).parameters)
    told = re.findall(r"^\| `(\w+)` \|", REST, re.MULTILINE)
    assert sorted(told) == sorted(parameters | set(Faults.__struct_fields__))


def test_what_is_done_in_a_test_runs() -> None:
    """The block of that section."""
    [block] = re.findall(r"```python\n(.*?)```", REST, re.DOTALL)
    exec(compile(block, "fake-logto.md", "exec", dont_inherit=True), {"__name__": "page"})
