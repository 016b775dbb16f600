"""The same run across processes and machines: Flower carries the messages, and decides nothing.

Only the modules of this package and of `deploy` import it.
"""

import os

# Read by Flower and Ray when they are imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # a future default of Ray, which warns as long as this is not set
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on Linux too: Ray then listens on loopback only; it has no passwords
