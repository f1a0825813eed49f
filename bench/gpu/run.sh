#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in under nine minutes and without a network: builds the extension, runs the tests
# marked gpu, measures the ceilings, every kernel beside its floor and its peers, and decoding beside Inductor. Writes
# bench/results/gpu/<device>.json and .md, after each part, so that an early end leaves what there is.
#
#   bench/gpu/run.sh [--seconds 530] [--only build,ceilings,kernels] [--models 8B,30B-A3B] [--out FOLDER]
cd "$(dirname "$0")/../.." || exit 1
exec "${PYTHON:-python3}" -m bench.gpu.run "$@"
