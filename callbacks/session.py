"""The former place of :mod:`entropy_pl.monitor.run_probe`, under which it is still imported."""

import sys

from entropy_pl.monitor import run_probe

sys.modules[__name__] = run_probe
