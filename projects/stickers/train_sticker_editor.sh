#!/usr/bin/env bash
# Make the sticker editor in projects/stickers, stage by stage, on two CPU cores. A stage that was stopped continues where
# it stopped.
# All stages: bash projects/stickers/train_sticker_editor.sh
# One stage: bash projects/stickers/train_sticker_editor.sh vq_model
set -euo pipefail
cd "$(dirname "$0")/../.."
RUNS=${RUNS:-runs}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
# The process keeps freed memory. To request it again from the system takes a large part of a training step on a CPU.
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184

data() {
    python projects/stickers/make_sticker_edits.py --output-dir "$RUNS/stickers" --resolution 64 --seed 0 \
        --num-train 160000 --num-validation 1600 --num-test 500 --num-workers 2
    python projects/stickers/make_sticker_edits.py --output-dir "$RUNS/more-stickers" --resolution 64 --seed 1 \
        --num-train 30000 --num-validation 0 --num-test 0 --shares 0.4 0.1 0.25 0.05 0.1 --num-workers 2
}

train_vq_model() {
    python examples/train_vq.py --dataset "$RUNS/stickers" --split "train[:50000]" --validation-split validation \
        --image-columns source_image,target_image --resolution 64 --output-dir "$RUNS/vq-model" \
        --num-embeddings 4096 --latent-channels 64 --base-channels 32 --channel-multipliers 1 1 2 4 \
        --num-res-blocks 1 --norm-num-groups 2 --batch-size 32 --learning-rate 1e-3 --warmup-steps 100 \
        --weight-decay 0.01 --dead-code-patience 20 --mixed-precision bf16 --evaluation-steps 250 \
        --checkpointing-steps 500 --resume-from-checkpoint latest "$@"
}

# The second part sharpens shapes. Without the larger weight, faint texture dominates the loss.
vq_model() {
    train_vq_model --max-steps 4500
    train_vq_model --max-steps 6000 --squared-error-weight 20
}

# Continue with the decoder half of the VQ model alone. The tokens do not change.
decoding() {
    python examples/train_vq.py --model "$RUNS/vq-model/vq_model" --freeze-codes --dataset "$RUNS/stickers" \
        --split "train[:50000]" --validation-split validation --image-columns source_image,target_image \
        --resolution 64 --output-dir "$RUNS/vq-model-decoding" --batch-size 32 --learning-rate 5e-4 \
        --warmup-steps 50 --weight-decay 0.01 --squared-error-weight 50 --mixed-precision bf16 --max-steps 1500 \
        --evaluation-steps 250 --checkpointing-steps 500 --resume-from-checkpoint latest
}

encode() {
    python examples/precompute_tokens.py --dataset "$1" --split "$2" --vq-model "$RUNS/vq-model/vq_model" \
        --output-dir "$3" --resolution 64 --dtype "$4"
}

tokens() {
    encode "$RUNS/stickers" validation "$RUNS/tokens" bfloat16
    encode "$RUNS/stickers" train "$RUNS/tokens" bfloat16
    encode "$RUNS/more-stickers" train "$RUNS/more-tokens" float32
}

train_editor() {
    python examples/train_editar.py --validation-dataset "$RUNS/tokens" \
        --train-text-encoder --edit-region-weight 6 --optimizer muon --muon-learning-rate 3e-3 --learning-rate 1e-3 \
        --lr-warmup-steps 50 --mixed-precision bf16 --compile --attn-implementation eager \
        --num-validation-batches 8 --resume-from-checkpoint latest "$@"
}

# Four stages. 1: small batches. 2: larger batches, in which some pairs show the decoder unedited tokens; the learning
# rate falls from step 1,500 on. 3: the same from the weights rounded to bfloat16, with two thirds of the learning rate,
# which falls from the start. 4: half of the learning rate, on new pairs, most of them of the operations that fail most
# often; in float32, which was faster on that machine.
editor() {
    [ -d "$RUNS/untrained" ] || python projects/stickers/create_sticker_editor.py \
        --vq-model "$RUNS/vq-model-decoding/vq_model" --dataset "$RUNS/stickers/train-00000*.parquet" \
        --output-dir "$RUNS/untrained"
    train_editor --dataset "$RUNS/tokens" --model "$RUNS/untrained" --output-dir "$RUNS/editor-small-batches" \
        --batch-size 32 --max-train-steps 2000 --checkpointing-steps 1000 --validation-steps 2000
    large_batches=(--batch-size 64 --checkpointing-steps 500 --validation-steps 1000)
    first=("${large_batches[@]}" --dataset "$RUNS/tokens" --model "$RUNS/editor-small-batches/pipeline"
        --output-dir "$RUNS/editor-first")
    train_editor "${first[@]}" --max-train-steps 500
    train_editor "${first[@]}" --max-train-steps 1500 --target-token-dropout 0.3
    train_editor "${first[@]}" --max-train-steps 4200 --target-token-dropout 0.3 --lr-scheduler linear
    large_batches+=(--target-token-dropout 0.3 --lr-scheduler linear)
    [ -d "$RUNS/editor-rounded" ] || ship_pipeline "$RUNS/editor-first/pipeline" "$RUNS/editor-rounded"
    train_editor "${large_batches[@]}" --dataset "$RUNS/tokens" --model "$RUNS/editor-rounded" \
        --output-dir "$RUNS/editor-second" --max-train-steps 5200 --muon-learning-rate 2e-3 --learning-rate 7e-4
    [ -d "$RUNS/editor-rounded-again" ] || ship_pipeline "$RUNS/editor-second/pipeline" "$RUNS/editor-rounded-again"
    train_editor "${large_batches[@]}" --dataset "$RUNS/more-tokens" --model "$RUNS/editor-rounded-again" \
        --output-dir "$RUNS/editor" --max-train-steps 600 --muon-learning-rate 1.5e-3 --learning-rate 5e-4 \
        --lr-warmup-steps 30 --mixed-precision no --checkpointing-steps 100 --validation-steps 600
}

ship_pipeline() {
    python projects/stickers/ship_sticker_editor.py --model "$1" --output-dir "$2" \
        --guidance-scale 1.5 --temperature 0.3
}

# This guidance scale has the most edits done on validation samples. At this temperature, seeds give different results,
# and sampling costs less than two points.
ship() {
    ship_pipeline "$RUNS/editor/pipeline" projects/stickers/sticker-editor
    python projects/stickers/show_sticker_edits.py --model projects/stickers/sticker-editor \
        --output projects/stickers/sticker-edits.png
}

figures() {
    python projects/stickers/evaluate_sticker_editor.py --model projects/stickers/sticker-editor \
        --dataset "$RUNS/stickers" --output "$RUNS/figures.json" \
        --settings greedy-1.5 sampled-1.5-0.3 sampled-1.5 greedy-1 greedy-3 greedy-7.5
}

for stage in ${*:-data vq_model decoding tokens editor ship figures}; do
    "$stage"
done
