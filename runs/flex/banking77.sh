#!/bin/sh
# FLEx with headroom: runs/flex/banking77.toml, its methods side by side, five seeds. Rates are those that tune.sh found on Super-NI;
# FedPer's, whose personal part is the experts here, was not tuned there: at 1e-2 it stays below a constant answer.
# METHODS: others, as --methods takes them. Started twice at once, the two share the work.
set -e
command=${1:-fedexperts}
experts='training.parts=["attention", "experts"]'
methods="FLEx=flex,FedIT=fedit,local=local,FedSA-LoRA=fedsa_lora,Ditto=ditto,FedPer with personal experts 3e-3=fedper:personal=[\"experts\"]:$experts:training.lr=3e-3,experts too=fedit:$experts"
"$command" compare runs/flex/banking77.toml --seeds "${SEEDS:-5}" --out results/flex/banking77 --set federation.workers="${WORKERS:-1}" \
  --methods "${METHODS:-$methods}"
