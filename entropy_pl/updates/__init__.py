"""What one optimizer step did to the parameters, read off the step itself, or would do, from a saved state."""

from entropy_pl.updates.clipping import clip_gradients
from entropy_pl.updates.displace import displaced, parameters_set_to
from entropy_pl.updates.optimizer_state import MatchedState, match_optimizer_state
from entropy_pl.updates.rebuild import rebuild_update
from entropy_pl.updates.record import UpdateRecorder, record_update
from entropy_pl.updates.steps import inner_optimizer, was_skipped, watch_steps
from entropy_pl.updates.vector import UpdateVector

__all__ = [
    "MatchedState",
    "UpdateRecorder",
    "UpdateVector",
    "clip_gradients",
    "displaced",
    "inner_optimizer",
    "match_optimizer_state",
    "parameters_set_to",
    "rebuild_update",
    "record_update",
    "was_skipped",
    "watch_steps",
]
