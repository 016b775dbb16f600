#!/bin/sh
# FedMoE's experiment: four settings, seven methods, three seeds; then, on Standard-T, the two ablations and FedAvg with all experts.
# Started twice at once, the two share the work. The learning rates are the run files', not tuned yet: tune.sh.
set -e
command=${1:-fedexperts}
same="experts_per_layer=6"
"$command" compare runs/fedmoe/standard-t.toml runs/fedmoe/standard-td.toml runs/fedmoe/enforced-t.toml runs/fedmoe/enforced-td.toml \
  --seeds 3 --out results/fedmoe --set federation.workers="${WORKERS:-1}" \
  --methods "FedMoE=fedmoe,randomMoE=random_moe:$same,FedAvg=fedavg:$same,FedProx=fedprox:$same,SCAFFOLD=scaffold:$same,local=local:$same,centralised"
"$command" compare runs/fedmoe/standard-t.toml --seeds 3 --out results/fedmoe-ablations --set federation.workers="${WORKERS:-1}" \
  --methods "FedMoE=fedmoe,without stage 1=fedmoe:initial=random:$same,without adjustment=fedmoe:adjust=false,FedAvg with all experts=fedavg"
