"""The same run across processes and machines: Flower carries the messages, and decides nothing.

Of the library only the modules below here import it.
"""

import os

# Read by Flower and Ray when they are imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # what Ray will do by itself; it warns as long as this is not set
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on Linux too: it listens on loopback only, for it knows no passwords
