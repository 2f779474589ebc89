"""The probe in runs of several processes: Lightning's DDP and ``accelerate launch``."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import run_processes
from scripts.lightning_run import take_part
from tiny import build_model, build_tokenizer
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoModelForCausalLM

from entropy_pl import EntropyProbe, Rollout, UpdateVector, sample_completions
from entropy_pl.monitor.discovery import find_policy, refuse_sharded
from entropy_pl.monitor.step_monitor import NOT_COMPARED
from entropy_pl.policy.rng import derived_seed, isolated_rng
from entropy_pl.probe.memory import LESS_MEMORY
from entropy_pl.reporting import read_records

SCRIPTS = Path(__file__).parent / "scripts"
DEADLINE = 150  # seconds; a run takes ten to twenty, a deadlock takes forever
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += [
    "--main_process_port",
    "FREE_PORT",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    str(SCRIPTS / "trl_run.py"),
]


def in_lightning(folder: Path, processes: int, **options: Any) -> list[dict[str, Any]]:
    """Train by DDP in so many processes; what each has left behind."""
    folder.mkdir(exist_ok=True)
    return run_processes(take_part, processes, folder, folder, options | {"processes": processes})


def under_accelerate(folder: Path, options: dict[str, Any]) -> tuple[Any, ...]:
    """What each of two processes has left behind, of a run without the probe and of one with it."""
    command = [*ACCELERATE, str(folder), json.dumps(options)]
    returned, said = launch(command)
    if returned is None and not list(folder.glob("begun*")):  # the launcher's own meeting hung, before any of the run
        returned, said = launch(command)
    whole = all((folder / f"rank{rank}.pt").is_file() for rank in range(2))
    assert returned == 0 or (returned is None and whole), said  # a launcher may hang behind a run that is over
    return tuple(zip(*(torch.load(folder / f"rank{rank}.pt") for rank in range(2)), strict=True))


def launch(command: list[str]) -> tuple[int | None, str]:
    """Its exit status, None past the deadline, and what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [word.replace("FREE_PORT", port) for word in command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": port}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            returned: int | None = process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            returned = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return returned, output.read()[-8000:]


def found(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in NOT_COMPARED} for record in records]


OPTIONS = {"num_sequences": 12, "every_n_steps": 1, "max_new_tokens": 6, "eta_multipliers": [], "precision": "float64"}


def test_ddp_shares_the_batch_and_every_rank_has_the_result(tmp_path):
    plain = in_lightning(tmp_path / "plain", 2, probe=None)
    probed = in_lightning(tmp_path / "probed", 2, probe=OPTIONS)
    first, second = (rank["records"] for rank in probed)
    assert [(r["step"], r["status"], r["processes"]) for r in first] == [(0, "ok", 2), (1, "ok", 2)]
    assert found(first) == found(second)
    written = read_records(tmp_path / "probed/entropy_probe/records.jsonl")
    assert [r["step"] for r in written] == [0, 1]  # once, by the first process
    for without, with_probe in zip(plain, probed, strict=True):
        assert torch.equal(without["random"], with_probe["random"])
        for before, after in zip(without["weights"], with_probe["weights"], strict=True):
            assert all(torch.equal(before[name], after[name]) for name in before)

    # The oracle: one process, the very rollouts that the ranks drew, the step read off the saved weights. 1e-10 is a
    # thousand times float64's rounding of a sum over some hundred tokens.
    model, tokenizer = build_model().double(), build_tokenizer()
    weights = probed[0]["weights"]
    model.load_state_dict(weights[0], strict=False)
    prompts = random.Random("0").sample([f"{a}+{b}=" for a in range(4) for b in range(4)], 12)
    shares = []
    for share, purpose in ((prompts[:6], "completions of step 0"), (prompts[6:], "completions of step 0, process 1")):
        with isolated_rng(derived_seed(0, purpose)):
            shares.append(sample_completions(model, tokenizer, share, max_new_tokens=6))
    direction = {name: (weights[1][name] - weights[0][name]) / 1e-3 for name in weights[0]}
    probe = EntropyProbe(eta_multipliers=(), precision="float64")
    expected = probe.measure(model, Rollout.concatenate(shares), UpdateVector(direction, 1e-3)).to_dict()
    [point], [theirs] = expected["sweep"], first[0]["sweep"]
    for name in ("true", "first_order"):
        for field in ("value", "stderr", "ci_low", "ess", "n_tokens"):
            assert theirs[name][field] == pytest.approx(point[name][field], rel=1e-10), (name, field)
    assert first[0]["entropy"]["value"] == pytest.approx(expected["entropy"]["value"], rel=1e-10)


def test_a_rank_that_fails_fails_that_probe_everywhere(tmp_path):
    """Rank 1 has no memory at step 0: both ranks record it, training goes on, and step 1 is measured."""
    first, second = in_lightning(tmp_path, 2, probe=OPTIONS, fails=[1, 0])
    assert first["steps"] == second["steps"] == 2
    assert [r["status"] for r in first["records"]] == [r["status"] for r in second["records"]] == ["failed", "ok"]
    said = f"OutOfMemoryError: no room for this rank's keys and values: {LESS_MEMORY}"
    assert second["records"][0]["message"] == said
    assert first["records"][0]["message"] == f"PeerError: process 1 failed: {said}"  # what to do included
    assert found(first["records"][1:]) == found(second["records"][1:])


def test_a_rank_without_a_prompt_takes_part(tmp_path):
    """Two prompts, three processes."""
    ranks = in_lightning(tmp_path, 3, probe=OPTIONS | {"num_sequences": 2}, steps=1)
    records = [found(rank["records"]) for rank in ranks]
    assert [r["status"] for r in records[0]] == ["ok"]
    assert records[0][0]["entropy"]["n_sequences"] == 2
    assert records[0] == records[1] == records[2]


def test_ranks_that_train_apart_are_told_so(tmp_path):
    """No measurement is made of processes whose steps are not the same."""
    first, second = in_lightning(tmp_path, 2, probe=OPTIONS, apart=True, steps=1)
    for rank in (first, second):
        [record] = rank["records"]
        assert record["status"] == "failed"
        assert "expected all 2 processes to take the same step, got (norm, projection) [" in record["message"]


def test_no_room_for_one_ranks_snapshot(tmp_path):
    first, second = in_lightning(tmp_path, 2, probe=OPTIONS, fails=["keep", 1])
    assert [r["status"] for r in first["records"]] == [r["status"] for r in second["records"]] == ["failed", "ok"]
    assert second["records"][0]["message"].startswith("OutOfMemoryError: no room for this rank's snapshot")


def test_a_rank_that_cannot_begin_ends_the_run_everywhere(tmp_path):
    """At once and with the reason, not in a deadlock at the first gradient."""
    with pytest.raises(AssertionError, match="expected the E prompts to be the same in all 2 processes"):
        in_lightning(tmp_path, 2, probe=OPTIONS, fails=["start", 1])


def test_grpo_under_accelerate_launch(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed (extra 'trl')")
    options = OPTIONS | {"precision": "float32"}
    plain, probed = under_accelerate(tmp_path, options)
    first, second = (found(rank["records"]) for rank in probed)
    assert [(r["step"], r["status"], r["processes"]) for r in first] == [(0, "ok", 2), (1, "ok", 2)]
    assert first == second
    assert first[0]["entropy"]["n_sequences"] == 12
    for record in first:  # the U-batch of both, and the rewards of both shares of E
        assert record["absent"] == {}
        found_of = record["attribution"]
        # float32 and central differences: 5 % at Adam's first step, where P is largest for the least gradients
        assert abs(found_of["remainder"]["gradient"]) < 0.1 * abs(found_of["tokens"]["value"])
    assert len(read_records(tmp_path / "probed/entropy_probe/records.jsonl")) == 2
    for without, with_probe in zip(plain, probed, strict=True):
        assert without["logged"] == with_probe["logged"]
        assert torch.equal(without["random"], with_probe["random"])
        assert all(torch.equal(without["weights"][name], with_probe["weights"][name]) for name in without["weights"])


def test_the_same_config_on_two_processes(tmp_path):
    """``entropy-pl fit`` with nothing but the strategy changed: GRPO on all prompts, the E-batch shared out."""
    policy = tmp_path / "policy"
    build_model(max_position_embeddings=256).save_pretrained(policy)
    build_tokenizer().save_pretrained(policy)
    with isolated_rng(0):  # an adapter that says something, so that there is a KL divergence to descend
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(policy), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    words = {
        "config": str(SCRIPTS.parents[2] / "configs/quickstart.yaml"),
        "model.policy.name": str(policy),
        "model.policy.adapter": str(tmp_path / "adapter"),
        "model.max_new_tokens": "8",
        "model.rewards": '["format"]',
        "model.reward_weights": "[1]",
        "model.kl_coefficient": "0.1",  # the policy, a random one, earns nothing
        "data.e_size": "16",
        "data.batch_size": "4",
        "probe.num_sequences": "12",
        "probe.every_n_steps": "1",
        "trainer.max_steps": "2",
        "trainer.strategy": "ddp",
        "trainer.devices": "2",
        "trainer.logger.init_args.save_dir": str(tmp_path / "runs"),
    }
    command = [sys.executable, "-m", "entropy_pl.cli", "fit", *(w for k, v in words.items() for w in (f"--{k}", v))]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    [path] = (tmp_path / "runs").rglob("records.jsonl")
    records = read_records(path)
    assert [(r["step"], r["status"], r["processes"]) for r in records] == [(0, "ok", 2), (1, "ok", 2)]
    assert records[0]["e_prompts"]["in_u"] == 0
    assert done.stdout.count("Entropy change per optimizer step") == 1  # one table, whatever the number of processes
    assert "12 completions of up to 8 tokens shared by 2 processes" in done.stdout


def shard(rank: int) -> list[str]:
    policy = FullyShardedDataParallel(build_model(), use_orig_params=True, device_id=torch.device("cpu"))
    said = []
    for module in (policy, find_policy(policy, None)):  # as wrapped, and what is within
        try:
            refuse_sharded(module, None)
        except ValueError as error:
            said.append(str(error))
    return said


def test_fsdp_itself_is_refused(tmp_path):
    """Its parameters look like any others, of another shape."""
    for outer, inner in run_processes(shard, 2, tmp_path):
        assert outer.startswith("expected every process to hold the whole policy, got FullyShardedDataParallel around")
        assert inner.startswith("expected every process to hold the whole policy, got model.embed_tokens.weight as a")
