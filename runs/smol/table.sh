#!/bin/sh
# FLEx, FedIT, FedMoE, HFedMoE, centralized and local on `smol`, and with BASE=small on `small`: six clients of short tasks, at equal
# rounds and steps.
# DTYPE: of frozen weights and products, auto (float32) by default; bfloat16 where the processor has products of it.
# The rate on `smol` is that of six.toml, which was better than 1e-3 in training on all four tasks in one place; on `small` the one that
# was best for it on other tasks. No method has a rate of its own. SEEDS: 1 by default.
# Started twice at once, the two share the work.
set -e
command=${1:-fedexperts}
base=${BASE:-smol}
case $base in small) rate=1e-2 ;; *) rate=5e-3 ;; esac
experts='training.parts=["experts"]'
"$command" compare runs/smol/six.toml --seeds "${SEEDS:-1}" --out "results/smol/six-$base" --set model.name="$base" \
  --set training.lr=$rate --set model.dtype="${DTYPE:-auto}" \
  --methods "FedIT=fedit,FLEx=flex,HFedMoE=hfedmoe:$experts,FedMoE=fedmoe:reserve=1:$experts,centralized=centralized,local=local"
