"""When freed memory is kept, and that it is given back. That it keeps to the plan: `test_memory_plan`."""

from __future__ import annotations

import pytest

from harmony_core.engine.training.packing import kept_while_it_runs
from harmony_core.rpc import platform


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    seen: list[object] = []
    monkeypatch.setattr(platform, "set_heap_limits", lambda mapped, trimmed: seen.append(mapped))
    monkeypatch.setattr(platform, "trim_heap", lambda: seen.append("trim"))
    return seen


def test_limits_are_restored_and_pages_given_back_whatever_happens(
    calls: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    with pytest.raises(ValueError, match="stop"), kept_while_it_runs(True) as give_back:
        give_back()
        raise ValueError("stop")
    assert calls == [32 << 20, "trim", 1 << 20, "trim"]


@pytest.mark.parametrize(("applies", "setting"), [(False, "1048576"), (True, None), (True, "x"), (True, "67108864")])
def test_what_the_user_or_the_system_decided_stays(
    calls: list[object], monkeypatch: pytest.MonkeyPatch, applies: bool, setting: str | None
) -> None:
    if setting is None:
        monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    else:
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", setting)
    with kept_while_it_runs(applies) as give_back:
        give_back()
    assert calls == []


def test_the_calls_exist_here() -> None:
    platform.trim_heap()
