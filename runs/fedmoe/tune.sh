#!/bin/sh
# Three tries for each method of FedMoE's experiment, judged on validation examples, on a seed that no table uses. Two of them
# at once share the work. What comes out belongs into table.sh.
set -e
command=${1:-fedexperts}
same="experts_per_layer=6"
tries=""
for lr in 1e-4 3e-4 1e-3; do
  for method in fedmoe "random_moe:$same" "fedavg:$same" "fedprox:$same" "scaffold:$same" "local:$same" centralized; do
    tries="$tries$method:training.lr=$lr,"
  done
done
"$command" compare runs/fedmoe/standard-t.toml --methods "$tries" --out results/fedmoe-tune --set seed=100 \
  --set evaluation.split=validation --set federation.rounds=20 --set evaluation.every=20 --set federation.workers="${WORKERS:-1}"
