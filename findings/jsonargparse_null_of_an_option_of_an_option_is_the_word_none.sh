#!/usr/bin/env bash
# `--model.head.words=null` gives the text "None", where `--model.words=null` gives None.
#
# jsonargparse parses an option of a class that is an option of a class (two steps deep) once, and hands the value on to
# the inner class as text made with Python's formatting, so that null becomes the word None. A number or null then
# refuses it, saying that null would do; a text or null takes it silently. In a configuration file, null is None at every
# depth. Expected: None in all four lines. Seen with jsonargparse 4.53.0 on Python 3.11, 2026-11-30.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jsonargparse[signatures]==4.53.0"
cd "$work"
cat > read.py <<'PYTHON'
from typing import Optional

from jsonargparse import ArgumentError, ArgumentParser


class Head:
    def __init__(self, words: Optional[str] = "a b", width: Optional[int] = 3):
        pass


class Model:
    def __init__(self, head: Head, words: Optional[str] = "a b"):
        pass


def read(*arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Model, "model")
    try:
        return parser.parse_args(["--model=Model", "--model.head=Head", *arguments]).model.init_args
    except ArgumentError:
        return "refused"


print(repr(read("--model.words=null").words))
print(repr(read("--model.head.words=null").head.init_args.words))
print(read("--model.head.width=null"))
print(repr(read('--model.head={"words": null, "width": null}').head.init_args.words))
PYTHON
seen=$("$work/venv/bin/python" read.py | paste -sd' ')
echo "jsonargparse 4.53.0, $("$work/venv/bin/python" -V): $seen"
[ "$seen" = "None 'None' refused None" ] || { echo "changed: expected None 'None' refused None"; exit 1; }
