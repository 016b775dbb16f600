#!/bin/sh
# FLEx, FedIT, FedMoE and HFedMoE on `smol`, and with BASE=small on `small`: six clients of short tasks, at equal rounds and steps.
# Rates are not tuned: on `smol` that of six.toml, on `small` the one that was best for it on other tasks. SEEDS: 1 by default.
# Started twice at once, the two share the work.
set -e
command=${1:-fedexperts}
base=${BASE:-smol}
case $base in small) rate=1e-2 ;; *) rate=1e-3 ;; esac
experts='training.parts=["experts"]'
"$command" compare runs/smol/six.toml --seeds "${SEEDS:-1}" --out "results/smol/$base" --set model.name="$base" \
  --set training.lr=$rate \
  --methods "FLEx=flex,FedIT=fedit,FedMoE=fedmoe:reserve=1:$experts,HFedMoE=hfedmoe:$experts"
