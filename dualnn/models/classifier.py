"""What the models share: cross-entropy steps, light logging, a configurable optimizer."""

from collections.abc import Iterable

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim
from torch.nn import functional as F

from dualnn.engine.errors import DualInputError


class Classifier(LightningModule):
    """A network trained by cross-entropy; logs loss and acc under `train/`, `val/`, `test/`.

    The step is ordinary torch code: it runs unchanged when parameters or activities are DualTensors.

    Args:
        net: maps (B, ...) to logits (B, C).
        optimizer: takes the parameters, returns the optimizer. The default is a lambda, out of which the command
            line makes SGD with options (`--model.optimizer.lr 0.3`); give a named function to pickle a model.

    Shape:
        x: (B, ...) -> logits: (B, C); labels y: (B,) int64.

    Example:
        >>> import torch
        >>> model = Classifier(nn.Linear(4, 3))
        >>> tuple(model(torch.zeros(2, 4)).shape)
        (2, 3)
    """

    def __init__(self, net: nn.Module, optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.1)) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a training batch."""
        del batch_idx
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a validation batch."""
        del batch_idx
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a test batch."""
        del batch_idx
        self._step(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits of a batch."""
        del batch_idx
        return self(batch[0])

    def configure_optimizers(self) -> optim.Optimizer:
        """Build the optimizer over all parameters."""
        return self.optimizer(self.parameters())

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        accuracy = (logits.argmax(dim=1) == y).float().mean()
        self.log_dict({f"{stage}/loss": loss, f"{stage}/acc": accuracy}, batch_size=len(y))
        return loss


def sizes(name: str, values: Iterable[int]) -> list[int]:
    """Return layer sizes as a list, or raise `DualInputError` where one is below 1."""
    values = list(values)
    if any(value < 1 for value in values):
        raise DualInputError(f"{name} must be positive, got {values}")
    return values
