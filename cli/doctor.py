"""`adaptive doctor`: what this machine has, and what is missing."""

from __future__ import annotations

from typing import Annotated

import typer

from harmony_core.doctor import examine

from . import output


def doctor(json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> int:
    """Check Python, packages, devices, memory, compiler, home and locks; exit code 4 when something is missing."""
    checks = examine()
    code = 4 if any(check.status == "fail" for check in checks) else 0
    rows: list[tuple[str, str, str]] = []
    for check in checks:
        rows.append((check.status, check.name, check.detail))
        if check.hint and check.status != "ok":
            rows.append(("", "", check.hint))
    output.answer(json, {"checks": [vars(check) for check in checks]}, *output.table(rows), ok=code == 0, code=code)
    return code
