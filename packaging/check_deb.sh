#!/usr/bin/env bash
# Installs, upgrades and purges the packages of `make deb` in a fresh Debian of its own, without a network, and asks what was
# installed for vectors. Needs root, debootstrap, lintian and systemd. The Debian is kept in build/packages for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' cembed/__init__.py)
base=$PWD/build/packages/base
root=$PWD/build/packages/root
debs=(dist/*_"${version}"_*.deb)
mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources | head -n 1)
needed=python3,libpng16-16,libturbojpeg0,libssl3,zlib1g,libgcc-s1,libstdc++6,adduser,init-system-helpers,systemd,dbus

say() { printf '\n== %s\n' "$*"; }
inside() { unshare --net sh -c 'ip link set lo up; exec chroot "$0" sh -c "$1"' "$root" "$1"; }
fail() { echo "FAILED: $*"; exit 1; }

say "a fresh Debian"
[ -e "$base/usr/bin/python3" ] || debootstrap --variant=minbase --include="$needed" bookworm "$base" "$mirror" > /dev/null
rm -rf "$root" && cp -a "$base" "$root"
mount -t proc proc "$root/proc" && trap 'umount "$root/proc"' EXIT
mkdir -p "$root/root/debs" "$root/root/new"
cp "${debs[@]}" "$root/root/debs"

say "installed, with no network"
inside "dpkg -i /root/debs/*.deb" > build/packages/install.log 2>&1 || { cat build/packages/install.log; fail "dpkg -i"; }
inside "id cembed && stat -c '%U %a %n' /var/lib/cembed /var/lib/cembed/scans && ls /etc/cembed"
inside "dpkg-query --show --showformat='\${Package} \${Version} \${Installed-Size} KiB\n' '*cembed*'"
ls "$root"/etc/systemd/system/multi-user.target.wants/ | grep cembed
sed -i 's/^CEMBED_PORT=8081/CEMBED_PORT=8089/' "$root/etc/cembed/service.env"

say "it embeds"
cp -a samples/bundle "$root/root/bundle"
cp tests/golden/causalqwen2_5/page.png "$root/root/page.png"
inside "cembed --version"
inside "cd /root && cembed embed bundle page.png --out pages.npz && cembed search pages.npz total --bundle bundle"

say "it answers over HTTP"
cat > "$root/root/ask.py" <<'PYTHON'
import sys, time, urllib.request
for _ in range(300):
    try:
        print(urllib.request.urlopen(sys.argv[1] + sys.argv[2]).status, sys.argv[2])
        break
    except OSError:
        time.sleep(0.2)
else:
    sys.exit("it never was ready")
for path in sys.argv[3:]:
    body, kind = (open(path, "rb").read(), "image/png") if path.endswith(".png") else (path.encode(), "text/plain")
    request = urllib.request.Request(sys.argv[1] + "/embed", body, {"Content-Type": kind})
    answer = urllib.request.urlopen(request)
    print(answer.status, kind, answer.headers["Cembed-Rows"], "x", answer.headers["Cembed-Dim"], len(answer.read()), "bytes")
PYTHON
inside ". /etc/cembed/service.env; export CEMBED_ONNXRUNTIME
    cembed-service /root/bundle \$CEMBED_PORT & python3 /root/ask.py http://127.0.0.1:\$CEMBED_PORT /health /root/page.png 'warranty period'
    status=\$?; kill %1 2> /dev/null || kill \$!; wait; exit \$status"
inside "cembed serve /root/bundle --port 8090 > /root/serve.log 2>&1 & python3 /root/ask.py http://127.0.0.1:8090 /health/ready
    status=\$?; kill \$!; wait; exit \$status"

say "upgraded"
for deb in "${debs[@]}"; do
    rm -rf build/packages/repacked
    dpkg-deb -R "$deb" build/packages/repacked
    sed -i "s/\b${version//./\\.}\b/${version}.1/g" build/packages/repacked/DEBIAN/control
    dpkg-deb --root-owner-group -Znone -b build/packages/repacked "$root/root/new" > /dev/null
done
inside "dpkg -i /root/new/*.deb" > build/packages/upgrade.log 2>&1 || { cat build/packages/upgrade.log; fail "upgrade"; }
inside "dpkg-query --show --showformat='\${Package} \${Version} \${Status}\n' '*cembed*'; cembed --version"
grep -q '^CEMBED_PORT=8089' "$root/etc/cembed/service.env" || fail "a setting was lost"
inside "touch /var/lib/cembed/kept"

say "removed, and purged"
packages=$(for deb in "${debs[@]}"; do dpkg-deb -f "$deb" Package; done | tr '\n' ' ')
inside "dpkg --remove $packages" > build/packages/remove.log 2>&1
[ -e "$root/var/lib/cembed/kept" ] && [ -e "$root/etc/cembed/service.env" ] || fail "removing took what purging takes"
inside "dpkg --purge $packages" > build/packages/purge.log 2>&1
left=$(find "$root" -xdev \( -path "$root/proc" -o -path "$root/root" -o -path "$root/var/log" \) -prune -o -name '*cembed*' -print)
grep -q '^cembed:' "$root/etc/passwd" && fail "the user is left"
[ -z "$left" ] || fail "left behind: $left"
echo "nothing is left"

say "units"
for unit in watch serve service; do
    systemd-analyze security --offline=true "packaging/systemd/cembed-$unit.service" 2> /dev/null | tail -n 1
done

say "lintian"
lintian --allow-root --suppress-tags no-manual-page "${debs[@]}" > build/packages/lintian.log || true
sed 's/\[.*//' build/packages/lintian.log | awk '{print $1, $2, $3}' | sort | uniq -c
! grep '^E:' build/packages/lintian.log || fail "lintian has errors"
