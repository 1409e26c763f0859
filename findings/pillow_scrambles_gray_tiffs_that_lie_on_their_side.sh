#!/usr/bin/env bash
# An uncompressed gray or palette TIFF whose orientation says that it lies on its side is scrambled by Pillow.
#
# Opened by its path it is mapped into memory with the sides that the image will have once it is upright, so that its
# rows are cut at the wrong places, and what is shown is lying and has lost its flag. Compressed, in colours, or opened
# from a file object the same image is right. Expected: the image upright, as everywhere else.
# Seen with pillow 13.0.0 and numpy 2.4.6 on Python 3.11, 2026-11-30.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "pillow==13.0.0" "numpy==2.4.6"
cd "$work"
seen=$("$work/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
from PIL import Image

levels = np.arange(32, dtype=np.uint8).reshape(4, 8)
upright = np.rot90(levels, -1)  # orientation 6: to be turned clockwise
exif = Image.Exif()
exif[0x0112] = 6
for mode in ("L", "I;16", "P", "RGB"):
    image = Image.fromarray(levels.astype(np.uint16) if mode == "I;16" else levels)
    if mode == "P":
        image.putpalette([value for level in range(256) for value in (level,) * 3])
    elif mode == "RGB":
        image = image.convert("RGB")
    for compression in (None, "tiff_lzw"):
        image.save("a.tif", exif=exif, compression=compression)
        with open("a.tif", "rb") as file:
            found = []
            for source in ("a.tif", file):
                with Image.open(source) as opened:
                    pixels = np.asarray(opened)
                    pixels = pixels[..., 0] if mode == "RGB" else pixels
                    found.append("right" if np.array_equal(pixels, upright) else f"wrong, of size {opened.size}")
        print(f"{mode}, {compression}: by path {found[0]}, by file object {found[1]}")
PYTHON
)
echo "pillow 13.0.0, numpy 2.4.6, $("$work/venv/bin/python" -V)"
echo "$seen"
expected="L, None: by path wrong, of size (8, 4), by file object right
L, tiff_lzw: by path right, by file object right
I;16, None: by path wrong, of size (8, 4), by file object right
I;16, tiff_lzw: by path right, by file object right
P, None: by path wrong, of size (8, 4), by file object right
P, tiff_lzw: by path right, by file object right
RGB, None: by path right, by file object right
RGB, tiff_lzw: by path right, by file object right"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
