"""The pages about commands: none is missing or stale. What the examples of any page print is so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from logto_webhooks import cli
from tests.pages import examples, made, scene, tree
from tests.support.doc_runner import is_alike, run_command

WITH_EXAMPLES = [page for page in sorted(made.DOCS.rglob("*.md")) if examples.are_in(page)]


def words(path: tree.Path) -> str:
    return " ".join(path)


@pytest.mark.parametrize("path", tree.COMMANDS, ids=words)
def test_a_command_is_told_of(path: tree.Path) -> None:
    """It has a section with its options on its page, and a line in the table of commands."""
    page = tree.page_of(path).read_text()
    assert f"`{words(path)}`\n" in page, "a title of its own"
    assert path in made.told(page), f"<!-- options: {words(path)} -->"
    assert f"| [`{words(path)}`](" in tree.INDEX.read_text()


@pytest.mark.parametrize("path", [*tree.COMMANDS, *tree.GROUPS], ids=words)
def test_help_helps(path: tree.Path) -> None:
    """`--help` works, and says what a command, each argument and each option is for."""
    told = CliRunner().invoke(cli.app, [*path, "--help"])
    assert told.exit_code == 0, told.output
    command = tree.COMMANDS.get(path) or tree.GROUPS[path]
    assert tree.summary(command).endswith((".", ":")) or not path
    for option in command.params if path in tree.COMMANDS else []:
        assert option.help, option.name


def test_the_list_of_commands_has_their_summaries() -> None:
    """`--help` imports no command, so it lists summaries of its own: the first sentences."""
    commands = {path[0]: each for path, each in {**tree.COMMANDS, **tree.GROUPS}.items() if path}
    assert {name: summary for name, (_, summary) in cli.COMMANDS.items()} == {
        name: tree.summary(tree.GROUPS.get((name,), commands[name])) for name in cli.COMMANDS
    }


@pytest.mark.parametrize("page", made.pages(), ids=lambda page: page.stem)
def test_a_page_is_made_anew(page: Path) -> None:
    """What is made of commands, events and states is as they are now; else run `make pages`."""
    text = page.read_text()
    assert made.rewritten(text) == text


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database of recorded deliveries, and an application."""
    folder = tmp_path_factory.mktemp("filled")
    scene.fill(folder)
    return folder


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_examples_print_what_is_said(page: Path, filled: Path, tmp_path: Path) -> None:
    """Each is run, in order; else run `make pages`, and look at what changed."""
    folder = shutil.copytree(filled, tmp_path / page.stem)
    with scene.stage(folder, page.stem):
        for example in examples.examples(page.read_text()):
            printed = run_command(example.line)
            assert is_alike(example.printed, printed), f"{example.line}\n{printed}"
