"""Lightning's strategies, as far as it matters here: does every device hold the whole policy?"""

from __future__ import annotations

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)


def holds_whole_policy(strategy: Strategy) -> bool:
    """Whether it is one device, or DDP; a strategy that is not known counts as one that shards."""
    whole = isinstance(strategy, DDPStrategy | SingleDeviceStrategy)
    other = isinstance(strategy, DeepSpeedStrategy | XLAStrategy | SingleDeviceXLAStrategy)  # inherit from these
    return whole and not other
