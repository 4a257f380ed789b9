"""Statements of the documentation that a program can check: links, tables and the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harmony_core.client import engine, spawning
from harmony_core.config import yaml_source
from harmony_core.errors import all_errors
from harmony_core.memory import ledger, plan as memory_plan
from harmony_core.model.families import FAMILIES
from harmony_core.options import RUNNER_FLAGS
from harmony_core.recipe import built_in_recipes
from harmony_core.rpc import protocol
from harmony_core.runs.interruption import GRACE_SECONDS
from harmony_core.runs.resuming import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "SECURITY", "CONTRIBUTING")), *sorted(ROOT.glob("docs/*.md"))]


def anchors(page: Path) -> set[str]:
    """Anchors as they are made from headings: lower case, no punctuation, hyphens for spaces."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]*#?[^)\s]*)\)", page.read_text("utf-8")):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            found = (page.parent / name).resolve() if name else page
            assert found.is_file(), target
            assert not anchor or anchor in anchors(found), target


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", README))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


def test_the_readme_lists_every_flag_of_the_runner() -> None:
    cells = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `-")]
    listed = {flag.replace("-", "_") for cell in cells for flag in re.findall(r"--([a-z-]+)", cell)}
    assert listed == RUNNER_FLAGS - {"help"}


def test_the_readme_lists_every_exit_code() -> None:
    rows = [line for line in README.splitlines() if re.match(r"\| \d+ \|", line)]
    listed = {int(cell) for row in rows for cell in row.split("|") if cell.strip().isdigit()}
    assert listed == {0, 8, 129, 130, 143} | {error.exit_code for error in all_errors().values()}


def test_the_models_that_are_taken_are_listed() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
    rows = [line.split("|") for line in text.splitlines() if "ForCausalLM`" in line]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    architectures = {name for row in rows for name in re.findall(r"`(\w+)`", row[2])}
    assert listed == set(FAMILIES)
    assert architectures == {family.architecture for family in FAMILIES.values()}


def test_the_readme_shows_the_tree() -> None:
    listed, above = set(), ""
    for indent, name in re.findall(r"^( *)(\w+)/ +\S", README, re.MULTILINE):
        parents = above.split("/")[: len(indent) // 2]
        above = "/".join([*parents, name])
        listed.add(above)
    assert all((ROOT / folder).is_dir() for folder in listed)
    code = {file.parent.relative_to(ROOT).as_posix() for file in (ROOT / "harmony_core").rglob("__init__.py")}
    top = {file.parent.name for file in ROOT.glob("*/__init__.py")} | {"docs", "tests"}
    assert code | top <= listed


def test_the_built_in_recipes_are_named() -> None:
    (line,) = re.findall(r"^recipes/ +(.+)$", README, re.MULTILINE)
    assert all(name in line for name in built_in_recipes())


def test_files_that_pages_name_are_there() -> None:
    """`engine/order.py` and the like, from the root, from the package or beside it."""
    for page in PAGES:
        for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", page.read_text("utf-8")):
            assert (ROOT / name).is_file() or (ROOT / "harmony_core" / name).is_file(), f"{page.name}: {name}"


NO_PROMISE = ("A way around one of these", "A text is a secret", "|", "Not masked:")
"""What a paragraph begins with that introduces others, is a table, or says what is not done."""


def test_each_promise_of_the_security_page_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "security.md").read_text("utf-8")
    sources = [file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for source in sources for name in re.findall(r"^(?:async )?def (test_\w+)", source, re.MULTILINE)}
    named = r"`(tests/[\w/.]+|test_\w+)`"
    assert [name for name in re.findall(named, page) if name not in defined and not (ROOT / name).exists()] == []
    for title in ("What we guarantee", "Network", "Secrets", "Files"):
        section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        statements = [text.strip() for text in re.split(r"\n\n|\n(?=- )", section)]
        silent = [text for text in statements if not text.startswith(NO_PROMISE) and not re.search(named, text)]
        assert silent == []


@pytest.mark.parametrize(
    ("page", "statement"),
    [
        ("memory", f"up to {memory_plan.DEFAULT_KV_TOKENS:,} tokens"),
        ("memory", f"the largest multiple of {memory_plan.BATCH_STEP} that fits"),
        ("memory", f"not made smaller than {spawning.LEAST_KV_TOKENS:,} tokens"),
        ("memory", f"{ledger.RANK_BASELINE_BYTES >> 20} MiB are set aside"),
        ("memory", f"less {engine.CUDA_BASELINE_BYTES >> 30} GiB for a process"),
        ("compatibility", f"at most {memory_plan.DEFAULT_KV_TOKENS:,}"),
        ("configuration", f"more than {yaml_source.MAX_DEPTH} levels, {yaml_source.MAX_ALIASES} aliases"),
        ("configuration", f"{yaml_source.MAX_VALUES:,} values"),
        ("command_line", f"then has {GRACE_SECONDS:.0f} s to finish"),
        ("command_line", f"can be ended within {PATIENCE_SECONDS:.0f} s"),
        ("writing_a_recipe", "with_adapter(rank={rank}, alpha={alpha:g}, dropout={dropout:g}, targets=...)"),
    ],
)
def test_numbers_are_those_of_the_code(page: str, statement: str) -> None:
    lora = protocol.LoraSettings()
    expected = statement.format(rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout)
    assert expected in " ".join((ROOT / "docs" / f"{page}.md").read_text("utf-8").split())
