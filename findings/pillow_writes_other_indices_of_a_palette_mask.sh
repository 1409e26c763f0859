#!/usr/bin/env bash
# A palette mask with the usual 255 of pixels to ignore holds another class there once Pillow has written it as PNG.
#
# The image has as many colours as there are classes, and one pixel of index 255, which the image in memory keeps. The
# file gets as few bits a pixel as the palette needs, and 255 is cut to them: 3 for up to four colours, 15 for up to
# sixteen, without a word; such a value may be a class. Expected: 255 is read back, or writing it is refused.
# Seen with pillow 13.0.0 and numpy 2.4.6 on Python 3.11, 2026-11-29.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "pillow==13.0.0" "numpy==2.4.6"
cd "$work"
seen=$("$work/venv/bin/python" -W ignore - <<'PYTHON'
from io import BytesIO

import numpy as np
from PIL import Image

for colours in (3, 12, 21):
    mask = Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8))
    mask.putpalette([value for index in range(colours) for value in (index, 0, 0)])
    file = BytesIO()
    mask.save(file, "PNG")
    print(f"{colours} colours: {np.asarray(mask).tolist()} is written as {np.asarray(Image.open(file)).tolist()}")
PYTHON
)
echo "pillow 13.0.0, numpy 2.4.6, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="3 colours: [[0, 1, 2, 255]] is written as [[0, 1, 2, 3]]
12 colours: [[0, 1, 2, 255]] is written as [[0, 1, 2, 15]]
21 colours: [[0, 1, 2, 255]] is written as [[0, 1, 2, 255]]"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
