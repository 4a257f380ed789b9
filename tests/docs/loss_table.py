"""The documentation's table of losses, made from the rows. `python tests/docs/loss_table.py` writes it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from harmony_core.client import TrainingModel
from harmony_core.client.losses import ROWS, Numbers, Row

PAGE = Path(__file__).parents[2] / "docs" / "numerics.md"
PLACE = re.compile(r"(?<=<!-- losses -->\n).*(?=<!-- /losses -->)", re.DOTALL)
HEAD = "| call | samples | numbers | settings | options | divided by |\n| --- | --- | --- | --- | --- | --- |\n"


def table() -> str:
    """One line for each loss."""
    return HEAD + "".join(map(line, ROWS.values()))


def line(row: Row) -> str:
    """A row as Markdown."""
    call = f"train_{row.name}"
    defaults = {name: p.default for name, p in inspect.signature(getattr(TrainingModel, call)).parameters.items()}
    numbers, settings, options = [], [], []
    for name, kind in row.kinds.items():
        default = "" if defaults[name] is None else f'; if left out "{defaults[name]}"'
        if defaults[name] is not inspect.Parameter.empty:
            options.append(f"`{name}` {kind.words}{default}")
        else:
            (numbers if isinstance(kind, Numbers) else settings).append(f"`{name}` {kind.words}")
    tokens = "last token" if row.on_last else "weighted tokens"
    samples = f"{'a pair, ' if len(row.threads) == 2 else ''}{'values' if row.of_values else 'log-probs'} of {tokens}"
    unit = f"{row.unit}, or `normalise`" if "normalise" in row.kinds else row.unit
    cells = [f"`{call}`", samples, *("<br>".join(cell) for cell in (numbers, settings, options)), unit]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    PAGE.write_text(PLACE.sub(lambda _: table(), PAGE.read_text("utf-8")), "utf-8")
