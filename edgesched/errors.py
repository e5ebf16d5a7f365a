"""The exceptions that edgesched raises on purpose; all derive from :class:`EdgeschedError`."""


class EdgeschedError(Exception):
    """Base class: a message meant for the user, naming the field, the value and what is allowed."""


def reason(error: BaseException) -> str:
    """What an exception says, in one line; one that is not ours begins with its kind."""
    told = str(error).strip().splitlines()
    kind = "" if isinstance(error, EdgeschedError) else f"{type(error).__name__}: "
    return (kind + (told[0] if told else "no reason given"))[:240]


class ScenarioError(EdgeschedError, ValueError):
    """A :class:`~edgesched.types.Scenario` is malformed."""


class PlanError(EdgeschedError, ValueError):
    """A :class:`~edgesched.types.Plan` is malformed or does not fit its scenario."""


class ScoreTableError(EdgeschedError, ValueError):
    """A score table breaks its contract; the message names row, column and reason."""


class PromptError(EdgeschedError, ValueError):
    """A prompt source is missing, empty or malformed."""


class SearchError(EdgeschedError, ValueError):
    """A search method cannot solve this problem; another method may."""


class ArgumentError(EdgeschedError, ValueError):
    """An argument is out of its range, or of the wrong kind: the call is wrong, whatever the problem."""


class ConfigError(EdgeschedError, ValueError):
    """A configuration cannot be composed or instantiated."""


class ModelError(EdgeschedError, RuntimeError):
    """A diffusion model or a scorer cannot be loaded or run."""


class StepsRefused(ModelError):  # noqa: N818, for it tells what happened
    """A pipeline refuses a step count, or makes no image of it; other step counts may do.

    Args:
        model: The model, as messages call it.
        steps: The step count.
        why: The pipeline's reason.
    """

    def __init__(self, model: str, steps: int, why: str) -> None:
        super().__init__(f"{model} at {steps} steps: {why}")
        self.model, self.steps, self.why = model, steps, why

    def __reduce__(self) -> tuple[type, tuple[str, int, str]]:
        return type(self), (self.model, self.steps, self.why)


class CampaignError(EdgeschedError, RuntimeError):
    """A campaign cannot go on; what is done is kept."""


class RequestError(EdgeschedError, ValueError):
    """A stream of requests cannot be made, or does not fit a plan."""


class OutputError(EdgeschedError, RuntimeError):
    """A result cannot be written."""
