"""The nightly loop of examples/nightly, as a user runs it, on drawn loads of an engine's plugin."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moetuner as mt

FOLDER = Path(__file__).parents[1] / "examples" / "nightly"
BUDGET = 6
TOOLS = ("bash", "flock")
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
# Every key of a CronJob that the example may use, by the path to it.
KEYS = {
    "": "apiVersion kind metadata spec",
    "metadata": "name",
    "spec": """schedule concurrencyPolicy startingDeadlineSeconds successfulJobsHistoryLimit
        failedJobsHistoryLimit jobTemplate""",
    "spec.jobTemplate": "spec",
    "spec.jobTemplate.spec": "backoffLimit activeDeadlineSeconds template",
    "spec.jobTemplate.spec.template": "spec",
    "spec.jobTemplate.spec.template.spec": """restartPolicy automountServiceAccountToken
        securityContext containers volumes""",
    "spec.jobTemplate.spec.template.spec.securityContext": """runAsUser runAsGroup fsGroup
        runAsNonRoot""",
    "container": "name image command env resources securityContext volumeMounts",
    "container.env": "name value",
    "container.resources": "requests limits",
    "container.securityContext": """allowPrivilegeEscalation readOnlyRootFilesystem
        capabilities""",
    "container.volumeMounts": "name mountPath readOnly",
    "volume": "name persistentVolumeClaim configMap emptyDir",
}


@pytest.fixture(scope="module")
def moetuner(tmp_path_factory):
    """Command that runs this moetuner."""
    path = tmp_path_factory.mktemp("bin") / "moetuner"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m moetuner "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def night(tmp_path, moetuner):
    """Return a function that records loads of a law, by its seed, and runs the script once."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    random = np.random.default_rng(0)

    def run(law=None, **variables):
        if law is not None:
            mean = np.random.default_rng(law).lognormal(5, 1, (2, 16))
            np.savez(recordings / "load-1-2x16.npz", load=random.poisson(mean, (24, 2, 16)))
        settings = {
            "STATE_DIRECTORY": tmp_path,
            "MOETUNER": moetuner,
            "OPTIONS": "--devices 4 --for vllm --effort brief",
            "MOVE_BUDGET": BUDGET,
        }
        environment = os.environ | {n: str(v) for n, v in (settings | variables).items()}
        command = ["bash", str(FOLDER / "nightly.sh")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def test_a_placement_is_made_kept_and_replaced_within_the_budget(night, tmp_path):
    """The same traffic keeps it; other traffic replaces it by few moves, and the old one stays."""
    assert "nightly: replaced" in night(law=1).stdout
    first = (tmp_path / "placement.json").read_bytes()
    same = night(law=1)
    assert (same.returncode, same.stdout.split()[:2]) == (0, ["nightly:", "kept"])
    assert (tmp_path / "placement.json").read_bytes() == first
    assert "nightly: replaced" in night(law=2).stdout
    assert (tmp_path / "placement.json.previous").read_bytes() == first
    before = mt.Placement.load(tmp_path / "placement.json.previous")
    after = mt.Placement.load(tmp_path / "placement.json")
    assert 0 < before.diff(after).experts_moved <= BUDGET
    assert (tmp_path / "status").read_text().split()[1] == "replaced"


@pytest.mark.parametrize("prune", [14, 1])
def test_whatever_fails_leaves_the_old_placement(night, tmp_path, prune):
    """One line names the step, and the status is not 0; old nights are deleted, not what serves."""
    night(law=1)
    served = (tmp_path / "placement.json").read_bytes()
    recordings = tmp_path / "recordings"
    nothing = night(KEEP=prune)
    (recordings / "load-2-2x16.npz").write_bytes(b"PK torn")
    torn = night(KEEP=prune)
    other = night(law=1, OPTIONS="", KEEP=prune)
    wrong = night(law=2, OPTIONS="--devices 4 --for nothing", KEEP=prune)
    (tmp_path / "placement.json").write_text("{")
    broken = night(law=2, KEEP=prune)
    assert (tmp_path / "placement.json").read_text() == "{"
    steps = ["collect", "convert", "settings", "solve", "drift"]
    for step, run in zip(steps, [nothing, torn, other, wrong, broken], strict=True):
        assert run.returncode != 0
        assert (run.stdout, run.stderr.count("\n")) == ("", 1)
        assert f"failed at {step} " in run.stderr
        assert run.stderr.endswith("placement.json stays as it is\n")
    if prune == 14:
        (tmp_path / "placement.json").write_bytes(served)
        assert night(law=1).returncode == 0


def test_the_gate_keeps_what_serves(night, tmp_path):
    """A gain that is not sure, or below the wish, replaces nothing."""
    night(law=1)
    served = (tmp_path / "placement.json").read_bytes()
    refused = night(law=2, GAIN=90)
    assert (refused.returncode, refused.stdout.split()[:2]) == (0, ["nightly:", "kept"])
    assert "does not surely gain 90 %" in refused.stdout
    assert (tmp_path / "placement.json").read_bytes() == served


def test_a_second_run_waits_for_nobody(night, tmp_path):
    """A run that finds the lock taken ends at once."""
    night(law=1)
    held = subprocess.Popen(["flock", str(tmp_path / "lock"), "sh", "-c", "echo; read x"], **PIPES)
    assert held.stdout.readline() == "\n"
    refused = night(law=2)
    held.communicate("\n")
    assert refused.returncode == 1
    assert "another run holds" in refused.stderr


def test_a_file_that_cannot_be_replaced_stays(night, tmp_path):
    """As where the disk is full: here a folder has the name of the copy."""
    night(law=1)
    served = (tmp_path / "placement.json").read_bytes()
    (tmp_path / "placement.json.new" / "placement.json").mkdir(parents=True)
    failed = night(law=2)
    assert failed.returncode != 0
    assert "failed at replace " in failed.stderr
    assert (tmp_path / "placement.json").read_bytes() == served


def test_traffic_is_compared_with_that_of_the_placement_alone(night, tmp_path):
    """Without the loads that it was computed from a night fails; no others are taken for them."""
    night(law=1)
    for path in tmp_path.glob("nights/*.safetensors"):
        path.unlink()
    assert "failed at drift " in night(law=2).stderr


def test_old_nights_go_but_that_of_a_placement(night, tmp_path):
    """Its loads are what the next night compares with."""
    night(law=1)
    kept = {path.name for path in tmp_path.glob("nights/*")}
    for number in range(2):
        old = tmp_path / "nights" / f"20200101-00000{number}-abcd"
        old.mkdir()
        old.with_suffix(".safetensors").touch()
    night(KEEP=0)
    assert {path.name for path in tmp_path.glob("nights/*")} == kept


def read_variables():
    """Return the variables of the systemd service."""
    lines = (FOLDER / "nightly.env").read_text().splitlines()
    pairs = [line.split("=", 1) for line in lines if line and not line.startswith("#")]
    return {name: value.strip('"') for name, value in pairs}


def test_the_options_of_the_service_solve(tmp_path):
    """Its variables are those of a real command, on loads of the model that they name."""
    variables = read_variables()
    mean = np.random.default_rng(1).lognormal(5, 1, (2, 128))
    load = np.random.default_rng(2).poisson(mean, (24, 2, 128))
    np.savez(tmp_path / "loads.npz", load=load)
    command = [sys.executable, "-m", "moetuner", "solve", tmp_path / "loads.npz"]
    moves = ["--initial", "contiguous", "--move-budget", variables["MOVE_BUDGET"]]
    options = [*variables["OPTIONS"].split(), *moves, "--effort", "brief"]
    subprocess.run([*command, *options, "--out", tmp_path / "placement.json"], check=True)
    assert mt.Placement.load(tmp_path / "placement.json").slots.shape == (2, 8, 18)


def test_systemd_takes_the_units(tmp_path):
    """Without any remark; the timer is that of the service."""
    systemd = shutil.which("systemd-analyze")
    if systemd is None:
        pytest.skip("needs systemd-analyze")
    service, timer = (FOLDER / f"moetuner-nightly.{kind}" for kind in ("service", "timer"))
    installed = "ExecStart=/usr/local/lib/moetuner/nightly.sh\n"
    assert installed in service.read_text()
    text = service.read_text().replace(installed, f"ExecStart={FOLDER / 'nightly.sh'}\n")
    (tmp_path / service.name).write_text(text)
    shutil.copy(timer, tmp_path)
    done = subprocess.run(
        [systemd, "verify", tmp_path / service.name, tmp_path / timer.name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_cronjob_has_only_known_keys():
    """And the image of the Dockerfile, its user, the script, and the variables of the service."""
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    job = yaml.safe_load((FOLDER / "cronjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]

    def find(path):
        root, *names = path.split(".")
        places = {"container": [container], "volume": pod["volumes"]}.get(root)
        if places is None:
            places, names = [job], [name for name in (root, *names) if name]
        for name in names:
            inner = [place[name] for place in places]
            places = [part for each in inner for part in (each if type(each) is list else [each])]
        return places

    for path, keys in KEYS.items():
        for place in find(path):
            assert set(place) <= set(keys.split()), path
    dockerfile = (FOLDER.parents[1] / "Dockerfile").read_text()
    assert f"--tag {container['image']} ." in dockerfile
    assert f"USER {pod['securityContext']['runAsUser']}\n" in dockerfile
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert container["command"] == ["bash", f"{mounts['script']}/nightly.sh"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables.pop("STATE_DIRECTORY") == mounts["state"]
    assert variables == {
        name: value for name, value in read_variables().items() if name != "MOETUNER"
    }
