#!/usr/bin/env bash
# From a fresh clone to a learned 2:4 mask: install, learn on the embedded tiny-llama, export, and check the export in a
# process that knows nothing of this project. No network beyond pip. About 4 minutes after installation on two cores.
#   bash scripts/quickstart.sh [RUN_DIRECTORY]     (default runs/quickstart; an earlier run there is replaced)
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
run=${1:-runs/quickstart}
rm -rf "$run"
compress learn-mask quickstart --out "$run"
compress export "$run" --out "$run/model"
compress verify "$run/model"
learned=$(python -c 'import json, sys; print(next(r["perplexity"] for r in json.load(open(sys.argv[1])) if r["method"] == "learned"))' "$run/summary.json")
# -I: the child sees neither this folder nor any variable of ours.
python -I scripts/plain_perplexity.py "$run/model" compress/assets/text/wikitext2/test.txt --seqlen 256 --limit 256 --expect "$learned"
echo "report: $run/report.html"
