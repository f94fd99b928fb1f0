#!/bin/sh
# Makes a Mender Artifact: build.sh NAME DEVICE_TYPE BUNDLE_OR_PATCH OUT.mender, signed where $KEY names a private key.
set -eu

name=$1 device=$2 model=$3 out=$4
set -- --type cembed --artifact-name "$name" --device-type "$device" --output-path "$out" ${KEY:+--key "$KEY"}
if [ -d "$model" ]; then
    for file in "$model"/*; do set -- "$@" --file "$file"; done
else
    set -- "$@" --file "$model"
fi
exec mender-artifact write module-image "$@"
