"""What can go wrong in the lab, one class per decision a caller can take. Pure.

| class          | the caller should                                            |
|----------------|--------------------------------------------------------------|
| `LabRefused`   | ask for something else: a name is wrong, a thing is missing   |
| `LabTimedOut`  | look at the log that the message names; the lab did not come up |
"""


class LabError(Exception):
    """Base of everything the lab raises on purpose."""


class LabRefused(LabError):  # noqa: N818 - reads as a sentence where it is raised
    """The request makes no sense as things stand; nothing was changed."""


class LabTimedOut(LabError):  # noqa: N818
    """Something that was started did not do its part before its deadline."""
