#!/bin/sh
# What is kept against what is learnt: four methods, three learning rates, two numbers of rounds. SEEDS: 1 by default; RATES, ROUNDS:
# lists of their own. Started twice at once, the two share the work.
set -e
command=${1:-fedexperts}
methods=""
for rounds in ${ROUNDS:-12 6}; do
  for lr in ${RATES:-1e-3 3e-3 1e-2}; do
    for method in FLEx=flex FedIT=fedit local=local FedSA-LoRA=fedsa_lora; do
      methods="$methods${methods:+,}${method%%=*} $lr $rounds=${method#*=}:training.lr=$lr:federation.rounds=$rounds"
    done
  done
done
"$command" compare runs/flex/kept.toml --seeds "${SEEDS:-1}" --out results/flex/kept --set federation.workers="${WORKERS:-1}" --methods "$methods"
