"""`docs/fake-logto.md`: its service and its Logto run as printed, and nothing is missing there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from logto_webhooks.testing.fake import FakeLogto, Faults
from tests.support.doc_reader import Reader, steps
from tests.support.servers import free_port

PAGE = (Path(__file__).parents[2] / "docs" / "fake-logto.md").read_text()
PLAY, REST = PAGE.split("\n## Use it in a test\n")


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/logto-webhooks.db", poolclass=sa.NullPool)
    port = str(free_port())
    made = Reader(tmp_path, engine, {"port=3001": f"port={port}", ":3001": f":{port}"})
    try:
        yield made
    finally:
        made.end()


def test_the_logto_runs_as_printed(reader: Reader) -> None:
    """What it lost is brought back, its key is changed, and all that was sent is here."""
    printed = []
    for language, text, name in steps(PLAY):
        if language == "sh":
            printed.append(reader.run(text))
        else:
            reader.write(name, text)
    listed, recovered, found, rotated, judged = (each for each in printed if each)
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
