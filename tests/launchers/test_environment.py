"""No variable in the environment changes a training: each one that a library reads is cleared or known to be harmless."""

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from drumline_launchers.environment import (
    cleared_names,
    is_cleared,
    kept_variables,
    launch_environment,
)

LIBRARIES = ("accelerate", "deepspeed", "torch.distributed", "transformers", "datasets")
READS = re.compile(
    r"(environ\.(get|pop|setdefault)|getenv|\w*env(iron)?|\w*(get|parse|read|str|int|bool)\w*_env\w*)$"
)
HARMLESS = {
    "credentials and other services": (
        "AWS_ACCESS_KEY_ID AWS_DEFAULT_REGION AWS_PROFILE AWS_REGION AWS_SECRET_ACCESS_KEY CLEARML_LOG_MODEL "
        "CLEARML_PROJECT CLEARML_TASK COMET_LOG_ASSETS COMET_MODE DATABRICKS_RUNTIME_VERSION "
        "DISABLE_KUBEFLOW_INTEGRATION DISABLE_MLFLOW_INTEGRATION ECS_CONTAINER_METADATA_URI "
        "HF_DAGSHUB_LOG_ARTIFACTS HF_DAGSHUB_MODEL_NAME HF_DVCLIVE_LOG_MODEL HF_ENDPOINT HF_MLFLOW_LOG_ARTIFACTS "
        "HF_UPDATE_DOWNLOAD_COUNTS HUGGINGFACE_CO_STAGING KUBEFLOW_TRAINER_SERVER_URL MLFLOW_EXPERIMENT_NAME "
        "MLFLOW_FLATTEN_PARAMS MLFLOW_MAX_LOG_PARAMS MLFLOW_NESTED_RUN MLFLOW_RUN_ID MLFLOW_TAGS MLFLOW_TRACKING_URI "
        "RAY_SCOPE SWANLAB_LOG_MODEL SWANLAB_PROJECT SWANLAB_RESUME SWANLAB_RUN_ID TENSORBOARD_LOGGING_DIR "
        "TRAINING_JOB_ARN VSCODE_PID WANDB_LOG_MODEL WANDB_MODE WANDB_PROJECT WANDB_WATCH"
    ),
    "caches and folders": (
        "HF_DATASETS_CACHE HF_DATASETS_DOWNLOADED_DATASETS_PATH HF_DATASETS_EXTRACTED_DATASETS_PATH HF_HOME "
        "HF_MODULES_CACHE TEMP TMP TMPDIR TRITON_CACHE_DIR TRITON_HOME XDG_CACHE_HOME"
    ),
    "compilers and libraries": (
        "CCL_ROOT CFLAGS CPATH CUDA_HOME CUDA_PATH CUTLASS_PATH CUTLASS_ROOT CXX LDFLAGS LIBRARY_PATH "
        "NVSHMEM_LIB_DIR ROCSHMEM_LIB_DIR"
    ),
    "devices, threads, network": (
        "CUDA_VISIBLE_DEVICES KMP_AFFINITY NCCL_GRAPH_MIXING_SUPPORT NCCL_IB_DISABLE NCCL_P2P_DISABLE "
        "NCCL_SOCKET_IFNAME OMP_NUM_THREADS TOKENIZERS_PARALLELISM"
    ),
    "deterministic kernels, wanted by who sets it": "CUBLAS_WORKSPACE_CONFIG",
    "logs": (
        "ASCEND_LAUNCH_BLOCKING AUTOEP_FOLDING_DEBUG_PAYLOAD AUTOEP_FOLDING_DEBUG_SAMPLE_LIMIT DATASETS_VERBOSITY "
        "DISABLE_LOGS_WHILE_COMPILING FR_TRACE_VERBOSE_OUTPUT HF_DATASETS_DISABLE_PROGRESS_BARS "
        "HF_DATASETS_STACK_MULTIPROCESSING_DOWNLOAD_PROGRESS_BARS LOGGER_METHODS_TO_EXCLUDE_FROM_DISABLE "
        "NETWORK_DEBUG_REPORT NETWORK_DEBUG_REPORT_PATH TF_CPP_MIN_LOG_LEVEL TQDM_POSITION"
    ),
    "where the rows lie, not which they are": (
        "DISABLE_SAFETENSORS_CONVERSION HF_DATASETS_IN_MEMORY_MAX_SIZE HF_DATASETS_OFFLINE"
    ),
    "the system's": "PATH PYTHONPATH USER",
    "the libraries' own tests": (
        "BRANCH CI CI_CPU_MEMORY_LIMIT_GB CI_RECORD_DEPS_INCLUDE_CHAIN CI_RECORD_DEPS_INCLUDE_COLLECTION "
        "CI_RECORD_DEPS_OUTPUT PYTEST_CURRENT_TEST PYTEST_TIMEOUT PYTEST_XDIST_WORKER RUN_AGENT_TESTS "
        "RUN_CUSTOM_TOKENIZERS RUN_EXPERT_PARALLEL_TESTS RUN_FLAKY RUN_FSDP_TESTS RUN_PIPELINE_TESTS RUN_SLOW "
        "RUN_TENSOR_PARALLEL_TESTS RUN_TRAINING_TESTS SKIP_CUDA_DOCTEST _INSIDE_SUB_PROCESS "
        "_PATCHED_TESTING_METHODS_OUTPUT_DIR"
    ),
    "DeepSpeed's multi-node starter, which is not used": "PDSH_RCMD_TYPE PDSH_SSH_ARGS_APPEND",
}  # fmt: skip
"""Variables that a library reads and the ranks keep, by the reason why they cannot change a training."""


def sources(library: str) -> Iterator[Path]:
    spec = find_spec(library)
    assert spec and spec.origin
    yield from Path(spec.origin).parent.rglob("*.py")


def constants(node: ast.expr, named: dict[str, str]) -> list[str]:
    """The strings that an expression stands for: itself, a name of one, or a list of them."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.Name):
        return [named[node.id]] if node.id in named else []
    if isinstance(node, ast.List | ast.Tuple):
        return [text for item in node.elts for text in constants(item, named)]
    return []


def variables_read_by(path: Path) -> set[str]:
    """Names of environment variables in a Python file: of os.environ, os.getenv and the library's helpers."""
    text = path.read_text(errors="replace")
    if "env" not in text.lower():
        return set()
    tree = ast.parse(text)
    named = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found: list[str] = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and node.args
            and READS.search(ast.unparse(node.func).partition("(")[0])
        ):
            found += constants(node.args[0], named)
        elif isinstance(node, ast.Subscript) and "environ" in ast.unparse(node.value):
            found += constants(node.slice, named)
        elif isinstance(node, ast.Compare) and any(
            "environ" in ast.unparse(c) for c in node.comparators
        ):
            found += constants(node.left, named)
    return {name for name in found if re.fullmatch(r"[A-Z_][A-Z0-9_]*", name)}


def variables_of(library: str) -> set[str]:
    """Every variable that a library reads, found in its sources; torchrun's options are PET_<OPTION>."""
    found = {name for path in sources(library) for name in variables_read_by(path)}
    if library == "torch.distributed":
        from torch.distributed.run import get_args_parser

        options = [
            o for a in get_args_parser()._actions for o in a.option_strings if o.startswith("--")
        ]
        found |= {f"PET_{option.lstrip('-').upper().replace('-', '_')}" for option in options}
    return found


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_variable_that_a_library_reads_is_cleared_or_harmless(library: str) -> None:
    """A new release that reads a new variable turns this red, until somebody has said which it is."""
    harmless = {name for names in HARMLESS.values() for name in names.split()}
    found = variables_of(library)
    assert len(found) > 20, "the sources were not read"
    assert not {name for name in found if not is_cleared(name)} - harmless - KEPT_FAMILIES
    assert not {name for name in harmless if is_cleared(name)}


KEPT_FAMILIES = {
    "PYTORCH_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK", "PYTORCH_ROCM_ARCH", "TORCH_CUDA_ARCH_LIST",
    "TORCH_DISTRIBUTED_DEBUG", "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS", "TRANSFORMERS_VERBOSITY",
}  # fmt: skip
"""Of families that are cleared: logs, the allocator, the flight recorder, for which GPUs kernels are built."""


def test_what_reaches_the_ranks_is_recorded() -> None:
    """Cleared ones are named, kept ones of the libraries have their values; the command's own come last."""
    given = {"PET_NNODES": "4", "NCCL_DEBUG": "INFO", "HOME": "/root", "RANK": "3", "OMP_NUM_THREADS": "9",
             "TORCH_HOME": "/cache", "WANDB_MODE": "offline"}  # fmt: skip
    assert cleared_names(given) == ["PET_NNODES", "RANK"]
    assert list(kept_variables(given)) == [
        "NCCL_DEBUG",
        "OMP_NUM_THREADS",
        "TORCH_HOME",
        "WANDB_MODE",
    ]
    started = launch_environment(given, {"OMP_NUM_THREADS": "1", "RANK": "0"})
    assert started == {"NCCL_DEBUG": "INFO", "HOME": "/root", "OMP_NUM_THREADS": "1", "RANK": "0",
                       "TORCH_HOME": "/cache", "WANDB_MODE": "offline"}  # fmt: skip
