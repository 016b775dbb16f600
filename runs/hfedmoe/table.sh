#!/bin/sh
# HFedMoE's experiment: two settings, three seeds; with the memories of the run files, and with enough for everybody. Started twice
# at once, the two share the work. Each method has the learning rate that tune.sh found best for it. An expert matters to a client
# that uses it more than evenly (usage_floor=1): hardly any passes 3.2 here (docs/results/hfedmoe.md).
set -e
command=${1:-fedexperts}
own="usage_floor=1:training.lr=1e-3"
for setting in four twenty; do
  "$command" compare runs/hfedmoe/$setting.toml --seeds 3 --out results/hfedmoe/$setting --set federation.workers="${WORKERS:-1}" \
    --methods "HFedMoE=hfedmoe:$own,FedAvg=fedavg:training.lr=3e-3,FedMoE=fedmoe:reserve=1:training.lr=1e-3,PFL-MoE=pfl_moe:training.lr=1e-3,SEER-MoE=seer_moe:training.lr=3e-3,random selection=hfedmoe:select=random:$own,usage selection=hfedmoe:select=usage:$own"
  "$command" compare runs/hfedmoe/$setting.toml --seeds 3 --out results/hfedmoe/$setting-unlimited --set federation.workers="${WORKERS:-1}" \
    --set devices.memory_share=2 --methods "HFedMoE=hfedmoe:$own,FedAvg=fedavg:training.lr=3e-3"
done
