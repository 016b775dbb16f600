#!/bin/sh
# FedMoE's experiment in little: one setting, three methods, one seed, half the rounds.
set -e
same="experts_per_layer=6"
fast="training.lr=1e-3"
"${1:-fedexperts}" compare runs/fedmoe/standard-t.toml --out results/fedmoe-short --set federation.workers="${WORKERS:-2}" \
  --set federation.rounds=20 --set evaluation.every=10 \
  --methods "FedMoE=fedmoe:$fast,randomMoE=random_moe:$same:$fast,FedAvg=fedavg:$same:$fast"
