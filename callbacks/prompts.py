"""The former place of :mod:`entropy_pl.monitor.prompts`, under which it is still imported."""

import sys

from entropy_pl.monitor import prompts

sys.modules[__name__] = prompts
