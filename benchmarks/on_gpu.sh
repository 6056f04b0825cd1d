#!/usr/bin/env bash
# What a GPU shows, in one go: `check` (minutes), then `speed` (minutes more; needs trl==1.16.0), then `vllm` (not run yet;
# needs VLLM_PYTHON, an interpreter with vLLM, and models/smollm2-135m-instruct).
#     bash benchmarks/on_gpu.sh check
#     bash benchmarks/on_gpu.sh speed [folder for the results, default benchmarks/results]
#     VLLM_PYTHON=/opt/vllm/bin/python bash benchmarks/on_gpu.sh vllm [the same]
# Each line has a time limit of its own, so that one that hangs does not take the others with it.
set -uo pipefail
failed=0
results=${2:-benchmarks/results}
run() {
  local limit=$1
  shift
  echo "--- $*"
  timeout "$limit" "$@" 2>&1 | grep -v -E "Loading weights|Writing model|Warning|warnings.warn" || failed=1
}
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
    run 90 python3 benchmarks/t5_step.py --out "$results/t5_step.jsonl" # not run on a GPU yet
    run 120 python3 benchmarks/tricks.py --model runs/peers/500m --dtype bfloat16 --prompts 64 --repeats 2 --out "$results/tricks.jsonl"
    run 240 python3 benchmarks/growth.py --hidden 2048 --layers 16 --dtype bfloat16 --rows 64 256 --out "$results/growth.jsonl"
    run 240 python3 benchmarks/cut.py --hidden 2048 --layers 16 --limits 0 20000 5200 --out "$results/cut.jsonl"
    ;;
  vllm) # probe gaps and tokens per second of both engines at 63 and 255 rows; then a run on one card, and its resume
    python=${VLLM_PYTHON:?an interpreter with vLLM}
    engines() {
      run 240 python3 benchmarks/vllm.py --model models/smollm2-135m-instruct --vllm-python "$python" --dtype bfloat16 --tokens 128 \
        --num-prompts 21 85 --out "$results/vllm.jsonl" "$@"
    }
    engines
    engines --sleep auto
    engines --whole
    train() {
      run 240 python3 -m bondlm train --engine vllm --vllm_server auto --vllm_python "$python" \
        --reward_funcs examples/everyday/reward.py:not_repetitive --reward_weights "[1.0]" --lr_scheduler_type constant --warmup_steps 0 \
        --bf16 true --save_steps 2 "$@"
    }
    mkdir -p runs
    grep -v -E "^(use_peft|lora_r|learning_rate):" examples/everyday/jbond.yaml > runs/on-gpu-full.yaml
    for steps in 2 4; do # the second goes on from the first one's checkpoint
      train --config examples/everyday/jbond.yaml --output_dir runs/on-gpu-vllm-lora --max_steps $steps
      train --config runs/on-gpu-full.yaml --output_dir runs/on-gpu-vllm-full --max_steps $steps
    done
    ;;
esac
exit $failed
