"""Forty secrets planted in a run's configuration, environment, command line, prints, errors and a rank's last words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

RECIPE = """
import os, signal, sys
from pydantic import SecretStr
from adaptive_harmony import StringThread
from adaptive_harmony.metric_logger import get_prod_logger
from adaptive_harmony.parameters import Model, model_kinds
from adaptive_harmony.runtime import InputConfig, RecipeContext, recipe_main
from harmony_core.errors import RankDied
from harmony_core.loggers import JSONLLogger

api_key = "LITERALPLANT"  # kept only as a mask

class Config(InputConfig):
    model: Model[model_kinds.Trainable] = Model(model_key="builtin:tiny-lm")
    grader_key: str = "grader-unmasked"
    eos_token: str = "eos-unmasked"
    api_key: str | None = None
    hub: dict[str, str] = {}
    tokens_of: list[dict[str, str]] = []
    creds: SecretStr | None = None
    url: str = ""
    pin: str = ""
    note: str = ""

def told():
    with open(os.environ["PLANTED"]) as file:
        return file.read()

def loss(logprobs, samples):
    print("rank says", told(), repr(told()), flush=True)
    print({"api_key": "RANKPLANT12"}, file=sys.stderr)
    os.write(2, b"last words " + told().encode())
    os.kill(os.getpid(), signal.SIGSEGV)

@recipe_main
async def main(config: Config, ctx: RecipeContext) -> str:
    print("recipe says", told())
    print("recipe says", repr(told()), file=sys.stderr)
    secrets = told().split("\\n\\n")
    logger = get_prod_logger(ctx)
    own = JSONLLogger(ctx.run.directory / "metrics.jsonl")
    for each in (logger, own):
        each.log_config({"text": told(), "list": secrets, "api_key": "LOGGERPLANT", "lr": 1.0})
        each({"text": told(), "loss": 1.0})
    ctx.run.events.write("told", {"list": secrets, "deep": {"s": {s: told() for s in secrets}}})
    policy = await config.model.spawn_train("policy", ctx, max_batch_size=512)
    try:
        await policy.train_custom([StringThread([("user", "a"), ("assistant", "b")])], loss)
        await policy.optim_step(1e-3, 0.0, 1.0)
    except RankDied as error:
        raise RuntimeError("raised with " + told()) from error
"""

PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0\nPLANTPEMPLANTPEM09\n-----END PRIVATE KEY-----"
ENVIRONMENT = {
    "WANDB_API_KEY_2": "PLANT00-aaaabbbb",
    "OPENAI_API_KEY": 'PLANT01"quoted\\back',
    "DB_PASSWORD": "PLANT02 with blanks",
    "HF_TOKEN": "PLANT03\twith\ttabs",
    "SESSION_COOKIE": "PLANT04-ümläut",
    "GITHUB_PAT": "PLANT05'single'",
    "SENTRY_DSN": "https://PLANT06key@sentry/1",
    "MY_CREDENTIALS": "PLANT07{}[]",
    "SOME_JWT": "PLANT08%2F+&x=1",
    "AUTH_KEY": "PLANT09/slash/",
    "SMTP_PWD": "PLANT10$HOME`x`",
    "PRIVATE_KEY": PEM,
    "DATABASE_URL": "postgres://user:PLANT11word@db/x",
    "AUTHORIZATION": "Basic PLANT12word",
}
CONFIGURED = ["PLANT13config", "PLANT14nested", "PLANT15listed", "PLANT16secretstr", "PLANT17url", "PLANT18given"]
SHAPED = [
    *("hf_" + "PLANT19" + "a1" * 14, "sk-proj-" + "PLANT20" + "b2" * 20, "ghp_" + "PLANT21" + "c3" * 15),
    *("github_pat_" + "PLANT22" + "d4" * 30, "glpat-" + "PLANT23" + "e5" * 10, "xoxb-123456789012-PLANT24f6"),
    *("AKIAPLANT25AAAAAAAAA", "AIza" + "PLANT26" + "g7" * 14, "sk_live_" + "PLANT27" + "h8" * 10),
    *("npm_" + "PLANT28" + "i9" * 15, "pypi-AgEIcHlwaS5vcmc" + "PLANT29" + "j0" * 20, "SG." + "PLANT30" + "k1" * 25),
    *("nvapi-" + "PLANT31" + "l2" * 20, "gsk_" + "PLANT32" + "m3" * 20, "sk-ant-api03-" + "PLANT33" + "n4" * 30),
    *("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkw.PLANT34", "Authorization: Bearer PLANT35-abcdefgh1"),
    *("https://me:PLANT36@example.org/x", "lin_api_" + "PLANT37" + "o5" * 20, "dapi" + "PLANT38" + "p6" * 14),
    "https://hooks.slack.com/services/T0/B0/PLANT39",
]


def test_forty_secrets_in_twelve_places_reach_no_file(tmp_path: Path) -> None:
    secrets = [*ENVIRONMENT.values(), *CONFIGURED, *SHAPED]
    planted, recipe, config = tmp_path / "planted", tmp_path / "planting.py", tmp_path / "c.yaml"
    planted.write_text("\n\n".join(secrets))
    recipe.write_text(RECIPE)
    given = {
        "api_key": CONFIGURED[0],
        "hub": {"token": CONFIGURED[1]},
        "tokens_of": [{"password": CONFIGURED[2]}],
        "url": f"redis://:{CONFIGURED[4]}@host/0",
        "pin": "pin-unmasked",
        "note": "1234567",  # the value of a password, too short to be masked within others
    }
    config.write_text(f"# {CONFIGURED[0]}\n" + yaml.safe_dump(given))
    (tmp_path / "more.json").write_text(json.dumps({"hub": {"token": CONFIGURED[1]}}))
    home = tmp_path / "home"
    env = os.environ | ENVIRONMENT | {"ADAPTIVE_HOME": str(home), "PLANTED": str(planted), "LOGIN_PASSWORD": "1234567"}
    env["MODEL_PASSWORD"] = "builtin:tiny-lm"  # a model's key is no secret, whatever holds it
    env["ADAPTIVE_CFG__CREDS"] = CONFIGURED[3]
    words = ["run", str(recipe), "-c", str(config), "-c", str(tmp_path / "more.json"), "--device", "cpu"]
    words += ["--set", f"hub.api_key={CONFIGURED[5]}", "--pin", "pin-unmasked 1234567"]
    done = subprocess.run(
        [sys.executable, "-m", "harmony_core.cli", *words], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    subprocess.run(
        [sys.executable, "-m", "harmony_core.cli", "runs", "report", "last", "--open", "no"],
        env=os.environ | {"ADAPTIVE_HOME": str(home)},
        check=True,
        capture_output=True,
    )
    (run,) = (home / "runs").iterdir()
    files = {path: path.read_bytes() for path in home.rglob("*") if path.is_file() and path.suffix != ".safetensors"}
    found = sorted({f"{path.name}: {name}" for path, text in files.items() for name in _plants_in(text)})
    assert found == []
    for path, text in files.items():
        lines = text.splitlines() if path.suffix == ".jsonl" else [text] if path.suffix == ".json" else []
        for line in lines:
            json.loads(line)
    config_text = (run / "config.yaml").read_text()
    for name in ("model: builtin:tiny-lm", "grader_key: grader-unmasked", "eos_token: eos-unmasked"):
        assert name in config_text
    assert "pin: pin-unmasked 1234567" in config_text and "note: '********'" in config_text
    log = (run / "logs" / "rank-0.log").read_text()
    assert log.count("rank says") == 1 and "last words ********" in log and "Segmentation fault" in log
    assert "#" not in (run / "inputs" / "1-c.yaml").read_text()
    assert json.loads((run / "inputs" / "2-more.json").read_text()) == {"hub": {"token": "********"}}
    for name in ("stdout.log", "stderr.log"):
        assert "recipe says" in (run / "logs" / name).read_text()


def _plants_in(text: bytes) -> list[str]:
    names = [f"PLANT{number:02}" for number in range(40)]
    names += ["PLANTPEM", "MIIEvQ", '"LITERALPLANT', "RANKPLANT12'", "LOGGERPLANT'"]
    return [name for name in names if name.encode() in text]
