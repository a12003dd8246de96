"""Every Triton kernel once at a small, uneven size: what compute-sanitizer runs. On a CPU, in Triton's interpreter."""

from __future__ import annotations

import torch

from densecl_ops import MomentumQueue
from densecl_ops.functional import dense_correspondence, dense_info_nce


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.bfloat16, torch.float32):
        queue = MomentumQueue(300, 40, init="empty", dtype=dtype).to(device)
        queue.enqueue(torch.randn(270, 40, device=device))
        for temperature in (0.2, 0.01):
            query, key = (torch.randn(3, 40, 5, 7, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
            match = dense_correspondence(query, key, mutual=True, backend="triton")
            negatives = queue.rows.detach().requires_grad_()
            for bank in (queue, negatives):
                own = torch.tensor([1, 70, 200], device=device)
                loss, _ = dense_info_nce(
                    query, key, bank, match, temperature=temperature, exclude=own, return_rank=True, backend="triton"
                )
                loss.backward()  # type: ignore[no-untyped-call]
        plain = torch.randn(3, 64, 49, device=device, dtype=dtype, requires_grad=True)  # the tile without any mask
        dense_info_nce(plain, plain.detach(), MomentumQueue(300, 64).to(device), backend="triton").backward()  # type: ignore[no-untyped-call]
        wide = torch.randn(2, 40, 13, 11, device=device, dtype=dtype)
        dense_correspondence(wide, wide, mutual=True, backend="triton")
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
