#!/bin/bash
# Training on all hosts of a Cloud TPU slice. UNTESTED: no TPU was at hand.
#
#     bash experiments/launch/tpu_slice.sh NAME ZONE --config=configs/ade20k.py --workdir=/mnt/shared/runs/ade20k
#
# * The checkout lies in ~/pspnet_jax on every host, installed into ~/pspnet_jax/.venv by `pip install -e '.[tpu]'`.
# * The run's folder lies on a file system that all hosts see.
# * JAX asks the slice for the other hosts, so `--distributed=on` needs no variables.
set -euo pipefail

name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  cd ~/pspnet_jax && . .venv/bin/activate && python -m pspnet_jax.main --distributed=on $(printf '%q ' "$@")"
