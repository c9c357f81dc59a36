#!/usr/bin/env bash
# Finetune a LLaVA-style model with MiLoRA.
#
#   bash scripts/finetune_llava_milora.sh                                  the embedded demo, CPU
#   bash scripts/finetune_llava_milora.sh CONFIG [section.key=value ...] [--run-folder DIR]
#
# Interrupted? The same command goes on where it was. On several GPUs it starts through
# `accelerate launch` (settings: `accelerate config`, or ACCELERATE_CONFIG=FILE).
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
config="$root/configs/demo_cpu.yaml"
case "${1:-}" in
-h | --help)
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
*.yaml | *.yml)
    config="$1"
    shift
    ;;
esac
extras=""
if grep -qE '^ +path: demo( |$)|data_prep/stickervqa' "$config"; then extras=demo; fi
prefetch=""
if [ "$extras" = demo ] && [ "${MILORA_NO_VENV:-}" != 1 ] && [ ! -f "$root/.venv/milora_installed" ]; then
    # the demo's model comes down while packages are installed; what fails is fetched again later
    (cd "$root" && exec "${MILORA_PYTHON:-python3}" -m milora_vl.data.fetch) >/dev/null 2>&1 &
    prefetch=$!
fi
. "$root/scripts/setup_env.sh" "$extras"
if [ -n "$prefetch" ]; then wait "$prefetch" || true; fi
[ -t 2 ] || export TQDM_MININTERVAL="${TQDM_MININTERVAL:-15}" # a log needs no moving bars

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" -gt 1 ] || [ -n "${ACCELERATE_CONFIG:-}" ]; then
    exec accelerate launch ${ACCELERATE_CONFIG:+--config_file "$ACCELERATE_CONFIG"} \
        -m milora_vl train "$config" "$@"
fi
exec python -m milora_vl train "$config" "$@"
