"""The shipped configurations, read as accelerate reads them, and the command that they are for."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from rank_workers import UNITS, checked_arguments, launch_environment

CONFIGS = files("sentence_vipyloqwen.train") / "accelerate"
KINDS = {
    "single_gpu.yaml": DistributedType.NO,
    "fsdp2_4x_h100.yaml": DistributedType.FSDP,
    "fsdp2_multi_node.yaml": DistributedType.FSDP,
    "deepspeed_zero3.yaml": DistributedType.DEEPSPEED,
}
SHARDED = [name for name, kind in KINDS.items() if kind == DistributedType.FSDP]


def test_each_shipped_file_is_known_here() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == set(KINDS)


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_accelerate_reads_them(name: str, kind: DistributedType) -> None:
    config = load_config_from_file(str(CONFIGS / name))  # it refuses keys that it does not know
    assert config.distributed_type == kind
    assert config.mixed_precision == "bf16"
    assert config.num_processes % config.num_machines == 0
    assert launch_environment(name)["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize("name", SHARDED)
def test_full_sharding_reaches_the_processes(name: str) -> None:
    environment = launch_environment(name)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert environment["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",") == [unit.__name__ for unit in UNITS]
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    for key in load_config_from_file(str(CONFIGS / name)).fsdp_config:
        assert hasattr(checked_arguments(name), key), f"accelerate launch knows no --{key}"


def test_several_machines_agree_on_their_processes() -> None:
    arguments = checked_arguments("fsdp2_multi_node.yaml", "--machine_rank", "1", "--main_process_ip", "10.0.0.9")
    launch_environment("fsdp2_multi_node.yaml", arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.9:29500")


def test_deepspeed_gathers_the_weights_on_saving() -> None:
    arguments = checked_arguments("deepspeed_zero3.yaml")
    assert arguments.use_deepspeed
    assert (arguments.zero_stage, arguments.zero3_save_16bit_model, arguments.zero3_init_flag) == (3, True, False)


def test_the_module_that_accelerate_starts_is_the_command_line() -> None:
    command = [sys.executable, "-m", "sentence_vipyloqwen", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "--recipe" in done.stdout


def test_the_docs_name_every_file_and_know_where_they_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in KINDS)
    find = re.search(r'python -c "(.*)"\)', page)
    assert find
    done = subprocess.run([sys.executable, "-c", find[1]], capture_output=True, text=True, timeout=60, check=True)
    assert Path(done.stdout.strip()) == Path(str(CONFIGS))
