#!/usr/bin/env bash
# Start the queue of runs and the tests of a GPU in the background:  launch.sh SECONDS [workers with MPS] [without]
# Everything ends when SECONDS are over, or when a file `stop` lies in out/frontier/.
set -uo pipefail
seconds=$1 with_mps=${2:-9} without=${3:-6}
cd "$(dirname "$0")/../../.."
here=$PWD
export PYTHONPATH=$here/code/src:$here/site OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 BONDLM_COMMIT=$(cat code/COMMIT) PATH=$PATH:/usr/local/nvidia/bin
{ nvidia-smi; which -a nvidia-cuda-mps-control; nproc; } > out/nvidia-smi.txt 2>&1
cd code
background() { setsid nohup "$@" < /dev/null & }
if [ "${TESTS:-1}" = 1 ]; then
  background timeout 240 python3 -m pytest -q --show-capture=no -p no:cacheprovider -n 4 \
    tests/trainer/test_cuda.py tests/engines/local/test_cuda_graph.py > "$here/out/tests.log" 2>&1
fi
# Processes that share the card by MPS run their kernels side by side, otherwise in turn. It is a program that we start
# and end, no setting of the card; where it is not there, or a try fails, we do without.
workers=$without
if [ "${MPS:-1}" = 1 ] && command -v nvidia-cuda-mps-control > /dev/null; then
  export CUDA_MPS_PIPE_DIRECTORY=$here/mps CUDA_MPS_LOG_DIRECTORY=$here/mps-log
  mkdir -p mps "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
  if timeout 20 nvidia-cuda-mps-control -d > "$here/out/mps.txt" 2>&1 &&
    timeout 40 python3 -c "import torch; x = torch.ones(512, 512, device='cuda'); print(float((x @ x).sum()))" \
      >> "$here/out/mps.txt" 2>&1; then
    workers=$with_mps
    export BONDLM_DEVICE_NOTE=", MPS"
  else
    echo quit | timeout 10 nvidia-cuda-mps-control >> "$here/out/mps.txt" 2>&1
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
  fi
else
  echo "no MPS here" > "$here/out/mps.txt"
fi
echo "$workers workers" >> "$here/out/mps.txt"
background python3 benchmarks/paper/frontier.py --workers "$workers" --until "$seconds" --seeds ${SEEDS:-0 1 2} \
  --out "$here/out/frontier" --results "$here/out/frontier.jsonl" --models "$here/models" --data "$here/data/debian" \
  ${FRONTIER_ARGS:-} > "$here/out/queue.log" 2>&1
echo "launched: $workers workers"
