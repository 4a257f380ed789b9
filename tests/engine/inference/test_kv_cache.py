import os

import pytest
import torch

from harmony_core.engine.inference.runner import KVCache
from harmony_core.errors import ResourceError

CPU = torch.device("cpu")


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_promise_is_every_slot_of_every_layer_rounded_up_to_pages() -> None:
    cache = KVCache(100, num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float32, device=CPU, block_size=16)
    assert cache.slots == 112
    assert cache.bytes == 2 * 3 * 112 * 2 * 8 * 4
    held = [*cache.keys, *cache.values]
    assert [tensor.shape for tensor in held] == [(112, 2, 8)] * 6
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == cache.bytes
    half = KVCache(100, num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16, device=CPU, block_size=16)
    assert half.bytes == cache.bytes // 2


def test_layers_do_not_share_memory() -> None:
    cache = KVCache(32, num_layers=2, num_kv_heads=1, head_dim=4, dtype=torch.float32, device=CPU)
    for index, tensor in enumerate((*cache.keys, *cache.values)):
        tensor.fill_(index + 1)
    assert [tensor.unique().tolist() for tensor in (*cache.keys, *cache.values)] == [[1], [2], [3], [4]]


@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_is_taken_when_tokens_are_written(deterministic: bool) -> None:
    before = resident()
    torch.use_deterministic_algorithms(deterministic)
    try:
        cache = KVCache(131_072, num_layers=4, num_kv_heads=8, head_dim=64, dtype=torch.float32, device=CPU)
    finally:
        torch.use_deterministic_algorithms(False)
    assert cache.bytes == 2 << 30
    assert resident() - before < 16 << 20
    slots = torch.arange(16_384)
    for tensor in (*cache.keys, *cache.values):
        tensor.index_copy_(0, slots, torch.ones(len(slots), 8, 64))
    grown = resident() - before
    written = 256 << 20
    assert 0.9 * written < grown < 1.3 * written
    assert float(cache.keys[3][20_000].abs().max()) == 0
    del cache, tensor
    assert resident() - before < 0.3 * grown


def test_what_the_system_cannot_give_is_an_error_with_the_size() -> None:
    with pytest.raises(ResourceError, match="bytes of address space") as caught:
        KVCache(1 << 50, num_layers=32, num_kv_heads=8, head_dim=128, dtype=torch.float32, device=CPU)
    assert caught.value.details["bytes"] == 2 * 32 * (1 << 50) * 8 * 128 * 4
