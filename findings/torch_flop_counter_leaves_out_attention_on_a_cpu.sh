#!/usr/bin/env bash
# PyTorch's FlopCounterMode counts nothing for `scaled_dot_product_attention` on a CPU, nor for matrix times vector.
#
# The kernel that a CPU uses for attention is not among those that it knows, nor is `mv`; it says nothing and counts 0.
# Expected: what the same products count when they are written as matrix products, 4 * heads * n^2 * d and 2 * n * d. So
# the count of a transformer on a CPU is too small, and what a method saves in its attention is not seen.
# Seen with torch 2.14.1 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "numpy==2.4.6"
cd "$work"
seen=$("$work/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


q = torch.randn(1, 2, 10, 8)
matrix, vector = torch.randn(10, 8), torch.randn(8)
same = torch.allclose(F.scaled_dot_product_attention(q, q, q), (q @ q.mT / 8**0.5).softmax(-1) @ q, atol=1e-5)
print("torch", torch.__version__.split("+")[0], "equal outputs", same)
print("attention", counted(lambda: F.scaled_dot_product_attention(q, q, q)), "as products", counted(lambda: (q @ q.mT / 8**0.5).softmax(-1) @ q))
print("matrix times vector", counted(lambda: matrix @ vector), "times a column", counted(lambda: matrix @ vector[:, None]))
PYTHON
)
echo "$seen"
expected="torch 2.14.1 equal outputs True
attention 0 as products 6400
matrix times vector 0 times a column 160"
[ "$seen" = "$expected" ] || { echo "changed: expected"; echo "$expected"; exit 1; }
