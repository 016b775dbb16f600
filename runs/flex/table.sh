#!/bin/sh
# FLEx's experiment: three settings, or those that are named (table.sh fedexperts superni), five seeds, all baselines at equal rounds
# and steps. Started twice at once, the two share the work. Each method has the learning rate that tune.sh found best for it.
set -e
command=${1:-fedexperts}
shift || true
router='training.parts=["attention", "router"]'
experts='training.parts=["attention", "experts"]'
optimizer="federation.server_optimizer.name"
methods="FLEx=flex:training.lr=1e-3,FedIT=fedit:training.lr=1e-3,local=local:training.lr=1e-3"
methods="$methods,FedProx=fedprox:training.lr=1e-3,SCAFFOLD=scaffold:training.lr=1e-3,Ditto=ditto:training.lr=1e-3"
methods="$methods,FFA-LoRA=ffa_lora:training.lr=1e-3,FedSA-LoRA=fedsa_lora:training.lr=1e-3,FLoRA=flora:training.lr=1e-3"
methods="$methods,FlexLoRA=flexlora:training.lr=1e-3,HetLoRA=hetlora:training.lr=1e-3"
methods="$methods,FedPer=fedper:$router:training.lr=1e-3,FedRep=fedrep:$router:training.lr=1e-3"
methods="$methods,random expert=random_expert:$experts:training.lr=1e-3"
methods="$methods,FedAvgM=fedit:$optimizer=fedavgm:training.lr=1e-3,FedAdagrad=fedit:$optimizer=fedadagrad:training.lr=1e-3"
methods="$methods,FedYogi=fedit:$optimizer=fedyogi:training.lr=1e-3,FedAdam=fedit:$optimizer=fedadam:training.lr=1e-3"
for setting in "${@:-superni pathological dirichlet}"; do
  for each in $setting; do
    "$command" compare "runs/flex/$each.toml" --seeds 5 --out "results/flex/$each" --set federation.workers="${WORKERS:-1}" --methods "$methods"
  done
done
