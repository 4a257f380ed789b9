"""What is masked before it is written, and what is not."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from harmony_core import redaction
from harmony_core.redaction import MASK, KeptPrints, Redactor, is_secret_name


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("api_key", True),
        ("HF_TOKEN", True),
        ("hub-token", True),
        ("x.password", True),
        ("secret", True),
        ("aws_secret_access_key", True),
        ("model_key", False),
        ("tokens_to_generate", False),
        ("dataset_key", False),
        ("max_tokens", False),
        ("tokenizer", False),
        ("grader_key", False),
        ("private_model_key", False),
        ("eos_token", False),
        ("padToken", False),
        ("key", False),
        ("monkey", False),
        ("path", False),
        ("PASSWORD_FILE", False),
        ("apiKey", True),
        ("SSH_AUTH_KEY_2", True),
        ("hf_pat", True),
        ("sentry.dsn", True),
        ("Authorization", True),
        ("session_cookies", True),
        ("dbPwd", True),
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret


def test_redacted_data_keeps_its_shape() -> None:
    redactor = Redactor().knowing({"nested": [{"token": "abcdefgh"}], "pin": SecretStr("1234")})
    data = {"a": ["x abcdefgh", 1, None, "1234", "12345"], "password": "p", "token": 5, "model_key": "1234"}
    kept = {"a": [f"x {MASK}", 1, None, MASK, "12345"], "password": MASK, "token": 5, "model_key": "1234"}
    assert redactor.data(data) == kept
    assert redactor.data({"abcdefgh": 1}) == {"abcdefgh": 1}


PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEabc\ndef\n-----END RSA PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"a {PEM} b", f"a {MASK} b"),
        (f"<{JWT}>", f"<{MASK}>"),
        ("Authorization: Bearer abcdef1234567", f"Authorization: Bearer {MASK}"),
        ("redis://:s3cr3t@h/0", f"redis://{MASK}@h/0"),
        ("AKIAIOSFODNN7EXAMPLE", MASK),
        (f"{{'token': 'hf_{'abcdefgh' * 4}'}}", f"{{'token': '{MASK}'}}"),
        (f"<hf_{'abcdefgh' * 4}>", f"<{MASK}>"),
        ("--token=glpat-0123456789abcdefghij", f"--token={MASK}"),
        (
            "{'api_key': 'some words here', 'model_key': 'abcdefgh'}",
            f"{{'api_key': '{MASK}', 'model_key': 'abcdefgh'}}",
        ),
        ("input_value='x', password=abcdefgh1, n=1", f"input_value='x', password={MASK}, n=1"),
        ("https://host/?token=abcd1234&x=1", f"https://host/?token={MASK}&x=1"),
        ("eos_token: <|endoftext|> next token: something", None),
        ("tokens_per_second=12345.6789 monkey: abcdefghijk", None),
        ("a task-specific-thing-0123456789", None),
    ],
)
def test_shapes_of_secrets_in_text(text: str, shown: str | None) -> None:
    assert Redactor().text(text) == (text if shown is None else shown)


def test_a_known_value_is_found_in_its_escaped_spellings() -> None:
    value = 'pl"an\ted/ä\nline'
    mask = Redactor([value, PEM])
    for spelled in (
        value,
        json.dumps(value),
        json.dumps(value, ensure_ascii=False),
        repr(value),
        quote(value, safe=""),
    ):
        assert "ted" not in mask.text(f"x {spelled} y")
    assert "MIIEabcMIIEabc12345" not in Redactor(["first\nMIIEabcMIIEabc12345\n"]).text("only MIIEabcMIIEabc12345")


def test_kept_prints_mask_secrets_and_say_where_something_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, write, full = KeptPrints(), os.write, False

    def writing(descriptor: int, data: bytes) -> int:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(redaction.os, "write", writing)
    kept.write(b"before canary")
    kept.begin(tmp_path / "logs" / "stdout.log", Redactor(["canary12"]))
    kept.write(b"12 \xff\n")
    full = True
    kept.write(b"lost\n")
    full = False
    kept.write(b"after\nunfinished")
    kept.end()
    kept.write(b"late")
    text = (tmp_path / "logs" / "stdout.log").read_bytes()
    assert text == f"before {MASK} ".encode() + b"\xff\n\n[5 bytes could not be written here]\nafter\nunfinished"
    assert kept.lost == 5
