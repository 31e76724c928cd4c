"""Where DeepSpeed is not installed: what needs it says so, and everything else works."""

import subprocess
import sys
from pathlib import Path

from moe_groups.checkpoints.convert.convert import regroup_checkpoint
from moe_groups.checkpoints.files import list_saved
from moe_groups.checkpoints.manifest import FILE_NAME, Manifest, write_manifest
from tests.pure.checkpoints.convert.test_regroup import MANY, ONE
from tests.pure.test_import import run
from tests.pure.test_public_names import NAMES
from tests.support.checkpoints.made_checkpoints import (
    make_checkpoint,
    random_state,
    same,
    shard_contents,
)

BLOCKED = "import sys\nsys.modules['deepspeed'] = None\n"

IMPORTED = """
from importlib import import_module
for package, names in {packages!r}.items():
    for name in names.split():
        try:
            getattr(import_module(package), name)
        except import_module("moe_groups").MoEGroupsError as error:
            assert "pip install 'moe-groups[deepspeed]'" in str(error), error
            print(package, name, type(error).__name__)
"""


def test_all_public_names_but_the_layer_can_be_imported() -> None:
    assert run(BLOCKED + IMPORTED.format(packages=NAMES)) == "moe_groups MoE MissingPackageError"


MODEL = """
import torch
import moe_groups
from moe_groups import losses

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Module())
model[1].experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
moe_groups.tag_experts(model, "1.experts", ep_size=2)
"""

WITH_AN_ENGINE = [
    "moe_groups.GroupMetrics(model)",
    "moe_groups.GroupSchedule(model, [])",
    "moe_groups.LossTracker(model)",
    "moe_groups.balance_experts(model)",
    "moe_groups.compact_gradients(model)",
    "moe_groups.gather_model(model)",
    "moe_groups.lean_step(model)",
    "moe_groups.load_experts(groups, 'there')",
    "moe_groups.protect_checkpoints(model)",
    "moe_groups.save_experts(groups, 'there', family='mixtral')",
    "moe_groups.set_group_options(model, '*', lr=0.1)",
    "moe_groups.verify(model)",
    "losses.gradient_scale(model)",
    "moe_groups.StepConfig.from_deepspeed({'bf16': {'enabled': True}})",
]

REFUSED = """
groups = moe_groups.create_moe_param_groups(model)
for call in {calls!r}:
    try:
        eval(call)
    except moe_groups.MoEGroupsError as error:
        assert "pip install 'moe-groups[deepspeed]'" in str(error), error
    else:
        raise AssertionError(call)
"""

USED = """
from moe_groups.cli import main

ranks = {"data_parallel_size": 4}
plan = moe_groups.plan_param_groups(model, split_by="expert", weight_decay=0.1, **ranks)
groups = plan.groups_of(model)
print(moe_groups.describe(groups, **ranks), moe_groups.estimate_step_memory(groups, **ranks))
halves = moe_groups.split_for_muon(model, muon={"lr": 0.1}, adam={"lr": 0.1})
assert {group["use_muon"] for group in halves} == {True, False}
mine = {"params": list(model.parameters()), "name": "all"}
assert len(moe_groups.split_params_into_different_moe_groups_for_optimizer(mine)) == 2
assert moe_groups.get_expert_tag(model[1].experts[3].weight).expert_number == 3
x = torch.randn(4, 8, requires_grad=True)
loss = moe_groups.router_z_loss(model[0](x))
moe_groups.attach_loss(model[0](x), loss, scale=1.0).sum().backward()
optimizer = torch.optim.AdamW(groups)
with moe_groups.measure_step_memory("cpu") as measured:
    optimizer.step()
assert measured.step_peak > 0
assert moe_groups.Topology(world_size=8, ep_size=4)
main(["topology", "--world-size", "8", "--ep", "4"])
"""


def test_what_needs_an_engine_says_what_to_install_and_groups_plans_and_losses_work() -> None:
    """In one process, because each imports torch."""
    run(BLOCKED + MODEL + REFUSED.format(calls=WITH_AN_ENGINE) + USED)


CONVERTED = (
    BLOCKED
    + """
import moe_groups

if __name__ == "__main__":  # the conversion's workers run the lines above, too
    source, destination, target = sys.argv[1:]
    for trust in (False, True):
        assert not moe_groups.inspect_checkpoint(source, trust=trust).problems
    moe_groups.regroup_checkpoint(source, destination, target, workers=2)
"""
)


def test_checkpoints_are_inspected_and_converted(tmp_path: Path) -> None:
    source, target, ours, without = (tmp_path / name for name in ("a", "b", "ours", "without"))
    for place, layout in ((source, ONE), (target, MANY)):
        make_checkpoint(place, layout, random_state(layout))
        manifest = Manifest(layout, "ZeRO-2", {"step": 7}, list_saved(place / "global_step7"))
        write_manifest(manifest, place / "global_step7" / FILE_NAME)
    script = tmp_path / "convert.py"
    script.write_text(CONVERTED)
    subprocess.run([sys.executable, script, source, without, target], check=True, timeout=120)
    regroup_checkpoint(source, ours, target)
    assert same(shard_contents(without), shard_contents(ours))
