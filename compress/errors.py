"""The two ways in which a run fails that are no bug."""


class UserError(Exception):
    """A user's mistake, told in one sentence: what was found, what was expected, what to type."""


class PostconditionError(Exception):
    """A stage did not do what it says, so its result is worth nothing."""
