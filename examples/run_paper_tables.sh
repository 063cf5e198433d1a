#!/usr/bin/env bash
# The tables of the paper, where data and weights are at hand: EditAR and the systems it is compared with, scored here,
# beside the published rows. Each stage may be stopped and started again, and goes on where it was.
# One: bash examples/run_paper_tables.sh depth
# All: bash examples/run_paper_tables.sh
# Each is written to $RUNS/<table>/report.md. What has no Hub id is read from these folders:
set -euo pipefail
MODEL=${MODEL:-editar}                                       # what `editar-hf convert` wrote
LPIPS=${LPIPS:-lpips}                                        # what `editar-hf convert-metric-model` wrote
INCEPTION=${INCEPTION:-fid-inception}                        # the same
PIE_BENCH=${PIE_BENCH:-PIE-Bench_v1}                         # as its authors share it
CONTROLNET_PP=${CONTROLNET_PP:-reward_controlnet}            # limingcv/reward_controlnet, downloaded
RUNS=${RUNS:-runs}

pie-bench() {
    run=(editar-hf evaluate run --lpips-model "$LPIPS")
    "${run[@]}" --task pie-bench --source "$PIE_BENCH" --model "$MODEL" --dtype bfloat16 \
        --output-dir "$RUNS/pie-bench/editar"
    "${run[@]}" --data "$RUNS/pie-bench/editar/data" --system instruct-pix2pix --dtype float16 \
        --output-dir "$RUNS/pie-bench/instruct-pix2pix"
    editar-hf evaluate report "$RUNS"/pie-bench/{editar,instruct-pix2pix} --output-dir "$RUNS/pie-bench"
}

translation() {  # TASK CONTROLNET CONTROLNET++
    run=(editar-hf evaluate run --inception-model "$INCEPTION")
    # ControlNet++'s evaluation takes 20 steps with both.
    diffusion=(--data "$RUNS/$1/editar/data" --system controlnet --num-inference-steps 20 --dtype float16)
    "${run[@]}" --task "$1" --model "$MODEL" --dtype bfloat16 --output-dir "$RUNS/$1/editar"
    "${run[@]}" "${diffusion[@]}" --controlnet "$2" --output-dir "$RUNS/$1/controlnet"
    "${run[@]}" "${diffusion[@]}" --controlnet "$3" --output-dir "$RUNS/$1/controlnet++"
    editar-hf evaluate report "$RUNS/$1"/{editar,controlnet,controlnet++} --output-dir "$RUNS/$1"
}

depth() {
    translation depth lllyasviel/control_v11f1p_sd15_depth "$CONTROLNET_PP/checkpoints/depth/controlnet"
}

canny() {
    translation canny lllyasviel/control_v11p_sd15_canny "$CONTROLNET_PP/checkpoints/canny/controlnet"
}

segmentation() {
    translation segmentation lllyasviel/control_v11p_sd15_seg "$CONTROLNET_PP/checkpoints/cocostuff/reward_5k"
}

for table in ${*:-pie-bench depth canny segmentation}; do
    "$table"
done
