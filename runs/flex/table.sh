#!/bin/sh
# FLEx's experiment: four settings, or those that are named (table.sh fedexperts superni), five seeds, all baselines at equal rounds
# and steps. Rates are those that tune.sh found best: 1e-2 for all clients but FFA-LoRA's.
set -e
command=${1:-fedexperts}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- superni pathological dirichlet-0.5 dirichlet-1.0
router='training.parts=["attention", "router"]'
experts='training.parts=["attention", "experts"]'
optimizer="federation.server_optimizer"
methods="FLEx=flex,FedIT=fedit,local=local,FedPer=fedper:$router,FedRep=fedrep:$router,Ditto=ditto,FedSA-LoRA=fedsa_lora"
methods="$methods,FFA-LoRA=ffa_lora:training.lr=3e-2,FLoRA=flora,FlexLoRA=flexlora,HetLoRA=hetlora,random expert=random_expert:$experts"
methods="$methods,FedProx=fedprox,SCAFFOLD=scaffold,FedAvgM=fedit:$optimizer.name=fedavgm:$optimizer.lr=0.1"
methods="$methods,FedAdagrad=fedit:$optimizer.name=fedadagrad:$optimizer.lr=3e-2,FedYogi=fedit:$optimizer.name=fedyogi:$optimizer.lr=1e-2"
methods="$methods,FedAdam=fedit:$optimizer.name=fedadam:$optimizer.lr=1e-2"
methods="$methods,experts too=fedit:$experts,FedMoE=fedmoe:$experts"
for setting; do
  case $setting in
    dirichlet-*) file=dirichlet partition="--set data.partition.alpha=${setting#dirichlet-}" ;;
    *) file=$setting partition= ;;
  esac
  "$command" compare "runs/flex/$file.toml" --seeds "${SEEDS:-5}" --out "results/flex/$setting" $partition \
    --set federation.workers="${WORKERS:-1}" --methods "$methods"
done
