#!/bin/sh
# FLEx, FedIT, FedMoE and HFedMoE on `smol`, and with BASE=small on `small`: six clients of short tasks, at equal rounds and steps.
# Rates are not tuned. SEEDS: 1 by default.
set -e
command=${1:-fedexperts}
base=${BASE:-smol}
experts='training.parts=["experts"]'
"$command" compare runs/smol/six.toml --seeds "${SEEDS:-1}" --out "results/smol/$base" --set model.name="$base" \
  --methods "FLEx=flex,FedIT=fedit,FedMoE=fedmoe:$experts,HFedMoE=hfedmoe:$experts"
