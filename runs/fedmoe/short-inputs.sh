#!/bin/sh
# FedMoE with short inputs: two settings, three seeds. Started twice at once, the two share the work. No rate was tuned here.
# Common usage: everybody holds the same experts, those that the clients together use most, as many as FedMoE's clients at most.
# METHODS: others, as --methods takes them. All experts: without a memory limit. More rounds: the 600 steps of FedMoE's stage 1 as 15 more rounds of 40 steps.
set -e
command=${1:-fedexperts}
same="experts_per_layer=7"
methods="FedMoE=fedmoe:reserve=0.95,randomMoE=random_moe:$same,common usage=seer_moe:entropy=0:reserve=0.95,FedAvg all experts=fedavg,FedAvg=fedavg:$same,FedAvg more rounds=fedavg:$same:federation.rounds=55,FedProx=fedprox:$same,SCAFFOLD=scaffold:$same:training.lr=3e-4,local=local:$same"
for setting in ${SETTINGS:-t td}; do
  "$command" compare runs/fedmoe/short-inputs-$setting.toml --seeds "${SEEDS:-3}" --out results/fedmoe/short-inputs-$setting --set federation.workers="${WORKERS:-1}" --methods "${METHODS:-$methods}"
done
