#!/usr/bin/env bash
# Train under Slurm, one task per GPU.
#   [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...] \
#       tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]
set -euo pipefail
if [ $# -lt 4 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
partition=$1 job=$2 config=$3 work_dir=$4
shift 4
refuse() {
    echo "slurm_train.sh: $1" >&2
    exit 2
}
for name in GPUS GPUS_PER_NODE CPUS_PER_TASK; do
    if [ -n "${!name:-}" ] && ! [[ ${!name} =~ ^[1-9][0-9]*$ ]]; then
        refuse "$name=${!name}: expected a whole number, 1 or more."
    fi
done
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
[ $((gpus % per_node)) -eq 0 ] || refuse "GPUS=$gpus is no multiple of GPUS_PER_NODE=$per_node: expected whole nodes."
[ -f "$config" ] || refuse "There is no config $config: expected PARTITION JOB_NAME CONFIG WORK_DIR, in this order."
command -v srun >/dev/null || refuse "There is no srun on this machine: run it where Slurm is, or tools/dist_train.sh."
# shellcheck disable=SC2086  # SRUN_ARGS holds several words
exec srun --partition="$partition" --job-name="$job" --gres="gpu:$per_node" \
    --ntasks="$gpus" --ntasks-per-node="$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$config" --work-dir="$work_dir" --launcher=slurm "$@"
