#!/bin/sh
# HFedMoE with budgets of an eighth, a quarter and a half of all experts, chosen by importance, usage or at random, and without a
# budget: runs/hfedmoe/budget.toml, three seeds. BUDGETS: others. Started twice at once, the two share the work.
set -e
command=${1:-fedexperts}
methods=""
for budget in ${BUDGETS:-0.125 0.25 0.5}; do
  for select in importance usage random; do
    methods="$methods$select $budget=hfedmoe:select=$select:budget=$budget,"
  done
done
"$command" compare runs/hfedmoe/budget.toml --seeds "${SEEDS:-3}" --out results/hfedmoe/budget --set federation.workers="${WORKERS:-1}" --methods "${methods}no budget=hfedmoe:select=none"
