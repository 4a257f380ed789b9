"""The kernels that draw tokens pass through the whole compiler for a GPU that is not there.

The interpreter accepts more than the compiler does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("there is no Triton for this system", allow_module_level=True)

FLAGS = ("DRAWS", "FILTERED", "SCORES", "MASS")
SIZES = {"CHUNK": 4096, "BLOCK": 256, "PARTS": 16, "CHUNKS_PADDED": 64}
DOUBLES = ("temperature", "uniform", "wanted", "raw", "sums", "outputs", "needed", "counts", "totals")
INTEGERS = {
    "masks": "*i32",
    "ids": "*i32",
    "found": "*i32",
    "limits": "*i32",
    "slots": "*i64",
    "last": "*i64",
    "rows": "*i64",
}
CASES: list[tuple[str, tuple[str, ...]]] = [
    ("_summarise", ("SCORES",)),
    ("_summarise", ("SCORES", "DRAWS")),
    ("_summarise", ("DRAWS", "FILTERED")),
    ("_pick", ()),
    ("_pick", ("DRAWS",)),
    ("_pick", ("DRAWS", "FILTERED")),
    ("_count_keys", ()),
    ("_count_keys", ("MASS",)),
    ("_choose_digit", ()),
    ("_choose_digit", ("MASS",)),
    ("_mask", ()),
    ("_record_masked", ()),
]


def type_of(name: str) -> str:
    if name in FLAGS or name in SIZES:
        return "constexpr"
    if name in ("stride", "size", "chunks", "shift", "words"):
        return "i32"
    return "*fp64" if name in DOUBLES else INTEGERS.get(name, "*fp32")


@pytest.mark.parametrize(("kernel", "flags"), CASES)
def test_compiles(kernel: str, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from harmony_core.engine.kernels import sampling

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function: Any = getattr(sampling, kernel)
    names = function.arg_names
    chosen = {name: name in flags for name in FLAGS} | SIZES
    source = ASTSource(
        fn=function,
        signature={name: type_of(name) for name in names},
        constexprs={(names.index(name),): value for name, value in chosen.items() if name in names},
    )
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert f".entry {kernel}" in compiled.asm["ptx"] and compiled.asm["cubin"]
