"""The errors of training: a combination that cannot work, a run that broke, an experiment that is written wrongly."""

from dualnn.engine.errors import DualnnError


class TrainingSetupError(DualnnError, ValueError):
    """The trainer, the module and the signal cannot work together as they were put together."""


class NonFiniteLossError(DualnnError, ArithmeticError):
    """The loss became nan or infinite, so nothing after this step means anything.

    Attributes:
        step: Optimizer steps that had been finished when it happened.
        value: The loss.
    """

    def __init__(self, step: int, batch: int, value: float) -> None:
        super().__init__(step, batch, value)
        self.step = step
        self.batch = batch
        self.value = value

    def __str__(self) -> str:
        """The step, the batch, the value and what to try."""
        return (
            f"the loss is {self.value} at step {self.step} (batch {self.batch}): the weights were left as they were "
            "before it. Usual cures: a smaller learning rate, gradient clipping, more tangents"
        )


class UsageError(DualnnError):
    """A command line or a configuration says something that is not known, or leaves out what is needed."""


class ResumeError(DualnnError, ValueError):
    """A checkpoint was made with settings that this run contradicts, so it cannot continue that run."""


class RunError(DualnnError, RuntimeError):
    """A run of a comparison broke.

    Attributes:
        step: Optimizer steps that had been finished when it happened.
        cause: What happened.
    """

    def __init__(self, step: int, cause: Exception) -> None:
        super().__init__(step, cause)
        self.step = step
        self.cause = cause

    def __str__(self) -> str:
        """The step and the cause in a line."""
        if isinstance(self.cause, NonFiniteLossError):
            return f"at step {self.step}: loss {self.cause.value}"
        return f"at step {self.step}: {type(self.cause).__name__}: {self.cause}".splitlines()[0]


class ExperimentError(DualnnError, ValueError):
    """An experiment's file does not say what it has to say."""


class RunNameError(ExperimentError):
    """The name of an experiment or of an arm is not a plain folder name, so it could write outside `logs/`."""
