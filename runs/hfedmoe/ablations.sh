#!/bin/sh
# HFedMoE's two ablations (what importance is made of, how the server aggregates), three seeds each, and its three sweeps, two seeds
# of half as many rounds. Started twice at once, the two share the work.
set -e
command=${1:-fedexperts}
fast="training.lr=1e-3"
own="usage_floor=1:$fast"
compare() {
  "$command" compare runs/hfedmoe/four.toml --set federation.workers="${WORKERS:-1}" "$@"
}
compare --seeds 3 --out results/hfedmoe/aggregation --methods \
  "selective and weighted router=hfedmoe:$own,selective=hfedmoe:aggregate=selective:$own,FedAvg=hfedmoe:aggregate=fedavg:$fast"
compare --seeds 3 --out results/hfedmoe/importance --methods \
  "cumulative=hfedmoe:mean_share=1:redundancy=0:$own,and specific=hfedmoe:redundancy=0:$own,and redundancy=hfedmoe:$own"
half="--seeds 2 --set federation.rounds=12 --set evaluation.every=12"
compare $half --out results/hfedmoe/lambda --methods \
  "1.0=hfedmoe:mean_share=1:$own,0.9=hfedmoe:$own,0.8=hfedmoe:mean_share=0.8:$own,0.7=hfedmoe:mean_share=0.7:$own,0.6=hfedmoe:mean_share=0.6:$own"
compare $half --out results/hfedmoe/beta --methods \
  "0=hfedmoe:redundancy=0:$own,0.1=hfedmoe:$own,0.3=hfedmoe:redundancy=0.3:$own,1=hfedmoe:redundancy=1:$own"
compare $half --out results/hfedmoe/tau --methods \
  "0=hfedmoe:usage_floor=0:$fast,0.8=hfedmoe:usage_floor=0.8:$fast,1=hfedmoe:$own,1.2=hfedmoe:usage_floor=1.2:$fast,3.2=hfedmoe:usage_floor=3.2:$fast"
