#!/bin/sh
# What FLEx is made of, on the Super-NI setting, three seeds each: how many experts are grafted, how they are chosen, and whether the
# routers are trained and shared too. Started twice at once, the two share the work.
set -e
command=${1:-fedexperts}
public="results/flex/public.txt" # windows of plain text for the shared selection
mkdir -p results/flex
[ -f "$public" ] || gzip -dc "${FEDEXPERTS_DATA:-../shared/data}/text/wikitext2_valid.train.jsonl.gz" | sed 's/^{"text": "//; s/"}$//; s/\\n/\n/g; s/\\"/"/g' | head -c 400000 > "$public"
methods="one by reconstruction=flex,two=flex:num_grafted=2,three=flex:num_grafted=3"
methods="$methods,random=flex:select=random,most used=flex:select=most_used,shared=flex:select=shared:public_text=$public"
methods="$methods,routers trained=flex:training.parts=[\"attention\", \"router\"]"
"$command" compare runs/flex/superni.toml --seeds 3 --out results/flex/ablations --set federation.workers="${WORKERS:-1}" --methods "$methods"
