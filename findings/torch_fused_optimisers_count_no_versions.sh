#!/usr/bin/env bash
# PyTorch's fused optimisers write to parameters without counting it: `_version` stays what it was.
#
# Expected: as with `foreach=True` and `foreach=False`, each step counts, because autograd finds out by these versions
# that a tensor was written to after it was saved for a backward pass. So a step between forward and backward, which is
# an error otherwise, gives gradients of other weights without a word, and what keeps results of weights is not told.
# Seen with torch 2.14.1 on Python 3.11, 2026-11-30.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "numpy==2.4.6"
cd "$work"
seen=$("$work/venv/bin/python" - <<'PYTHON'
import torch

print("torch", torch.__version__.split("+")[0])
for name in ("AdamW", "Adam", "SGD", "Adagrad"):
    moved, versions = [], []
    for how in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        getattr(torch.optim, name)([weight], lr=0.1, **how).step()
        moved.append(not torch.equal(weight.detach(), torch.ones(3)))
        versions.append("counted" if weight._version else "not counted")
    print(name, moved, versions)
for how in ({"fused": True}, {"foreach": True}):
    weight, x = torch.nn.Parameter(torch.ones(1)), torch.ones(1, requires_grad=True)
    y = weight * x  # dy/dx = 1
    weight.grad = torch.ones(1)
    torch.optim.SGD([weight], lr=0.5, **how).step()
    try:
        y.backward()
        print(how, "dy/dx =", x.grad.item())
    except RuntimeError as error:
        print(how, str(error)[:94])
PYTHON
)
echo "$seen"
expected="torch 2.14.1
AdamW [True, True, True] ['not counted', 'counted', 'counted']
Adam [True, True, True] ['not counted', 'counted', 'counted']
SGD [True, True, True] ['not counted', 'counted', 'counted']
Adagrad [True, True, True] ['not counted', 'counted', 'counted']
{'fused': True} dy/dx = 0.5
{'foreach': True} one of the variables needed for gradient computation has been modified by an inplace operation"
[ "$seen" = "$expected" ] || { echo "changed: expected"; echo "$expected"; exit 1; }
