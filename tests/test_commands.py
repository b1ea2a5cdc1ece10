"""Each command has its help and its page, and what they say is so."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from logto_webhooks.cli import app
from tests.pages import examples, made, scene, tree

README = (tree.FOLDER.parents[1] / "README.md").read_text()
PAGES = sorted(tree.FOLDER.glob("*.md"))
WITH_EXAMPLES = [page for page in PAGES if list(examples.examples(page.read_text()))]
SECTION = ("**Exit codes**: ", "**Next**: ")


def named(path: tree.Path) -> str:
    return " ".join(path)


def section(path: tree.Path) -> str:
    """What a page says of a command: all of it, or from its title to the next."""
    page = tree.page_of(path).read_text()
    level = "#" * len(path)
    [found] = re.findall(rf"^{level} `{named(path)}`\n(.*?)(?=^{level} |\Z)", page, re.M | re.S)
    return str(found)


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples begin with."""
    folder = tmp_path_factory.mktemp("filled")
    scene.fill(folder)
    return folder


@pytest.mark.parametrize("path", [*tree.COMMANDS, *tree.GROUPS], ids=named)
def test_it_has_help(path: tree.Path) -> None:
    """Its own, in plain text, and that of each argument and option."""
    shown = CliRunner().invoke(app, [*path, "--help"], terminal_width=100)
    assert shown.exit_code == 0
    assert shown.output.startswith("Usage: ")
    assert "\x1b" not in shown.output
    assert "..." not in shown.output.partition("Commands:")[2], "a summary is too long for the list"
    command = (tree.COMMANDS | tree.GROUPS)[path]
    assert tree.summary(command) in " ".join(shown.output.split())
    assert [each.name for each in command.params if not each.help] == []


@pytest.mark.parametrize("path", tree.COMMANDS, ids=named)
def test_it_has_a_page(path: tree.Path) -> None:
    """With an example, exit codes, what to do next, and the shape of its JSON if it prints any."""
    told = section(path)
    wanted = [*SECTION, "**With `--json`**: "] if "--json" in tree.flags(path) else SECTION
    assert [each for each in wanted if each not in told] == []
    assert f"logto-webhooks {named(path)}" in told
    assert path in made.told(told)


def test_the_readme_names_each() -> None:
    """In its table of commands, the first word with the others of a group."""
    table = "\n".join(line for line in README.splitlines() if line.startswith("| `"))
    assert [named(each) for each in tree.COMMANDS if f"`{named(each)}" not in table] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_made_is_fresh(page: Path) -> None:
    """Options, and the list of commands; `make pages` writes them."""
    text = page.read_text()
    assert made.rewritten(text) == text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_it_names_nothing_that_is_not_there(page: Path) -> None:
    """No page without a command, no command, and no option, in prose or examples."""
    text = page.read_text()
    here = [path for path in tree.COMMANDS if tree.page_of(path) == page]
    assert here or page == tree.INDEX
    for words in examples.command_lines(text):
        assert tree.named_in(words) in tree.COMMANDS, words
    for words in [*examples.command_lines(text), *examples.mentioned(text)]:
        path = tree.named_in(words)
        known = tree.flags(path) if path in tree.COMMANDS else set()
        assert [each for each in words if each.startswith("--") and each not in known] == []
    known = {flag for path in here for flag in tree.flags(path)} | {"--json", "--help"}
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= known


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_its_examples_print_what_it_says(page: Path, filled: Path, tmp_path: Path) -> None:
    """On the demo's data, but for what differs each time; `make pages` writes them."""
    folder = shutil.copytree(filled, tmp_path / "folder")
    with scene.stage(folder, page.stem):
        for each in examples.examples(page.read_text()):
            printed = examples.run(each.line)
            assert examples.alike(each.printed, printed), f"{each.line}\n{printed}"
