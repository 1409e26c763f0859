#!/usr/bin/env bash
# Without gradients, `F.linear` in bfloat16 on a CPU copies the weight once for each token if the tokens were transposed.
#
# OpenCLIP's blocks give `nn.MultiheadAttention` tokens (batch, tokens, width), which it transposes to (tokens, batch,
# width) before its first product. That is not contiguous, and without a gradient anywhere PyTorch makes a batched product
# of it, with the weight expanded to the number of tokens; in bfloat16 the expanded weight is copied: 697 MB for 197
# tokens of ViT-B/16. Expected: as fast as the product of the same tokens laid out one after the other, as it is where the
# weight requires a gradient. So a frozen CLIP in bfloat16 is several times slower on a CPU than the same that is trained.
# Seen with torch 2.14.1 on Python 3.11 and an AMD EPYC with AVX-512 BF16, one thread, 2026-11-30.
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

torch.set_num_threads(1)
tokens = torch.randn(4, 197, 768, dtype=torch.bfloat16)
weight, bias = torch.randn(2304, 768, dtype=torch.bfloat16), torch.randn(2304, dtype=torch.bfloat16)
transposed = tokens.transpose(0, 1)
trained = torch.nn.Parameter(weight.clone())
CASES = {
    "transposed": lambda: F.linear(transposed, weight, bias),
    "contiguous": lambda: F.linear(transposed.contiguous(), weight, bias),
    "transposed, weight requires a gradient": lambda: F.linear(transposed, trained, bias),
}
seconds = {case: [] for case in CASES}
for turn in range(5):  # in turns; the first warms up
    for case, run in CASES.items():
        start = time.process_time()
        run()
        seconds[case].append(time.process_time() - start)
median = {case: statistics.median(found[1:]) for case, found in seconds.items()}
print("torch", torch.__version__.split("+")[0], torch.backends.cpu.get_cpu_capability())
for case, found in median.items():
    print(f"{case}: {found / median['contiguous']:.1f} times as long as contiguous")
if median["transposed"] < 5 * median["contiguous"] or median["transposed, weight requires a gradient"] > 3 * median["contiguous"]:
    sys.exit("changed: expected the first above 5, and the last below 3")
PYTHON
