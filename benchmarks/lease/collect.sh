#!/usr/bin/env bash
# Say how things stand, and copy results to a folder:  collect.sh FOLDER [reference]   (with it also the reference)
set -uo pipefail
to=$1
cd "$(dirname "$0")/../../.."
here=$PWD
cd out
cp frontier.jsonl "$to/" 2> /dev/null
tail -n 2 queue.log
cat mps.txt | tail -n 2
nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader
uptime
tail -n 4 tests.log 2> /dev/null | cut -c1-300
tail -n 6 vllm.log 2> /dev/null | cut -c1-200
tail -qn 1 frontier/worker-*.log 2> /dev/null | cut -c1-200
tail -qn 1 frontier/*/failed.txt 2> /dev/null | cut -c1-300 | sort | uniq -c
python3 - << 'END'
import json
from pathlib import Path

for line in Path("frontier.jsonl").read_text().splitlines()[-40:] if Path("frontier.jsonl").exists() else []:
    try:
        row = json.loads(line)
    except ValueError:  # a line that was cut
        continue
    numbers = " ".join(f"{n} {row[n]:.3f}" for n in ("win_rate", "kl", "kl_ratio", "entropy", "seconds") if row.get(n))
    print(f"{row['run']:22} s{row['seed']} step {row['step']:3} {numbers}")
END
tar -cJf "$to/logs.tar.xz" --exclude='frontier/reference*' --exclude='samples.jsonl' --exclude='*.safetensors' --exclude='logs.tar.xz' --exclude='steps-*/vllm' -- * 2> /dev/null
if [ "${2:-}" = reference ]; then
  xz -T0 -1 -c "$here"/models/t5-debian-sft500x32/changes.npz > "$here/changes.npz.xz"
  split -b 15M "$here/changes.npz.xz" "$to/changes.npz.xz."
  tar -cJf "$to/reference.tar.xz" frontier/reference frontier/reference.json
fi
du -sm "$to"
