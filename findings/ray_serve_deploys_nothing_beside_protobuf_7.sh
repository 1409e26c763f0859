#!/usr/bin/env bash
# Ray Serve up to 2.56.0 deploys nothing beside protobuf 7, which its own metadata admits (protobuf>=3.20.3).
#
# Its controller asks a field for `label`, which protobuf 7 no longer has: `serve.run` fails for every deployment. Other
# packages admit protobuf 7, too, or ask for it (grpcio-reflection 1.85.1 for 7.35.1 or newer), so that pip brings both
# together without a word. Ray 2.56.1 asks in another way.
# Expected: a deployment, or a requirement of protobuf below 7.
# Seen with ray 2.56.0 and 2.56.1 and protobuf 7.36.2 on Python 3.11, 2026-11-30.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/deploy.py" <<'PYTHON'
import logging
import re

import ray
from ray import serve


@serve.deployment
class Double:
    def __call__(self, number):
        return 2 * number


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
try:
    print(serve.run(Double.bind()).remote(21).result())
except Exception as error:
    print(re.findall(r"AttributeError: .*", str(error))[-1])
finally:
    ray.shutdown()
PYTHON
cd "$work"
seen=""
for version in 2.56.0 2.56.1; do
    "${PYTHON:-python3}" -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "ray[serve]==$version" "protobuf==7.36.2"
    seen+="ray $version: $("$work/$version/bin/python" -W ignore deploy.py 2> /dev/null | tail -n 1)"$'\n'
done
echo "protobuf 7.36.2, $("$work/2.56.1/bin/python" -V)"
echo "$seen"
expected="ray 2.56.0: AttributeError: 'google._upb._message.FieldDescriptor' object has no attribute 'label'
ray 2.56.1: 42
"
[ "$seen" = "$expected" ] || { printf 'changed: expected\n%s\n' "$expected"; exit 1; }
