from __future__ import annotations

import os
from pathlib import Path

import pytest

from harmony_core.errors import ResourceError
from harmony_core.home import Home


def test_environment_names_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path / "a" / "b"))
    home = Home.open()
    assert home.path == tmp_path / "a" / "b"
    assert (home.path / "VERSION").read_text() == "1\n"
    assert all(p.is_dir() for p in (home.models, home.staging, home.runs, home.locks, home.cache, home.trash))
    assert Home.open().path == home.path


def test_without_environment_it_lies_in_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTIVE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Home.open().path == tmp_path / ".adaptive"


@pytest.mark.parametrize("text", ["2", "", "one", "1.0", "9" * 5000])
def test_another_format_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "VERSION").write_text(text)
    with pytest.raises(ResourceError, match="has format") as caught:
        Home.open(tmp_path)
    assert "ADAPTIVE_HOME" in caught.value.hint
    assert not (tmp_path / "models").exists()


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot be used") as caught:
        Home.open(tmp_path / "file")
    assert "ADAPTIVE_HOME" in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_home_is_refused(tmp_path: Path) -> None:
    Home.open(tmp_path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ResourceError, match="cannot be used"):
            Home.open(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_home_behind_a_link_works(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert Home.open(tmp_path / "link").models.is_dir()
    assert (tmp_path / "real" / "models").is_dir()
