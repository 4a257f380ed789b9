"""What would be started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harmony_core.errors import ConfigError, ResourceError
from harmony_core.launch import launcher
from harmony_core.launch.launcher import (
    AccelerateSettings,
    Launch,
    launch_command,
    launch_environment,
    resolve,
)
from harmony_core.options import VARIABLE, EngineOptions, RunOptions


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(launcher, "installed_devices", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def options(tmp_path: Path, **more: object) -> EngineOptions:
    return EngineOptions(log_dir=tmp_path / "logs", run_id="run", **more)  # type: ignore[arg-type]


def test_by_default_every_device_else_one_cpu_rank(monkeypatch: pytest.MonkeyPatch):
    gpus(monkeypatch, 0)
    assert resolve(None, "auto", None) == Launch("cpu", 1, AccelerateSettings())
    gpus(monkeypatch, 4)
    assert resolve(None, "auto", None) == Launch("cuda", 4, AccelerateSettings(), ["0", "1", "2", "3"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,9,0")
    assert resolve(None, "auto", None).devices == ["3", "1"]
    assert resolve(2, "cpu", None) == Launch("cpu", 2, AccelerateSettings())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve(None, "auto", None).device == "cpu"


def test_more_ranks_than_devices_and_senseless_values_are_refused(monkeypatch: pytest.MonkeyPatch):
    gpus(monkeypatch, 2)
    with pytest.raises(ResourceError, match="3 ranks asked for, 2 CUDA devices") as error:
        resolve(3, "cuda", None)
    assert "--num-processes 2" in error.value.hint
    gpus(monkeypatch, 0)
    with pytest.raises(ResourceError, match="0 CUDA devices"):
        resolve(None, "cuda", None)
    with pytest.raises(ConfigError, match="0 ranks"):
        resolve(0, "cpu", None)
    with pytest.raises(ConfigError, match="tpu"):
        resolve(1, "tpu", None)


def test_a_flag_wins_over_the_file_and_the_file_chooses_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gpus(monkeypatch, 4)
    path, on_cpu = tmp_path / "accelerate.yaml", tmp_path / "cpu.yaml"
    path.write_text("num_processes: 2\ngpu_ids: 0,2\n")
    on_cpu.write_text("use_cpu: true\nnum_processes: 3")
    launch = resolve(None, "auto", path)
    assert (launch.device, launch.world_size, launch.devices) == ("cuda", 2, ["0", "2"])
    assert launch_environment(options(tmp_path), launch, {})["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert resolve(1, "auto", path).devices == ["0"]
    assert resolve(None, "auto", on_cpu).device == "cpu"


@pytest.mark.parametrize(("count", "kind"), [(1, "NO"), (2, "MULTI_GPU")])
def test_the_launcher_gets_our_configuration_and_a_free_port(tmp_path: Path, count: int, kind: str):
    command = launch_command(options(tmp_path), Launch("cpu", count, AccelerateSettings()), tmp_path)
    config = yaml.safe_load((tmp_path / "accelerate.yaml").read_text())
    assert command[command.index("--config_file") + 1] == str(tmp_path / "accelerate.yaml")
    assert command[command.index("--main_process_port") + 1] == "0"
    assert command[command.index("--num_processes") + 1] == str(count)
    assert (config["distributed_type"], config["num_processes"], config["use_cpu"]) == (kind, count, False)
    assert not any("TOKEN" in part.upper() for part in command)


def test_the_environment_of_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launcher, "available_cores", lambda: 7)
    caller = {
        "PATH": "/bin",
        "RANK": "3",
        "MASTER_PORT": "29500",
        "PET_NPROC_PER_NODE": "8",
        "FSDP_VERSION": "2",
        "ACCELERATE_USE_FSDP": "true",
        "TORCHELASTIC_RUN_ID": "x",
        "CUDA_VISIBLE_DEVICES": "0",
        "WANDB": "1",
    }
    env = launch_environment(options(tmp_path, rehearse=True), Launch("cpu", 2, AccelerateSettings()), caller)
    assert env["OMP_NUM_THREADS"] == "3" and env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["MALLOC_ARENA_MAX"] == "1" and int(env["MALLOC_MMAP_THRESHOLD_"]) > 0
    assert env["PYTHONFAULTHANDLER"] == env["PYTHONUNBUFFERED"] == env["HF_HUB_OFFLINE"] == "1"
    assert env["NCCL_NVLS_ENABLE"] == "0" and env["TOKENIZERS_PARALLELISM"] == "false"
    assert env["PATH"] == "/bin" and env["WANDB"] == "1"
    assert env["ADAPTIVE_RUN_ID"] == "run"
    found = RunOptions.of_rank(env)
    assert (found.device, found.num_processes, found.rehearse) == ("cpu", 2, True)
    # Later than the driver, who can say for whom the others wait; with no hang timeout as good as never.
    seconds = "from harmony_core.engine.topology import COLLECTIVE_TIMEOUT as t; print(t.total_seconds())"
    for hang_timeout, least in ((600.0, 1800), (0.0, 1e7)):
        told = {VARIABLE: options(tmp_path, hang_timeout=hang_timeout).for_ranks("cpu", 2)}
        shown = subprocess.run([sys.executable, "-c", seconds], env=os.environ | told, capture_output=True, check=True)
        assert float(shown.stdout) >= least
    if os.path.exists("/sys/class/net/lo"):
        assert env["GLOO_SOCKET_IFNAME"] == "lo"
    gone = {"RANK", "MASTER_PORT", "PET_NPROC_PER_NODE", "FSDP_VERSION", "ACCELERATE_USE_FSDP", "TORCHELASTIC_RUN_ID"}
    assert not gone & set(env)


def test_compiled_code_is_kept_where_the_home_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launcher, "available_cores", lambda: 34)
    cache = tmp_path / "cache"
    launch = Launch("cpu", 2, AccelerateSettings())
    env = launch_environment(options(tmp_path, cache=cache), launch, {"TRITON_CACHE_DIR": "/mine"})
    assert (env["TORCHINDUCTOR_CACHE_DIR"], env["TRITON_CACHE_DIR"]) == (str(cache / "inductor"), "/mine")
    assert env["TORCHINDUCTOR_COMPILE_THREADS"] == "8"
    assert "TORCHINDUCTOR_CACHE_DIR" not in launch_environment(options(tmp_path), launch, {})


def test_what_the_user_set_stays(tmp_path: Path):
    caller = {"OMP_NUM_THREADS": "5", "GLOO_SOCKET_IFNAME": "eth7", "MALLOC_ARENA_MAX": "4"}
    settings = AccelerateSettings(environment={"MALLOC_ARENA_MAX": "2"})
    env = launch_environment(options(tmp_path), Launch("cpu", 2, settings), caller)
    assert (env["OMP_NUM_THREADS"], env["GLOO_SOCKET_IFNAME"], env["MALLOC_ARENA_MAX"]) == ("5", "eth7", "2")
