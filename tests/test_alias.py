"""The documented import paths: each module only imports, every name is one of harmony_core, and all of it is light."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys

import pytest

from source_tree import modules

ALIASES = {
    name: file for name, file in modules().items() if name.split(".")[0] in ("adaptive_harmony", "harmony_client")
}
OTHERS = ("builtins", "collections.abc", "logging", "pydantic", "types", "typing")
"""Where else a documented name may come from."""


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_defines_nothing(name: str) -> None:
    tree = ast.parse(ALIASES[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    runs = [node for node in tree.body[1:] if isinstance(node, ast.If)]
    assert [ast.unparse(node) for node in runs] in ([], ["if __name__ == '__main__':\n    main()"])
    assert all(isinstance(node, ast.ImportFrom | ast.If) for node in tree.body[1:])


@pytest.mark.parametrize("name", ALIASES)
def test_its_names_are_those_of_harmony_core(name: str) -> None:
    module = importlib.import_module(name)
    for attribute, found in vars(module).items():
        home = getattr(found, "__module__", None) or getattr(found, "__name__", None)
        if not attribute.startswith("_") and isinstance(home, str):
            assert home.startswith(("harmony_core", "adaptive_harmony", "harmony_client", *OTHERS)), attribute


def test_a_package_lists_what_its_modules_have() -> None:
    """What a module imports by name, it imports as itself, so that checkers see it as the module's own."""
    for file in ALIASES.values():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name == "*" or alias.asname == alias.name for alias in node.names), file


def test_importing_all_of_it_is_light() -> None:
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {sorted(ALIASES)}]; "
        "print(sorted({'torch', 'transformers', 'accelerate', 'peft', 'rich', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
