#!/usr/bin/env bash
# All checks and measurements that need a GPU: `check` and `t5` (minutes), `speed` and `size` (at most ten minutes each;
# `speed` needs trl==1.16.0), `vllm` and `vllm-more` (at most ten minutes each; both need a C compiler, and VLLM_PYTHON,
# an interpreter with vLLM and trl==1.16.0; `vllm-more` also needs models/smollm2-135m-instruct). `vllm`, `vllm-more` and
# `t5` have not been run on a GPU yet. The most important lines come first.
#     bash benchmarks/on_gpu.sh check
#     bash benchmarks/on_gpu.sh speed [folder for results and logs, default $OUT, or benchmarks/results without it]
#     VLLM_PYTHON=/opt/vllm/bin/python bash benchmarks/on_gpu.sh vllm [the same]    # then vllm-more
# Each line has its own time limit, so that one that hangs does not stop the others.
set -uo pipefail
failed=0
results=${2:-${OUT:-benchmarks/results}}
run() {
  local limit=$1
  shift
  echo "--- $(date +%T) $*"
  # A run answers the first signal by finishing its step, which may be waiting for a server.
  timeout --kill-after=10 "$limit" "$@" 2>&1 | grep -v -E "Loading weights|Writing model|FutureWarning|warnings.warn"
  [ "${PIPESTATUS[0]}" = 0 ] || { failed=1; echo "--- that line failed, or took more than $limit s"; }
}
# What trainers and servers have written goes to the results, as the machine goes.
keep() {
  local path
  mkdir -p "$results"
  for path in runs/on-gpu-*/metrics.jsonl runs/on-gpu-*/vllm/server.log runs/peers/out/vllm/server.log; do
    [ -f "$path" ] && cp "$path" "$results/$(echo "$path" | tr / -)"
  done
}
trap keep EXIT
vllm_peers() {
  run "${limit:-215}" python3 benchmarks/peers.py --lora --dtype bfloat16 --lengths full --vllm-python "$VLLM_PYTHON" \
    --out "$results/peers.jsonl" "$@"
}
engines() {
  run 140 python3 benchmarks/vllm.py --vllm-python "$VLLM_PYTHON" --dtype bfloat16 --tokens 128 --out "$results/vllm.jsonl" "$@"
}
train() {
  run "${limit:-72}" python3 -m bondlm train --engine vllm --vllm_server auto --vllm_python "$VLLM_PYTHON" \
    --vllm_server_args '["--enforce-eager"]' --reward_funcs examples/everyday/reward.py:not_repetitive \
    --reward_weights "[1.0]" --lr_scheduler_type constant --warmup_steps 0 --bf16 true --save_steps 2 \
    --eval_num_samples 1 --eval_num_reference_samples 2 "$@"
}
case ${1:-check} in
  vllm*)
    : "${VLLM_PYTHON:?an interpreter with vLLM}"
    command -v cc gcc clang > /dev/null || echo "--- no C compiler: Triton, and so vLLM, will not start"
    ;;
esac
case ${1:-check} in
  check)
    run 150 python3 -m pytest -q --show-capture=no -p no:cacheprovider -n 4 tests/trainer/test_cuda.py tests/engines/local/test_cuda_graph.py
    ;;
  speed)
    peers() { run 160 python3 benchmarks/peers.py --dtype bfloat16 --tokens 128 --steps 3 --out "$results/peers.jsonl" "$@"; }
    peers --size 500m --lora --against rloo grpo sft
    peers --size 500m --against rloo grpo sft
    peers --size 1.3b --lora --lengths full --against rloo
    run 60 python3 benchmarks/roofline.py --model runs/peers/500m --dtype bfloat16 --batch 64 256 --profile --out "$results/roofline.jsonl"
    ;;
  t5)
    run 90 python3 benchmarks/t5_step.py --out "$results/t5_step.jsonl"
    ;;
  size)
    run 110 python3 benchmarks/tricks.py --model runs/peers/500m --dtype bfloat16 --prompts 128 --repeats 2 --out "$results/tricks.jsonl"
    run 225 python3 benchmarks/growth.py --hidden 2048 --layers 16 --dtype bfloat16 --rows 64 256 --out "$results/growth.jsonl"
    run 225 python3 benchmarks/cut.py --hidden 2048 --layers 16 --limits 0 20000 5200 --out "$results/cut.jsonl"
    ;;
  vllm)
    # A whole step beside TRL with its own vLLM, 192 completions of 128 tokens; the bar is at most 0.8 of TRL's time.
    # Also the trainer's memory and the peak of the whole card. Makes the model that the next line draws from. TRL's
    # activations and its vLLM need about 85 GB by calculation: on a card of 80 it is 96 completions.
    card=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1) # MiB
    vllm_peers --size 500m --completions $((card > 100000 ? 192 : 96)) --tokens 128 --steps 4 --against rloo
    # Tokens per second at 63, 192 and 255 rows; the bars are at least 3 times the transformers engine's and 40% of the
    # roofline. Also memory of trainer and server (awake and asleep), seconds per update, probe gap.
    engines --model runs/peers/500m --num-prompts 21 64 85 --rounds 2 --sleep auto
    # Correctness: first tokens against the policy's probabilities, log-probabilities of each role, reloads of adapters
    # and whole weights, a run of each. Whole weights in fp32, so products must not be rounded to TF32.
    run 190 env BONDLM_VLLM_ON=cuda BONDLM_VLLM_PYTHON="$VLLM_PYTHON" TRITON_F32_DEFAULT=ieee \
      python3 -m pytest -v -p no:cacheprovider -m vllm tests/engines/vllm/test_real.py \
      -k "frequencies or own_distribution or reload or in_turn or training or fine_tuning"
    ;;
  vllm-more)
    # `vllm_server: auto` on one card, real weights. The first command may be the machine's first start of vLLM; the
    # second resumes from its checkpoint, and fails if there is none.
    limit=110 train --config examples/everyday/jbond.yaml --output_dir runs/on-gpu-vllm-lora --max_steps 2
    train --config examples/everyday/jbond.yaml --output_dir runs/on-gpu-vllm-lora --max_steps 4 \
      --resume runs/on-gpu-vllm-lora/checkpoint-2
    mkdir -p runs
    grep -v -E "^(use_peft|lora_r|learning_rate):" examples/everyday/jbond.yaml > runs/on-gpu-full.yaml
    train --config runs/on-gpu-full.yaml --output_dir runs/on-gpu-vllm-full --max_steps 2
    # Handing over whole weights of a real model (full fine-tuning): probe gap, seconds per update, memory.
    engines --model models/smollm2-135m-instruct --num-prompts 64 --rounds 2 --whole --sleep auto
    # Size: does a random 7B with LoRA fit on one card with its server, how long is a step, how large is each role?
    limit=185 vllm_peers --size 7b --completions 48 --tokens 128 --steps 3 --sleep auto --against
    ;;
esac
exit $failed
