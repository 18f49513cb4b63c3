"""Which environment variables reach the ranks: none through which a library would train something else.

A recipe says what is trained. The libraries also read variables: accelerate takes gradient accumulation
from one, torchrun every option, transformers how weights are loaded. Such variables are taken away from the
launcher and its ranks; what is left (caches, credentials, network, logs) is recorded with the attempt.
`tests/launchers/test_environment.py` finds the variables in the libraries' sources. Pure.
"""

from collections.abc import Mapping

_CLEARED_PREFIXES = (
    "ACCELERATE_",
    "AZUREML_",
    "AZ_BATCH",
    "CROSS_",
    "DCP_",
    "DEEPSPEED_",
    "DLTS_",
    "DLWS_",
    "DS_",
    "FSDP_",
    "GROUP_",
    "HYDRA_",
    "MPI_",
    "MV2_COMM_",
    "OMPI_",
    "PARALLELISM_CONFIG_",
    "PET_",
    "PMIX_",
    "PMI_",
    "ROLE_",
    "SM_",
    "SMDATAPARALLEL_",
    "TORCHCOMM",
    "TORCHDYNAMO_",
    "TORCHELASTIC_",
    "TORCHINDUCTOR_",
    "TORCH_",
    "TRANSFORMERS_",
    "PYTORCH_",
    "XLA_",
)
"""Variables of these families are cleared, unless `_KEPT` names them: new ones come with every release."""

_CLEARED = frozenset({
    "ASCEND_HOME_PATH", "CUDA_LAUNCH_BLOCKING", "DEEPSPEED_USE_HPU", "FLASH_ATTENTION_DETERMINISTIC",
    "FORK_LAUNCHED", "GLOO_DEVICE_TRANSPORT", "HCCL_DETERMINISTIC", "HF_DEACTIVATE_ASYNC_LOAD",
    "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "LOGLEVEL", "MASTER_ADDR", "MASTER_PORT",
    "MAST_HPC_JOB_NAME", "MKL_SERVICE_FORCE_INTEL", "MORI_ENABLE_SDMA", "NODE_RANK", "NPROC",
    "NPU_FA2_SPARSE_MODE", "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "PJRT_DEVICE",
    "PT_HPU_ENABLE_REFINE_DYNAMIC_SHAPES", "PT_HPU_LAZY_ACC_PAR_MODE", "PT_HPU_LAZY_MODE",
    "PYTHONINSPECT", "PYTHONOPTIMIZE", "PYTHONSTARTUP", "PYTHONWARNINGS", "PYTHON_EXEC", "RANK",
    "RPC_INIT_WITH_TCP", "SAGEMAKER_JOB_NAME", "TPU_NAME", "TRUST_REMOTE_CODE", "USE_HUB_KERNELS",
    "USE_JAX", "USE_LIBUV", "USE_MKL_GEMM", "USE_TF", "USE_TORCH", "USE_TORCH_XLA", "WORLD_SIZE",
    "XPU_EVENT_KL3_ENABLE",
})  # fmt: skip

_KEPT = frozenset({
    # caches
    "TORCH_EXTENSIONS_DIR", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRANSFORMERS_CACHE",
    "PYTORCH_KERNEL_CACHE_PATH",
    # the GPU's allocator, and for which GPUs kernels are built
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK", "PYTORCH_ROCM_ARCH",
    "TORCH_CUDA_ARCH_LIST",
    # what is logged
    "TORCHDYNAMO_VERBOSE", "TORCH_CPP_LOG_LEVEL", "TORCH_DISTRIBUTED_DEBUG", "TORCH_LOGS",
    "TORCH_SHOW_CPP_STACKTRACES", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "TRANSFORMERS_OFFLINE",
    "TRANSFORMERS_VERBOSITY",
    # threads that compile
    "TORCHINDUCTOR_COMPILE_THREADS",
    # the flight recorder, whose size an administrator may set
    "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE",
})  # fmt: skip
"""Exceptions from `_CLEARED_PREFIXES`: they cannot change what is computed."""

_RECORDED_PREFIXES = (
    *_CLEARED_PREFIXES,
    "ATEN_", "CCL_", "CUBLAS", "CUDA", "CUDNN", "DATASETS_", "DNNL_", "FI_", "GLOO_", "GOMP_", "HF_", "HSA_",
    "HUGGINGFACE_", "KMP_", "LD_", "MALLOC_", "MKL_", "NCCL_", "NVIDIA_", "NVTE_", "OMP_", "ONEDNN_",
    "OPENBLAS_", "PYTHON", "RCCL_", "ROCM_", "ROCR_", "TOKENIZERS_", "TRITON_", "UCX_", "WANDB_",
)  # fmt: skip
"""Families of variables that libraries of a training read; what of them is set is recorded."""
_NEVER_RECORDED = frozenset({"PYTHONPATH"})
"""PYTHONPATH holds paths of the machine; the code itself is recorded."""


def is_cleared(name: str) -> bool:
    """Whether a variable of this name is taken away from the launcher and its ranks."""
    return name in _CLEARED or (name.startswith(_CLEARED_PREFIXES) and name not in _KEPT)


def cleared_names(environment: Mapping[str, str]) -> list[str]:
    """The variables of `environment` that are cleared, sorted."""
    return sorted(name for name in environment if is_cleared(name))


def kept_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that reach the ranks and that a library of a training may read, sorted by name."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(_RECORDED_PREFIXES)
        and not is_cleared(name)
        and name not in _NEVER_RECORDED
    }


def launch_environment(environment: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The environment of a launcher: the caller's without what is cleared, then the command's `own`."""
    return {**{k: v for k, v in environment.items() if not is_cleared(k)}, **own}
