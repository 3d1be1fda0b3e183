"""Every accelerate config that ships: read by accelerate's own loader, and started with two real processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

ROOT = Path(__file__).parents[2]
CONFIGS = {
    path.stem: path for path in [ROOT / "accelerate_config.yaml", *sorted(ROOT.glob("launch/accelerate/*.yaml"))]
}
ZERO_STAGES = {"accelerate_config": 2, "zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "cpu_zero2": 2}
ZERO_STAGES["cpu_zero3"] = 3
PROBE = """
import torch
from train import distributed
from train.engine.build import build_engine
from train.engine.start import start
accelerator = start()
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
engine = build_engine(accelerator, model, optimizer, blank=dict, micro_batch=4, clip_grad=1.0)
print(f"rank {distributed.rank()} of {distributed.world_size()}: {type(engine.wrapped).__name__} "
      f"zero {getattr(engine, 'stage', 0)} {engine.precision}", flush=True)
"""


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(CONFIGS[name]))
    stage = ZERO_STAGES.get(name, 0)
    assert config.distributed_type == (DistributedType.DEEPSPEED if stage else DistributedType.MULTI_GPU)
    assert config.deepspeed_config.get("zero_stage", 0) == stage
    assert config.use_cpu == name.startswith("cpu")
    assert config.mixed_precision == ("no" if name.startswith("cpu") else "bf16")
    assert config.num_processes == -1, "a number here would be wrong on most machines: accelerate asks for it"
    assert CONFIGS[name].read_text().startswith("# "), "says what it is for"
    knobs_of_the_run = {"gradient_accumulation_steps", "gradient_clipping"}
    assert not knobs_of_the_run & set(config.deepspeed_config), "the run's YAML owns these"


def test_the_default_is_zero2():
    assert CONFIGS["zero2"].read_text() == CONFIGS["accelerate_config"].read_text()


# Without a GPU the GPU configs run on gloo too, so every engine is seen everywhere. zero2 is accelerate_config, and cpu
# is what other tests launch with.
SLOW = {"zero1", "zero2_offload", "zero3", "cpu", "cpu_zero2", "cpu_zero3"}
STARTED = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CONFIGS if name != "zero2"]


@pytest.mark.parametrize("name", STARTED)
def test_it_starts(name, tmp_path):
    on_gpu = torch.cuda.is_available() and not name.startswith("cpu")
    processes = torch.cuda.device_count() if on_gpu else 2
    (tmp_path / "probe.py").write_text(PROBE)
    command = [sys.executable, "-m", "launch.start", "--config_file", str(CONFIGS[name])]
    command += ["--num_processes", str(processes), "--main_process_port", "0", str(tmp_path / "probe.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    stage = ZERO_STAGES.get(name, 0)
    engine = "DeepSpeedEngine" if stage else "DistributedDataParallel"
    precision = "no" if name.startswith("cpu") else "bf16"
    assert on_gpu or "real_accelerator" not in done.stdout, "the launcher itself has nothing to say on stdout"
    said = sorted(re.findall(r"rank \d+ of \d+: \w+ zero \d (?:no|bf16)", done.stdout))
    assert said == [f"rank {i} of {processes}: {engine} zero {stage} {precision}" for i in range(processes)]
