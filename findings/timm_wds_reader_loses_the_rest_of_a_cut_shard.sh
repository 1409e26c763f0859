#!/usr/bin/env bash
# timm's reader of WebDataset shards ends a cut shard with a line in the log, and does not evaluate each image once.
#
# A shard that is cut in the middle (a download that broke off) gives the images before the cut; the rest is missing
# from the evaluation without an error. Where two processes evaluate whole shards, each takes ceil(n / 2) images of its
# own: the one with more leaves the last ones out, the one with fewer begins again. Expected: an error, and each image
# once (timm's map-style readers are shared by a sampler that repeats at most one image).
# Seen with timm 1.0.31, webdataset 1.0.2 and torch 2.14.1 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "timm==1.0.31" "webdataset==1.0.2" "torch==2.14.1" "torchvision==0.29.1" "numpy==2.4.6"
cd "$work"
cat > read.py <<'PYTHON'
import io, logging, sys, tarfile

import torch.distributed as dist
from PIL import Image
from timm.data.readers import create_reader

logging.disable(logging.CRITICAL)


def shard(name, numbers):
    """Image n is grey n and of class n."""
    with tarfile.open(name, "w") as tar:
        for number in numbers:
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (number,) * 3).save(file, "PNG")
            for ending, content in (("png", file.getvalue()), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"{number:03}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def evaluated():
    reader = create_reader("wds/", root=".", split="shard-{0..1}.tar|10")
    return [target for _, target in reader]


if len(sys.argv) > 1:
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
    print(f"process {rank + 1} of 2: {evaluated()}", flush=True)
    dist.destroy_process_group()
else:
    shard("shard-0.tar", range(7))
    shard("shard-1.tar", range(7, 10))
    print(f"whole: {evaluated()}")
    content = open("shard-0.tar", "rb").read()
    open("shard-0.tar", "wb").write(content[:5500])
    print(f"cut: {evaluated()}")
    open("shard-0.tar", "wb").write(content)
PYTHON
python="$work/venv/bin/python"
"$python" read.py > alone.txt
"$python" read.py 0 "$work/rendezvous" > first.txt & "$python" read.py 1 "$work/rendezvous" > second.txt
wait
seen=$(cat alone.txt first.txt second.txt)
echo "timm 1.0.31, webdataset 1.0.2, torch 2.14.1, $("$python" -V)"
echo "$seen"
expected="whole: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
cut: [0, 1, 7, 8, 9]
process 1 of 2: [0, 1, 2, 3, 4]
process 2 of 2: [7, 8, 9, 7, 8]"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
