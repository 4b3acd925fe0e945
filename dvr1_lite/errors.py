"""Errors that a user can mend: each message names the thing and then the remedy."""


class UserError(Exception):
    """Base class; the command line prints it as one line and exits with status 2."""


class ClipError(UserError):
    """A clip that cannot be read. During training it is skipped and counted."""


class RecordError(UserError):
    """A record of a data set with a missing or wrong field; names file, line and field."""


class ConfigError(UserError):
    """An unknown config key or an impossible value."""


class ModelError(UserError):
    """A model folder, adapter or optional package that cannot be loaded."""


class NumericsError(UserError):
    """A non-finite log-prob, reward or gradient; names the record."""
