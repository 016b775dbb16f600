#!/bin/sh
# HFedMoE's time to a target: runs/hfedmoe/time.toml, eight seeds; and how much of the gradient the router gets. METHODS: others, as
# --methods takes them. Started twice at once, the two share the work. Rates are those of table.sh.
set -e
command=${1:-fedexperts}
own="hfedmoe:usage_floor=1"
methods="HFedMoE=$own,random selection=$own:select=random,usage selection=$own:select=usage,SEER-MoE=seer_moe:training.lr=3e-3,gradient through all=$own:gradient_through=all"
"$command" compare runs/hfedmoe/time.toml --seeds "${SEEDS:-8}" --out results/hfedmoe/time --set federation.workers="${WORKERS:-1}" \
  --methods "${METHODS:-$methods}"
