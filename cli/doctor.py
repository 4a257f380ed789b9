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
    if json:
        output.data(output.dumped({"ok": code == 0, "exit": code, "checks": [vars(check) for check in checks]}))
        return code
    width = max(len(check.name) for check in checks)
    for check in checks:
        output.data(f"{check.status:4}  {check.name:{width}}  {check.detail}")
        if check.hint and check.status != "ok":
            output.data(f"      {'':{width}}  {check.hint}")
    return code
