#!/usr/bin/env bash
# On the lent machine, in the folder that the first pieces were unpacked in: packages, models, data (about 10 s).
set -euo pipefail
cd "$(dirname "$0")/../../.."   # the folder that holds code/
here=$PWD
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target site wheels/*.whl &
mkdir -p models data out
[ -d data/debian ] || cp -r debian data/debian
[ -d models/all-minilm-l6-v2 ] || cp -r all-minilm-l6-v2 models/
xz -dc t5-int8.safetensors.xz > t5-int8.safetensors
[ -d models/flan-t5-small-title ] || python3 code/benchmarks/lease/unpack.py t5-int8.safetensors t5-rest models/flan-t5-small-title
# The reference of an earlier machine, if its changes travelled too.
if [ -f changes.npz.xz ] && [ ! -d models/t5-debian-sft500x32 ]; then
  xz -dc changes.npz.xz > changes.npz
  python3 code/benchmarks/paper/sft_start.py models/flan-t5-small-title changes.npz models/t5-debian-sft500x32
fi
if [ -f earlier.jsonl ] && [ ! -f out/frontier.jsonl ]; then cp earlier.jsonl out/frontier.jsonl; fi
wait
ln -sfn "$here/models" code/models
ln -sfn "$here/data" code/data
ls models
