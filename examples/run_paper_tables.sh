#!/usr/bin/env bash
# Reproduce the tables of the paper. This script runs and scores EditAR and the systems that it is compared with, and
# shows the published rows in the same tables. You need the data and the weights. You can stop the script at any time; if
# you start it again, it continues where it stopped.
# One table: bash examples/run_paper_tables.sh depth
# All tables: bash examples/run_paper_tables.sh
# The reports are $RUNS/<table>/report.md. Files without a Hub id are read from these paths:
set -euo pipefail
MODEL=${MODEL:-editar}                                       # the output of `editar-hf convert`
LPIPS=${LPIPS:-lpips}                                        # squeezenet1_1-b8a52dc0.pth and squeeze.pth
INCEPTION=${INCEPTION:-pt_inception-2015-12-05-6726825d.pth}
PIE_BENCH=${PIE_BENCH:-PIE-Bench_v1}                         # as its authors published it
CONTROLNET_PP=${CONTROLNET_PP:-reward_controlnet}            # limingcv/reward_controlnet, downloaded
RUNS=${RUNS:-runs}

pie-bench() {
    data=(--benchmark pie-bench --source "$PIE_BENCH")
    editar-hf evaluate run "${data[@]}" --model "$MODEL" --dtype bfloat16 --lpips-model "$LPIPS" \
        --output-dir "$RUNS/pie-bench/editar"
    python examples/baselines/instruct_pix2pix.py "${data[@]}" --dtype float16 \
        --output-dir "$RUNS/pie-bench/instruct-pix2pix"
    editar-hf evaluate score "${data[@]}" --lpips-model "$LPIPS" --output-dir "$RUNS/pie-bench/instruct-pix2pix"
    editar-hf evaluate report "$RUNS"/pie-bench/{editar,instruct-pix2pix} --output-dir "$RUNS/pie-bench"
}

translation() {  # BENCHMARK CONTROLNET CONTROLNET++
    editar-hf evaluate run --benchmark "$1" --model "$MODEL" --dtype bfloat16 --inception-model "$INCEPTION" \
        --output-dir "$RUNS/$1/editar"
    draw "$1" "$2" controlnet
    draw "$1" "$3" controlnet++
    editar-hf evaluate report "$RUNS/$1"/{editar,controlnet,controlnet++} --output-dir "$RUNS/$1"
}

draw() {  # BENCHMARK CONTROLNET NAME
    python examples/baselines/controlnet.py --benchmark "$1" --controlnet "$2" --dtype float16 \
        --output-dir "$RUNS/$1/$3"
    editar-hf evaluate score --benchmark "$1" --inception-model "$INCEPTION" --output-dir "$RUNS/$1/$3"
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
