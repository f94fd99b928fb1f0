"""The recipes for Mender and RAUC: the module runs through its states, and a RAUC bundle is built and installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cembed.runtime import Bundle, current_hash
from cembed.runtime.updates.diff import diff

sys.path.append(str(Path(__file__).parent / "crash"))
from deploys import SAMPLE, variant

DEVICES = SAMPLE.parent / "devices"
BUS = """<busconfig><type>system</type><listen>unix:path={0}</listen><policy context="default"><allow user="*"/>
<allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>"""


@pytest.fixture(scope="module")
def update(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Another bundle, and a patch to it from the sample."""
    place = tmp_path_factory.mktemp("update")
    other = variant(place, "b")
    diff(SAMPLE, other, place / "b.cembed-patch")
    return other, place / "b.cembed-patch"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    command = Path(sys.executable).with_name("cembed")
    about = {"CEMBED": str(command), "CEMBED_MODELS": str(tmp_path / "models"), "CEMBED_OPTIONS": "--threads 1"}
    return {**os.environ, **about}


class Client:
    """Calls the module as Mender does: a state, and a folder with `files` and `tmp`, in which it stands."""

    def __init__(self, place: Path, files: list[Path], environment: Mapping[str, str]) -> None:
        self.place, self.environment = place, environment
        for folder in ("files", "tmp", "header", "streams"):
            (place / folder).mkdir(parents=True)
        for file in files:
            shutil.copy(file, place / "files")

    def __call__(self, state: str, status: int = 0) -> str:
        command = [str(DEVICES / "mender" / "cembed"), state, str(self.place)]
        done = subprocess.run(
            command, cwd=self.place, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, (state, done.stdout, done.stderr)
        return done.stdout.strip()


def test_menders_module_installs_commits_and_rolls_back(
    tmp_path: Path, update: tuple[Path, Path], environment: dict[str, str]
) -> None:
    (other, patch), current = update, tmp_path / "models" / "current"
    first = Client(tmp_path / "1", list(SAMPLE.iterdir()), environment)
    assert (first("SupportsRollback"), first("NeedsArtifactReboot"), first("Download")) == ("Yes", "No", "")
    for state in ("ArtifactInstall", "ArtifactCommit", "Cleanup"):
        first(state)
    assert current_hash(current) == Bundle(SAMPLE).hash
    second = Client(tmp_path / "2", [patch], environment)
    second("ArtifactInstall")
    assert current_hash(current) == Bundle(other).hash
    for _ in range(2):  # the client may ask again after a power cut
        second("ArtifactRollback")
        assert current_hash(current) == Bundle(SAMPLE).hash
    damaged = Client(tmp_path / "3", [patch], environment)
    os.truncate(damaged.place / "files" / patch.name, 100)
    damaged("ArtifactInstall", status=1)
    damaged("ArtifactRollback")
    damaged("ArtifactFailure")
    assert current_hash(current) == Bundle(SAMPLE).hash


@pytest.mark.skipif(shutil.which("mender-artifact") is None, reason="mender-artifact is not installed")
def test_a_mender_artifact_is_made(tmp_path: Path, update: tuple[Path, Path]) -> None:
    for name, model in zip(("whole", "patch"), (SAMPLE, update[1]), strict=True):
        out = tmp_path / f"{name}.mender"
        subprocess.run([str(DEVICES / "mender" / "build.sh"), name, "kiosk", str(model), str(out)], check=True)
        shown = subprocess.run(["mender-artifact", "read", str(out)], check=True, capture_output=True, text=True).stdout
        assert "cembed" in shown
        assert ("text.data" if name == "whole" else "b.cembed-patch") in shown


def lacking() -> str | None:
    """Why a RAUC bundle cannot be installed here."""
    missing = [name for name in ("rauc", "mksquashfs", "dbus-daemon", "openssl") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    return "mounting needs root and loop devices" if os.geteuid() or not Path("/dev/loop-control").exists() else None


@pytest.fixture
def rauc(tmp_path: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of a service with a bus of its own, which trusts cert.pem."""
    if why := lacking():
        pytest.skip(why)
    certificate = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=test"]
    subprocess.run(
        [*certificate, "-keyout", "key.pem", "-out", "cert.pem"], cwd=tmp_path, check=True, capture_output=True
    )
    (tmp_path / "bus.conf").write_text(BUS.format(tmp_path / "bus"))
    (tmp_path / "slot").touch()
    settings = (DEVICES / "rauc" / "system.conf").read_text()
    for there, here in {
        "/var/lib/rauc/status": "status",
        "/run/rauc": "mount",
        "/etc/rauc/keyring.pem": "cert.pem",
        "/dev/disk/by-label/system": "slot",
    }.items():
        settings = settings.replace(there, str(tmp_path / here))
    (tmp_path / "system.conf").write_text(settings)
    (tmp_path / "mount").mkdir()
    environment |= {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={tmp_path / 'bus'}", "FORMAT": "plain"}
    environment |= {"CERT": str(tmp_path / "cert.pem"), "KEY": str(tmp_path / "key.pem")}
    bus = subprocess.Popen(["dbus-daemon", "--nofork", f"--config-file={tmp_path / 'bus.conf'}"])
    wait_for(tmp_path / "bus")
    service = subprocess.Popen(
        ["rauc", f"--conf={tmp_path / 'system.conf'}", "service", "--override-boot-slot=system"],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    yield environment
    for process in (service, bus):
        process.send_signal(signal.SIGTERM)
        process.wait()


def wait_for(path: Path) -> None:
    for _ in range(100):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def installed(
    tmp_path: Path, environment: Mapping[str, str], model: Path, name: str
) -> subprocess.CompletedProcess[str]:
    """What `rauc install` says of a bundle with this model, made with build.sh."""
    out, conf = tmp_path / f"{name}.raucb", f"--conf={tmp_path / 'system.conf'}"
    build = [str(DEVICES / "rauc" / "build.sh"), name, "cembed-kiosk", str(model), str(out)]
    subprocess.run(build, env=environment, check=True, capture_output=True)
    shown = subprocess.run(["rauc", conf, "info", str(out)], check=True, capture_output=True, text=True).stdout
    assert f"'{name}'" in shown
    for _ in range(50):  # until the service is there
        command = ["rauc", conf, "install", str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if "ServiceUnknown" not in done.stderr + done.stdout:
            return done
        time.sleep(0.1)
    return done


def test_rauc_installs_a_bundle_then_a_patch_and_refuses_a_damaged_one(
    tmp_path: Path, update: tuple[Path, Path], rauc: dict[str, str]
) -> None:
    (other, patch), current = update, tmp_path / "models" / "current"
    assert "succeeded" in installed(tmp_path, rauc, SAMPLE, "1").stdout
    assert current_hash(current) == Bundle(SAMPLE).hash
    assert "succeeded" in installed(tmp_path, rauc, patch, "2").stdout
    assert current_hash(current) == Bundle(other).hash
    damaged = tmp_path / "damaged.cembed-patch"
    damaged.write_bytes(patch.read_bytes()[:100])
    assert installed(tmp_path, rauc, damaged, "3").returncode != 0
    assert current_hash(current) == Bundle(other).hash
