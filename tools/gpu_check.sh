#!/usr/bin/env bash
# All proof that needs a GPU, in four stages without a network; each is useful alone and takes less than 200 seconds.
#
# Usage: tools/gpu_check.sh [--out DIR] [--commit REF] [--seconds N] [smoke|ops|train|tests|tune ...]
#
#   smoke   the environment, the clocks, and the kernels' tests
#   ops     GN, EvoNormS0, BN and ConvWS against torch eager, timm, liger and mmcv: bf16, fp32; then torch.compile
#   train   training steps of Mask R-CNN in bf16: frozen BN, GN stock and ours, EvoNormS0, CBN; then of I3D
#   tests   the other tests that know of a GPU, those of ops and layers first
#   tune    other values of the kernels' constants, each checked and timed: for whoever works on the kernels
#
# No stage: the first four, in this order. --out: benchmarks/ of this tree unless given; --commit names a copy without .git;
# --seconds: of each stage (180). PYTHON chooses the interpreter.
#
# Everything lies in DIR/<gpu>/<date>/ from the moment it is known: rows in *.json, tests in *.txt, the programs'
# progress in log.txt, and report.md, which is written anew after each part. INT and TERM stop the part that runs, and
# then the report is written.
#
# Exit code: 0 all is well; 1 a test or a benchmark failed; 2 no GPU, or wrong arguments; 130, 143 stopped.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1

wrong() {
    echo "gpu_check: $1; see tools/gpu_check.sh --help" >&2
    exit 2
}

out=$root/benchmarks seconds=180 commit=() stages=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set/{/^#/!d;s/^# \{0,1\}//p}' "$0" && exit 0 ;;
        --out | --commit | --seconds)
            [ -n "${2-}" ] || wrong "$1 needs a value"
            case $1 in
                --out) out=$2 ;;
                --commit) commit=(--commit "$2") ;;
                *) seconds=$2 ;;
            esac
            shift
            ;;
        smoke | ops | train | tests | tune) stages+=("$1") ;;
        *) wrong "'$1' is no stage and no option; stages are smoke, ops, train, tests and tune" ;;
    esac
    shift
done
[[ $seconds =~ ^[1-9][0-9]{0,5}$ ]] || wrong "--seconds must be a whole number of 1 or more, got '$seconds'"
[ ${#stages[@]} -gt 0 ] || stages=(smoke ops train tests)

out=$(realpath -m "$out") # seen from where it was called
cd "$root" || exit 1
python=${PYTHON:-$(command -v python3 || command -v python)}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

gpu=$("$python" - <<'EOF'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit(f"gpu_check: torch {torch.__version__} sees no GPU here (CUDA of torch: {torch.version.cuda}); nothing was run")
try:
    from normplug.bench.facts import slug
except ImportError as error:
    sys.exit(f"gpu_check: {error}; tools/gpu_wheels.sh collects what normplug needs where there is no network")
print(slug(torch.cuda.get_device_name()))
EOF
) || exit 2

target=$out/$gpu/$(date -u +%Y-%m-%d-%H%M%S)
mkdir -p "$target" || exit 1
tables=$(mktemp -d) || exit 1
trap 'rm -rf "$tables"' EXIT
parts=() failed=() stopped="" child=""

# Stopping: the part that runs gets INT, by which pytest prints its failures; then everything ends through the report.
# shellcheck disable=SC2329
stop() {
    stopped=$1
    echo "gpu_check: stopped by $1; the report follows" >&2
    [ -z "$child" ] || kill -INT "$child" 2>/dev/null
}
trap 'stop INT' INT
trap 'stop TERM' TERM
trap 'stop HUP' HUP

clocks() { # a slow number of a hot or throttled GPU is known for what it is
    nvidia-smi --query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active \
        --format=csv,noheader 2>/dev/null | head -n 1
}

limited() { # SECONDS COMMAND...: run it, stop it by INT when its time is up. 124: the time was up
    local code
    # Without --foreground the program gets INT twice, by itself and with its group, and the second interrupts what it
    # prints at the first. In the background of a script INT is ignored, by whatever is started, unless jobs are
    # controlled; each is a process group of its own then.
    set -m
    timeout --foreground -s INT -k 15 "$@" &
    child=$!
    set +m
    while :; do # a signal ends wait, not the part
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    kill -KILL -- "-$child" 2>/dev/null # workers, or a variant's process, whose parent did not end by itself
    child=""
    return $code
}

part() { # NAME FILE SHARE COMMAND...: a part that may take SHARE % of the stage's time, whose results are in FILE
    local name=$1 file=$2 left=$((deadline - SECONDS)) code budget outcome began=$SECONDS before
    local limit=$((seconds * $3 / 100 + 1))
    shift 3
    [ -z "$stopped" ] || return
    [ $limit -le $left ] || limit=$left
    if [ $limit -le 0 ]; then
        parts+=("| $name | - | the stage's time was up | - |") failed+=("$name (not begun)")
        return
    fi
    echo "== $name, at most $limit s" | tee -a "$target/log.txt" >&2
    running=$name
    report
    before=$(clocks)
    budget=$((limit > 40 ? limit - 20 : limit / 2 + 1)) # a benchmark begins nothing after it, and ends by itself
    case $file in
        *.txt) limited $limit "$@" >>"$target/$file" 2>&1 ;;
        *) limited $limit "$@" --seconds $budget --out "$target/$file" "${commit[@]}" \
            >"$tables/$name" 2> >(tee -ai "$target/log.txt" >&2) ;;
    esac
    code=$?
    outcome="well"
    if [ -n "$stopped" ]; then
        outcome="stopped by $stopped"
    elif [ $code -eq 124 ]; then
        outcome="stopped when its time was up"
    elif [ $code -ne 0 ]; then
        outcome="exit code $code"
    fi
    [ "$outcome" = well ] || failed+=("$name ($outcome)")
    parts+=("| $name | $((SECONDS - began)) s | $outcome | ${before:-unknown}${before:+; $(clocks)} |")
    [[ " ${files[*]} " == *" $file "* ]] || files+=("$file")
    running=""
    report # at once: the table of what was cut short takes seconds to make
    table "$name" "$file" && report
}

table() { # NAME FILE: make the table of a benchmark that did not come to print it
    if [[ $2 != *.json ]] || [ -s "$tables/$1" ] || [ ! -s "$target/$2" ]; then return 1; fi
    local maker=(-m normplug bench)
    [[ $1 != train-* ]] || maker=(tools/benchmark_train.py)
    [ "$1" != tune ] || maker=(tools/tune_kernels.py)
    "$python" "${maker[@]}" --table "$target/$2" >"$tables/$1" 2>>"$target/log.txt"
}

report() {
    local file name headline="all is well"
    [ ${#failed[@]} -eq 0 ] || headline="failed: $(printf '%s, ' "${failed[@]}" | sed 's/, $//')"
    [ -z "$running" ] || headline="$running is running, or was killed; before: $headline"
    {
        printf '# gpu_check %s on %s: %s\n\n' "${stages[*]}" "$gpu" "$headline"
        printf '| part | took | ended | SM clock, memory clock, temperature, power, throttling: before; after |\n'
        printf '| --- | --- | --- | --- |\n'
        [ ${#parts[@]} -eq 0 ] || printf '%s\n' "${parts[@]}"
        for file in "${files[@]}"; do
            name=${file%.*}
            printf '\n## %s\n\n' "$name"
            if [[ $file == *.txt ]]; then # without the lines of what passed
                printf '```\n%s\n```\n' "$(grep -vE '(PASSED|SKIPPED)( |$)|^tests/[^ ]+ *$' "$target/$file" | tail -n 150)"
            elif [ -s "$tables/$name" ]; then
                cat "$tables/$name"
            elif [ -s "$target/$file" ]; then
                printf 'The rows are in %s.\n' "$file"
            else
                printf 'Nothing was measured; log.txt says why.\n'
            fi
        done
    } >"$target/report.part"
    mv "$target/report.part" "$target/report.md"
}

tested() { # NAME SHARE ARGUMENTS...: tests by pytest, a line per test so that nothing is lost
    # TF32 has 10 bits: the formulas in float64 would call cuDNN's convolutions wrong. Of pytest's plugins those that are
    # named: another one that is installed (pytest-benchmark) warns that it does not go with workers, which is an error.
    NVIDIA_TF32_OVERRIDE=0 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 part "$1" "$stage.txt" "$2" \
        "$python" -m pytest -p no:cacheprovider -v --tb=short -rfE "${workers[@]}" "${@:3}"
}

bench() { # NAME SHARE ARGUMENTS...
    part "$1" "$1.json" "$2" "$python" -m normplug bench --device cuda --shapes quick "${@:3}"
}

train() { # MODEL SHARE
    part "train-$1" "train-$1.json" "$2" "$python" tools/benchmark_train.py --device cuda --models "$1" \
        --norms "frozen BN" GN EvoNormS0 CBN --implementations normplug stock --precisions bf16 \
        --layouts channels_last contiguous --warmup 4 --iterations 15
}

files=() running=""
norms=(group_norm_relu group_norm_add_relu evonorm_s0 batch_norm_relu)
# Needs a GPU's memory, or all cores for the compilation of all kernels, that no GPU is needed for.
large="more_than_2_to_the_31 or compile_without_spills"
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-p xdist -n 12)

for stage in "${stages[@]}"; do
    [ -z "$stopped" ] || break
    deadline=$((SECONDS + seconds))
    case $stage in
        smoke)
            part environment smoke.txt 20 "$python" -m normplug env
            tested kernels 100 tests/test_kernels*.py -k "not ($large)"
            ;;
        ops)
            bench ops-bf16 40 --ops "${norms[@]}" weight_standardize_many --dtypes bfloat16 \
                --peers "torch eager" timm liger mmcv
            bench ops-fp32 33 --ops "${norms[@]}" weight_standardize_many --dtypes float32 \
                --peers "torch eager" timm liger mmcv
            bench ops-compiled 33 --ops "${norms[@]}" --dtypes bfloat16 --peers torch.compile
            ;;
        train)
            train mask_rcnn 75
            train i3d 40
            ;;
        tests)
            # first those whose tensors are on the GPU, then those in which something goes there; test_k*: in smoke
            mapfile -t knowing < <(for word in DEVICE cuda; do grep -lw $word tests/test_[!k]*.py; done | awk '!seen[$0]++')
            tested layers 85 "${knowing[@]}"
            tested large 50 tests/test_kernels*.py -m "" -k "$large" # -m: the compilation is marked long
            ;;
        tune)
            part tune tune.json 100 "$python" tools/tune_kernels.py
            ;;
    esac
done

report
echo "$target/report.md"
if [ -n "$stopped" ]; then
    exit $((128 + $(kill -l "$stopped")))
fi
[ ${#failed[@]} -eq 0 ] || { printf 'gpu_check: failed: %s\n' "${failed[@]}" >&2 && exit 1; }
