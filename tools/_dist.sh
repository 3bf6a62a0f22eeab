#!/usr/bin/env bash
# _dist.sh TOOL CONFIG PROCESSES [arguments]: torchrun for dist_train.sh and dist_test.sh, by way of _launch.py.
set -euo pipefail
tools=$(cd "$(dirname "$0")" && pwd)
if [ $# -lt 3 ] || ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,4s/^# //p' "$tools/dist_$1.sh" >&2
    exit 2
fi
# Processes that share a machine's cores must not each start a thread per core.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PYTHON:-python}" "$tools/_launch.py" "$@"
