"""What the lab raises on purpose. Must not: know how the lab is built."""

from vipd.proxy.errors import VipdError


class LabError(VipdError):
    """The lab could not do what was asked; the message names the host or namespace and the cure."""


class LabUnavailable(LabError):
    """This machine or user cannot have a lab at all; the message names what is missing."""
