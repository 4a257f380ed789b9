"""The ledger, sizes as people write them, and what a host has to give."""

from __future__ import annotations

from pathlib import Path

import pytest

from harmony_core.errors import ConflictError, MemoryRefused, UsageError
from harmony_core.memory import ledger
from harmony_core.memory.ledger import Ledger, MemoryPlan, format_size, host_capacity, parse_assume, parse_size

MIB = 1 << 20


def test_resident_parts_add_up_and_working_space_counts_once() -> None:
    book = Ledger(1000)
    book.promise("policy", MemoryPlan(weights=100, gradients=50, kv=10, activations=200, workspace=40))
    assert (book.free, book.transient) == (840, 240)
    book.promise("judge", MemoryPlan(weights=600, workspace=100))
    assert (book.free, book.transient) == (240, 240)
    assert not book.fits(MemoryPlan(weights=1)), "the policy's working space still has to fit"
    book.release("policy")
    assert (book.free, book.transient) == (400, 100)
    assert book.fits(MemoryPlan(weights=300, workspace=100))


def test_a_refusal_shows_a_table_and_changes_nothing() -> None:
    book = Ledger(1000 * MIB)
    book.promise("judge", MemoryPlan(weights=300 * MIB, workspace=100 * MIB))
    before = book.snapshot()
    with pytest.raises(MemoryRefused) as refusal:
        book.promise(
            "policy",
            MemoryPlan(weights=300 * MIB, gradients=300 * MIB, activations=200 * MIB),
            ways_out=lambda free, transient: [f"free {free // MIB}", f"transient {transient // MIB}"],
        )
    text = str(refusal.value)
    for line in ("capacity", "promised to judge", "policy: gradients", "needed", "missing"):
        assert line in text
    assert "100.0 MiB" in text.splitlines()[-2], "800 are needed, 700 are free"
    assert refusal.value.hint == "what fits: free 700; transient 100"
    assert refusal.value.details == {"needed_bytes": 800 * MIB, "free_bytes": 700 * MIB}
    assert book.snapshot() == before


def test_the_same_name_twice_is_a_conflict() -> None:
    book = Ledger(1000)
    book.promise("judge", MemoryPlan(weights=1))
    with pytest.raises(ConflictError, match="judge"):
        book.promise("judge", MemoryPlan(weights=1))


def test_shared_weights_count_once_until_the_last_holder_leaves() -> None:
    book = Ledger(1000)
    book.promise("judge", MemoryPlan(weights=600), weights_key="base tp=1")
    # Planned with or without the weights that are there already: the same.
    book.promise("policy", MemoryPlan(weights=600, adapter=50), weights_key="base tp=1")
    book.promise("third", MemoryPlan(weights=0, adapter=50), weights_key="base tp=1")
    assert book.free == 300
    assert [parts["weights"] for parts in book.snapshot()["models"].values()] == [600, 0, 0]
    book.release("judge")
    book.release("policy")
    assert book.free == 350 and book.holds("base tp=1")
    assert book.snapshot()["models"]["third"]["weights"] == 600, "of those that are left the first one counts them"
    assert not book.fits(MemoryPlan(weights=600), "another base")
    book.release("third")
    assert book.free == 1000 and not book.holds("base tp=1")


def test_ranks_of_a_host_have_equal_parts_and_the_smallest_device_decides() -> None:
    assert Ledger(1000, ranks=4).capacity == 250
    devices = Ledger([800, 700])
    assert (devices.capacity, devices.ranks) == (700, 2)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * MIB),
        ("8GB", 8 * 10**9),
        ("8G", 8 << 30),
        ("1.5 gib", 3 << 29),
        (4096, 4096),
        ("4096", 4096),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "0", "8 elephants", "8GBB", "GB"])
def test_bad_sizes_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_size(text)
    assert repr(text) in str(error.value) and "512MiB" in error.value.hint


def test_assumed_machines() -> None:
    assert parse_assume("8x80GiB") == [80 << 30] * 8
    assert parse_assume("24GiB") == [24 << 30]
    for bad in ("0x80GiB", "x80GiB", "eightx80GiB", "8x", "8x80Elephants"):
        with pytest.raises(UsageError):
            parse_assume(bad)


def test_sizes_are_shown_as_people_read_them() -> None:
    assert [format_size(n) for n in (0, 1023, 1 << 20, 3 << 29, -(1 << 20))] == [
        "0 B",
        "1023 B",
        "1.0 MiB",
        "1.50 GiB",
        "-1.0 MiB",
    ]


def test_a_limit_lowers_the_host_and_ranks_to_come_take_their_share() -> None:
    machine = host_capacity()
    assert machine > 0
    assert host_capacity(MIB) == MIB
    assert host_capacity(1 << 60) <= machine + (64 << 20)
    assert host_capacity(ranks=1) < machine
    assert host_capacity(ranks=10**6) == 0


def _cgroup(directory: Path, names: dict[str, str]) -> None:
    directory.mkdir(parents=True)
    for name, text in names.items():
        (directory / name).write_text(text)


def test_the_tightest_cgroup_above_this_process_counts(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    root = tmp_path / "fs"
    _cgroup(root, {})
    _cgroup(
        root / "outer",
        {"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": "anon 300\ninactive_file 100\n"},
    )
    _cgroup(root / "outer/inner", {"memory.max": "max\n", "memory.current": "400\n", "memory.stat": "anon 300\n"})
    assert ledger._cgroup_rest(root, membership) == 700
    (root / "outer/inner/memory.max").write_text("500\n")
    assert ledger._cgroup_rest(root, membership) == 100


def test_cgroup_v1_and_no_cgroup(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("5:memory:/job\n0::/\n")
    root = tmp_path / "fs"
    files = {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "600", "memory.stat": "total_inactive_file 50\n"}
    _cgroup(root / "memory/job", files)
    assert ledger._cgroup_rest(root, membership) == 450
    (root / "memory/job/memory.limit_in_bytes").write_text("9223372036854771712")
    assert ledger._cgroup_rest(root, membership) is None
    assert ledger._cgroup_rest(root, tmp_path / "nothing") is None
