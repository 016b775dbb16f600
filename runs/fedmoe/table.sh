#!/bin/sh
# FedMoE's experiment: four settings, seven methods, three seeds; then, on Standard-T, the two ablations.
# Started twice at once, the two share the work. Each method has the learning rate that tune.sh found best for it.
set -e
command=${1:-fedexperts}
same="experts_per_layer=6"
fast="training.lr=1e-3"
"$command" compare runs/fedmoe/standard-t.toml runs/fedmoe/standard-td.toml runs/fedmoe/enforced-t.toml runs/fedmoe/enforced-td.toml \
  --seeds 3 --out results/fedmoe --set federation.workers="${WORKERS:-1}" \
  --methods "FedMoE=fedmoe:$fast,randomMoE=random_moe:$same:$fast,FedAvg=fedavg:$same:$fast,FedProx=fedprox:$same:training.lr=3e-4,SCAFFOLD=scaffold:$same:training.lr=1e-4,local=local:$same:$fast,centralized=centralized:training.lr=1e-4"
"$command" compare runs/fedmoe/standard-t.toml --seeds 3 --out results/fedmoe-ablations --set federation.workers="${WORKERS:-1}" \
  --methods "FedMoE=fedmoe:$fast,without stage 1=fedmoe:initial=random:$same:$fast,without adjustment=fedmoe:adjust=false:$fast"
