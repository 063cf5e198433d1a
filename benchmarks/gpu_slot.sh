#!/usr/bin/env bash
# On a bare GPU machine without a network: unpack what `make wheels` packed, apart from what is installed there, and run
# gpu_slot.py, which says what it takes. Results go to $OUT, or to runs/gpu-slot.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
archive=${LIBRARIES:-.whl/site.tar.xz}
site=/tmp/editar-hf-site

if [ -e "$archive" ]; then
    mkdir -p "$site"
    # Machines without xz have Python's module, as a rule.
    tar -C "$site" -xJf "$archive" || "$python" -m tarfile -e "$archive" "$site"
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONPATH="$PWD/src:$site${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" benchmarks/gpu_slot.py --output_dir "${OUT:-runs/gpu-slot}" "$@"
