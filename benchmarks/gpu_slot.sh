#!/usr/bin/env bash
# On a bare GPU machine without a network: install the wheels of `make wheels` apart from what is there, then run
# gpu_slot.py, which says what it takes. Results go to $OUT, or to runs/gpu-slot.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
site=/tmp/editar-hf-site

if compgen -G "$wheels/*.whl" > /dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$wheels"/*.whl
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONPATH="$PWD/src:$site${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" benchmarks/gpu_slot.py --output_dir "${OUT:-runs/gpu-slot}" "$@"
