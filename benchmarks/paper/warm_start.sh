#!/usr/bin/env bash
# J-BOND that starts from Best-of-8 SFT instead of from the reference (T5 task, one seed; about 15 minutes of a core):
#     bash benchmarks/paper/warm_start.sh [folder, default runs/warm]
# 20 steps of 12 x 8 completions, then 20 of 32 x 3, measured against the reference that the first started from.
set -eu
out=${1:-runs/warm}
mkdir -p "$out"
head -n 64 data/debian/heldout.jsonl > "$out/heldout.jsonl"
reward='["nli:models/flan-t5-small-title?template=flan&premise_prefix=summarize: "]'  # as YAML: it has a colon
train() {
  bondlm train --reward_funcs "$reward" --train_dataset data/debian/train.jsonl --max_completion_length 16 \
    --learning_rate 1e-4 --warmup_steps 2 --max_steps 20 --bf16 true \
    --use_cpu true --seed 1 "$@"
}
measure() {
  bondlm eval --model "$1" --reference models/t5-debian-sft --dataset "$out/heldout.jsonl" --num_samples 4 \
    --num_reference_samples 16 --max_completion_length 16 --reward_funcs "$reward" --reference_column reference \
    --judges similarity:models/all-minilm-l6-v2 --output "$out/eval-$2"
}
train --model models/t5-debian-sft --objective best_of_n_sft --n 8 --anchor fixed --per_device_train_batch_size 12 \
  --output_dir "$out/sft"
train --model "$out/sft" --objective jbond --eta 0.3 --per_device_train_batch_size 32 --output_dir "$out/jbond"
measure "$out/jbond" jbond
