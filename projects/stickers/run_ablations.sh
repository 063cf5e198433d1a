#!/usr/bin/env bash
# Repeat two studies of the paper with the sticker editor, from training to report: guidance from 1 to 7.5, and
# training with and without distillation. A stage that was stopped continues where it stopped.
# Both studies: bash projects/stickers/run_ablations.sh
# One study: bash projects/stickers/run_ablations.sh guidance
#
# TEACHER is the DINOv2 model of the distillation study. By default, the script trains a stand-in for some minutes to
# recognise the colour and shape of stickers. To use the teacher of the paper:
# TEACHER=facebook/dinov2-base bash projects/stickers/run_ablations.sh distillation
set -euo pipefail
cd "$(dirname "$0")/../.."
RUNS=${RUNS:-runs/ablations}
MODEL=${MODEL:-projects/stickers/sticker-editor}
TEACHER=${TEACHER:-$RUNS/stand-in-teacher}
RESULTS=${RESULTS:-benchmarks/results}
NUM_TEST=${NUM_TEST:-100}  # test samples per operation or map; held-out edits add half as many
NUM_TRAIN=${NUM_TRAIN:-20000}
STEPS=${STEPS:-1000}
SCALES=${SCALES:-1 1.5 2 3 4.5 6 7.5}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# All runs use the same samples.
data() {
    [ -d "$RUNS/stickers" ] || python projects/stickers/make_sticker_edits.py --output-dir "$RUNS/stickers" \
        --resolution 64 --seed 0 --num-train 0 --num-validation 0 --num-test "$NUM_TEST" --num-workers 1
}

evaluate() {  # NAME MODEL SCALE
    python projects/stickers/evaluate_stickers.py run --benchmark sticker-edits --source "$RUNS/stickers" \
        --model "$2" --vq-model "$MODEL" --guidance-scale "$3" --no-do-sample --batch-size 64 --output-dir "$RUNS/$1"
}

# Copy table and plot without the contact sheets, and say under the table how they were made.
publish() {  # STUDY RUN...
    study=$1; shift
    python projects/stickers/evaluate_stickers.py report "$@" --output-dir "$RUNS/$study-report"
    mkdir -p "$RESULTS/$study"
    cp "$RUNS/$study-report/report.md" "$RESULTS/$study/"
    [ "$study" = distillation ] || cp "$RUNS/$study-report/guidance.png" "$RESULTS/$study/"
    sed -i -e '/-sheet\.png)$/,+1d' "$RESULTS/$study/report.md"
    printf '\nMade by `NUM_TEST=%s bash projects/stickers/run_ablations.sh %s` on %s; %s, %s cores. %s\n' \
        "$NUM_TEST" "$study" "$(date -I)" "$(uname -m)" "$(nproc --all)" "$NOTE" > "$RUNS/$study-report/note.md"
    sed -i -e "/^Scored on /r $RUNS/$study-report/note.md" "$RESULTS/$study/report.md"
}

guidance() {
    data
    runs=()
    for scale in $SCALES; do
        evaluate "guidance-$scale" "$MODEL" "$scale"
        runs+=("$RUNS/guidance-$scale")
    done
    NOTE="Greedy decoding." publish guidance "${runs[@]}"
}

teacher() {
    [ -d "$TEACHER" ] || [ "$TEACHER" != "$RUNS/stand-in-teacher" ] || \
        python projects/stickers/train_patch_teacher.py --output-dir "$TEACHER"
}

# Both editors start from the same weights and see the same pairs in the same order. Only the teacher differs.
distillation() {
    data
    teacher
    [ -f "$RUNS/pairs/train-00000-of-00001.parquet" ] || \
        python projects/stickers/make_sticker_edits.py --output-dir "$RUNS/pairs" --resolution 64 --seed 1 \
            --num-train "$NUM_TRAIN" --num-validation 0 --num-test 0 --shard-size "$NUM_TRAIN" --num-workers 1
    width=$(python -c "from transformers import AutoConfig as C; print(C.from_pretrained('$TEACHER').hidden_size)")
    [ -d "$RUNS/untrained" ] || python projects/stickers/create_sticker_editor.py --vq-model "$MODEL/vq_model" \
        --dataset "$RUNS/pairs" --output-dir "$RUNS/untrained" --distillation-hidden-size "$width"
    distilled=distilled-by-$(basename "$TEACHER")
    for name in "$distilled" undistilled; do
        options=()
        [ $name = undistilled ] || options=(--distillation-model "$TEACHER")
        [ -d "$RUNS/editor-$name/pipeline" ] || \
            python examples/train_editar.py --model "$RUNS/untrained" --dataset "$RUNS/pairs" \
            --output-dir "$RUNS/editor-$name" --train-text-encoder --edit-region-weight 6 --optimizer muon \
            --muon-learning-rate 3e-3 --learning-rate 1e-3 --lr-scheduler linear --lr-warmup-steps 50 \
            --target-token-dropout 0.3 --batch-size 32 --max-train-steps "$STEPS" --checkpointing-steps 250 \
            --resume-from-checkpoint latest "${options[@]}"
        evaluate "$name" "$RUNS/editor-$name/pipeline" 1.5
    done
    note="Both trained for $STEPS steps of 32 pairs, of $NUM_TRAIN."
    [ "$TEACHER" != "$RUNS/stand-in-teacher" ] || note+=" The stand-in teacher is no DINOv2: it was trained on stickers."
    note+=" With the paper's: \`TEACHER=facebook/dinov2-base bash projects/stickers/run_ablations.sh distillation\`."
    NOTE=$note publish distillation "$RUNS/$distilled" "$RUNS/undistilled"
}

for study in ${*:-guidance distillation}; do
    "$study"
done
