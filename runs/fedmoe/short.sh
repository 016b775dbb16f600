#!/bin/sh
# FedMoE's experiment in little: one setting, one seed, half the rounds.
set -e
"${1:-fedexperts}" compare runs/fedmoe/standard-t.toml --out results/fedmoe-short --set federation.rounds=20 --set federation.workers="${WORKERS:-2}" \
  --methods "FedMoE=fedmoe,randomMoE=random_moe:experts_per_layer=6,FedAvg=fedavg:experts_per_layer=6,centralised=centralised"
