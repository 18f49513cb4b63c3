"""What does a training process hold on a GPU outside torch's allocator, and from when?

    python benchmarks/outside_allocator.py

Prints one line per stage: the bytes in use on the device less those in use before this process, less what the
allocator has reserved. Nothing else may use the GPU meanwhile. One process: NCCL's buffers for a second rank
are not in it.
"""

import statistics

import torch
import torch.distributed as dist
from torch.nn import functional

MIB = 2**20


def held() -> int:
    """Bytes in use on the device that the allocator has not reserved."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def main() -> None:
    """Go through the stages of a training process."""
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    before = 0

    def tell(stage: str) -> None:
        nonlocal before
        now = held()
        print(f"{stage:<44} {now / MIB:8.0f} MiB  {(now - before) / MIB:+8.0f}", flush=True)
        before = now

    torch.cuda.init()
    x = torch.ones(256, 256, device="cuda", requires_grad=True)
    tell("context")
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(1, device="cuda"))
    tell("nccl, one rank")
    (x @ x).sum().backward()
    tell("fp32 matrix product and its backward")
    with torch.autocast("cuda", torch.bfloat16):
        (x @ x).float().sum().backward()
    tell("bf16 matrix product and its backward")
    q = torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    tell("attention and its backward")
    logits = torch.randn(64, 512, device="cuda", requires_grad=True)
    functional.cross_entropy(logits, torch.zeros(64, dtype=torch.long, device="cuda")).backward()
    tell("cross entropy and its backward")
    torch.optim.AdamW([x], fused=True).step()
    tell("fused AdamW")
    torch.nn.utils.clip_grad_norm_([x], 1.0)
    tell("clipping")
    print("median of ten readings", statistics.median(held() for _ in range(10)) / MIB)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
