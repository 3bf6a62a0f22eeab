#!/usr/bin/env bash
# _dist.sh TOOL CONFIG PROCESSES [arguments]: torchrun for dist_train.sh and dist_test.sh.
set -euo pipefail
tools=$(cd "$(dirname "$0")" && pwd)
if [ $# -lt 3 ] || ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,4s/^# //p' "$tools/dist_$1.sh" >&2
    exit 2
fi
tool=$1 config=$2 processes=$3
shift 3
# Processes that share a machine's cores must not each start a thread per core.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    --nproc_per_node="$processes" \
    "$tools/$tool.py" "$config" "$@" --launcher pytorch
