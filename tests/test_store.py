"""The store: keys, atomic entries, damage, full disks, kills, and two processes at once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import wait_until
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from invertune.__main__ import explain, main
from invertune.files import locked
from invertune.store import (
    StoreError,
    artifact_key,
    canonical,
    damage,
    default_root,
    entries,
    obtain,
    verify,
)

finite = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | finite,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


def made(root: Path, seed: int = 0, value: float = 1.5, **more):
    """Obtains a small artifact; returns it and the list of computations that really ran."""
    calls: list[Path] = []

    def compute(work: Path):
        calls.append(work)
        tensors = {"model": {"w": torch.full((3, 2), value), "n": torch.tensor(7)}}
        return tensors, {"ca": value, "rows": [1, 2]}

    own = (root, "attack", 1, {"lr": value}, ["a" * 64], "data", compute, seed)
    return obtain(*own, **more), calls


@given(st.dictionaries(st.text(), plain), st.randoms())
def test_keys_ignore_the_order_of_settings(settings, random):
    items = list(settings.items())
    random.shuffle(items)
    assert artifact_key("s", 1, settings, [], "d") == artifact_key("s", 1, dict(items), [], "d")


@given(plain)
def test_canonical_json_reads_back_as_the_same_value(value):
    assert json.loads(canonical(value)) == value
    assert canonical(json.loads(canonical(value))) == canonical(value)


def test_every_part_of_the_identity_is_in_the_key():
    base = ("s", 1, {"lr": 0.1, "seed": 0}, ["u", "v"], "d")
    others = [
        ("t", *base[1:]),
        ("s", 2, *base[2:]),
        ("s", 1, {"lr": 0.2, "seed": 0}, *base[3:]),
        (*base[:3], ["v", "u"], "d"),
        (*base[:4], "e"),
        (*base[:2], {"lr": 0.1}, *base[3:]),
    ]
    assert len({artifact_key(*b) for b in [base, *others]}) == 7


def test_tuples_and_negative_zero_have_one_spelling():
    assert canonical({"a": (1, 2), "z": -0.0}) == canonical({"z": 0.0, "a": [1, 2]})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1: 2}, {"a": Path("x")}, [object()]])
def test_what_json_cannot_carry_is_refused(bad):
    with pytest.raises(StoreError, match="settings"):
        canonical(bad)


def test_second_time_is_found_bit_identical_without_a_word(tmp_path, capsys):
    first, calls = made(tmp_path)
    assert len(calls) == 1 and first.computed and "stored" in capsys.readouterr().out
    second, calls = made(tmp_path, label="BadNet")
    assert calls == [] and not second.computed and capsys.readouterr().out == ""
    assert second.key == first.key and second.metrics == {"ca": 1.5, "rows": [1, 2]}
    tensors = second.tensors("model")
    assert torch.equal(tensors["w"], torch.full((3, 2), 1.5)) and tensors["n"].item() == 7


def test_an_optimized_tensor_is_stored_without_its_gradient(tmp_path):
    tensor = torch.rand(3, 4, requires_grad=True)

    def compute(_: Path):
        return {"trigger": {"patch": tensor}}, {}

    entry = obtain(tmp_path, "attack", 1, {}, [], "data", compute, 0)
    stored = entry.tensors("trigger")["patch"]
    assert torch.equal(stored, tensor) and not stored.requires_grad


def test_seeds_have_keys_of_their_own(tmp_path):
    keys = {made(tmp_path, seed)[0].key for seed in (0, 1, 2)}
    assert keys == {a.key for a in entries(tmp_path)} and len(keys) == 3


def test_meta_says_where_the_entry_comes_from(tmp_path):
    meta = made(tmp_path, seed=4)[0].meta
    assert (meta["step"], meta["version"], meta["seed"], meta["device"]) == ("attack", 1, 4, "cpu")
    assert meta["settings"] == {"lr": 1.5, "seed": 4} and meta["upstream"] == ["a" * 64]
    assert set(meta["files"]) == {"model.safetensors", "metrics.json"}
    assert {"python", "torch", "open_clip_torch"} <= set(meta["versions"])
    assert meta["peak_mb"] > 10 and meta["seconds"] >= 0 and meta["created"].endswith("+00:00")


def test_scratch_survives_a_failure_and_goes_after_success(tmp_path):
    def compute(work: Path):
        if not (work / "checkpoint").exists():
            (work / "checkpoint").write_text("half")
            raise ValueError("stopped")
        return {}, {"from": (work / "checkpoint").read_text()}

    arguments = (tmp_path, "s", 1, {}, [], "d", compute, 0)
    with pytest.raises(ValueError, match="stopped"):
        obtain(*arguments)
    artifact = obtain(*arguments)
    assert artifact.metrics == {"from": "half"}
    assert not any((tmp_path / ".work").iterdir())


def change(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """A damage: ``edit`` of the content of one file of an entry."""
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def edited(content: bytes, **changes: object) -> bytes:
    return json.dumps({**json.loads(content), **changes}).encode()


WEIGHTS = "model.safetensors"
FILES = {WEIGHTS: "", "metrics.json": ""}
DAMAGES = {
    "truncated": change(WEIGHTS, lambda content: content[:-5]),
    "bit": change(WEIGHTS, lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "missing": remove(WEIGHTS),
    "no metrics": remove("metrics.json"),
    "no meta": remove("meta.json"),
    "bad JSON": change("meta.json", lambda _: b"{"),
    "not a dictionary": change("meta.json", lambda _: b"[]"),
    "other settings": change("meta.json", lambda c: c.replace(b'"lr": 1.5', b'"lr": 1.6')),
    "not listed": change("meta.json", lambda c: edited(c, files={})),
    "files in a list": change("meta.json", lambda c: edited(c, files=[[1, 2]])),
    "a long name": change("meta.json", lambda c: edited(c, files={"f" * 5000: "", **FILES})),
    "no seconds": change("meta.json", lambda c: c.replace(b'"seconds"', b'"minutes"')),
    "seconds in words": change("meta.json", lambda c: edited(c, seconds="few")),
    "deep": change("meta.json", lambda _: b"[" * 10**5),
    "deep settings": change("meta.json", lambda c: c.replace(b"1.5", b"[" * 980 + b"]" * 980)),
    "changed number": change("metrics.json", lambda _: b'{"ca": 99}'),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_entry_counts_as_absent_and_is_said_so(tmp_path, capsys, kind):
    artifact, _ = made(tmp_path)
    DAMAGES[kind](artifact.folder)
    assert list(verify(tmp_path)) == [artifact.key]
    capsys.readouterr()
    again, calls = made(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert len(calls) == 1 and again.metrics["ca"] == 1.5
    assert len(said) == 2 and "damaged" in said[0] and artifact.key[:8] in said[0]
    assert verify(tmp_path) == {} and damage(again.folder) is None
    assert (tmp_path / ".damaged" / artifact.key).is_dir()


def test_tensors_that_are_none_are_one_line(tmp_path):
    artifact, _ = made(tmp_path)
    (artifact.folder / WEIGHTS).write_bytes(b"<html>")
    digest = hashlib.sha256(b"<html>").hexdigest()
    files = artifact.meta["files"] | {WEIGHTS: digest}
    change("meta.json", lambda c: edited(c, files=files))(artifact.folder)
    with pytest.raises(StoreError, match=rf"{WEIGHTS} cannot be read"):
        made(tmp_path)[0].tensors("model")


@pytest.mark.parametrize("kind", [".locks", ".work"])
def test_the_store_writes_through_no_link(tmp_path, kind):
    key, target = made(tmp_path / "first")[0].key, tmp_path / "target"
    target.mkdir() if kind == ".work" else target.write_text("mine")
    (tmp_path / "store" / kind).mkdir(parents=True)
    (tmp_path / "store" / kind / key).symlink_to(target)
    with pytest.raises(StoreError, match=rf"{kind}/{key}"):
        made(tmp_path / "store")
    assert not any(target.iterdir()) if kind == ".work" else target.read_text() == "mine"


def test_a_lock_is_no_link(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / ".results.csv.lock").symlink_to("target")
    with pytest.raises(OSError, match="is a link, which a lock"), locked(tmp_path / "results.csv"):
        pass
    assert (tmp_path / "target").read_text() == "mine"


def test_a_listing_shows_what_a_terminal_would_obey(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INVERTUNE_STORE", str(tmp_path))
    artifact, _ = made(tmp_path)
    change("meta.json", lambda c: edited(c, created="\x1b[2J"))(artifact.folder)
    assert main(["store", "list"]) == 0
    change("meta.json", lambda c: edited(c, files=FILES | {"\x1b[2J": ""}))(artifact.folder)
    change("meta.json", lambda c: edited(c, files={"\x1b]0;": "", **FILES}))(artifact.folder)
    assert main(["store", "verify"]) == 1
    made(tmp_path)
    said = capsys.readouterr().out
    assert "\x1b" not in said and said.count("\\x1b") == 3
    assert explain(StoreError("no \x1b[2J\nand\udcff")) == r"no \x1b[2J and\udcff"
    assert explain(FileNotFoundError(2, "not found", "\x1b")) == r"not found: \x1b"


def test_metrics_that_are_no_json_leave_nothing_behind(tmp_path):
    with pytest.raises(StoreError, match=r"metrics\.loss is nan"):
        obtain(tmp_path, "s", 1, {}, [], "d", lambda _: ({}, {"loss": float("nan")}), 0)
    assert entries(tmp_path) == [] and not any((tmp_path / ".partial").iterdir())


def test_unknown_tensors_are_named(tmp_path):
    with pytest.raises(StoreError, match="no tensors 'patch'; it has: model"):
        made(tmp_path)[0].tensors("patch")


def test_default_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("INVERTUNE_STORE", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("INVERTUNE_STORE")
    assert default_root().parts[-2:] == ("results", "store")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_during_the_step_is_one_line(tmp_path):
    def compute(work: Path):
        (work / "checkpoint").write_text("kept")
        Path("/dev/full").write_bytes(b"0")

    with pytest.raises(StoreError, match=r"disk is full: .* MB free") as caught:
        obtain(tmp_path, "s", 1, {}, [], "d", compute, 0)
    assert "\n" not in str(caught.value)
    assert [p.read_text() for p in tmp_path.glob(".work/*/checkpoint")] == ["kept"]


def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path):
    def compute(work: Path):  # what safetensors says of a full disk
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with pytest.raises(StoreError, match=r"^s: the disk is full: .* MB free") as caught:
        obtain(tmp_path, "s", 1, {}, [], "d", compute, 0)
    assert "\n" not in str(caught.value)


@pytest.fixture
def small_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_an_entry_that_does_not_fit_leaves_the_store_as_it_was(small_disk):
    kept, _ = made(small_disk)
    big = {"model": {"w": torch.zeros(1_000_000)}}
    with pytest.raises(StoreError, match=r"disk is full: .* MB free, 4\.0 MB needed"):
        obtain(small_disk, "big", 1, {}, [], "d", lambda _: (big, {}), 0)
    assert [a.key for a in entries(small_disk)] == [kept.key] and verify(small_disk) == {}
    assert not any((small_disk / ".partial").iterdir())


STEP = """
import os, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from invertune.store import obtain

root, hold = Path(sys.argv[1]), int(sys.argv[2])

def compute(work):
    checkpoint, x, first = work / "checkpoint.safetensors", torch.ones(4), 0
    if checkpoint.exists():
        saved = load_file(checkpoint)
        x, first = saved["x"], int(saved["step"])
    for step in range(first, 40):
        (work / "steps").open("a").write(f"{step}\\n")
        while step >= hold and not (root / "go").exists():
            time.sleep(0.01)
        x = x + torch.randn(4, generator=torch.Generator().manual_seed(step)) / 3
        if step % 5 == 4:
            save_file({"x": x, "step": torch.tensor(step + 1)}, work / "next")
            os.replace(work / "next", checkpoint)
    done = [int(line) for line in (work / "steps").read_text().split()]
    print("steps", *done, flush=True)
    return {"model": {"x": x}}, {"loss": x.sum().item()}

artifact = obtain(root, "sum", 1, {}, [], "d", compute, 0)
print("loss", repr(artifact.metrics["loss"]), flush=True)
"""


def start(root: Path, hold: int = 100) -> subprocess.Popen[str]:
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", STEP, str(root), str(hold)]
    return subprocess.Popen(command, text=True, env=os.environ | own, stdout=subprocess.PIPE)


def wait_for_step(root: Path, step: int) -> None:
    files = ".work/*/steps"
    wait_until(
        lambda: any(str(step) in p.read_text().split() for p in root.glob(files)), f"step {step}"
    )


def test_killed_at_several_points_it_resumes_and_ends_with_the_same_numbers(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    straight = start(whole).communicate()[0]
    for step in (3, 9, 31):
        process = start(broken, hold=step)
        wait_for_step(broken, step)
        process.kill()
        process.wait()
        assert entries(broken) == []
    out = start(broken).communicate()[0]
    assert out.splitlines()[-1] == straight.splitlines()[-1]  # the loss, to the last bit
    [one], [two] = entries(whole), entries(broken)
    assert (one.folder / WEIGHTS).read_bytes() == (two.folder / WEIGHTS).read_bytes()
    done = [int(s) for line in out.splitlines() if line[:5] == "steps" for s in line.split()[1:]]
    assert len(done) < 60  # 40 and at most five again after each kill


def test_two_processes_at_once_compute_it_once(tmp_path):
    first = start(tmp_path, hold=1)
    wait_for_step(tmp_path, 1)
    second = start(tmp_path)
    assert second.stdout and second.stdout.readline() == (
        f"sum: process {first.pid} is computing it; waiting\n"
    )
    (tmp_path / "go").touch()
    outputs = [first.communicate()[0], second.communicate()[0]]
    assert "stored" not in outputs[1] and "steps" not in outputs[1]
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]
    assert len(entries(tmp_path)) == 1


def test_a_waiting_process_takes_over_from_a_killed_one(tmp_path):
    first = start(tmp_path, hold=7)
    wait_for_step(tmp_path, 7)
    second = start(tmp_path)
    assert second.stdout and "waiting" in second.stdout.readline()
    first.kill()
    first.wait()
    out = second.communicate()[0]
    assert "steps 0" in out and "loss" in out
    assert len(entries(tmp_path)) == 1 and verify(tmp_path) == {}
