"""What never stands in the tree: code that runs data, swallowed errors, tests that sleep, traces of its writing."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from source_tree import FOLDERS, ROOT

SOURCES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
PYTHON = [*SOURCES, *(file for folder in ("tests", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py")))]

SWALLOWED = {
    "cli/app.py": (1, "the edge of the process"),
    "harmony_core/text/chat_template.py": (1, "a template is foreign code"),
    "harmony_core/engine/convert_gguf.py": (2, "the edge of a converting process, and a reader that checks little"),
    "harmony_core/engine/worker.py": (1, "the edge of a request: an exception is sent back as data"),
    "harmony_core/engine/process.py": (1, "the edge of a rank"),
    "harmony_core/engine/training/loss_evaluation.py": (1, "a recipe's loss is foreign code: its failure says where"),
    "harmony_core/graders/base.py": (1, "a grader is foreign code: its failure is its sample's, and counted"),
    "harmony_core/notifiers.py": (
        1,
        "an artifact that is lost takes neither the others nor the outcome with it",
    ),
    "harmony_core/environments/environment.py": (2, "an environment is foreign code: its failure is its trajectory's"),
    "harmony_core/graders/judges.py": (1, "a service's errors are of its own kinds; what passes is tried again"),
    "harmony_core/runs/interruption.py": (1, "the edge of a thread without which no signal is heeded: it ends the run"),
    "harmony_core/loggers/local.py": (1, "a second logger may be the client of any service, and ends nothing"),
    "harmony_core/algorithms/batch_loader.py": (2, "a failure of one item, by contract"),
    "harmony_core/recipe/__init__.py": (1, "whatever the classes of a recipe raise while they are built"),
    "harmony_core/graders/lanes.py": (1, "the error of a grader is the answer to a call"),
    "harmony_core/graders/worker.py": (2, "a grader is foreign code"),
    "harmony_core/recipe_file.py": (1, "whatever a recipe's module raises while it is imported"),
    "harmony_core/runs/run.py": (1, "a report that cannot be made does not change how the run ended"),
    "harmony_core/text/tokenizer_files.py": (2, "tokenizers raises a bare Exception"),
}
"""Handlers of everything that do not raise again: how many in a file, and why."""

SLEEPS = {
    "tests/client/test_faults.py": (2, "a driver that computes without awaiting, and what waits for a line"),
    "tests/echo_rank.py": (1, "a rank that hangs"),
    "tests/fake_launcher.py": (1, "looks as often as torchrun does"),
    "tests/fake_rank.py": (6, "a rank that is slow, or mute, or waits for another, or looks for a file"),
    "tests/launch/test_hygiene.py": (1, "a driver that is held"),
    "tests/launch/test_diagnosis.py": (2, "the random moment of a kill, and a driver that is busy"),
    "tests/launch/test_supervisor.py": (1, "a driver that blocks its own loop"),
    "tests/leftovers.py": (2, "what waits for a condition"),
    "tests/sockets.py": (1, "a flood with room to answer"),
    "tests/environments/test_trajectories.py": (3, "an environment that hangs"),
    "tests/recipes/two_stages.py": (1, "a recipe that is killed meanwhile"),
}
"""Sleeps outside of slow tests: how many in a file, and why. Nothing depends on how long they are."""

FORBIDDEN_MODULES = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN_CALLS = {"__import__", "eval", "exec", "numpy.load", "np.load", "os.system", "torch.load", "yaml.load"}
FORBIDDEN_ARGUMENTS = {"allow_pickle", "shell", "trust_remote_code"}

TEXT = (".cfg", ".jinja", ".json", ".jsonl", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", "")
TRACES = re.compile(
    "|".join(
        (
            *(r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"\bX" + r"XX\b", r"\bHA" + r"CK\b"),
            *(r"(?<![\w.])/(?:work|root|mnt|Users)/", r"/home/(?!USER\b)\w", r"/tmp/" + r"(?:w|venv)\b"),
            *(r"\bdesign" + r"\.md\b", r"\bcontract" + r"\.md\b", r"\bissue " + r"#?\d", r"\bAI[- ]generated\b"),
        )
    )
)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def dangerous(tree: ast.AST) -> Iterator[str]:
    """Ways in which data becomes code, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: import {n}" for n in names if n.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS:
                yield f"{node.lineno}: {called}()"
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN_ARGUMENTS and ast.unparse(keyword.value) != "False":
                    yield f"{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}"


def swallowing(tree: ast.AST) -> Iterator[int]:
    """Lines of handlers that take every exception and do not raise again, and of such `suppress` calls."""
    everything = {"Exception", "BaseException"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type
            types = caught.elts if isinstance(caught, ast.Tuple) else [caught] if caught else []
            broad = not types or any(ast.unparse(t) in everything for t in types)
            again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if broad and not again:
                yield node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            yield from (node.lineno for argument in node.args if ast.unparse(argument) in everything)


def timing(tree: ast.AST) -> Iterator[int]:
    """Lines, but for slow tests, that sleep or assert what a clock shows. `sleep(0)` only lets others go on."""
    clocks = {"time.monotonic", "time.perf_counter", "time.process_time", "time.time"}
    for node in ast.iter_child_nodes(tree):
        decorators = getattr(node, "decorator_list", ())
        if any(ast.unparse(decorator) == "pytest.mark.slow" for decorator in decorators):
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("asyncio.sleep", "time.sleep"):
            yield from () if ast.unparse(node.args[0]) == "0" else (node.lineno,)
        if isinstance(node, ast.Assert):
            calls = {ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}
            yield from (node.lineno,) if calls & clocks else ()
        yield from timing(node)


def test_data_never_becomes_code() -> None:
    found = [f"{name_of(file)}:{line}" for file in PYTHON for line in dangerous(ast.parse(file.read_text("utf-8")))]
    assert found == []


def test_transformers_is_told_to_run_no_code() -> None:
    """Each call of ours that builds something from a directory or a config says so itself; the default may change."""
    loading, silent = 0, []
    for file in [file for file in SOURCES if "engine" in file.parts]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            called = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            if called in ("from_pretrained", "from_config", "pipeline"):
                loading += 1
                assert isinstance(node, ast.Call)
                if "trust_remote_code" not in {keyword.arg for keyword in node.keywords}:
                    silent.append(f"{name_of(file)}:{node.lineno}")
    assert loading == 3 and silent == []


def test_errors_are_swallowed_only_at_listed_edges() -> None:
    found = Counter(name_of(file) for file in SOURCES for _ in swallowing(ast.parse(file.read_text("utf-8"))))
    assert dict(found) == {name: count for name, (count, _) in SWALLOWED.items()}


def test_tests_wait_for_conditions() -> None:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    found = Counter(name_of(file) for file in tests for _ in timing(ast.parse(file.read_text("utf-8"))))
    expected = {name: count for name, (count, _) in SLEEPS.items()}
    assert dict(found) == expected, {n: c for n, c in found.items() if expected.get(n) != c}


def test_sources_keep_their_size() -> None:
    """A file fits a short walk, a function a screen."""
    long_files, long_functions = {}, {}
    for file in SOURCES:
        text = file.read_text("utf-8")
        if text.count("\n") > 400:
            long_files[name_of(file)] = text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60 and not only_declares(node):
                    long_functions[f"{name_of(file)}:{node.name}"] = lines
    assert (long_files, long_functions) == ({}, {})


def only_declares(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A signature with a docstring, such as a command's options."""
    return all(isinstance(statement, ast.Expr | ast.Pass) for statement in node.body)


def texts() -> list[Path]:
    """Every text file of the tree that was written by hand."""
    skipped = {"build", "dist", "node_modules"}
    found = []
    for file in sorted(ROOT.rglob("*")):
        parts = file.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part not in (".ci", ".dockerignore", ".gitignore") for part in parts)
        generated = skipped & set(parts) or any(part.endswith(".egg-info") or part == "__pycache__" for part in parts)
        if file.is_file() and not hidden and not generated and file.suffix in TEXT and file != Path(__file__):
            found.append(file)
    return found


def test_no_traces_of_where_and_how_it_was_written() -> None:
    found = [
        f"{name_of(file)}:{number}: {line.strip()[:100]}"
        for file in texts()
        for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), 1)
        if TRACES.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "torch.load(path)",
        "subprocess.run(command, shell=True)",
        "AutoConfig.from_pretrained(path, trust_remote_code=flag)",
    ],
)
def test_dangerous_code_would_be_seen(source: str) -> None:
    assert list(dangerous(ast.parse(source)))


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        ("except Exception:\n    pass", True),
        ("except:\n    pass", True),
        ("except (OSError, BaseException) as e:\n    print(e)", True),
        ("except Exception:\n    close()\n    raise", False),
        ("except OSError:\n    pass", False),
    ],
)
def test_a_swallowed_error_would_be_seen(body: str, seen: bool) -> None:
    assert bool(list(swallowing(ast.parse(f"try:\n    f()\n{body}")))) is seen


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("def test():\n    time.sleep(0.1)", True),
        ("async def test():\n    await asyncio.sleep(seconds)", True),
        ("async def test():\n    await asyncio.sleep(0)", False),
        ("@pytest.mark.slow\ndef test():\n    time.sleep(1)", False),
        ("def test():\n    assert time.monotonic() - before < 5", True),
        ("def test():\n    deadline = time.monotonic() + 5", False),
    ],
)
def test_a_test_that_sleeps_would_be_seen(source: str, seen: bool) -> None:
    assert bool(list(timing(ast.parse(source)))) is seen


@pytest.mark.parametrize(
    "line", ["# TO" + "DO: later", "open('/wor" + "k/x')", "see design" + ".md", "/home" + "/me/x"]
)
def test_a_trace_would_be_seen(line: str) -> None:
    assert TRACES.search(line)
