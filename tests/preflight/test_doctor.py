"""The doctor reports what does not work on a machine, and how to fix it."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llavar_peft import cli
from llavar_peft.preflight.doctor_devices import check_devices
from llavar_peft.preflight.doctor_machine import check_machine
from llavar_peft.preflight.doctor_packages import check_packages, check_requirement


def test_this_machine_has_no_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--output-dir", str(tmp_path / "runs"), "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert not [one for one in found.values() if one["state"] == "fault"]
    assert found["torch"]["what"] == metadata.version("torch")
    assert "nf4" in found["4 bits"]["what"]
    assert str(tmp_path / "runs") in found["output folder"]["what"]
    assert not (tmp_path / "runs").exists()
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["doctor", "--output-dir", str(tmp_path)]) == 0
    assert "ok    torch: " in capsys.readouterr().out


def test_a_missing_or_old_package_is_reported_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    old = check_requirement(Requirement("torch>=99"))
    assert (old.state, old.fix) == ("fault", "pip install 'torch>=99'")
    assert "expected >=99" in old.what
    gone = check_requirement(Requirement("no-such-package>=1"))
    assert (gone.state, gone.what) == ("fault", "is not installed (expected >=1)")
    monkeypatch.setattr(metadata, "requires", lambda _: ["no-such-package>=1; extra == 'serve'", "torch>=2"])
    states = {one.name: one.state for one in check_packages()}
    assert states["torch"] == "ok"
    assert states["[serve]"] == "note"  # a missing extra is not a fault


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "file"
    there.write_text("")
    faults = [one for one in check_machine(there / "runs") if one.state == "fault"]
    assert [one.name for one in faults] == ["output folder"]
    assert cli.main(["doctor", "--output-dir", str(there / "runs")]) == 3
    assert "FAULT output folder: " in capsys.readouterr().out


def test_broken_4_bit_kernels_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    (found,) = [one for one in check_devices() if one.name == "4 bits"]
    assert found.state == "fault"
    assert "no kernel image is available" in found.what


def test_torch_without_cuda_on_a_machine_with_a_driver_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that works")
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert next(iter(check_devices())).state == "fault"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = next(iter(check_devices()))
    assert found.state == "fault"
    assert "driver" in found.fix
