#!/usr/bin/env bash
# Run gpu_slot.py on a GPU machine without a network. First, the libraries that `make wheels` packed are unpacked to a
# folder of their own. gpu_slot.py describes the options. Results go to $OUT, or to runs/gpu-slot.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
archive=${LIBRARIES:-.whl/site.tar.xz}
site=/tmp/editar-hf-site

if [ -e "$archive" ]; then
    mkdir -p "$site"
    # Most machines without xz have Python's lzma module.
    tar -C "$site" -xJf "$archive" || "$python" -m tarfile -e "$archive" "$site"
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONPATH="$PWD/src:$site${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" benchmarks/gpu_slot.py --output_dir "${OUT:-runs/gpu-slot}" "$@"
