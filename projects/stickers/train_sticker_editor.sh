#!/usr/bin/env bash
# Make the small checkpoint in examples/sticker-editor, stage by stage, on two CPU cores. Every stage may be stopped and
# started again, and goes on where it was. All stages: bash projects/stickers/train_sticker_editor.sh
# One of them: bash projects/stickers/train_sticker_editor.sh tokenizer
set -euo pipefail
cd "$(dirname "$0")/../.."
RUNS=${RUNS:-runs}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
# Freed memory stays with the process: asking the system for it anew is a good part of a step on a CPU.
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184

data() {
    python projects/stickers/make_sticker_edits.py --output_dir "$RUNS/stickers" --resolution 64 --seed 0 \
        --num_train 160000 --num_validation 1600 --num_test 500 --num_workers 2
    python projects/stickers/make_sticker_edits.py --output_dir "$RUNS/more-stickers" --resolution 64 --seed 1 \
        --num_train 30000 --num_validation 0 --num_test 0 --shares 0.4 0.1 0.25 0.05 0.1 --num_workers 2
}

train_tokenizer() {
    python examples/train_vq.py --dataset "$RUNS/stickers" --split "train[:50000]" --validation_split validation \
        --image_columns source_image,target_image --resolution 64 --output_dir "$RUNS/tokenizer" \
        --num_embeddings 4096 --latent_channels 64 --base_channels 32 --channel_multipliers 1 1 2 4 \
        --num_res_blocks 1 --norm_num_groups 2 --batch_size 32 --learning_rate 1e-3 --warmup_steps 100 \
        --weight_decay 0.01 --dead_code_patience 20 --mixed_precision bf16 --evaluation_steps 250 \
        --checkpointing_steps 500 --resume_from_checkpoint latest "$@"
}

# The second part sharpens shapes: with equal weights, faint texture has most of the say.
tokenizer() {
    train_tokenizer --max_steps 4500
    train_tokenizer --max_steps 6000 --squared_error_weight 20
}

# The decoding half alone goes on: the tokens stay what they are.
decoding() {
    python examples/train_vq.py --model "$RUNS/tokenizer/vq_model" --freeze_codes --dataset "$RUNS/stickers" \
        --split "train[:50000]" --validation_split validation --image_columns source_image,target_image \
        --resolution 64 --output_dir "$RUNS/tokenizer-decoding" --batch_size 32 --learning_rate 5e-4 \
        --warmup_steps 50 --weight_decay 0.01 --squared_error_weight 50 --mixed_precision bf16 --max_steps 1500 \
        --evaluation_steps 250 --checkpointing_steps 500 --resume_from_checkpoint latest
}

encode() {
    python examples/precompute_tokens.py --dataset "$1" --split "$2" --vq_model "$RUNS/tokenizer/vq_model" \
        --output_dir "$3" --resolution 64 --dtype "$4"
}

tokens() {
    encode "$RUNS/stickers" validation "$RUNS/tokens" bfloat16
    encode "$RUNS/stickers" train "$RUNS/tokens" bfloat16
    encode "$RUNS/more-stickers" train "$RUNS/more-tokens" float32
}

train_editor() {
    python examples/train_editar.py --validation_dataset "$RUNS/tokens" \
        --train_text_encoder --edit_region_weight 6 --optimizer muon --muon_learning_rate 3e-3 --learning_rate 1e-3 \
        --lr_warmup_steps 50 --mixed_precision bf16 --compile --attn_implementation eager \
        --num_validation_batches 8 --resume_from_checkpoint latest "$@"
}

# Small batches first; then, from their result, larger ones, of which a share shows the decoder an unedited target so
# far; the learning rate falls from step 1,500 on. From that result, rounded to bfloat16, once more: a learning rate two
# thirds as high that falls from the start. And again, half as high, on new pairs, most of them of the operations that
# fail most often; in float32, because that machine multiplied it faster.
editor() {
    [ -d "$RUNS/untrained" ] || python projects/stickers/create_sticker_editor.py \
        --vq_model "$RUNS/tokenizer-decoding/vq_model" --dataset "$RUNS/stickers/train-00000*.parquet" \
        --output_dir "$RUNS/untrained"
    train_editor --dataset "$RUNS/tokens" --model "$RUNS/untrained" --output_dir "$RUNS/editor-small-batches" \
        --batch_size 32 --max_train_steps 2000 --checkpointing_steps 1000 --validation_steps 2000
    large_batches=(--batch_size 64 --checkpointing_steps 500 --validation_steps 1000)
    first=("${large_batches[@]}" --dataset "$RUNS/tokens" --model "$RUNS/editor-small-batches/pipeline"
        --output_dir "$RUNS/editor-first")
    train_editor "${first[@]}" --max_train_steps 500
    train_editor "${first[@]}" --max_train_steps 1500 --target_token_dropout 0.3
    train_editor "${first[@]}" --max_train_steps 4200 --target_token_dropout 0.3 --lr_scheduler linear
    large_batches+=(--target_token_dropout 0.3 --lr_scheduler linear)
    [ -d "$RUNS/editor-rounded" ] || ship_pipeline "$RUNS/editor-first/pipeline" "$RUNS/editor-rounded"
    train_editor "${large_batches[@]}" --dataset "$RUNS/tokens" --model "$RUNS/editor-rounded" \
        --output_dir "$RUNS/editor-second" --max_train_steps 5200 --muon_learning_rate 2e-3 --learning_rate 7e-4
    [ -d "$RUNS/editor-rounded-again" ] || ship_pipeline "$RUNS/editor-second/pipeline" "$RUNS/editor-rounded-again"
    train_editor "${large_batches[@]}" --dataset "$RUNS/more-tokens" --model "$RUNS/editor-rounded-again" \
        --output_dir "$RUNS/editor" --max_train_steps 600 --muon_learning_rate 1.5e-3 --learning_rate 5e-4 \
        --lr_warmup_steps 30 --mixed_precision no --checkpointing_steps 100 --validation_steps 600
}

ship_pipeline() {
    python projects/stickers/ship_sticker_editor.py --model "$1" --output_dir "$2" \
        --guidance_scale 1.5 --temperature 0.3
}

# The guidance scale is the one with the most edits done on validation samples; at this temperature sampling costs less
# than two points, so that seeds mean something.
ship() {
    ship_pipeline "$RUNS/editor/pipeline" examples/sticker-editor
    python projects/stickers/show_sticker_edits.py --model examples/sticker-editor --output docs/sticker-editor.png
}

figures() {
    python projects/stickers/evaluate_sticker_editor.py --model examples/sticker-editor --dataset "$RUNS/stickers" \
        --settings greedy-1.5 sampled-1.5-0.3 sampled-1.5 greedy-1 greedy-3 greedy-7.5 --output "$RUNS/figures.json"
}

for stage in ${*:-data tokenizer decoding tokens editor ship figures}; do
    "$stage"
done
