#!/bin/sh
# RAUC's install handler: `model` in the RAUC bundle, a cembed bundle or a patch, becomes the current version.
set -eu

: "${CEMBED:=cembed}" "${CEMBED_MODELS:=/srv/cembed/models}" "${CEMBED_OPTIONS:=}"

# CEMBED_OPTIONS are words, as in `--provider tensorrt --threads 2`.
# shellcheck disable=SC2086
exec "$CEMBED" deploy "$RAUC_BUNDLE_MOUNT_POINT/model" --to "$CEMBED_MODELS" $CEMBED_OPTIONS
