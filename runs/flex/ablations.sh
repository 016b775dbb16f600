#!/bin/sh
# What FLEx is made of, on the Super-NI setting, three seeds each: how many experts are grafted, how they are chosen, and whether the
# routers are trained and shared too. Started twice at once, the two share the work.
set -e
command=${1:-fedexperts}
compare() {
  "$command" compare runs/flex/superni.toml --seeds 3 --set federation.workers="${WORKERS:-1}" "$@"
}
public="results/flex/public.txt" # windows of plain text for the shared selection
mkdir -p results/flex
[ -f "$public" ] || gzip -dc "${FEDEXPERTS_DATA:-../shared/data}/text/wikitext2_valid.train.jsonl.gz" | sed 's/^{"text": "//; s/"}$//; s/\\n/\n/g; s/\\"/"/g' | head -c 400000 > "$public"
compare --out results/flex/grafted --methods "1=flex,2=flex:num_grafted=2,3=flex:num_grafted=3"
compare --out results/flex/selection --methods "reconstruction=flex,random=flex:select=random,most used=flex:select=most_used,shared=flex:select=shared:public_text=$public"
compare --out results/flex/router --methods "frozen=flex,trained and shared=flex:training.parts=[\"attention\", \"router\"]"
