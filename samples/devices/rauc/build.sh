#!/bin/sh
# Makes a RAUC bundle: build.sh VERSION COMPATIBLE BUNDLE_OR_PATCH OUT.raucb, signed with $CERT and $KEY.
# $FORMAT is `verity` unless the device's kernel has no dm-verity: then it is `plain`.
set -eu

version=$1 compatible=$2 model=$3 out=$4
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r "$model" "$folder/model"
cp "$(dirname "$0")/install.sh" "$folder/install.sh"
cat >"$folder/manifest.raucm" <<END
[update]
compatible=$compatible
version=$version

[bundle]
format=${FORMAT:-verity}

[handler]
filename=install.sh
END
rauc bundle --cert="$CERT" --key="$KEY" "$folder" "$out"
