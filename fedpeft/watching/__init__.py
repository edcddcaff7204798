"""What a run's journal says of it while it grows: followed line by line, and summed up."""

from fedpeft.watching.follow import Follower
from fedpeft.watching.status import Status, status_of

__all__ = ["Follower", "Status", "status_of"]
