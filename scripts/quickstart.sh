#!/usr/bin/env bash
# From nothing to an aligned model on this machine's CPU: bash scripts/quickstart.sh
# Makes .venv, installs requirements.txt, and runs the built-in task at a small size: SFT, then DPO, IPO,
# KTO and ORPO from that model. Run again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
python=.venv/bin/python

runs=runs/quickstart
pairs=(--task.prefixes 700 --task.held-out-prefixes 100)

echo "1/3 SFT: a small model learns to write film reviews"
"$python" -m scripts.train experiments/sft.py --workdir "$runs/sft" \
    --task.model reviews-500k --task.reviews 8000 \
    --steps 220 --optimizer.learning-rate 4e-3 --optimizer.warmup-steps 22
for method in dpo ipo kto orpo; do
    echo "2/3 $method: learns from pairs of reviews which are better"
    "$python" -m scripts.train "experiments/$method.py" --workdir "$runs/$method" \
        --model.source "$runs/sft" "${pairs[@]}" --steps 60 --evaluate-every 30 \
        --optimizer.learning-rate 7e-4 --samples.count 96
done
echo "3/3 report"
"$python" -m scripts.report "$runs"
