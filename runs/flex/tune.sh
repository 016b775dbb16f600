#!/bin/sh
# Three learning rates for each way to train in FLEx's experiment, then of each server with an optimiser, judged on validation examples of
# the Super-NI setting, on a seed that no table uses. Methods that train their clients as FedIT does (they differ in what the server
# does) take its rate, FedRep takes FedPer's. Two of these at once share the work. What comes out is in the run files and table.sh.
set -e
command=${1:-fedexperts}
router='training.parts=["attention", "router"]'
experts='training.parts=["attention", "experts"]'
optimizer="federation.server_optimizer"
clients="" servers=""
for lr in 3e-3 1e-2 3e-2; do
  for method in flex fedit local ffa_lora "fedper:$router" "random_expert:$experts" ditto scaffold; do
    clients="$clients$method:training.lr=$lr,"
  done
done
for lr in 1e-2 3e-2 1e-3; do
  for name in fedadam fedyogi fedadagrad; do
    servers="${servers}fedit:$optimizer.name=$name:$optimizer.lr=$lr:training.lr=1e-2,"
  done
done
for lr in 1e-1 3e-1; do
  servers="${servers}fedit:$optimizer.name=fedavgm:$optimizer.lr=$lr:training.lr=1e-2,"
done
try() {
  "$command" compare runs/flex/superni.toml --methods "$1" --out "results/flex-tune/$2" --set seed=100 --set evaluation.split=validation \
    --set evaluation.retained=[] --set federation.rounds=10 --set evaluation.every=10 --set data.test_examples=100 \
    --set federation.workers="${WORKERS:-1}"
}
try "$clients" clients
try "$servers" servers
