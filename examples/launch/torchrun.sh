#!/bin/sh
# One machine, one process for each of its GPUs (or two on the CPU): sh torchrun.sh recipe.yaml [more options of polyrank train]
set -e
processes=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
[ "$processes" -gt 0 ] || processes=2
exec torchrun --standalone --nproc-per-node "$processes" -m polyrank train "$@"
