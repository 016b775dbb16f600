#!/bin/sh
# Three tries for each method of HFedMoE's experiment, judged on validation examples, on a seed that no table uses. Two of them
# at once share the work. What comes out belongs into table.sh.
set -e
command=${1:-fedexperts}
tries=""
for lr in 3e-4 1e-3 3e-3; do
  for method in hfedmoe:usage_floor=1 fedavg fedmoe:reserve=1 pfl_moe seer_moe; do
    tries="$tries$method:training.lr=$lr,"
  done
done
"$command" compare runs/hfedmoe/four.toml --methods "$tries" --out results/hfedmoe-tune --set seed=100 \
  --set evaluation.split=validation --set federation.rounds=12 --set evaluation.every=12 --set federation.workers="${WORKERS:-1}"
