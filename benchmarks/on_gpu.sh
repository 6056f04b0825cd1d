#!/usr/bin/env bash
# What a GPU shows, in one go: `check` (minutes), then `speed` (minutes more; needs trl==1.16.0).
#     bash benchmarks/on_gpu.sh check
#     bash benchmarks/on_gpu.sh speed [folder for the results, default benchmarks/results]
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
    run 120 python3 benchmarks/tricks.py --model runs/peers/500m --dtype bfloat16 --prompts 64 --repeats 2 --out "$results/tricks.jsonl"
    ;;
esac
exit $failed
