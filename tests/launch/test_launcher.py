"""What would be started, and what a user's accelerate configuration may change."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harmony_core.errors import ConfigError, NotFoundError, ResourceError
from harmony_core.launch import launcher
from harmony_core.launch.launcher import (
    VARIABLES,
    AccelerateSettings,
    Launch,
    launch_command,
    launch_environment,
    read_accelerate_config,
    resolve,
)
from harmony_core.options import VARIABLE, EngineOptions, RunOptions

SAVED_BY_ACCELERATE = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_GPU
downcast_bf16: 'no'
enable_cpu_affinity: false
gpu_ids: 0,2
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "accelerate.yaml"
    path.write_text(text)
    return path


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(launcher, "installed_devices", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def options(tmp_path: Path, **more: object) -> EngineOptions:
    return EngineOptions(log_dir=tmp_path / "logs", run_id="run", **more)  # type: ignore[arg-type]


def test_the_file_that_accelerate_itself_saves_is_taken(tmp_path: Path):
    settings = read_accelerate_config(write(tmp_path, SAVED_BY_ACCELERATE))
    assert settings == AccelerateSettings(num_processes=2, gpu_ids="0,2")


def test_count_devices_and_environment(tmp_path: Path):
    text = "num_processes: 3\ngpu_ids: all\nenvironment: {NCCL_DEBUG: INFO, OMP_NUM_THREADS: 3}\n"
    settings = read_accelerate_config(write(tmp_path, text))
    assert settings == AccelerateSettings(num_processes=3, environment={"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "3"})


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_file_says_nothing(tmp_path: Path, text: str):
    assert read_accelerate_config(write(tmp_path, text)) == AccelerateSettings()


def test_everything_else_is_refused_by_name_all_at_once(tmp_path: Path):
    text = (
        "distributed_type: FSDP\nmixed_precision: bf16\nnum_machines: 2\nmachine_rank: 1\ndebug: true\n"
        "fsdp_config: {fsdp_version: 2}\ndynamo_config: {dynamo_backend: INDUCTOR}\nsomething_new: 1\n"
        "main_process_ip: 10.0.0.1\nnum_processes: 0\ngpu_ids: all\nenvironment: [a]\n"
    )
    with pytest.raises(ConfigError) as error:
        read_accelerate_config(write(tmp_path, text))
    assert error.value.issues[0].startswith(f"{tmp_path / 'accelerate.yaml'}:1:1: distributed_type: 'FSDP'")
    assert [issue.split(": ")[1] for issue in error.value.issues] == [
        *("distributed_type", "mixed_precision", "num_machines", "machine_rank", "debug", "fsdp_config"),
        *("dynamo_config", "something_new", "main_process_ip", "num_processes", "environment"),
    ]
    assert "num_processes, gpu_ids and environment only" in error.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "a: [",
        "a: 1\na: 2",
        "a: !!python/object/apply:os.system [x]",
        "[" * 100_000,
        "x" * 1_100_000,
        "a: \x00",
    ],
)
def test_a_file_that_is_none_is_a_config_error(tmp_path: Path, text: str):
    with pytest.raises(ConfigError):
        read_accelerate_config(write(tmp_path, text))


def test_a_missing_file_is_not_found(tmp_path: Path):
    with pytest.raises(NotFoundError):
        read_accelerate_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError):
        read_accelerate_config(tmp_path / "bad.yaml")


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
    path = write(tmp_path, SAVED_BY_ACCELERATE)
    launch = resolve(None, "auto", path)
    assert (launch.device, launch.world_size, launch.devices) == ("cuda", 2, ["0", "2"])
    assert launch_environment(options(tmp_path), launch, {})["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert resolve(1, "auto", path).devices == ["0"]
    assert resolve(None, "auto", write(tmp_path, "use_cpu: true\nnum_processes: 3")).device == "cpu"


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


NAMES_OF_PLACES = re.compile(
    r"PLUGIN|_FILE|FILE_|_DIR|DIR_|PATH|PRELOAD|HOME|LIB|_SO$|CONF|LOGS|_TRACE$|DUMP|PIPE|CACHE|CXX|_CC$|CMD|HOOK|MODULE|"
    r"TOPO|GRAPH|TUNER|PROFIL|STARTUP|INSPECT|BACKEND|COMM_ID|ADDR|HOST|PROXY|TOKEN|KEY"
)
KNOWN = set(
    re.findall(
        r"\w+",
        """
        LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT DYLD_INSERT_LIBRARIES PATH HOME PYTHONPATH PYTHONHOME PYTHONSTARTUP
        PYTHONUSERBASE PYTHONBREAKPOINT PYTHONPLATLIBDIR PYTHONPYCACHEPREFIX PYTHONWARNINGS PYTHONINSPECT
        BASH_ENV ENV IFS TMPDIR GCONV_PATH NCCL_NET_PLUGIN NCCL_TUNER_PLUGIN NCCL_PROFILER_PLUGIN
        NCCL_ENV_PLUGIN NCCL_NET NCCL_CONF_FILE NCCL_TOPO_FILE NCCL_TOPO_DUMP_FILE NCCL_GRAPH_FILE
        NCCL_GRAPH_DUMP_FILE NCCL_DEBUG_FILE NCCL_TUNER_CONFIG_FILE NCCL_COMM_ID NCCL_RAS_ADDR NCCL_HOSTID
        NCCL_COLLNET_ENABLE TORCH_NCCL_DEBUG_INFO_TEMP_FILE TORCH_NCCL_DEBUG_INFO_PIPE_FILE TORCH_HOME
        TORCH_LOGS TORCH_LOGS_OUT TORCH_TRACE TORCH_EXTENSIONS_DIR TORCH_DEVICE_BACKEND_AUTOLOAD
        TORCH_COMPILE_DEBUG TORCHINDUCTOR_CACHE_DIR TORCHINDUCTOR_CUTLASS_DIR TRITON_CACHE_DIR TRITON_DUMP_DIR
        TRITON_PTXAS_PATH TRITON_LIBCUDA_PATH TRITON_PLUGIN_DIRS TRITON_OVERRIDE_DIR CC CXX CUDA_HOME CUDA_PATH
        CUDA_CACHE_PATH CUDA_INJECTION64_PATH NVTX_INJECTION64_PATH HF_HOME HF_HUB_CACHE HF_TOKEN HF_ENDPOINT
        HF_MODULES_CACHE TRANSFORMERS_CACHE ACCELERATE_CONFIG UCX_MODULE_DIR FI_PROVIDER_PATH
        OMPI_MCA_mca_component_path KINETO_CONFIG KINETO_USE_DAEMON OMP_TOOL_LIBRARIES KMP_AFFINITY
        OMP_DISPLAY_ENV OPENSSL_CONF SSL_CERT_FILE HTTPS_PROXY MASTER_ADDR WORLD_SIZE MALLOC_CONF SITECUSTOMIZE
        """,
    )
)


def known_to_the_libraries() -> set[str]:
    """Names of variables that stand in the sources of torch and accelerate."""
    found = set()
    for package in ("torch", "accelerate"):
        spec = importlib.util.find_spec(package)
        assert spec and spec.submodule_search_locations
        for file in Path(spec.submodule_search_locations[0]).rglob("*.py"):
            if "environ" in (text := file.read_text("utf-8", errors="replace")) or "getenv" in text:
                found |= set(re.findall(r"[\"']([A-Z][A-Z0-9]+_[A-Z0-9_]{2,})[\"']", text))
    return found


def test_no_variable_that_names_a_plugin_a_file_or_a_folder_is_taken(tmp_path: Path):
    libraries = known_to_the_libraries()
    assert len(libraries) > 200
    for name in {*KNOWN, *(name for name in libraries if NAMES_OF_PLACES.search(name))}:
        assert name not in VARIABLES
    assert not [name for name in VARIABLES if NAMES_OF_PLACES.search(name)]
    text = "environment:\n" + "".join(f"  {name}: 1\n" for name in sorted(KNOWN))
    with pytest.raises(ConfigError) as error:
        read_accelerate_config(write(tmp_path, text))
    assert len(error.value.issues) == len(KNOWN)
    assert all(
        f"'{name}' may not be set" in issue for name, issue in zip(sorted(KNOWN), error.value.issues, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("OMP_NUM_THREADS", ["4", "'8'"], ["/lib/x.so", "4;ls", "''", "[1]", "a"]),
        ("NCCL_SOCKET_IFNAME", ["eth0", "'^lo,docker0'", "'=eth1'"], ["../x", "'a b'", "/dev/x"]),
        ("NCCL_IB_HCA", ["'mlx5_0:1,mlx5_1'"], ["/x"]),
        ("NCCL_DEBUG", ["INFO"], ["/tmp/x", "'INFO /x'", "{a: 1}"]),
    ],
)
def test_a_variable_has_the_values_of_its_kind(tmp_path: Path, name: str, good: list[str], bad: list[str]):
    for value in good:
        settings = read_accelerate_config(write(tmp_path, f"environment: {{{name}: {value}}}"))
        assert settings.environment == {name: value.strip("'")}
    for value in bad:
        with pytest.raises(ConfigError, match=f"{name}' must be"):
            read_accelerate_config(write(tmp_path, f"environment: {{{name}: {value}}}"))


def test_devices_may_be_named_by_their_variable(tmp_path: Path):
    text = "environment: {CUDA_VISIBLE_DEVICES: '1,GPU-3af'}\n"
    assert read_accelerate_config(write(tmp_path, text)) == AccelerateSettings(gpu_ids="1,GPU-3af")
    assert read_accelerate_config(write(tmp_path, text + "gpu_ids: all")) == AccelerateSettings()
    with pytest.raises(ConfigError, match="gpu_ids"):
        read_accelerate_config(write(tmp_path, "gpu_ids: ../x"))
