from fakegrid import clients, engine, identity  # noqa: F401  # fixtures
