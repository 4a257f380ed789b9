"""The command line in process: its exit code, stdout and stderr."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

RECIPE = """\
    '''Says hello.'''
    from __future__ import annotations
    from typing import Literal
    from pydantic import BaseModel, Field
    from harmony_core.recipe.context import RecipeContext
    from harmony_core.config.parameters import Dataset, Model, model_kinds
    from harmony_core.recipe import InputConfig, recipe_main

    class Lora(BaseModel):
        r: int = Field(16, ge=1)
        '''Rank of the adapter.'''
        alpha: float = 32

    class Config(InputConfig):
        '''What to do.'''
        model: Model[model_kinds.Trainable] = Model(model_key='builtin:tiny-lm')
        '''The model, with [/brackets] and {braces} and %s.'''
        lr: float = Field(1e-5, gt=0)
        '''Peak learning rate.'''
        kind: Literal['cosine', 'linear'] = 'cosine'
        shuffle: bool = True
        data: Dataset | None = None
        lora: Lora | None = Lora()
        seed: int = 0
        note: str = ''
        threshold: float = 0.5

    @recipe_main
    async def main(config: Config, ctx: RecipeContext):
        print('a print of the recipe')
        ctx.gate('note', len(config.note), '<', 5)
        if config.note == 'raise':
            raise ValueError('as asked')
        return {'lr': config.lr, 'seed': config.seed, 'shuffle': config.shuffle}
"""


@dataclass
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        (line,) = self.out.splitlines()
        return json.loads(line)

    @property
    def errors(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


Adaptive = Callable[..., Done]


@pytest.fixture
def adaptive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Adaptive]:
    """Run a command line as the console script does, in an empty folder and home with one recipe, `hello.py`."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="adaptive")
    main = entry.load()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("ADAPTIVE_CFG__")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "hello.py").write_text(textwrap.dedent(RECIPE))
    monkeypatch.chdir(folder)

    def run(*words: str) -> Done:
        capfd.readouterr()
        code = main(list(words))
        captured = capfd.readouterr()
        return Done(code, captured.out, captured.err)

    yield run
