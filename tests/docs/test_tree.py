"""The README's tree of packages is what their docstrings say."""

from __future__ import annotations

import ast

from source_tree import FOLDERS, ROOT


def tree() -> str:
    """One line for each package: its name, indented below the package that holds it, and its docstring's first line."""
    lines = []
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("__init__.py"), key=lambda file: file.parent.parts):
            parts = file.parent.relative_to(ROOT).parts
            if parts[0] in ("adaptive_harmony", "harmony_client") and len(parts) > 1:
                continue  # the documented import paths have their own page
            doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            assert doc, f"{file} says nothing"
            name = "  " * (len(parts) - 1) + parts[-1] + "/"
            lines.append(f"{name:19}{doc.splitlines()[0]}")
    return "\n".join(lines)


def test_the_readme_shows_the_packages() -> None:
    assert tree() in (ROOT / "README.md").read_text(encoding="utf-8"), f"the README's tree has to be\n\n{tree()}"
