#!/usr/bin/env bash
# On a CPU, the backward pass of PyTorch's fused attention takes three times as long in bfloat16 as in float32 when
# images have few tokens (65), and three times as long as that of the same attention written as products.
#
# Expected: bfloat16 is no slower (matrix products of this size are twice as fast in it on a CPU with AVX-512 BF16), and
# the fused kernel is the better one. The forward pass is as expected, so it does not show in inference. A training step
# of a ViT-S/14 at 112 pixels under autocast spends a quarter of its time there; `TIMM_FUSED_ATTN=0` has timm's
# attention written as products.
# Seen with torch 2.14.1 on Python 3.11 and an AMD EPYC with AVX-512 BF16, one thread, 2026-11-30: per token count
# the ratios were 3.1 and 2.7 to 3.6 (65), 1.2 to 1.4 and 1.1 to 1.4 (197), 1.1 to 1.3 and 0.9 to 1.0 (577).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "numpy==2.4.6"
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.set_num_threads(1)
CASES = {
    "fused, bfloat16": (torch.bfloat16, SDPBackend.FLASH_ATTENTION),
    "fused, float32": (torch.float32, SDPBackend.FLASH_ATTENTION),
    "products, bfloat16": (torch.bfloat16, SDPBackend.MATH),
}


def backward_seconds(tokens, dtype, backend):
    q, k, v = (torch.randn(1040 // tokens, 6, tokens, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v)
        start = time.process_time()
        out.backward(torch.ones_like(out))
        return time.process_time() - start


print("torch", torch.__version__.split("+")[0], torch.backends.cpu.get_cpu_capability())
ratios = {}
for tokens in (65, 197, 577):
    seconds = {case: [] for case in CASES}
    for turn in range(12):  # in turns; the first two warm up
        for case, (dtype, backend) in CASES.items():
            seconds[case].append(backward_seconds(tokens, dtype, backend))
    fused, float32, products = (statistics.median(found[2:]) for found in seconds.values())
    ratios[tokens] = fused / float32, fused / products
    print(f"{tokens} tokens: fused bfloat16 / fused float32 {fused / float32:.1f}, / products in bfloat16 {fused / products:.1f}")
if min(ratios[65]) < 1.5:
    sys.exit("changed: expected both ratios of 65 tokens above 1.5")
PYTHON
