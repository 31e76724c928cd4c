"""Train an MoE model with Lightning: groups by expert, and their learning rates in the logger.

torchrun --nproc-per-node 2 docs/examples/lightning_moe.py
"""

import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from moe_groups import MoE, create_moe_param_groups, verify
from moe_groups.integrations.lightning import GroupLearningRateMonitor


class Model(pl.LightningModule):
    """An MoE layer that learns to return 1."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.inp = nn.Linear(8, hidden)
        self.moe = MoE(hidden, nn.Linear(hidden, hidden), num_experts=4, ep_size=2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        out, aux_loss, _ = self.moe(self.inp(batch))
        loss: Tensor = (out.float() - 1).square().mean() + 0.01 * aux_loss
        return loss

    def configure_optimizers(self) -> Any:
        overrides = [("moe.expert.0", {"lr": 1e-3})]
        groups = create_moe_param_groups(self, split_by="expert", overrides=overrides)
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        halve = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": halve, "interval": "step"}]

    def on_train_start(self) -> None:
        verify(self.trainer.strategy.model)


class AnyDevice(DeepSpeedStrategy):
    """Runs on a CPU too, as DeepSpeed does; Lightning's strategy refuses it."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()


cpus = None if torch.cuda.is_available() else [torch.device("cpu", i) for i in range(2)]
logger, monitor = CSVLogger(tempfile.mkdtemp()), GroupLearningRateMonitor()
trainer = pl.Trainer(
    devices=2, max_epochs=1, precision="bf16-true", log_every_n_steps=1, callbacks=[monitor],
    strategy=AnyDevice(stage=2, parallel_devices=cpus), logger=logger, enable_checkpointing=False,
)  # fmt: skip
data: Any = torch.randn(24, 8)
trainer.fit(Model(), torch.utils.data.DataLoader(data, batch_size=4))
if trainer.is_global_zero:
    print(Path(logger.experiment.metrics_file_path).read_text())
