#!/usr/bin/env bash
# jsonargparse reads "1" for `Optional[Union[int, float]]` as 1 or as 1.0, by what *another* library annotated before.
#
# `typing` keeps types that it has made, and finds Union[float, int] equal to Union[int, float] (the order does not count
# for equality), so the second of two libraries in a process gets the first one's order. jsonargparse tries the members
# of a union in their order. In Lightning's Trainer, `limit_val_batches=1` is one batch and 1.0 is all of them.
# Expected by a reader of the annotation: 1 in both lines. Seen: 1, then 1.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jsonargparse[signatures]==4.53.0"
cat > "$work/read.py" <<'PYTHON'
import sys
from typing import Optional, Union

from jsonargparse import ArgumentParser

if "after" in sys.argv:
    Optional[Union[float, int]]  # what some other library says of some other argument


class Trainer:
    def __init__(self, limit: Optional[Union[int, float]] = None):
        pass


parser = ArgumentParser()
parser.add_class_arguments(Trainer, "trainer")
print(repr(parser.parse_args(["--trainer.limit=1"]).trainer.limit))
PYTHON
seen="$("$work/venv/bin/python" "$work/read.py") $("$work/venv/bin/python" "$work/read.py" after)"
echo "jsonargparse 4.53.0, $("$work/venv/bin/python" -V): $seen"
[ "$seen" = "1 1.0" ] || { echo "the behaviour has changed"; exit 1; }
