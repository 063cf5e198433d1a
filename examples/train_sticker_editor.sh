#!/usr/bin/env bash
# Make the small checkpoint in examples/sticker-editor, stage by stage, on two CPU cores. Every stage may be stopped and
# started again, and goes on where it was. All stages: bash examples/train_sticker_editor.sh
# One of them: bash examples/train_sticker_editor.sh tokenizer
set -euo pipefail
cd "$(dirname "$0")/.."
RUNS=${RUNS:-runs}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
# Freed memory stays with the process: asking the system for it anew is a good part of a step on a CPU.
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184

data() {
    python examples/make_sticker_edits.py --output_dir "$RUNS/stickers" --resolution 64 --seed 0 \
        --num_train 160000 --num_validation 1600 --num_test 500 --num_workers 2
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

tokens() {
    for split in validation train; do
        # The first ten shards of 5,000 pairs, and all of the validation split.
        python examples/precompute_tokens.py --dataset "$RUNS/stickers/$split-0000*.parquet" --split $split \
            --vq_model "$RUNS/tokenizer" --output_dir "$RUNS/tokens" --resolution 64 --dtype bfloat16
    done
}

editor() {
    [ -d "$RUNS/untrained" ] || python examples/create_sticker_editor.py --vq_model "$RUNS/tokenizer" \
        --dataset "$RUNS/stickers/train-00000*.parquet" --output_dir "$RUNS/untrained"
    python examples/train_editar.py --model "$RUNS/untrained" --dataset "$RUNS/tokens" \
        --validation_dataset "$RUNS/tokens" --output_dir "$RUNS/editor" --train_text_encoder \
        --edit_region_weight 6 --batch_size 64 --learning_rate 1e-3 --lr_warmup_steps 100 --lr_scheduler cosine \
        --max_train_steps 1000 --mixed_precision bf16 --compile --attn_implementation eager \
        --checkpointing_steps 500 --validation_steps 500 --resume_from_checkpoint latest
}

ship() {
    python examples/ship_sticker_editor.py --model "$RUNS/editor/pipeline" --output_dir examples/sticker-editor --do_sample False
}

figures() {
    python examples/evaluate_sticker_editor.py --model examples/sticker-editor --dataset "$RUNS/stickers" \
        --settings greedy-3 sampled-3 --max_samples 480 --output "$RUNS/figures.json"
}

for stage in ${*:-data tokenizer tokens editor ship figures}; do
    "$stage"
done
