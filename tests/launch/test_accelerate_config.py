"""What a user's accelerate configuration may change."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from harmony_core.errors import ConfigError, NotFoundError
from harmony_core.launch.launcher import VARIABLES, AccelerateSettings, read_accelerate_config

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
