#!/bin/sh
# Three learning rates for each method of FLEx's experiment, judged on validation examples of the Super-NI setting, on a seed that no
# table uses. Two of them at once share the work. What comes out belongs into table.sh.
set -e
command=${1:-fedexperts}
tries=""
router='training.parts=["attention", "router"]'
experts='training.parts=["attention", "experts"]'
optimizer="federation.server_optimizer.name"
for lr in 1e-3 3e-3 1e-2; do
  for method in flex fedit local fedprox scaffold ditto ffa_lora fedsa_lora flora flexlora hetlora \
    "fedper:$router" "fedrep:$router" "random_expert:$experts" \
    "fedit:$optimizer=fedavgm" "fedit:$optimizer=fedadagrad" "fedit:$optimizer=fedyogi" "fedit:$optimizer=fedadam"; do
    tries="$tries$method:training.lr=$lr,"
  done
done
"$command" compare runs/flex/superni.toml --methods "$tries" --out results/flex-tune --set seed=100 \
  --set evaluation.split=validation --set evaluation.retained=[] --set federation.rounds=10 --set evaluation.every=10 \
  --set federation.workers="${WORKERS:-1}"
