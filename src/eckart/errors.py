"""The exceptions that eckart raises on purpose; all derive from EckartError."""


class EckartError(Exception):
    """Base of every error that eckart raises on purpose."""


class ConfigError(EckartError, ValueError):
    """A recipe, an option or an argument is not legal."""


class RankError(EckartError, ValueError):
    """A rank or a budget cannot be had."""


class NotPositiveDefinite(EckartError, ValueError):
    """A metric that has to be inverted has no inverse."""


class NotFinite(EckartError, ValueError):
    """A weight, a statistic or a logit is NaN or infinite."""


class ModelError(EckartError, ValueError):
    """A model cannot be read or treated."""


class StoreError(EckartError, ValueError):
    """A folder cannot be written, or what it declares and what it holds disagree."""
