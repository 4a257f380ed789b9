from __future__ import annotations

from pathlib import Path

import pytest

from harmony_core.errors import HarmonyError, NotFoundError, UsageError
from harmony_core.home import Home
from harmony_core.registry import Registry, slugify
from harmony_core.registry.records import Reference, check_alias, check_key, key_problem, parse_reference, source_hint

GOOD = [
    "a",
    "7",
    "tiny",
    "qwen2.5-0.5b",
    "a_b",
    "team/project/model/x",
    "a" * 64,
    "v1",
    "v12345",
    "v0000001x",
    "console",
]

DOTS = [
    "..",
    "../x",
    "a/../b",
    "a/..",
    "./a",
    "a/.",
    ".",
    "...",
    "a..b",
    "..a",
    "a/..b",
    ".a",
    "a.",
    "a/.hidden",
    "~",
    "~/x",
]
SLASHES = [
    "/",
    "/etc/passwd",
    "a//b",
    "a/",
    "/a",
    "//a",
    "a/b/c/d/e",
    "\\",
    "a\\b",
    "..\\x",
    "a/\\b",
    "\\\\host\\share",
]
CODED = [
    "%2e%2e/x",
    "%2e%2e%2fx",
    "..%2fx",
    "..%5cx",
    "%252e%252e/x",
    "a%00b",
    "&#46;&#46;/x",
    "\\x2e\\x2e/x",
    "\\u002e",
]
UNICODE = ["․․/x", "‥/x", "．．/x", "．．／x", "∕x", "a⁄b", "é", "ａ", "ﬁ", "a\u200bb", "a\u202eb", "ſ", "K", "İ", "٣"]
CONTROL = [
    "",
    " ",
    "a b",
    " a",
    "a ",
    "a\n",
    "\na",
    "a\tb",
    "a\0",
    "\0",
    "a\0/../x",
    "a\rb",
    "\x1b[31m",
    "a\x7f",
    "\ufeffa",
]
SYSTEMS = [
    "c:",
    "c:/x",
    "C:\\x",
    "file:///x",
    "http://x/y",
]
LAYOUT = ["model.json", "a/model.json", "v000001", "a/v000001", "a/v1234567", "x.tmp", "manifest.json", "a/x.tmp/b"]
SHELL = [
    "$HOME",
    "${x}",
    "`x`",
    "$(x)",
    "a;b",
    "a|b",
    "a&b",
    "a>b",
    "a'b",
    'a"b',
    "*",
    "a?",
    "[a]",
    "{a}",
    "!a",
    "#a",
    "-rf",
    "--x",
]
OTHER = [
    "A",
    "Tiny",
    "a/B",
    "-a",
    "_a",
    "a/-b",
    "a/_b",
    "a+b",
    "a=b",
    "a,b",
    "a:b",
    "a@b",
    "(a)",
    "a" * 65,
    "a/" + "b" * 65,
]
LONG = ["a" * 5000, "../" * 1000, "a/" * 1000, "." * 300, "a" * 64 + "/" + "../" * 70 + "etc"]
SCHEMES = [f"model_registry://{key}" for key in ("../x", "/etc", "", "a//b", "model_registry://a", "%2e%2e")]
DEEPER = [f"{prefix}{'../' * depth}etc/passwd" for prefix in ("", "a/", "a/b/", "/") for depth in range(1, 15)]
BAD = [*DOTS, *SLASHES, *CODED, *UNICODE, *CONTROL, *SYSTEMS, *LAYOUT, *SHELL, *OTHER, *LONG, *DEEPER]


def test_good_keys_are_taken_as_they_are() -> None:
    for key in GOOD:
        check_key(key)
        assert slugify(key) == key
        assert parse_reference(key) == Reference(key)


def test_nothing_else_is_a_key() -> None:
    assert len(BAD) >= 170
    for key in BAD:
        assert key_problem(key), key
        with pytest.raises(UsageError, match="cannot be a model key"):
            check_key(key)


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a directory: names, times and contents."""
    return {
        str(path.relative_to(root)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in root.rglob("*")
    }


def test_no_name_leads_out_of_the_registry(tmp_path: Path) -> None:
    for name in ("x", "etc/passwd", "v000001"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("outside")
    registry = Registry(Home.open(tmp_path / "deep" / "home"))
    source = registry.add("a", "builtin:tiny-lm").path
    before = tree(tmp_path)
    for key in [
        *(key for key in BAD if key != "A"),  # which stands for the key that is there
        *SCHEMES,
        *(f"a@{tail}" for tail in ("../1", "", "01", "0", "-1", "1/..", "1\n", "٣", "A", "v000001")),
    ]:
        with pytest.raises(NotFoundError):
            registry.resolve(key)
        with pytest.raises(HarmonyError) as caught:
            registry.remove(key)
        assert caught.value.exit_code in (2, 3)
        with pytest.raises(NotFoundError):
            registry.set_defaults(key, {"tp": 1})
        with pytest.raises(HarmonyError):
            registry.add(key, str(source))
        with pytest.raises(HarmonyError):
            registry.set_alias(key, "best", 1)
    assert tree(tmp_path) == before


def test_references() -> None:
    assert parse_reference("a/b@12") == Reference("a/b", version=12)
    assert parse_reference("a@best") == Reference("a", alias="best")
    assert parse_reference("model_registry://a@3") == Reference("a", version=3)
    assert str(Reference("a", version=3)) == "a@3"
    assert str(Reference("a", alias="best")) == "a@best"
    for text in ("a@", "a@1@2", "a@1.0", "a@" + "9" * 30, "a@B"):
        with pytest.raises(NotFoundError):
            parse_reference(text)


def test_an_alias_is_never_a_number() -> None:
    check_alias("best-so.far_1")
    for alias in ("1", "1a", "", "A", "a/b", "..", "a b", "a" * 65):
        with pytest.raises(UsageError):
            check_alias(alias)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("My Model (v2)", "my-model-v2"),
        ("Qwen/Qwen2.5-0.5B", "qwen/qwen2.5-0.5b"),
        ("../../etc/passwd", "etc/passwd"),
        ("  ", "model"),
        ("", "model"),
        ("Ünï", "n"),
        ("model.json", "model-model-json"),
        ("v000001", "model-v000001"),
        ("a..b", "a.b"),
    ],
)
def test_slugs(name: str, key: str) -> None:
    assert slugify(name) == key


def test_every_name_has_a_slug_that_is_a_key_and_its_own_slug() -> None:
    for name in [*BAD, *SCHEMES]:
        slug = slugify(name)
        assert not key_problem(slug), (name, slug)
        assert slugify(slug) == slug


def test_hub_names_and_paths_get_the_line_to_type() -> None:
    assert source_hint("Qwen/Qwen2.5-0.5B") == "adaptive models add qwen2.5-0.5b hf:Qwen/Qwen2.5-0.5B"
    assert source_hint("hf:org/name") == "adaptive models add name hf:org/name"
    assert "adaptive models add KEY ./x" in source_hint("./x")
    assert source_hint("plain") == ""
    assert source_hint("../\x1b[31m") == ""


def test_a_name_resolves_to_the_key_under_which_it_is_saved(tmp_path: Path) -> None:
    registry = Registry(Home.open(tmp_path))
    registry.add("llama-3", "builtin:tiny-lm")
    for name in ("Llama-3", "model_registry://Llama-3@1", "LLAMA-3", "llama-3"):
        assert registry.resolve(name).ref == "llama-3@1"
    with pytest.raises(NotFoundError, match="Llama-4"):
        registry.resolve("Llama-4")
