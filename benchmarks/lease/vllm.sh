#!/usr/bin/env bash
# vLLM on the lent machine, in the background: install, compare the engines, train a few steps. Each with a time limit.
#     setsid nohup bash benchmarks/lease/vllm.sh > out/vllm.log 2>&1 &
set -uo pipefail
cd "$(dirname "$0")/../../.."
here=$PWD
say() { echo "--- $(date +%T) $*"; }
limited() {
  local limit=$1
  shift
  say "$*"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | grep -v -E "Loading weights|Writing model|Warning|warnings.warn"
  return "${PIPESTATUS[0]}"
}
export PYTHONPATH=$here/code/src:$here/site OMP_NUM_THREADS=4 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 BONDLM_COMMIT=$(cat code/COMMIT) VLLM_LOGGING_LEVEL=INFO
# One after the other: two versions of a package would stop a common install.
limited 90 python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target vllm-site vllm-wheels/*.whl
printf '#!/bin/sh\nPYTHONPATH=%s VLLM_USE_FLASHINFER_SAMPLER=0 exec python3 "$@"\n' "$here/vllm-site" > vllm_python
chmod +x vllm_python
if [ ! -d models/smollm2-135m-instruct ]; then
  limited 90 python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target smollm smollm-wheels/*.whl
  PYTHONPATH=$here/smollm:$PYTHONPATH limited 90 python3 code/examples/everyday/prepare.py --out models
fi
limited 60 ./vllm_python -c "import vllm, torch; print('vllm', vllm.__version__, torch.__version__)"
cd code
# A share of the card that is free beside other processes; the cache's size is given because vLLM's own measuring of
# free memory ends in an error where others take and return memory meanwhile.
memory=${VLLM_MEMORY:-0.12}
cache=4294967296
compare() {
  limited "${VLLM_LIMIT:-240}" python3 benchmarks/vllm.py --model models/smollm2-135m-instruct \
    --vllm-python "$here/vllm_python" --dtype bfloat16 --tokens 128 --num-prompts 22 86 --rounds 3 --threads 4 \
    --pause "$here/out/frontier/pause" --out "$here/out/vllm.jsonl" \
    --server-args="--max-model-len=1024 --gpu-memory-utilization=$memory --kv-cache-memory-bytes=$cache $*"
}
mkdir -p "$here/out/frontier"
eager=
compare || { say "once more, without compiling"; eager=--enforce-eager; compare --enforce-eager; }
train() {
  local engine=$1
  shift
  limited "${VLLM_LIMIT:-200}" python3 -m bondlm train --config examples/everyday/jbond.yaml \
    --output_dir "$here/out/steps-$engine" --max_steps 8 --save_strategy no --eval_strategy no --warmup_steps 0 \
    --max_completion_length 128 --per_device_train_batch_size 43 --gradient_accumulation_steps 2 "$@"
}
arguments="[--max-model-len=1024, --gpu-memory-utilization=$memory, --kv-cache-memory-bytes=$cache${eager:+, $eager}]"
train vllm --engine vllm --vllm_server auto --vllm_python "$here/vllm_python" --vllm_server_args "$arguments"
train transformers --engine transformers
for engine in vllm transformers; do
  cp "$here/out/steps-$engine/metrics.jsonl" "$here/out/vllm-steps-$engine.jsonl"
  cp "$here/out/steps-$engine/vllm/server.log" "$here/out/vllm-server.log" 2> /dev/null
done
say end
