import os

# Four devices, for the tests of sharding. JAX reads this at its first use, which is after all imports.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
