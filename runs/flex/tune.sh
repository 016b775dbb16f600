#!/bin/sh
# Three learning rates for each way to train in FLEx's experiment, judged on validation examples of the Super-NI setting, on a seed that
# no table uses. Methods that train their clients as FedIT does (they differ in what the server does) take its rate, FedRep takes
# FedPer's. Two of these at once share the work. What comes out belongs into table.sh.
set -e
command=${1:-fedexperts}
tries=""
router='training.parts=["attention", "router"]'
experts='training.parts=["attention", "experts"]'
for lr in 3e-3 1e-2 3e-2; do
  for method in flex fedit local ffa_lora "fedper:$router" "random_expert:$experts" ditto scaffold; do
    tries="$tries$method:training.lr=$lr,"
  done
done
"$command" compare runs/flex/superni.toml --methods "$tries" --out results/flex-tune --set seed=100 --set evaluation.split=validation \
  --set evaluation.retained=[] --set federation.rounds=10 --set evaluation.every=10 --set data.test_examples=100 \
  --set federation.workers="${WORKERS:-1}"
