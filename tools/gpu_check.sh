#!/usr/bin/env bash
# All proof that needs a GPU, in one command, in under 10 minutes, without a network: the tests on real kernels, the
# benchmark of the ops, training steps. Writes OUT/<gpu>/<date>.json and .md.
#
# Usage: tools/gpu_check.sh [OUT [COMMIT]]     OUT is benchmarks/ unless given; COMMIT names a copy without .git
# PYTHON chooses the interpreter; TESTS, OPS and TRAIN are the seconds of each part (190, 140, 140).
#
# Exit code: 0 all is well; 1 a test or a benchmark failed (what was measured is written all the same); 2 no GPU.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
out=$(realpath -m "${1:-$root/benchmarks}") # seen from where it was called
cd "$root" || exit 1
commit=${2:-}
python=${PYTHON:-$(command -v python || command -v python3)}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET

"$python" - <<'EOF' || exit 2
import sys
import torch
if not torch.cuda.is_available():
    sys.exit(f"gpu_check: torch {torch.__version__} sees no GPU here (CUDA of torch: {torch.version.cuda}); nothing was run")
EOF

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
name=$("$python" -c 'import torch; from normplug.bench.facts import slug; print(slug(torch.cuda.get_device_name()))') || exit 1
target=$out/$name/$(date -u +%Y-%m-%d-%H%M)
mkdir -p "$out/$name" || exit 1
failed=()

echo "== environment" >&2
"$python" -m normplug env | tee "$work/env.txt" >&2 || failed+=(environment)

echo "== tests" >&2
tests=()
for file in tests/test_kernels*.py tests/test_layers.py tests/test_*_op.py tests/test_group_norm.py tests/test_evonorm.py \
    tests/test_filter_response_norm.py tests/test_weight_standardization.py tests/test_cross_iteration_batch_norm.py \
    tests/test_sync_batch_norm.py; do
    [ -e "$file" ] && tests+=("$file")
done
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 6)
timeout -k 10 "${TESTS:-190}" "$python" -m pytest -p no:cacheprovider -q "${parallel[@]}" "${tests[@]}" >"$work/tests.txt" 2>&1
code=$?
tail -n 40 "$work/tests.txt" >&2
if [ $code -eq 124 ]; then echo "the tests were stopped after ${TESTS:-190} seconds" | tee -a "$work/tests.txt" >&2; fi
[ $code -eq 0 ] || failed+=("tests (exit code $code)")

echo "== ops" >&2
timeout -k 10 $((${OPS:-140} + 40)) "$python" -m normplug bench --device cuda --shapes quick --seconds "${OPS:-140}" \
    --out "$work/ops.json" ${commit:+--commit "$commit"} >"$work/ops.md" || failed+=("benchmark of the ops")

echo "== training steps" >&2
timeout -k 10 $((${TRAIN:-140} + 20)) "$python" tools/benchmark_train.py --device cuda --seconds "${TRAIN:-140}" \
    --out "$work/train.json" ${commit:+--commit "$commit"} >"$work/train.md" || failed+=("training steps")

"$python" - "$work" "$target" "${failed[@]}" <<'EOF'
"""Join the parts; what was cut short has its rows in JSON and gets its tables from them."""
import json
import sys
from pathlib import Path

work, target, failed = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
sys.path.insert(0, "tools")
text, result = ["# gpu_check: " + ("failed: " + ", ".join(failed) if failed else "all is well")], {"failed": failed}
for part in ("env", "tests"):
    lines = (work / f"{part}.txt").read_text(errors="replace").rstrip().splitlines()
    result[part] = lines if part == "env" else lines[-60:]
    text += [f"## {part}", "```", *result[part], "```"]
for part in ("ops", "train"):
    rows, table = work / f"{part}.json", work / f"{part}.md"
    if not rows.exists():
        text.append(f"## {part}: nothing was measured")
        continue
    result[part] = json.loads(rows.read_text())
    if not table.exists() or not table.stat().st_size:
        if part == "train":
            from benchmark_train import markdown
        else:
            from normplug.bench.report import markdown
        table.write_text(markdown(result[part]))
    text.append(table.read_text())
Path(f"{target}.json").write_text(json.dumps(result, indent=1) + "\n")
Path(f"{target}.md").write_text("\n".join(text) + "\n")
EOF
joined=$?
echo "$target.md"
echo "$target.json"
if [ ${#failed[@]} -gt 0 ] || [ $joined -ne 0 ]; then
    printf 'gpu_check: failed: %s\n' "${failed[@]:-report}" >&2
    exit 1
fi
