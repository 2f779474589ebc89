"""What one optimizer step did to the parameters, read off the step itself."""

from entropy_pl.updates.displace import displaced, parameters_set_to
from entropy_pl.updates.record import UpdateRecorder, record_update
from entropy_pl.updates.vector import UpdateVector

__all__ = ["UpdateRecorder", "UpdateVector", "displaced", "parameters_set_to", "record_update"]
